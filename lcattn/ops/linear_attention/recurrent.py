"""The literal recurrence, one token at a time: the definition that other forms are held against."""

import jax.numpy as jnp
from jax import lax

from lcattn.ops.checks import accumulation_dtype
from lcattn.ops.linear_attention.features import Similarity
from lcattn.ops.segments import owners
from lcattn.typing import Array


def attend(
    similarity: Similarity,
    q: Array,
    k: Array,
    v: Array,
    segment_ids: Array | None,
    state: Array | None,
    *,
    causal: bool,
    scale: float,
    chunk_size: int,
) -> tuple[Array, Array]:
    """Weighted sums of values `[B,T,N,H]` (not normalised), and the final state."""
    del chunk_size
    (B, T, N, _), (S, K, H) = q.shape, v.shape[1:]
    dtype = accumulation_dtype(q.dtype)
    q_features = similarity.query_features(q.astype(dtype) * scale)
    k_features = similarity.key_features(k.astype(dtype))
    q_features = q_features.reshape(B, T, K, N // K, q_features.shape[-1])
    ids = jnp.zeros((B, S), jnp.int32) if segment_ids is None else segment_ids

    def write(state, k_t, v_t, real, keep):
        update = jnp.where(real[:, None, None, None], jnp.einsum("bkd,bkh->bkdh", k_t, v_t), 0)
        return jnp.where(keep[:, None, None, None], state, 0) + update

    if state is None:
        state = jnp.einsum("bskd,bskh->bkdh", k_features[:, :1], v[:, :1].astype(dtype)) * 0
    before, after = owners(ids.T[:, :, None])
    steps = (
        jnp.moveaxis(k_features, 1, 0), jnp.moveaxis(v.astype(dtype), 1, 0),
        ids.T >= 0, before == after,
    )  # fmt: skip
    if causal:

        def step(state, xs):
            q_t, *key = xs
            state = write(state, *key)
            out = jnp.einsum("bkgd,bkdh->bkgh", q_t, state)
            return state, jnp.where(key[2][:, None, None, None], out, 0)

        state, out = lax.scan(step, state, (jnp.moveaxis(q_features, 1, 0), *steps))
        return jnp.moveaxis(out, 0, 1).reshape(B, T, N, H), state

    final, _ = lax.scan(lambda state, xs: (write(state, *xs), None), state, steps)
    if segment_ids is None:
        out = jnp.einsum("btkgd,bkdh->btkgh", q_features, final)
        return out.reshape(B, T, N, H), final
    # Each query reads the sum over its own document; the initial state is the first one's.
    same = (ids[:, :, None] == ids[:, None, :]) & (ids >= 0)[:, None, :]
    read = (ids == before[0][:, None]) & (ids >= 0)
    sums = jnp.einsum("bts,bskd,bskh->btkdh", same.astype(dtype), k_features, v.astype(dtype))
    sums += jnp.where(read[:, :, None, None, None], state[:, None], 0)
    out = jnp.einsum("btkgd,btkdh->btkgh", q_features, sums)
    return out.reshape(B, T, N, H), final
