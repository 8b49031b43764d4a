r"""Causal softplus attention for TPUs, in Pallas Mosaic TPU.

As `mosaic_gpu`, which defines it: two walks over the keys forward, two back, weights in VMEM only,
and a few numbers a query (`rows`) in memory: O(T). Operands of products have the dtype of q, all
else is float32.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.softplus_attention.config import TpuLaunchConfig, tpu_heuristic
from pallas_kernels.softplus_attention.packing import Packing, pack
from pallas_kernels.softplus_attention.rows import (
    Row,
    Scales,
    gradient_numbers,
    reciprocal,
    weight_numbers,
)
from pallas_kernels.softplus_attention.tpu_plan import Plan
from pallas_kernels.softplus_attention.tpu_walks import (
    key_gradients,
    mix,
    query_gradients,
    row_sums,
)
from pallas_kernels.softplus_attention.weights import power_objection
from pallas_kernels.tpu import DTYPES, SUBLANES, feature_major, token_major


def softplus_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    scales: Scales,
    packing: tuple[jax.Array, jax.Array] | None = None,
    *,
    power: int | None,
    flat_below: float,
    config: TpuLaunchConfig | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Causal softplus attention; differentiable in q, k and v.

    Args:
      q: queries `[B,T,N,F]`, bfloat16 or float32, with all that scales scores and with 1 / ln 2, so
        that `q·k` is in powers of two. F is a multiple of 8.
      k: keys `[B,T,K,F]`; K divides N.
      v: values `[B,T,K,H]`; H is a multiple of 8.
      scales: n and o of each query.
      packing: positions of queries and ends of keys, as for `mosaic_gpu`. None: one document.
      power: p, or None for LSSA.
      flat_below: rows whose largest n a / S - o is at most that have P = a / S.
      config: launch parameters; default: by shape.
      interpret: whether to run in the TPU simulator.

    Returns:
      `[B,T,N,H]` in the dtype of q.

    Raises:
      ValueError: saying why these kernels do not serve the call.
    """
    T = q.shape[1]
    reason = objection(dtype=q.dtype, F=k.shape[3], H=v.shape[3], power=power)
    if reason is not None:
        raise ValueError(f"softplus_attention: the mosaic_tpu kernels {reason}")
    config = config or tpu_heuristic(T=T)
    plan = Plan(
        power=1 if power is None else power, thresholded=power is not None, flat_below=flat_below,
        block=config.block, interpret=interpret,
    )  # fmt: skip
    missing = -T % plan.block
    # Padding comes last: no query sees its keys, and its queries are cut off.
    scales = Scales(*(jnp.pad(x, ((0, 0), (0, missing)), mode="edge") for x in scales))
    packed = None
    if packing is not None:
        positions, ends = (
            jnp.pad(x, ((0, 0), (0, missing)), constant_values=fill)
            for x, fill in zip(packing, (-1, 0), strict=True)
        )
        packed = pack(positions, ends, plan.block)
    q, k, v = (feature_major(x, T + missing) for x in (q, k, v))
    return token_major(_attend(plan, q, k, v, scales, packed), T)


def objection(*, dtype, F: int, H: int, power: float | None) -> str | None:
    """Why the kernels do not serve a call, in words, or None."""
    if dtype not in DTYPES:
        return f"take bfloat16 or float32, not {jnp.dtype(dtype).name}"
    for name, size in (("F", F), ("H", H)):
        if size % SUBLANES or size > 256:
            return f"take heads of a size 8, 16, ... 256, not {name}={size}"
    return power_objection(power)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(plan: Plan, q, k, v, scales: Scales, packing: Packing | None):
    return _attend_forward(plan, q, k, v, scales, packing)[0]


def _attend_forward(plan, q, k, v, scales, packing):
    sums = rows = None
    if plan.thresholded:
        sums = row_sums(plan, q, k, packing)
        rows = weight_numbers(scales, sums, plan.flat_below)
    out, total = mix(plan, q, k, v, rows, packing)
    return out, (q, k, v, scales, packing, sums, out, total)


def _attend_backward(plan, residuals, d_out):
    q, k, v, scales, packing, sums, out, total = residuals
    g = d_out.astype(jnp.float32) * reciprocal(total)[:, :, None]
    mean = jnp.sum(g * out.astype(jnp.float32), axis=2)
    g = g.astype(q.dtype)
    rows = gradient_numbers(scales, sums, mean, power=plan.power, flat_below=plan.flat_below)
    dq, e = query_gradients(plan, q, g, k, v, rows, packing)
    rows = rows.at[:, :, Row.SHARED].set(e)
    dk, dv = key_gradients(plan, q, g, k, v, rows, packing)
    return dq, dk, dv, None, None


_attend.defvjp(_attend_forward, _attend_backward)
