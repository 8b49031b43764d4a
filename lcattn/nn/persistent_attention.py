"""Windowed attention that also sees a few learned tokens, the same in every sequence."""

import dataclasses
from typing import Any, override

import jax
import jax.numpy as jnp
from flax import nnx

from lcattn import ops
from lcattn.nn.layers import split_heads
from lcattn.nn.softmax_attention import SoftmaxAttention, SoftmaxAttentionConfig
from lcattn.ops.merging import merge
from lcattn.typing import Array, Float, Hidden


@dataclasses.dataclass(frozen=True, kw_only=True)
class PersistentAttentionConfig(SoftmaxAttentionConfig):
    """The attention of Titans' hybrids (arXiv 2501.00663): recent tokens and learned ones.

    Attributes:
      window: number of recent keys seen, the query's own included. None: all.
      num_persistent: learned tokens that every query sees; at least one.
    """

    window: int | None = 512
    num_persistent: int = 16

    @override
    def validate(self) -> None:
        super().validate()
        self.require_positive("num_persistent")

    @override
    def make(self, rngs: nnx.Rngs) -> "PersistentAttention":
        return PersistentAttention(self, rngs)


class PersistentAttention(SoftmaxAttention):
    """`softmax_attention` over recent keys and over those of P learned tokens `[P,D]`, in one.

    Learned tokens are knowledge of the task that no input changes (Titans, arXiv 2501.00663,
    section 3.3), and a place for attention to rest. They stand before the first position,
    unrotated, and each document sees them. The paper puts them in front of the sequence; here only
    their keys and values are formed, since what they themselves attend to is thrown away.
    """

    def __init__(self, config: PersistentAttentionConfig, rngs: nnx.Rngs):
        super().__init__(config, rngs)
        dtype = jnp.dtype(config.param_dtype or "float32")
        shape = (config.num_persistent, config.require_width())
        self.persistent = nnx.Param(
            jax.random.normal(rngs.params(), shape, dtype), axes=(None, "embed")
        )

    @override
    def attention_map(self, x: Hidden, segment_ids: Any = None, positions: Any = None) -> None:
        """None: part of the weight lies on tokens that are not in the sequence."""

    @override
    def _attend(self, q: Array, k: Array, v: Array, **options: Any) -> Any:
        return self.attend_to(q, (k, v), **options)

    def attend_to(
        self, q: Float[Array, "B T N H"], *pairs: tuple[Array, Array], **options: Any
    ) -> Float[Array, "B T N H"]:
        """One softmax over the learned tokens and all pairs of keys and values `[B,S,K,H]`."""
        parts = [self._attend_to_persistent(q)]
        for k, v in pairs:
            parts.append(super()._attend(q, k, v, return_lse=True, **options))
        out = merge(*parts)[0].astype(q.dtype)
        ids = options.get("segment_ids")
        return out if ids is None else jnp.where((ids >= 0)[..., None, None], out, 0)

    def _attend_to_persistent(self, q: Float[Array, "B T N H"]) -> Any:
        """The part of the attention that goes to the learned tokens, and its log-sum-exp."""
        kv_heads = self.config.kv_heads
        tokens = self.persistent[...].astype(q.dtype)
        k, v = (split_heads(project(tokens), kv_heads) for project in (self.key, self.value))
        if self.config.qk_norm:
            k = self.key_norm(k)
        k, v = (jnp.broadcast_to(x, (q.shape[0], *x.shape)) for x in (k, v))
        return ops.softmax_attention(
            q, k, v, causal=False, return_lse=True, implementation=self.config.implementation
        )
