"""The kernels for Hopper GPUs, behind the op's contract."""

import functools
import math

import jax.numpy as jnp

from lcattn.ops import dispatch
from lcattn.ops.checks import Sizes
from lcattn.ops.softplus_attention import kernel

# There the kernels take half of XLA's time; at 256 both take the same: benchmarks/h200.
_PAYS_FROM = 1024

# Kernels take exp(c) in float32.
_LARGEST_LENGTH_SCALE = 80.0


attend = functools.partial(kernel.attend, "mosaic_gpu")


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
    if not causal:
        return "is causal"
    if not is_aligned:
        return "takes as many queries as keys, from the first position on"
    if not 0 < scale * math.log(sizes.T + 1) <= _LARGEST_LENGTH_SCALE:
        return f"takes a positive scale with scale ln(T) up to {_LARGEST_LENGTH_SCALE:g}"
    # Imported where it can run: it takes longer to import than the rest of the ops.
    from pallas_kernels.softplus_attention import mosaic_gpu

    return mosaic_gpu.objection(dtype=dtype, F=sizes.F, H=sizes.H, power=power) or dispatch.no_grid(
        sizes.B
    )


def pays(*, sizes: Sizes, **call) -> bool:
    """Whether the kernels are the better choice where they can serve."""
    del call
    return sizes.T >= _PAYS_FROM and dispatch.on_one_device()
