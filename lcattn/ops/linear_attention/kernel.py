"""The kernel for Hopper GPUs, behind the op's contract."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lcattn.ops import dispatch
from lcattn.ops.checks import Sizes
from lcattn.ops.linear_attention.features import TAYLOR, FeatureMap, Similarity
from lcattn.ops.linear_attention.state import LinearAttentionState, checked
from lcattn.typing import Array

# The shortest length measured, and there the kernel takes half of XLA's time: benchmarks/h200.
_PAYS_FROM = 1024


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
    """Outputs `[B,T,N,H]` and the final state, of a call that `objection` lets pass."""
    from pallas_kernels.linear_attention import mosaic_gpu

    del segment_ids, causal, chunk_size
    run = mosaic_gpu.linear_attention
    return attend_by(run, similarity, q, k, v, state, normalize=normalize, scale=scale)


def attend_by(
    run: Callable[..., tuple[Array, tuple[Array, Array | None]]],
    similarity: Similarity,
    q: Array,
    k: Array,
    v: Array,
    state: LinearAttentionState | None,
    *,
    normalize: bool,
    **options: Any,
) -> tuple[Array, LinearAttentionState]:
    """Attention by kernels `run`, whose state is a pair of arrays."""
    state = checked(state, normalize, similarity, k, v)
    out, (kv, normalizer) = run(
        q, k, v, None if state is None else (state.kv, state.normalizer),
        feature_map="taylor" if similarity is TAYLOR else "identity",
        normalize=normalize, **options,
    )  # fmt: skip
    return out, LinearAttentionState(kv=kv, normalizer=normalizer)


def objection(
    *,
    sizes: Sizes,
    dtype: jnp.dtype,
    feature_map: FeatureMap,
    normalize: bool,
    causal: bool,
    segment_ids: Array | None,
    scale: float,
    chunk_size: int | None,
) -> str | None:
    """Why the kernel cannot serve a call, in words."""
    del chunk_size
    if not dispatch.on_hopper():
        return "needs a Hopper GPU (compute capability 9.0)"
    if not causal:
        return "is causal"
    if segment_ids is not None:
        return "does not know segment_ids"
    if not isinstance(feature_map, str):
        return "knows no feature map but its own"
    # Imported where it can run: it takes longer to import than the rest of the ops.
    from pallas_kernels.linear_attention import mosaic_gpu

    return mosaic_gpu.objection(
        feature_map=feature_map, normalize=normalize, dtype=dtype, F=sizes.F, H=sizes.H,
        scale=scale,
    )  # fmt: skip


def pays(*, sizes: Sizes, chunk_size: int | None, **call) -> bool:
    """Whether the kernel is the better choice where it can serve.

    It walks chunks of its own size, and compilers cannot partition it: over several devices it
    belongs inside `shard_map`, and only who writes that can tell.
    """
    del call
    return sizes.T >= _PAYS_FROM and chunk_size is None and jax.device_count() == 1
