"""The kernels for TPUs, behind the op's contract."""

import jax.numpy as jnp

from lcattn.ops import dispatch
from lcattn.ops.checks import Sizes
from lcattn.ops.softplus_attention.kernel import attend_by
from lcattn.ops.softplus_attention.rows import Reweighting, Rows
from lcattn.ops.visibility import Visibility
from lcattn.typing import Array


def attend(
    q: Array,
    k: Array,
    v: Array,
    rows: Rows,
    visibility: Visibility,
    reweighting: Reweighting | None,
    *,
    is_packed: bool,
) -> Array:
    """Attention, of a call that `objection` lets pass."""
    from pallas_kernels.softplus_attention import mosaic_tpu

    run = mosaic_tpu.softplus_attention
    return attend_by(run, q, k, v, rows, visibility, reweighting, is_packed=is_packed)


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
    if dispatch.default_platform() != "tpu":
        return "needs a TPU"
    if not causal:
        return "is causal"
    if not is_aligned:
        return "takes as many queries as keys, from the first position on"
    # Imported where it can run: it takes longer to import than the rest of the ops.
    from pallas_kernels.softplus_attention import mosaic_tpu

    return mosaic_tpu.objection(dtype=dtype, F=sizes.F, H=sizes.H, power=power)
