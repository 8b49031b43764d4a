"""Softmax attention with smeared keys: one layer that can form induction heads."""

import dataclasses
from typing import Any, no_type_check, override

import jax
import jax.numpy as jnp
from flax import nnx

from lcattn.nn.attention import KeyValueCache
from lcattn.nn.mixer import check_stream, stream_positions
from lcattn.nn.softmax_attention import SoftmaxAttention, SoftmaxAttentionConfig
from lcattn.typing import Array, Float, Hidden, Int, Positions


@dataclasses.dataclass(frozen=True, kw_only=True)
class SmearedAttentionConfig(SoftmaxAttentionConfig):
    """Smeared keys (arXiv 2209.11895): softmax whose keys mix in the key of the token before.

    Attributes:
      smear_init: initial alpha; 0 mixes half and half. The larger, the closer to plain attention.
    """

    smear_init: float = 0.0

    @override
    def make(self, rngs: nnx.Rngs) -> "SmearedAttention":
        return SmearedAttention(self, rngs)


@no_type_check  # JAX also fills it with shapes and specs
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SmearedState:
    """The cache of smeared keys, and the last key as it was before.

    Attributes:
      cache: keys and values of the past.
      key: `[B,1,K,H]`; zeros before the first token.
    """

    cache: KeyValueCache
    key: Float[Array, "B 1 K H"]


class SmearedAttention(SoftmaxAttention):
    """`softmax_attention(q, s k_t + (1 - s) k_{t-1}, v)` with `s = sigmoid(alpha)` a key head.

    An induction head looks for the token after an earlier copy of its own. With plain keys that
    takes two layers: one writes at each token what stood before it, the other reads that. A smeared
    key says by itself what stood before, so that one layer suffices: the control experiment of
    Olsson et al. (2022), "In-context Learning and Induction Heads", arXiv 2209.11895. Keys are
    smeared before they are rotated; the first token of a document smears with nothing.
    """

    op = "softmax_attention"

    def __init__(self, config: SmearedAttentionConfig, rngs: nnx.Rngs):
        """Args: `config`, with its width set; `rngs`, for the parameters."""
        super().__init__(config, rngs)
        self.alpha = nnx.Param(
            jnp.full((config.kv_heads,), config.smear_init, jnp.float32), axes=(None,)
        )

    @override
    def _heads(
        self,
        x: Hidden,
        positions: Positions,
        lengths: Int[Array, "B T"],
        before: Float[Array, "B 1 K H"] | None = None,
    ):
        q, k, v = self.project(x)
        before = jnp.zeros_like(k[:, :1]) if before is None else before.astype(k.dtype)
        previous = jnp.concatenate([before, k[:, :-1]], axis=1)
        previous = jnp.where(lengths[..., None, None] > 1, previous, 0)
        share = jax.nn.sigmoid(self.alpha[...])[:, None].astype(k.dtype)
        q, k = self._encode(q, share * k + (1 - share) * previous, positions)
        return q, k, v

    @override
    def init_state(self, batch_size: int, max_length: int, dtype=None) -> Any:
        """An empty cache, and no key before the first."""
        cache = super().init_state(batch_size, max_length, dtype)
        config = self.config
        shape = (batch_size, 1, config.kv_heads, config.head_size)
        return SmearedState(cache, jnp.zeros(shape, dtype or config.dtype or "float32"))

    @override
    def extend(self, x: Hidden, state: Any) -> tuple[Hidden, Any]:
        """Continues each stream; errors are those of `SoftmaxAttention`."""
        check_stream(x, state.key)
        positions = stream_positions(x, state.cache.length)
        q, k, v = self._heads(x, positions, positions + 1, state.key)
        out, keys, values = self._extend(q, k, v, state.cache)
        cache = KeyValueCache(keys, values, state.cache.length + x.shape[1])
        last = self.project(x[:, -1:])[1].astype(state.key.dtype)
        return self.project_out(out), SmearedState(cache, last)
