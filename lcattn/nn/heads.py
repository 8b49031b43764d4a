"""What mixers with heads share: the sizes, and projections to heads and back."""

import dataclasses
from typing import ClassVar, override

import jax.numpy as jnp
from flax import nnx

from lcattn.nn.layers import merge_heads, projection, split_heads
from lcattn.nn.mixer import Mixer, MixerConfig, check_hidden
from lcattn.typing import Array, Float, Hidden


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadsConfig(MixerConfig):
    """What configs of mixers with heads share.

    Attributes:
      num_heads: query heads N.
      num_kv_heads: key/value heads K, a divisor of N (grouped queries). None: N.
      head_dim: head size H. None: `width // num_heads`.
    """

    num_heads: int = 8
    num_kv_heads: int | None = None
    head_dim: int | None = None

    # N·H over the width, where head_dim is None.
    value_share: ClassVar[float] = 1.0

    @override
    def validate(self) -> None:
        super().validate()
        self.require_positive("num_heads", "num_kv_heads", "head_dim")
        if self.num_heads % self.kv_heads:
            raise self.error("num_kv_heads", f"a divisor of num_heads={self.num_heads}")
        if self.width is not None and self.head_dim is None:
            self._head_share(self.value_share, "head_dim")

    @property
    def kv_heads(self) -> int:
        """K."""
        return self.num_kv_heads or self.num_heads

    @property
    def head_size(self) -> int:
        """H."""
        return self.head_dim or self._head_share(self.value_share, "head_dim")

    @property
    def key_size(self) -> int:
        """Channels of a query or key head: H, or F where a feature map or a state sets it."""
        return self.head_size

    def _head_share(self, share: float, field: str) -> int:
        """The size of a head, if all heads together have a share of the model width."""
        total = int(share * self.require_width())
        if total % self.num_heads:
            of = "" if share == 1 else f"{share} * "
            raise self.error("num_heads", f"a divisor of {of}width={self.width}, or a {field}")
        return total // self.num_heads


class HeadsMixer[C: HeadsConfig](Mixer):
    """Projections `Wq`, `Wk`, `Wv` to heads and `Wo` back, without biases."""

    config: C

    def __init__(self, config: C, rngs: nnx.Rngs):
        """Args: `config`, with its width set; `rngs`, for the parameters."""
        self.config = config
        width, F, H = config.require_width(), config.key_size, config.head_size
        N, K = config.num_heads, config.kv_heads
        self.query = projection(config, width, N * F, axes=("embed", "heads"), rngs=rngs)
        self.key = projection(config, width, K * F, axes=("embed", "heads"), rngs=rngs)
        self.value = projection(config, width, K * H, axes=("embed", "heads"), rngs=rngs)
        self.out = projection(
            config, N * H, width, axes=("heads", "embed"), rngs=rngs, is_output=True
        )

    def split(
        self, q: Array, k: Array, v: Array
    ) -> tuple[Float[Array, "B T N F"], Float[Array, "B T K F"], Float[Array, "B T K H"]]:
        """Projected queries, keys and values as heads."""
        N, K = self.config.num_heads, self.config.kv_heads
        return split_heads(q, N), split_heads(k, K), split_heads(v, K)

    def project(
        self, x: Hidden
    ) -> tuple[Float[Array, "B T N F"], Float[Array, "B T K F"], Float[Array, "B T K H"]]:
        """Heads of queries, keys and values."""
        check_hidden(x, self.config.require_width())
        return self.split(self.query(x), self.key(x), self.value(x))

    def one_hot_values(self, x: Hidden) -> Float[Array, "B T K T"]:
        """Values that say where they stand: the op's output for them is its attention map.

        Exact for every op that is linear in its values and treats their channels alike, whichever
        implementation runs.
        """
        B, T, _ = x.shape
        places = jnp.eye(T, dtype=self.config.dtype or "float32")
        return jnp.broadcast_to(places[None, :, None], (B, T, self.config.kv_heads, T))

    def project_out(self, heads: Float[Array, "B T N H"]) -> Hidden:
        """Back to the width."""
        return self.out(merge_heads(heads))
