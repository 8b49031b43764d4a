"""The contract of a token mixer: one call for training, one for streaming."""

import abc
import math
from typing import Any, ClassVar

import dataclasses
import jax
import jax.numpy as jnp
from flax import nnx

from lcattn.config import AnyConfig, Config
from lcattn.traits import Traits
from lcattn.typing import Hidden, Positions, SegmentIds

State = Any
"""A registered pytree dataclass; its arrays are all that a stream remembers."""


class Mixer(nnx.Module):
    """Mixes information along the sequence: `[B, T, D] -> [B, T, D]`.

    The law of streaming: however a sequence is cut into `extend` calls, the concatenated outputs
    equal one call of the mixer on the whole::

        y        = mixer(x, segment_ids=None, positions=None)
        state    = mixer.init_state(batch_size, max_length)
        y, state = mixer.extend(x, state)  # any number of new tokens: prefill and step alike

    Shapes are static, so `extend` can be jitted and used in `lax.scan`.

    `segment_ids` means: equal to running the documents apart. `positions` (default: counted from 0
    in each document) matter only to mixers with a position encoding.
    """

    traits: ClassVar[Traits]

    @abc.abstractmethod
    def __call__(
        self,
        x: Hidden,
        segment_ids: SegmentIds | None = None,
        positions: Positions | None = None,
    ) -> Hidden:
        """Mixes whole sequences, as in training."""

    @abc.abstractmethod
    def init_state(self, batch_size: int, max_length: int, dtype: Any = None) -> State:
        """The state before the first token.

        Args:
          batch_size: number of streams.
          max_length: the most tokens a stream will hold. Mechanisms of constant state ignore it.
          dtype: of cached activations (default: the mixer's compute dtype). Running sums stay
            float32 whatever is asked for.
        """

    @abc.abstractmethod
    def extend(self, x: Hidden, state: State) -> tuple[Hidden, State]:
        """Continues each stream by the `T` tokens of `x`."""

    def state_bytes(self, length: int, dtype: Any = None) -> int:
        """Bytes of state that one stream of `length` tokens holds, counted from the state itself."""
        state = jax.eval_shape(lambda: self.init_state(1, length, dtype))
        return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixerConfig(Config):
    """What every mixer's config holds. A model fills the fields left at None (`inherit`).

    Attributes:
      width: model width D.
      dtype: compute dtype of projections and ops, e.g. "bfloat16". None: "float32".
      param_dtype: dtype in which parameters are kept. None: "float32".
      init_std: standard deviation of the normal initialiser of input projections.
      output_init_std: the same for the output projection; a model sets it to
        `init_std / sqrt(2 * num_layers)`. None: `init_std`.
    """

    width: int | None = None
    dtype: str | None = None
    param_dtype: str | None = None
    init_std: float = 0.02
    output_init_std: float | None = None

    def validate(self) -> None:
        self.require_positive("width", "init_std", "output_init_std")
        for field in ("dtype", "param_dtype"):
            value = getattr(self, field)
            if value is not None and not _is_float_dtype(value):
                raise self.error(field, "the name of a floating-point dtype")

    def inherit(self: AnyConfig, **defaults: Any) -> AnyConfig:
        """A copy in which each field that is None takes the given default."""
        missing = {k: v for k, v in defaults.items() if getattr(self, k) is None}
        return self.replace(**missing)

    @abc.abstractmethod
    def make(self, rngs: nnx.Rngs) -> Mixer:
        """Builds the mixer. `width` must be set by then."""


def _is_float_dtype(name: str) -> bool:
    try:
        return jnp.issubdtype(jnp.dtype(name), jnp.floating)
    except TypeError:
        return False
