"""Softmax over the keys that a row sees."""

import jax.numpy as jnp
from jax import lax

from lcattn.typing import Array, Bool, Float


def masked_softmax(
    scores: Float[Array, "*rows S"], seen: Bool[Array, "*#rows S"]
) -> tuple[Float[Array, "*rows S"], Float[Array, "*rows"]]:
    """Probabilities of the seen keys, and the log of their denominator; 0 and -inf if none is."""
    highest = jnp.max(scores, axis=-1, keepdims=True, where=seen, initial=-jnp.inf)
    highest = lax.stop_gradient(jnp.where(jnp.isfinite(highest), highest, 0))
    # Hidden scores are replaced before exp, so that no inf enters the gradient. A fused
    # multiply-add can leave a huge score above its own maximum: the excess is taken off, as a
    # constant.
    below = jnp.where(seen, scores - highest, 0)
    below -= lax.stop_gradient(jnp.maximum(below, 0))
    weights = jnp.where(seen, jnp.exp(below), 0)
    total = weights.sum(axis=-1, keepdims=True)
    empty = total == 0
    safe = jnp.where(empty, 1, total)
    lse = jnp.where(empty, -jnp.inf, highest + jnp.log(safe))
    return weights / safe, lse[..., 0]
