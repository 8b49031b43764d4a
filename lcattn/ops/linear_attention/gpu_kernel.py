"""The kernel for Hopper GPUs, behind the op's contract."""

import functools

import jax
import jax.numpy as jnp

from lcattn.ops.checks import Sizes
from lcattn.ops.linear_attention import kernel
from lcattn.ops.linear_attention.features import FeatureMap
from lcattn.typing import Array

# The shortest length measured, and there the kernel takes half of XLA's time: benchmarks/h200.
_PAYS_FROM = 1024


attend = functools.partial(kernel.attend, "mosaic_gpu")


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
    del normalize, segment_ids, chunk_size
    if not causal:
        return "is causal"
    if not isinstance(feature_map, str):
        return "knows no feature map but its own"
    # Imported where it can run: it takes longer to import than the rest of the ops.
    from pallas_kernels.linear_attention import mosaic_gpu

    # elu + 1 is applied outside; what is left is the identity.
    kind = "taylor" if feature_map == "taylor" else "identity"
    return mosaic_gpu.objection(feature_map=kind, dtype=dtype, F=sizes.F, H=sizes.H, scale=scale)


def pays(
    *,
    sizes: Sizes,
    chunk_size: int | None,
    feature_map: FeatureMap,
    normalize: bool,
    segment_ids: Array | None,
    **call,
) -> bool:
    """Whether the kernel is the better choice where it can serve.

    It walks chunks of its own size, and compilers cannot partition it: over several devices it
    belongs inside `shard_map`, and only who writes that can tell. Packed documents, elu + 1 and the
    normalised identity were right on an H200, but their time has not been taken.
    """
    del call
    is_timed_map = feature_map == "taylor" or (feature_map == "identity" and not normalize)
    was_timed = is_timed_map and segment_ids is None
    is_long = sizes.T >= _PAYS_FROM and chunk_size is None
    return was_timed and is_long and jax.device_count() == 1
