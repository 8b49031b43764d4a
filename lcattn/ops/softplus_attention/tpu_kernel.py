"""The kernels for TPUs, behind the op's contract."""

import functools

import jax.numpy as jnp

from lcattn.ops.checks import Sizes
from lcattn.ops.softplus_attention import kernel

attend = functools.partial(kernel.attend, "mosaic_tpu")


def objection(
    *,
    sizes: Sizes,
    dtype: jnp.dtype,
    causal: bool,
    is_aligned: bool,
    scale: float,
    power: float | None,
) -> str | None:
    """Why the kernels cannot serve a call, in words."""
    del scale
    if not causal:
        return "is causal"
    if not is_aligned:
        return "takes as many queries as keys, from the first position on"
    # Imported where it can run: it takes longer to import than the rest of the ops.
    from pallas_kernels.softplus_attention import mosaic_tpu

    return mosaic_tpu.objection(dtype=dtype, F=sizes.F, H=sizes.H, power=power)
