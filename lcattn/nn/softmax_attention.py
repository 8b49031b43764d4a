"""Softmax attention as a token mixer: full or sliding-window, with its key/value cache."""

import dataclasses
from typing import Any, ClassVar, override

import jax.numpy as jnp
from flax import nnx
from jax import lax

from lcattn import ops
from lcattn.nn.attention import AttentionConfig, CachedAttention, KeyValueCache
from lcattn.traits import Traits
from lcattn.typing import Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class SoftmaxAttentionConfig(AttentionConfig):
    """Softmax attention, exact: over all past tokens, or over a sliding window.

    Attributes:
      window: number of keys seen, the query's own included. None: all.
    """

    position_encodings: ClassVar[tuple[str, ...]] = ("rope", "alibi", "nope")

    window: int | None = None

    @override
    def validate(self) -> None:
        super().validate()
        self.require_positive("window")

    def make(self, rngs: nnx.Rngs) -> "SoftmaxAttention":
        """Builds the mixer."""
        return SoftmaxAttention(self, rngs)


class SoftmaxAttention(CachedAttention[SoftmaxAttentionConfig]):
    """`y = Wo · softmax_attention(rotate(Wq x), rotate(Wk x), Wv x)`, without biases."""

    op = "softmax_attention"
    time = "T·min(T, w)"

    @property
    def traits(self) -> Traits:
        """Sub-quadratic with a window only."""
        return Traits(causal=True, streaming=True, subquadratic=self.config.window is not None)

    @override
    def init_state(self, batch_size: int, max_length: int, dtype=None) -> KeyValueCache:
        """An empty cache of `max_length` slots, or of `window`."""
        return super().init_state(batch_size, self.config.window or max_length, dtype)

    @override
    def _extend(
        self, q: Array, k: Array, v: Array, state: KeyValueCache
    ) -> tuple[Array, Array, Array]:
        if self.config.window is None:
            return super()._extend(q, k, v, state)
        if q.shape[1] == 1 and self.config.position_encoding != "alibi":
            return self._extend_by_one(q, k, v, state, self.config.window)
        return self._extend_by_many(q, k, v, state, self.config.window)

    def _extend_by_one(self, q, k, v, state, window: int) -> tuple[Array, Array, Array]:
        slot = state.length % window
        k, v = (
            lax.dynamic_update_slice_in_dim(ring, new.astype(ring.dtype), slot, axis=1)
            for ring, new in ((state.k, k), (state.v, v))
        )
        # All that the ring holds is in sight, in whatever order.
        last = jnp.minimum(state.length, window - 1)
        out = self._attend(
            q, k.astype(q.dtype), v.astype(q.dtype), window=None, query_position=last
        )
        return out, k, v

    def _extend_by_many(self, q, k, v, state, window: int) -> tuple[Array, Array, Array]:
        # In order of time; in a young stream, the first ones are at negative positions.
        k, v = (
            jnp.concatenate([jnp.roll(ring, -state.length, axis=1), new.astype(ring.dtype)], axis=1)
            for ring, new in ((state.k, k), (state.v, v))
        )
        out = self._attend(
            q, k.astype(q.dtype), v.astype(q.dtype),
            query_position=state.length, key_position=state.length - window,
        )  # fmt: skip
        end = state.length + q.shape[1]
        k, v = (jnp.roll(x[:, -window:], end, axis=1) for x in (k, v))
        return out, k, v

    @override
    def _attend(self, q: Array, k: Array, v: Array, **options: Any) -> Any:
        config = self.config
        use_alibi = config.position_encoding == "alibi"
        options.setdefault("window", config.window)
        return ops.softmax_attention(
            q,
            k,
            v,
            alibi_slopes=ops.alibi_slopes(config.num_heads) if use_alibi else None,
            implementation=config.implementation,
            **options,
        )
