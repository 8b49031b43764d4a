"""Attention over parts of the keys, put together."""

import jax.numpy as jnp
from jax import lax

from lcattn.typing import Array, Float


def merge(
    *parts: tuple[Float[Array, "B T N H"], Float[Array, "B T N"]],
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """One softmax over all keys, from outputs and log-sum-exps over disjoint parts of them.

    Sums are in the dtype of the log-sum-exps, and so are the results. A row that saw nothing in any
    part (-inf) gives zeros and -inf. Gradients flow through both.
    """
    outs, lses = (jnp.stack(x) for x in zip(*parts, strict=True))
    highest = lax.stop_gradient(lses.max(axis=0))
    weights = jnp.exp(lses - jnp.where(jnp.isneginf(highest), 0, highest))
    total = weights.sum(axis=0)
    safe = jnp.where(total == 0, 1, total)
    shares = weights / safe
    lse = jnp.where(total == 0, -jnp.inf, highest + jnp.log(safe))
    return jnp.sum(shares[..., None] * outs.astype(lses.dtype), axis=0), lse
