"""Token by token: the definition."""

import jax.numpy as jnp

from lcattn.ops import recurrence


def attend(q, k, v, log_decay, state, *, scale, chunk):
    """Outputs `[B,T,M,G,H]` and the final state; `chunk` is of no use."""
    del chunk

    def step(state, q, k, v, log_decay):
        state = jnp.exp(log_decay)[..., None] * state + jnp.einsum("bmf,bmh->bmfh", k, v)
        return state, scale * jnp.einsum("bmgf,bmfh->bmgh", q, state)

    return recurrence.token_by_token(step, state, q, k, v, log_decay)
