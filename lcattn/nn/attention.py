"""What mixers with queries, keys and values share: projections, positions, the key/value cache."""

import abc
import dataclasses
from typing import Any, ClassVar, Literal, no_type_check, override

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from lcattn import ops
from lcattn.nn.heads import HeadsConfig, HeadsMixer
from lcattn.nn.layers import rms_norm
from lcattn.nn.mixer import check_stream, default_positions, stream_positions
from lcattn.ops import checks
from lcattn.typing import Array, Float, Hidden, Int, Positions, SegmentIds


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionConfig(HeadsConfig):
    """Heads with a position encoding.

    Attributes:
      position_encoding: "rope" (rotary), "nope" (none) or, where the mechanism has scores to
        subtract from, "alibi" (a penalty on distance).
      rope_base: of the rotary frequencies.
      rope_size: leading channels that are rotated. None: all.
      qk_norm: RMSNorm of each query and key head before the rotation.
      implementation: passed to the op.
    """

    position_encodings: ClassVar[tuple[str, ...]] = ("rope", "nope")

    position_encoding: Literal["rope", "alibi", "nope"] = "rope"
    rope_base: float = 10_000.0
    rope_size: int | None = None
    qk_norm: bool = False
    implementation: str | None = None

    @override
    def validate(self) -> None:
        super().validate()
        self.require_positive("rope_base", "rope_size")
        if self.position_encoding not in self.position_encodings:
            raise self.error("position_encoding", f"one of {self.position_encodings}")


class AttentionMixer[C: AttentionConfig](HeadsMixer[C]):
    """`y = Wo · attend(rotate(Wq x), rotate(Wk x), Wv x)`, without biases."""

    @override
    def __init__(self, config: C, rngs: nnx.Rngs):
        super().__init__(config, rngs)
        if config.qk_norm:
            self.query_norm = rms_norm(config.head_size, dtype=config.dtype, rngs=rngs)
            self.key_norm = rms_norm(config.head_size, dtype=config.dtype, rngs=rngs)

    def __call__(
        self,
        x: Hidden,
        segment_ids: SegmentIds | None = None,
        positions: Positions | None = None,
    ) -> Hidden:
        """Mixes whole sequences."""
        q, k, v = self._all_heads(x, segment_ids, positions)
        return self.project_out(self._attend(q, k, v, segment_ids=segment_ids))

    @override
    def attention_map(
        self,
        x: Hidden,
        segment_ids: SegmentIds | None = None,
        positions: Positions | None = None,
    ) -> Float[Array, "B N T T"] | None:
        """The op's weights, of values as the op gets them."""
        q, k, _ = self._all_heads(x, segment_ids, positions)
        return self._attend(q, k, self.one_hot_values(x), segment_ids=segment_ids).swapaxes(1, 2)

    def _all_heads(self, x: Hidden, segment_ids: SegmentIds | None, positions: Positions | None):
        index = default_positions(x, segment_ids)
        return self._heads(x, index if positions is None else positions, index + 1)

    @abc.abstractmethod
    def _attend(self, q: Array, k: Array, v: Array, **options: Any) -> Any:
        """The op, with the options of the config."""

    def _heads(self, x: Hidden, positions: Positions, lengths: Int[Array, "B T"]):
        """Queries, keys and values; `lengths` count the tokens up to each one in its document."""
        del lengths
        q, k, v = self.project(x)
        q, k = self._encode(q, k, positions)
        return q, k, v

    def _encode(self, q: Array, k: Array, positions: Positions) -> tuple[Array, Array]:
        config = self.config
        if config.qk_norm:
            q, k = self.query_norm(q), self.key_norm(k)
        if config.position_encoding == "rope":
            q, k = (
                ops.rotary(h, positions, base=config.rope_base, size=config.rope_size)
                for h in (q, k)
            )
        return q, k


@no_type_check  # JAX also fills it with shapes and specs
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KeyValueCache:
    """Keys and values of the past.

    Attributes:
      k, v: `[B,S,K,H]`. Slot s holds position s; with a window, S slots hold the last S positions
        in a ring, position p in slot p mod S.
      length: number of tokens seen, a scalar int32.
    """

    k: Float[Array, "B S K H"]
    v: Float[Array, "B S K H"]
    length: Int[Array, ""]


class CachedAttention[C: AttentionConfig](AttentionMixer[C]):
    """Attention that keeps every key and value, and whose op takes a `query_position`."""

    def init_state(self, batch_size: int, max_length: int, dtype=None) -> KeyValueCache:
        """An empty cache of `max_length` slots."""
        config = self.config
        shape = (batch_size, max_length, config.kv_heads, config.head_size)
        empty = jnp.zeros(shape, dtype or config.dtype or "float32")
        return KeyValueCache(k=empty, v=empty, length=jnp.zeros((), jnp.int32))

    def extend(self, x: Hidden, state: KeyValueCache) -> tuple[Hidden, KeyValueCache]:
        """Continues each stream.

        Raises:
          ValueError: if the state holds another number of streams, or (outside `jit`) if the tokens
            do not fit into it. Under `jit`, which cannot raise, outputs past the end are NaN.
        """
        check_stream(x, state.k)
        positions = stream_positions(x, state.length)
        q, k, v = self._heads(x, positions, positions + 1)
        out, k, v = self._extend(q, k, v, state)
        return self.project_out(out), KeyValueCache(k, v, state.length + x.shape[1])

    def _extend(self, q: Array, k: Array, v: Array, state: KeyValueCache):
        slots, end = state.k.shape[1], state.length + q.shape[1]
        checks.check_room(q.shape[1], slots, state.length)
        k = lax.dynamic_update_slice_in_dim(state.k, k.astype(state.k.dtype), state.length, axis=1)
        v = lax.dynamic_update_slice_in_dim(state.v, v.astype(state.v.dtype), state.length, axis=1)
        out = self._attend(q, k.astype(q.dtype), v.astype(q.dtype), query_position=state.length)
        return jnp.where(end > slots, jnp.nan, out), k, v
