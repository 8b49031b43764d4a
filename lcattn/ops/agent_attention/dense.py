"""The definition, term by term."""

import jax
import jax.numpy as jnp
from jax import lax

from lcattn.ops.agent_attention.state import AgentAttentionState, agent_attention_state
from lcattn.ops.segments import owners
from lcattn.ops.visibility import visibility
from lcattn.typing import Array


def reference(
    shares: Array,
    x: Array,
    v: Array,
    segment_ids: Array | None,
    state: AgentAttentionState | None,
    *,
    causal: bool,
    chunk_size: int | None,
) -> tuple[Array, AgentAttentionState | None]:
    """From the queries' weights of the agents `[B,T,N,n]` and the agents' scores `[B,S,N,n]`.

    Every agent's softmax is formed for every query: T·S·n numbers a head. What was before the first
    token is one more key, which counts as often as the state's total says.
    """
    del chunk_size
    (B, T, N, n), S = shares.shape, x.shape[1]
    seen = visibility(T, S, causal=causal, segment_ids=segment_ids).mask()
    reads_past = jnp.zeros((B, T), bool)
    past = agent_attention_state(B, N, n, v.shape[-1], dtype=x.dtype)
    if state is not None:
        past, reads_past = state, ~reads_past
        if segment_ids is not None:
            before, _ = owners(segment_ids[None])
            reads_past = (segment_ids == before[0][:, None]) & (segment_ids >= 0)
    seen = jnp.broadcast_to(seen, (B, T, S))
    seen = jnp.concatenate([reads_past[..., None], seen], axis=-1)[:, None, :, None]  # [B,1,T,1,S']
    scores = jnp.concatenate([past.highest[..., None], x.transpose(0, 2, 3, 1)], axis=-1)
    seen = seen & jnp.isfinite(scores)[:, :, None]
    scores = jnp.where(seen, scores[:, :, None], 0)  # [B,N,T,n,1+S]
    highest = lax.stop_gradient(jnp.max(scores, axis=-1, where=seen, initial=-jnp.inf))
    base = jnp.where(jnp.isfinite(highest), highest, 0)
    weights = jnp.where(seen, jnp.exp(scores - base[..., None]), 0)
    weights = weights.at[..., 0].multiply(past.total[:, :, None])
    total = weights.sum(axis=-1)
    means = weights / jnp.where(total == 0, 1, total)[..., None]
    values = jnp.einsum("bntas,bsnh->bntah", means[..., 1:], v.astype(x.dtype))
    values += means[..., 0, None] * past.values[:, :, None]
    out = jnp.einsum("btna,bntah->btnh", shares, values)
    if not causal:
        return out, None
    return out, _last(AgentAttentionState(values, highest, total), segment_ids, past)


def _last(
    states: AgentAttentionState, segment_ids: Array | None, start: AgentAttentionState
) -> AgentAttentionState:
    """Of the states `[B,N,T,...]` after every token, that after the last which is not padding."""
    if segment_ids is None:
        return jax.tree.map(lambda x: x[:, :, -1], states)
    real = segment_ids >= 0
    at = jnp.max(jnp.where(real, jnp.arange(real.shape[1]), 0), axis=1)
    any_real = jnp.any(real, axis=1)

    def select(x: Array, before: Array) -> Array:
        last = jax.vmap(lambda row, t: row[:, t])(x, at)
        return jnp.where(any_real.reshape(-1, *(1,) * (last.ndim - 1)), last, before)

    return jax.tree.map(select, states, start)
