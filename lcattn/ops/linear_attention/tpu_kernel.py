"""The kernels for TPUs, behind the op's contract."""

import functools

import jax.numpy as jnp

from lcattn.ops.checks import Sizes
from lcattn.ops.linear_attention import kernel
from lcattn.ops.linear_attention.features import FeatureMap
from lcattn.typing import Array

attend = functools.partial(kernel.attend, "mosaic_tpu")


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
    if not causal:
        return "is causal"
    if not isinstance(feature_map, str):
        return "knows no feature map but its own"
    # Imported where it can run: it takes longer to import than the rest of the ops.
    from pallas_kernels.linear_attention import mosaic_tpu

    # elu + 1 is applied outside; what is left is the identity.
    kind = "taylor" if feature_map == "taylor" else "identity"
    return mosaic_tpu.objection(feature_map=kind, dtype=dtype, F=sizes.F, H=sizes.H)
