"""The kernels for TPUs, behind the op's contract."""

import jax.numpy as jnp

from lcattn.ops import dispatch
from lcattn.ops.checks import Sizes
from lcattn.ops.linear_attention.features import FeatureMap, Similarity
from lcattn.ops.linear_attention.kernel import attend_by
from lcattn.ops.linear_attention.state import LinearAttentionState
from lcattn.typing import Array


def attend(
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
    """Outputs `[B,T,N,H]` and the final state, of a call that `objection` lets pass."""
    from pallas_kernels.linear_attention import mosaic_tpu

    del causal, chunk_size
    return attend_by(
        mosaic_tpu.linear_attention, similarity, q, k, v, segment_ids, state,
        normalize=normalize, scale=scale,
    )  # fmt: skip


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
    """Why the kernels cannot serve a call, in words."""
    del normalize, segment_ids, scale, chunk_size
    if dispatch.default_platform() != "tpu":
        return "needs a TPU"
    if not causal:
        return "is causal"
    if not isinstance(feature_map, str):
        return "knows no feature map but its own"
    # Imported where it can run: it takes longer to import than the rest of the ops.
    from pallas_kernels.linear_attention import mosaic_tpu

    # elu + 1 is applied outside; what is left is the identity.
    kind = "taylor" if feature_map == "taylor" else "identity"
    return mosaic_tpu.objection(feature_map=kind, dtype=dtype, F=sizes.F, H=sizes.H)
