"""Softmax attention as a token mixer: full or sliding-window, with its key/value cache."""

import dataclasses
from typing import Any, Literal, no_type_check, override

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from lcattn import ops
from lcattn.errors import argument_error
from lcattn.nn.layers import merge_heads, projection, rms_norm, split_heads
from lcattn.nn.mixer import HeadsConfig, Mixer, check_stream, default_positions
from lcattn.traits import Traits
from lcattn.typing import Array, Float, Hidden, Int, Positions, SegmentIds


@no_type_check  # JAX also fills it with shapes and specs
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KeyValueCache:
    """Keys and values of the past.

    Attributes:
      k, v: `[B,S,K,H]`. Without a window, slot s holds position s; with one, the newest key is
        last and slots before the stream's start are unused.
      length: number of tokens seen, a scalar int32.
    """

    k: Float[Array, "B S K H"]
    v: Float[Array, "B S K H"]
    length: Int[Array, ""]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SoftmaxAttentionConfig(HeadsConfig):
    """Exact attention over all past tokens, or over a sliding window.

    Attributes:
      window: number of keys seen, the query's own included. None: all.
      position_encoding: "rope" (rotary), "alibi" (a penalty on distance) or "nope" (none).
      rope_base: of the rotary frequencies.
      rope_size: leading channels that are rotated. None: all.
      qk_norm: RMSNorm of each query and key head before the rotation.
      implementation: passed to `lcattn.ops.softmax_attention`.
    """

    window: int | None = None
    position_encoding: Literal["rope", "alibi", "nope"] = "rope"
    rope_base: float = 10_000.0
    rope_size: int | None = None
    qk_norm: bool = False
    implementation: str | None = None

    @override
    def validate(self) -> None:
        super().validate()
        self.require_positive("window", "rope_base", "rope_size")

    def make(self, rngs: nnx.Rngs) -> "SoftmaxAttention":
        """Builds the mixer."""
        return SoftmaxAttention(self, rngs)


class SoftmaxAttention(Mixer):
    """`y = Wo · softmax_attention(rotate(Wq x), rotate(Wk x), Wv x)`, without biases."""

    op = "softmax_attention"

    def __init__(self, config: SoftmaxAttentionConfig, rngs: nnx.Rngs):
        """Args: `config`, with its width set; `rngs`, for the parameters."""
        self.config = config
        width, H = config.require_width(), config.head_size
        N, K = config.num_heads, config.kv_heads
        self.query = projection(config, width, N * H, axes=("embed", "heads"), rngs=rngs)
        self.key = projection(config, width, K * H, axes=("embed", "heads"), rngs=rngs)
        self.value = projection(config, width, K * H, axes=("embed", "heads"), rngs=rngs)
        self.out = projection(
            config, N * H, width, axes=("heads", "embed"), rngs=rngs, is_output=True
        )
        if config.qk_norm:
            self.query_norm = rms_norm(H, dtype=config.dtype, rngs=rngs)
            self.key_norm = rms_norm(H, dtype=config.dtype, rngs=rngs)

    @property
    def traits(self) -> Traits:
        """Sub-quadratic with a window only."""
        return Traits(causal=True, streaming=True, subquadratic=self.config.window is not None)

    def __call__(
        self,
        x: Hidden,
        segment_ids: SegmentIds | None = None,
        positions: Positions | None = None,
    ) -> Hidden:
        """Mixes whole sequences."""
        if positions is None:
            positions = default_positions(x, segment_ids)
        q, k, v = self._heads(x, positions)
        return self.out(merge_heads(self._attend(q, k, v, segment_ids=segment_ids)))

    def init_state(self, batch_size: int, max_length: int, dtype=None) -> KeyValueCache:
        """An empty cache of `max_length` slots, or of `window - 1`."""
        config = self.config
        slots = max_length if config.window is None else config.window - 1
        shape = (batch_size, slots, config.kv_heads, config.head_size)
        empty = jnp.zeros(shape, dtype or config.dtype or "float32")
        return KeyValueCache(k=empty, v=empty, length=jnp.zeros((), jnp.int32))

    def extend(self, x: Hidden, state: KeyValueCache) -> tuple[Hidden, KeyValueCache]:
        """Continues each stream.

        Raises:
          ValueError: if the state holds another number of streams, or (outside `jit`) if the tokens
            do not fit into it. Under `jit`, which cannot raise, outputs past the end are NaN.
        """
        check_stream(x, state.k)
        positions = jnp.broadcast_to(
            state.length + jnp.arange(x.shape[1], dtype=jnp.int32), x.shape[:2]
        )
        q, k, v = self._heads(x, positions)
        if self.config.window is None:
            out, k, v = self._extend_full(q, k, v, state)
        else:
            out, k, v = self._extend_window(q, k, v, state)
        return self.out(merge_heads(out)), KeyValueCache(k, v, state.length + x.shape[1])

    def _extend_full(self, q, k, v, state):
        slots, end = state.k.shape[1], state.length + q.shape[1]
        if not isinstance(end, jax.core.Tracer) and int(end) > slots:
            raise argument_error("state", f"room for {int(end)} tokens", f"max_length={slots}")
        if q.shape[1] > slots:
            raise argument_error("x", f"at most max_length={slots} tokens", q.shape[1])
        k = lax.dynamic_update_slice_in_dim(state.k, k.astype(state.k.dtype), state.length, axis=1)
        v = lax.dynamic_update_slice_in_dim(state.v, v.astype(state.v.dtype), state.length, axis=1)
        out = self._attend(q, k.astype(q.dtype), v.astype(q.dtype), query_position=state.length)
        return jnp.where(end > slots, jnp.nan, out), k, v

    def _extend_window(self, q, k, v, state):
        slots = state.k.shape[1]
        k = jnp.concatenate([state.k, k.astype(state.k.dtype)], axis=1)
        v = jnp.concatenate([state.v, v.astype(state.v.dtype)], axis=1)
        out = self._attend(
            q, k.astype(q.dtype), v.astype(q.dtype),
            query_position=state.length, key_position=state.length - slots,
        )  # fmt: skip
        first = k.shape[1] - slots
        return out, k[:, first:], v[:, first:]

    def _heads(self, x: Array, positions: Array) -> tuple[Array, Array, Array]:
        config = self.config
        kv_heads = config.kv_heads
        q = split_heads(self.query(x), config.num_heads)
        k, v = (split_heads(layer(x), kv_heads) for layer in (self.key, self.value))
        if config.qk_norm:
            q, k = self.query_norm(q), self.key_norm(k)
        if config.position_encoding == "rope":
            q, k = (
                ops.rotary(h, positions, base=config.rope_base, size=config.rope_size)
                for h in (q, k)
            )
        return q, k, v

    def _attend(self, q: Array, k: Array, v: Array, **options: Any) -> Any:
        config = self.config
        use_alibi = config.position_encoding == "alibi"
        return ops.softmax_attention(
            q,
            k,
            v,
            window=config.window,
            alibi_slopes=ops.alibi_slopes(config.num_heads) if use_alibi else None,
            implementation=config.implementation,
            **options,
        )
