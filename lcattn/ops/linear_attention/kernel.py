"""What kernels for GPUs and TPUs are given, and what they give."""

import importlib

import jax.numpy as jnp

from lcattn.ops.linear_attention.features import TAYLOR, Similarity
from lcattn.ops.linear_attention.state import LinearAttentionState, checked
from lcattn.typing import Array


def attend(
    backend: str,
    similarity: Similarity,
    q: Array,
    k: Array,
    v: Array,
    segment_ids: Array | None,
    state: LinearAttentionState | None,
    *,
    normalize: bool,
    causal: bool,
    scale: float,
    chunk_size: int,
) -> tuple[Array, LinearAttentionState]:
    """Outputs `[B,T,N,H]` and the final state, of a call that the backend's objection lets pass."""
    del causal, chunk_size
    # Imported where it can run: it takes longer to import than the rest of the ops.
    kernels = importlib.import_module(f"pallas_kernels.linear_attention.{backend}")
    state = checked(state, normalize, similarity, k, v)
    out, (kv, normalizer) = kernels.linear_attention(
        q, k, v, None if state is None else (state.kv, state.normalizer), _documents(segment_ids),
        feature_map="taylor" if similarity is TAYLOR else "identity",
        normalize=normalize, scale=scale,
    )  # fmt: skip
    return out, LinearAttentionState(kv=kv, normalizer=normalizer)


def _documents(segment_ids: Array | None) -> Array | None:
    """Ids with 0 for the first document of each row and -1 for padding."""
    if segment_ids is None:
        return None
    padding = segment_ids < 0
    largest = jnp.iinfo(segment_ids.dtype).max
    first = jnp.min(jnp.where(padding, largest, segment_ids), axis=1, keepdims=True)
    return jnp.where(padding, -1, segment_ids - first).astype(jnp.int32)
