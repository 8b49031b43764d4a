"""Length-scaled softplus attention as a token mixer (LSSA, LSSAR)."""

import dataclasses
from typing import Any, override

from flax import nnx

from lcattn import ops
from lcattn.nn.attention import AttentionConfig, CachedAttention
from lcattn.traits import Traits
from lcattn.typing import Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class SoftplusAttentionConfig(AttentionConfig):
    """LSSA and LSSAR (arXiv 2501.13428): softplus scores that hold beyond the training length.

    Attributes:
      power: of the re-weighting; 15 extrapolates best, 3 is best at the training length. None: no
        re-weighting (LSSA).
      offset: threshold on the weight relative to the row's mean.
      exempt_rows: rows that see at most so many keys have no threshold.
    """

    power: float | None = 15.0
    offset: float = 1.0
    exempt_rows: int = 3

    @override
    def validate(self) -> None:
        super().validate()
        if self.power is not None and self.power < 1:
            raise self.error("power", "None or a number of at least 1")
        for field in ("offset", "exempt_rows"):
            if getattr(self, field) < 0:
                raise self.error(field, "a value of at least 0")

    def make(self, rngs: nnx.Rngs) -> "SoftplusAttention":
        """Builds the mixer."""
        return SoftplusAttention(self, rngs)


class SoftplusAttention(CachedAttention[SoftplusAttentionConfig]):
    """`y = Wo · softplus_attention(rotate(Wq x), rotate(Wk x), Wv x)`, without biases.

    The parameters are those of `SoftmaxAttention`, whose checkpoints it can take.
    """

    op = "softplus_attention"
    time = "T²"

    @property
    def traits(self) -> Traits:
        """The threshold of a row needs every key again: quadratic, with a key/value cache."""
        return Traits(causal=True, streaming=True, subquadratic=False)

    @override
    def _attend(self, q: Array, k: Array, v: Array, **options: Any) -> Any:
        config = self.config
        return ops.softplus_attention(
            q, k, v,
            power=config.power, offset=config.offset, exempt_rows=config.exempt_rows,
            implementation=config.implementation, **options,
        )  # fmt: skip
