"""The kernels for Hopper GPUs, behind the op's contract."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from lcattn.ops import dispatch
from lcattn.ops.checks import Sizes
from lcattn.ops.softplus_attention.rows import FLAT, Reweighting, Rows, unit
from lcattn.ops.visibility import Visibility
from lcattn.typing import Array

# There the kernels take half of XLA's time; at 256 both take the same: benchmarks/h200.
_PAYS_FROM = 1024

# Kernels take exp(c) in float32.
_LARGEST_LENGTH_SCALE = 80.0


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
    from pallas_kernels.softplus_attention import mosaic_gpu

    run = mosaic_gpu.softplus_attention
    return attend_by(run, q, k, v, rows, visibility, reweighting, is_packed=is_packed)


def attend_by(
    run: Callable[..., Array],
    q: Array,
    k: Array,
    v: Array,
    rows: Rows,
    visibility: Visibility,
    reweighting: Reweighting | None,
    *,
    is_packed: bool,
) -> Array:
    """Attention by kernels `run`, which take scaled queries and scores in powers of two."""
    from pallas_kernels.softplus_attention.rows import Scales

    # Rounded once, with the factor of the scores: as exact as a factor after the products.
    scaled = unit(q) * (rows.length_scale / math.log(2))[..., None, None]
    return run(
        scaled.astype(q.dtype), unit(k).astype(k.dtype), v, Scales(rows.length, rows.offset),
        (visibility.queries, visibility.end) if is_packed else None,
        power=None if reweighting is None else int(reweighting.power), flat_below=FLAT,
    )  # fmt: skip


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
    if not dispatch.on_hopper():
        return "needs a Hopper GPU (compute capability 9.0)"
    if not causal:
        return "is causal"
    if not is_aligned:
        return "takes as many queries as keys, from the first position on"
    if not 0 < scale * math.log(sizes.T + 1) <= _LARGEST_LENGTH_SCALE:
        return f"takes a positive scale with scale ln(T) up to {_LARGEST_LENGTH_SCALE:g}"
    # Imported where it can run: it takes longer to import than the rest of the ops.
    from pallas_kernels.softplus_attention import mosaic_gpu

    return mosaic_gpu.objection(dtype=dtype, F=sizes.F, H=sizes.H, power=power)


def pays(*, sizes: Sizes, **call) -> bool:
    """Whether the kernels are the better choice where they can serve.

    Compilers cannot partition them: over several devices they belong inside `shard_map`, and only
    who writes that can tell.
    """
    del call
    return sizes.T >= _PAYS_FROM and jax.device_count() == 1
