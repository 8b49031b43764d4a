"""One token of a stream: the state is read once and written once, which is all that it costs."""

import jax.numpy as jnp
from jax import lax

from lcattn.ops.checks import Sizes, accumulation_dtype
from lcattn.ops.linear_attention.features import Similarity
from lcattn.ops.linear_attention.state import LinearAttentionState, checked, quotient
from lcattn.typing import Array, Float


def attend(
    similarity: Similarity,
    q: Array,
    k: Array,
    v: Array,
    segment_ids: None,
    state: LinearAttentionState | None,
    *,
    normalize: bool,
    causal: bool,
    scale: float,
    chunk_size: int,
) -> tuple[Array, LinearAttentionState]:
    """Outputs `[B,1,N,H]` in float32, and the final state."""
    del segment_ids, causal, chunk_size
    (B, _, N, _), (K, H) = q.shape, v.shape[2:]
    dtype = accumulation_dtype(v.dtype)
    query, features = _features(similarity, q[:, 0].astype(dtype) * scale, k[:, 0].astype(dtype))
    kv = features[..., None] * v[:, 0, :, None].astype(dtype)
    normalizer = features if normalize else None
    if (state := checked(state, normalize, similarity, k, v)) is not None:
        kv += state.kv
        normalizer = None if state.normalizer is None else state.normalizer + features
    query = query.reshape(B, K, N // K, query.shape[-1])
    # A product and a sum, which fuse with the update: a matrix product would read the state again.
    out = jnp.sum(query[..., None] * kv[:, :, None], axis=-2)
    if normalizer is not None:
        out = quotient(out, jnp.sum(query * normalizer[:, :, None], axis=-1, keepdims=True))
    return out.reshape(B, 1, N, H), LinearAttentionState(kv=kv, normalizer=normalizer)


def _features(
    similarity: Similarity, q: Float[Array, "B N F"], k: Float[Array, "B K F"]
) -> tuple[Float[Array, "B N D"], Float[Array, "B K D"]]:
    """Features of a query and a key of every head.

    Both are slices of one array, which is kept: one kernel makes them, where it would be two, or as
    many as there are uses. Sums of padded arrays join that kernel, concatenation would not.
    """
    (_, N, F), K = q.shape, k.shape[1]
    both = jnp.pad(q, ((0, 0), (0, K), (0, 0))) + jnp.pad(k, ((0, 0), (N, 0), (0, 0)))
    features = lax.optimization_barrier(similarity.features(both))
    return similarity.weighted(features[:, :N], F), features[:, N:]


def objection(*, sizes: Sizes, causal: bool, segment_ids: Array | None, **call) -> str | None:
    """Why it cannot serve a call, or None."""
    del call
    if sizes.T != 1 or not causal:
        return f"takes one token and causal=True, not T={sizes.T} and causal={causal}"
    return None if segment_ids is None else "takes no segment_ids"
