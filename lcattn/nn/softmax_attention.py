"""Softmax attention as a token mixer: full or sliding-window, with its key/value cache."""

import dataclasses
from typing import Any, ClassVar, override

import jax.numpy as jnp
from flax import nnx
from jax import lax

from lcattn import ops
from lcattn.nn.attention import AttentionConfig, CachedAttention, KeyValueCache
from lcattn.traits import Traits
from lcattn.typing import Array, Int


@dataclasses.dataclass(frozen=True, kw_only=True)
class SoftmaxAttentionConfig(AttentionConfig):
    """Exact attention over all past tokens, or over a sliding window.

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
    def _extend(self, q: Array, k: Array, v: Array, state: KeyValueCache):
        config = self.config
        if config.window is None:
            return super()._extend(q, k, v, state)
        end = state.length + q.shape[1]
        if q.shape[1] == 1 and config.position_encoding != "alibi":
            ring = [_write(*x, state.length) for x in ((state.k, k), (state.v, v))]
            # All that it holds is in sight, in whatever order.
            last = jnp.minimum(state.length, config.window - 1)
            out = self._attend(
                q, *(x.astype(q.dtype) for x in ring), window=None, query_position=last
            )
            return out, *ring
        past = [_in_order(x, state.length) for x in (state.k, state.v)]
        k, v = (
            jnp.concatenate([old, new.astype(old.dtype)], axis=1)
            for old, new in zip(past, (k, v), strict=True)
        )
        out = self._attend(
            q, k.astype(q.dtype), v.astype(q.dtype),
            query_position=state.length, key_position=state.length - config.window,
        )  # fmt: skip
        return out, *(jnp.roll(x[:, -config.window :], end, axis=1) for x in (k, v))

    @override
    def _attend(self, q: Array, k: Array, v: Array, **options: Any) -> Any:
        config = self.config
        use_alibi = config.position_encoding == "alibi"
        options = {"window": config.window} | options
        return ops.softmax_attention(
            q,
            k,
            v,
            alibi_slopes=ops.alibi_slopes(config.num_heads) if use_alibi else None,
            implementation=config.implementation,
            **options,
        )


def _write(ring: Array, new: Array, position: Int[Array, ""]) -> Array:
    """A ring with the token at a position in place of the one a window before it."""
    slot = position % ring.shape[1]
    return lax.dynamic_update_slice_in_dim(ring, new.astype(ring.dtype), slot, axis=1)


def _in_order(ring: Array, length: Int[Array, ""]) -> Array:
    """The slots of a ring from the oldest position on, which is negative in a young stream."""
    return jnp.roll(ring, -length, axis=1)
