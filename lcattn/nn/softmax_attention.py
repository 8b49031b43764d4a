"""Softmax attention as a token mixer: full or sliding-window, with its key/value cache."""

import dataclasses
from typing import Any, ClassVar, override

import jax.numpy as jnp
from flax import nnx

from lcattn import ops
from lcattn.nn.attention import AttentionConfig, CachedAttention, KeyValueCache
from lcattn.traits import Traits
from lcattn.typing import Array


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
        """An empty cache of `max_length` slots, or of `window - 1`."""
        window = self.config.window
        return super().init_state(batch_size, max_length if window is None else window - 1, dtype)

    @override
    def _extend(self, q: Array, k: Array, v: Array, state: KeyValueCache):
        if self.config.window is None:
            return super()._extend(q, k, v, state)
        slots = state.k.shape[1]
        k = jnp.concatenate([state.k, k.astype(state.k.dtype)], axis=1)
        v = jnp.concatenate([state.v, v.astype(state.v.dtype)], axis=1)
        out = self._attend(
            q, k.astype(q.dtype), v.astype(q.dtype),
            query_position=state.length, key_position=state.length - slots,
        )  # fmt: skip
        first = k.shape[1] - slots
        return out, k[:, first:], v[:, first:]

    @override
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
