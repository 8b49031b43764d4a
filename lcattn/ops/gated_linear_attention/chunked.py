"""In chunks, in plain JAX."""

import jax
import jax.numpy as jnp
from jax import lax

from lcattn.ops.chunks import cut, einsum, paste
from lcattn.ops.decay import ChunkDecay, between_tokens, inside_chunks
from lcattn.ops.triangular import halves, merge
from lcattn.typing import Array, Float


def attend(q, k, v, log_decay, state, *, scale, chunk):
    r"""All chunks at once, but for the state, which a scan carries from chunk to chunk.

    With G the log decay from the start of a chunk, and S the state there:

        O  = A V + (Q e^G) S        A_ts = sum_c q_tc k_sc e^{G_tc - G_sc},  s <= t
        S' = e^{G_C} S + (K e^{G_C - G})^T V
    """

    @jax.checkpoint  # keep the inputs only; states and scores are recomputed for the gradient
    def in_chunks(q, k, v, log_decay, state):
        q, k, v, log_decay = (cut(x, chunk) for x in (q, k, v, log_decay))
        decay = inside_chunks(log_decay.astype(state.dtype))
        scores = _scores(q, k, decay)
        writes = einsum("...sf,...sh->...fh", k * jnp.exp(decay.after), v, like=v)
        states, final = _carry(state, jnp.exp(decay.total), writes)
        out = einsum("...gts,...sh->...gth", scores, v, like=v)
        queries = q * jnp.exp(decay.before)[..., None, :, :]
        return out + einsum("...gtf,...fh->...gth", queries, states, like=q), final

    out, final = in_chunks(q, k, v, log_decay, state)
    return scale * paste(out, q.shape[1]), final


def _scores(q: Array, k: Array, decay: ChunkDecay) -> Float[Array, "*chunks G C C"]:
    """Decayed inner products of queries `[...,G,C,F]` with keys `[...,C,F]` not after them."""
    if decay.before.shape[-1] == 1:
        factors = jnp.exp(between_tokens(decay))
        return factors[..., None, :, :] * einsum("...gtf,...sf->...gts", q, k, like=q)

    blocks = einsum("...gtf,...tf->...gt", q, k, like=q)[..., None, None]
    for to_right, from_left in decay.halves:
        m, h = to_right.shape[-3:-1]
        _, queries = halves(q.reshape(*q.shape[:-2], 2 * m, h, q.shape[-1]))
        keys, _ = halves(k.reshape(*k.shape[:-2], 2 * m, h, k.shape[-1]))
        queries = queries * jnp.exp(to_right)[..., None, :, :, :]
        keys = keys * jnp.exp(from_left)
        squares = einsum("...gmtf,...msf->...gmts", queries, keys, like=q)
        blocks = merge(blocks, squares)
    return blocks[..., 0, :, :]


def _carry(state: Array, decay: Array, writes: Array) -> tuple[Array, Array]:
    """The state before each chunk, and after the last."""

    def step(state, chunk):
        decay, write = chunk
        return decay[..., None] * state + write, state

    final, states = lax.scan(step, state, (decay, writes))
    return states, final
