"""The contract of a token mixer: one call for training, one for streaming."""

import abc
import dataclasses
import math
from typing import Any, ClassVar, override

import jax
import jax.numpy as jnp
from flax import nnx

from lcattn.errors import argument_error
from lcattn.nn.layers import LayerConfig
from lcattn.ops import segment_positions
from lcattn.ops.checks import check_segment_ids
from lcattn.traits import Traits
from lcattn.typing import Array, Float, Hidden, Positions, SegmentIds, Tokens

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

    Attributes:
      op: the function of `lcattn.ops` that the mixer is built around.
      time: the order of a training step's time, per channel of a head: T tokens, w in the window,
        C in a chunk; F features, H channels; n agents, c clusters, g in a group, b in a block, m
        samples; P parameters of the memory, W taps.
    """

    op: ClassVar[str]
    time: ClassVar[str]

    @property
    @abc.abstractmethod
    def traits(self) -> Traits:
        """What this mixer, configured as it is, promises."""

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

    def attention_map(
        self,
        x: Hidden,
        segment_ids: SegmentIds | None = None,
        positions: Positions | None = None,
    ) -> Float[Array, "B N T T"] | None:
        """How much of each token's value is in each head's output; None where that has no meaning.

        Rows are readers. For probes: it costs T² where the mixer itself may not.
        """
        del x, segment_ids, positions
        return None

    def state_bytes(self, length: int, dtype: Any = None) -> int:
        """Bytes of state of one stream of `length` tokens, counted from the state itself."""
        arrays = jax.eval_shape(lambda: jax.tree.leaves(self.init_state(1, length, dtype)))
        return sum(math.prod(array.shape) * array.dtype.itemsize for array in arrays)


class TokenMixer(Mixer):
    """A mixer that also reads which tokens its inputs stand for, `[B, T]`; a model passes them.

    Both calls take them by name, and raise a `ValueError` where there are none.
    """

    @abc.abstractmethod
    @override
    def __call__(
        self,
        x: Hidden,
        segment_ids: SegmentIds | None = None,
        positions: Positions | None = None,
        *,
        tokens: Tokens | None = None,
    ) -> Hidden:
        """Mixes whole sequences, as in training."""

    @abc.abstractmethod
    @override
    def extend(
        self, x: Hidden, state: State, *, tokens: Tokens | None = None
    ) -> tuple[Hidden, State]:
        """Continues each stream by the `T` tokens of `x`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixerConfig(LayerConfig):
    """What builds a mixer."""

    @abc.abstractmethod
    def make(self, rngs: nnx.Rngs) -> Mixer:
        """Builds the mixer. `width` must be set by then."""


def check_hidden(x: Array, width: int) -> None:
    """Checks inputs `[B,T,D]` of a mixer of this width."""
    if x.ndim != 3 or x.shape[2] != width:
        raise argument_error("x", f"shape [B,T,D] with D={width}", f"shape {x.shape}")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise argument_error("x", "a floating-point dtype", x.dtype)


def check_stream(x: Array, cached: Array) -> None:
    """Checks new tokens `[B,T,D]` against an array of the state, whose first axis is B too."""
    if x.ndim != 3 or x.shape[1] == 0:
        raise argument_error("x", "3 axes [B,T,D] with T > 0", f"shape {x.shape}")
    if cached.shape[0] != x.shape[0]:
        raise argument_error("state", f"B={x.shape[0]} streams, as in x", f"B={cached.shape[0]}")


def default_positions(x: Hidden, segment_ids: SegmentIds | None) -> Positions:
    """Positions counted from 0 in each document."""
    if segment_ids is not None:
        check_segment_ids(segment_ids, (x.shape[0], x.shape[1]))
        return segment_positions(segment_ids)
    return stream_positions(x, 0)


def stream_positions(x: Hidden, length: Array | int) -> Positions:
    """Positions of new tokens, after `length` others."""
    return jnp.broadcast_to(length + jnp.arange(x.shape[1], dtype=jnp.int32), x.shape[:2])
