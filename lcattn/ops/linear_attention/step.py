"""One token of a stream: the state is read once and written once, which is all that it costs."""

import jax.numpy as jnp

from lcattn.ops.checks import Sizes, accumulation_dtype
from lcattn.ops.linear_attention.features import Similarity
from lcattn.ops.linear_attention.state import LinearAttentionState, checked, quotient
from lcattn.typing import Array


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
    features = similarity.key_features(k[:, 0].astype(dtype))
    kv = features[..., None] * v[:, 0, :, None].astype(dtype)
    normalizer = features if normalize else None
    if (state := checked(state, normalize, similarity, k, v)) is not None:
        kv += state.kv
        normalizer = None if state.normalizer is None else state.normalizer + features
    query = similarity.query_features(q[:, 0].astype(dtype) * scale)
    query = query.reshape(B, K, N // K, -1)
    # A product and a sum, which fuse with the update: a matrix product would read the state again.
    out = jnp.sum(query[..., None] * kv[:, :, None], axis=-2)
    if normalizer is not None:
        out = quotient(out, jnp.sum(query * normalizer[:, :, None], axis=-1, keepdims=True))
    return out.reshape(B, 1, N, H), LinearAttentionState(kv=kv, normalizer=normalizer)


def objection(*, sizes: Sizes, causal: bool, segment_ids: Array | None, **call) -> str | None:
    """Why it cannot serve a call, or None."""
    del call
    if sizes.T != 1 or not causal:
        return f"takes one token and causal=True, not T={sizes.T} and causal={causal}"
    return None if segment_ids is None else "takes no segment_ids"
