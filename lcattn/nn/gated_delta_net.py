"""The delta rule as a token mixer: DeltaNet and Gated DeltaNet."""

import dataclasses
import math
from typing import Any, ClassVar, override

import jax
import jax.numpy as jnp
from flax import nnx

from lcattn import ops
from lcattn.nn.layers import projection, unit_norm
from lcattn.nn.recurrent import RecurrentConfig, RecurrentMixer
from lcattn.typing import Array, Hidden, Positions


@dataclasses.dataclass(frozen=True, kw_only=True)
class GatedDeltaNetConfig(RecurrentConfig):
    """Gated DeltaNet (arXiv 2412.06464): a state that forgets, and corrects what it holds.

    Attributes:
      decay: let the state decay; off, it is the plain delta rule.
      allow_negative_eigenvalues: write strengths in (0, 2) instead of (0, 1), so that a write can
        turn what it finds into its opposite, which helps to track states.
    """

    num_heads: int = 6
    kernel_size: int | None = 4
    decay: bool = True
    allow_negative_eigenvalues: bool = False

    key_share: ClassVar[float] = 0.75
    value_share: ClassVar[float] = 1.5

    def make(self, rngs: nnx.Rngs) -> "GatedDeltaNet":
        """Builds the mixer."""
        return GatedDeltaNet(self, rngs)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeltaNetConfig(GatedDeltaNetConfig):
    """DeltaNet (Yang et al. 2024, arXiv 2406.06484): no decay, no output gate.

    Its fields are those of `GatedDeltaNetConfig` with other defaults.
    """

    num_heads: int = 4
    output_gate: bool = False
    decay: bool = False

    key_share: ClassVar[float] = 1.0
    value_share: ClassVar[float] = 1.0


class GatedDeltaNet(RecurrentMixer[GatedDeltaNetConfig]):
    """`y = Wo (norm(gated_delta_rule(q, k, v, log_decay, beta)) * silu(Wg x))`.

    Queries and keys are convolved, passed through SiLU and scaled to norm 1, which keeps the
    recurrence stable; values are convolved and passed through SiLU. Gates, in float32:

        beta      = sigmoid(Wb x), doubled if eigenvalues may be negative
        log_decay = -exp(A_log) softplus(Wa x + dt_bias)
    """

    op = "gated_delta_rule"
    time = "T·(C + F)"

    @override
    def __init__(self, config: GatedDeltaNetConfig, rngs: nnx.Rngs):
        super().__init__(config, rngs)
        width, K = config.require_width(), config.kv_heads
        self.strength = projection(config, width, K, axes=("embed", None), rngs=rngs)
        if config.decay:
            self.decay = projection(config, width, K, axes=("embed", None), rngs=rngs)
            # As Mamba-2: decays from e^(-16 · 0.1) to nearly 1 a token, whatever x.
            rate = jax.random.uniform(rngs.params(), (K,), minval=1e-4, maxval=16)
            low, high = math.log(1e-3), math.log(0.1)
            step = jnp.exp(jax.random.uniform(rngs.params(), (K,), minval=low, maxval=high))
            self.A_log = nnx.Param(jnp.log(rate), axes=(None,))
            # softplus(dt_bias) = step
            self.dt_bias = nnx.Param(step + jnp.log(-jnp.expm1(-step)), axes=(None,))

    @override
    def recur(
        self, x: Hidden, q: Array, k: Array, v: Array, positions: Positions, **options: Any
    ) -> Any:
        del positions
        dtype = jnp.promote_types(self.config.dtype or "float32", jnp.float32)
        beta = jax.nn.sigmoid(self.strength(x).astype(dtype))
        if self.config.allow_negative_eigenvalues:
            beta = 2 * beta
        log_decay = None
        if self.config.decay:
            step = jax.nn.softplus(self.decay(x).astype(dtype) + self.dt_bias[...])
            log_decay = -jnp.exp(self.A_log[...]) * step
        q, k = unit_norm(q), unit_norm(k)
        return ops.gated_delta_rule(q, k, v, log_decay, beta, **options)
