"""Gated linear attention as a token mixer: GLA, its one-gate-a-head form, and retention."""

import dataclasses
from typing import Any, ClassVar, Literal, override

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lcattn import ops
from lcattn.nn.layers import projection, split_heads
from lcattn.nn.recurrent import RecurrentConfig, RecurrentMixer
from lcattn.typing import Array, Hidden, Positions


@dataclasses.dataclass(frozen=True, kw_only=True)
class GatedLinearAttentionConfig(RecurrentConfig):
    """Gated linear attention, GLA (arXiv 2312.06635): a state whose channels decay as tokens say.

    Attributes:
      decay: "channel": one gate a channel of a key head, from a projection of low rank (GLA);
        "head": one gate a head (with `kernel_size=4` and `feature_dim = head_dim` it is what the
        field calls simple GLA, the core of Mamba-2); "fixed": 1 - 2^(-5-h) for head h (retention).
      gate_rank: rank of the projection of "channel".
      gate_divisor: gates are sigmoid(z)^(1/gate_divisor): the larger, the longer the memory.
      position_encoding: "rope" rotates queries and keys, "nope" does not.
    """

    num_heads: int = 4
    decay: Literal["channel", "head", "fixed"] = "channel"
    gate_rank: int = 16
    gate_divisor: float = 16.0
    position_encoding: Literal["rope", "nope"] = "nope"

    key_share: ClassVar[float] = 0.5

    @override
    def validate(self) -> None:
        super().validate()
        self.require_positive("gate_rank", "gate_divisor")
        if self.position_encoding == "rope" and self.width is not None and self.key_size % 2:
            raise self.error("position_encoding", f"'nope', or an even F (F={self.key_size})")

    def make(self, rngs: nnx.Rngs) -> "GatedLinearAttention":
        """Builds the mixer."""
        return GatedLinearAttention(self, rngs)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RetentionConfig(GatedLinearAttentionConfig):
    """Retention (Sun et al. 2023, arXiv 2307.08621): fixed decays, rotary positions, wide values.

    Its fields are those of `GatedLinearAttentionConfig` with other defaults.
    """

    num_heads: int = 8
    decay: Literal["channel", "head", "fixed"] = "fixed"
    position_encoding: Literal["rope", "nope"] = "rope"

    key_share: ClassVar[float] = 1.0
    value_share: ClassVar[float] = 2.0


class GatedLinearAttention(RecurrentMixer[GatedLinearAttentionConfig]):
    """`y = Wo (norm(gated_linear_attention(Wq x, Wk x, Wv x, log_decay)) * silu(Wg x))`.

    With `log_decay = log sigmoid(z) / gate_divisor` in float32; z is a projection of x.
    """

    op = "gated_linear_attention"
    time = "T·(C + F)"

    @override
    def __init__(self, config: GatedLinearAttentionConfig, rngs: nnx.Rngs):
        super().__init__(config, rngs)
        width, K, rank = config.require_width(), config.kv_heads, config.gate_rank
        if config.decay == "channel":
            self.decay_down = projection(config, width, rank, axes=("embed", None), rngs=rngs)
            self.decay = projection(
                config, rank, K * config.key_size, axes=(None, "heads"), rngs=rngs,
                use_bias=True,
            )  # fmt: skip
        elif config.decay == "head":
            self.decay = projection(
                config, width, K, axes=("embed", None), rngs=rngs, use_bias=True
            )

    @override
    def recur(
        self, x: Hidden, q: Array, k: Array, v: Array, positions: Positions, **options: Any
    ) -> Any:
        if self.config.position_encoding == "rope":
            q, k = (ops.rotary(h, positions) for h in (q, k))
        return ops.gated_linear_attention(q, k, v, self._log_decay(x), **options)

    def _log_decay(self, x: Array) -> Array:
        config = self.config
        dtype = jnp.promote_types(config.dtype or "float32", jnp.float32)
        if config.decay == "fixed":
            gammas = -(2.0 ** -(5 + np.arange(config.kv_heads)))
            return jnp.broadcast_to(
                jnp.asarray(np.log1p(gammas), dtype), (*x.shape[:2], len(gammas))
            )
        logits = self.decay(self.decay_down(x) if config.decay == "channel" else x)
        log_decay = jax.nn.log_sigmoid(logits.astype(dtype)) / config.gate_divisor
        return split_heads(log_decay, config.kv_heads) if config.decay == "channel" else log_decay
