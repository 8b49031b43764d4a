"""The kernel for Hopper GPUs, behind the op's contract."""

import functools

import jax.numpy as jnp

from lcattn.ops import dispatch
from lcattn.ops.checks import Sizes
from lcattn.ops.linear_attention import kernel
from lcattn.ops.linear_attention.features import FeatureMap
from lcattn.typing import Array

# The shortest length measured, and there, with gradients, the kernels take a quarter of XLA's time:
# benchmarks/h200.
_PAYS_FROM = 256

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
    from pallas_kernels.tiles import TILE

    # elu + 1 is applied outside; what is left is the identity.
    kind = "taylor" if feature_map == "taylor" else "identity"
    return mosaic_gpu.objection(
        feature_map=kind, dtype=dtype, F=sizes.F, H=sizes.H, scale=scale
    ) or dispatch.no_grid(sizes.B * sizes.H // TILE)


def pays(*, sizes: Sizes, chunk_size: int | None, **call) -> bool:
    """Whether the kernel, with chunks of its own, is the better choice where it serves."""
    del call
    return sizes.T >= _PAYS_FROM and chunk_size is None and dispatch.on_one_device()
