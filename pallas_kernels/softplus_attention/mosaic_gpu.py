r"""Causal softplus attention for Hopper GPUs, in Pallas Mosaic GPU.

    a_ts = softplus(q_t·k_s)                          over the n_t keys s <= t of t's document
    P_t  = a_t / sum a_t                              LSSA
    P_t  ~ max(n_t a_t / sum a_t - o_t, 0)^p          LSSAR
    O_t  = sum_s P_ts v_s

Forward, one walk over the keys finds the sums of a and a second one mixes values (`forward`); the
gradient takes two walks more (`backward`). Weights exist in registers only, and a few numbers a
query (`rows`) in memory: O(T). Operands of products are bfloat16, all else is float32.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.softplus_attention.backward import key_gradients, query_gradients
from pallas_kernels.softplus_attention.config import LaunchConfig, heuristic
from pallas_kernels.softplus_attention.forward import mix, row_sums
from pallas_kernels.softplus_attention.packing import Packing, pack
from pallas_kernels.softplus_attention.plan import Plan
from pallas_kernels.softplus_attention.rows import (
    Row,
    Scales,
    gradient_numbers,
    reciprocal,
    weight_numbers,
)
from pallas_kernels.softplus_attention.weights import power_objection


def softplus_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    scales: Scales,
    packing: tuple[jax.Array, jax.Array] | None = None,
    *,
    power: int | None,
    flat_below: float,
    config: LaunchConfig | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Causal softplus attention; differentiable in q, k and v.

    Args:
      q: queries `[B,T,N,H]`, bfloat16, with all that scales scores and with 1 / ln 2, so that
        `q·k` is in powers of two; it has to stay below 120. H is 64 or 128.
      k: keys `[B,T,K,H]`; K divides N.
      v: values `[B,T,K,H]`.
      scales: n and o of each query.
      packing: positions of queries and ends of keys, `[B,T]` in int32: a query at position p sees
        key j where `j <= p < end_j`. Positions are indices, or -1 for a query that sees nothing and
        gives zeros; ends never decrease but for keys that nothing sees. None: one document.
      power: p, or None for LSSA.
      flat_below: rows whose largest n a / S - o is at most that have P = a / S.
      config: launch parameters; default: by shape.
      interpret: whether to run in the CPU simulator.

    Returns:
      `[B,T,N,H]`, bfloat16.

    Raises:
      ValueError: saying why these kernels do not serve the call.
    """
    B, T, N, H = q.shape
    reason = objection(dtype=q.dtype, F=k.shape[3], H=v.shape[3], power=power)
    if reason is not None:
        raise ValueError(f"softplus_attention: the mosaic_gpu kernels {reason}")
    plan = Plan(
        power=1 if power is None else power, thresholded=power is not None, flat_below=flat_below,
        config=config or heuristic(B=B, T=T, N=N, H=H), interpret=interpret,
    )  # fmt: skip
    missing = -T % plan.alignment
    # Padding comes last: no query sees its keys, and its queries are cut off.
    q, k, v = (jnp.pad(x, ((0, 0), (0, missing), (0, 0), (0, 0))) for x in (q, k, v))
    scales = Scales(*(jnp.pad(x, ((0, 0), (0, missing)), mode="edge") for x in scales))
    packed = None
    if packing is not None:
        positions, ends = (
            jnp.pad(x, ((0, 0), (0, missing)), constant_values=fill)
            for x, fill in zip(packing, (-1, 0), strict=True)
        )
        packed = pack(positions, ends, plan.block)
    return _attend(plan, q, k, v, scales, packed)[:, :T]


def objection(*, dtype, F: int, H: int, power: float | None) -> str | None:
    """Why the kernels do not serve a call, in words, or None."""
    if dtype != jnp.bfloat16:
        return f"take bfloat16, not {jnp.dtype(dtype).name}"
    if F != H or H not in (64, 128):
        return f"take keys and values of one size, 64 or 128, not F={F}, H={H}"
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
    g = d_out.astype(jnp.float32) * reciprocal(total).swapaxes(1, 2)[..., None]
    mean = jnp.sum(g * out.astype(jnp.float32), axis=-1).swapaxes(1, 2)
    g = g.astype(q.dtype)
    rows = gradient_numbers(scales, sums, mean, power=plan.power, flat_below=plan.flat_below)
    dq, e = query_gradients(plan, q, g, k, v, rows, packing)
    if e is not None:
        rows = rows.at[:, :, Row.SHARED].set(e)
    dk, dv = key_gradients(plan, q, g, k, v, rows, packing)
    return dq, dk, dv, None, None


_attend.defvjp(_attend_forward, _attend_backward)
