r"""Causal gated linear attention for TPUs, in Pallas Mosaic TPU.

    S_t = diag(e^{g_t}) S_{t-1} + k_t v_t^T,      o_t = S_t^T q_t

in the chunked form (`tpu_chunk`): dense inside a chunk, with decays that cannot overflow
(`tpu_decay`), a state between chunks, which stays in VMEM while a core walks the chunks of a head
(`tpu_sweeps`). The gradient walks them in reverse, from states kept every few chunks.

Operands of products have the dtype of q, bfloat16 or float32; sums, decays and states are float32.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.gated_linear_attention.config import (
    TPU_VMEM,
    TpuLaunchConfig,
    tpu_heuristic,
    tpu_vmem_bytes,
)
from pallas_kernels.gated_linear_attention.tpu_sweeps import Plan, gradients, outputs
from pallas_kernels.tpu import DTYPES, SUBLANES, feature_major, token_major


def gated_linear_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_decay: jax.Array,
    initial_state: jax.Array,
    *,
    config: TpuLaunchConfig | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Causal gated linear attention and its final state; differentiable in every array.

    Args:
      q: queries `[B,T,N,F]`, bfloat16 or float32; F is a multiple of 8.
      k: keys `[B,T,M,F]`; M, the number of states, divides N.
      v: values `[B,T,M,H]`; H is a multiple of 8.
      log_decay: `[B,T,M,F]` or `[B,T,M,1]`, <= 0, -inf included; bfloat16 or float32.
      initial_state: `[B,M,F,H]`, float32.
      config: launch parameters; default: by shape.
      interpret: whether to run in the TPU simulator.

    Returns:
      `[B,T,N,H]` in the dtype of q, and the state after the last token.

    Raises:
      ValueError: saying why these kernels do not serve the call.
    """
    (B, T, N, F), (M, H) = q.shape, v.shape[2:]
    shape = {"groups": N // M, "F": F, "H": H}
    reason = objection(dtype=q.dtype, **shape)
    if reason is not None:
        raise ValueError(f"gated_linear_attention: the mosaic_tpu kernels {reason}")
    config = config or tpu_heuristic(T=T, itemsize=q.dtype.itemsize, **shape)
    plan = Plan(config.chunks, interpret)
    # Padding comes last, adds nothing to the state, and does not decay it.
    length = T + -T % plan.tokens
    queries = feature_major(q, length).reshape(B, M, N // M, F, length)
    keys, values, decays = (feature_major(x, length) for x in (k, v, log_decay))
    out, final = _attend(plan, queries, keys, values, decays, initial_state)
    return token_major(out.reshape(B, N, H, length), T), final


def objection(*, dtype, groups: int, F: int, H: int) -> str | None:
    """Why the kernels do not serve a call, in words, or None."""
    if dtype not in DTYPES:
        return f"take bfloat16 or float32, not {jnp.dtype(dtype).name}"
    if F % SUBLANES or H % SUBLANES:
        return f"take keys and values of sizes that are multiples of 8, not F={F}, H={H}"
    taken = tpu_vmem_bytes(1, groups, F, H, jnp.dtype(dtype).itemsize)
    if taken > TPU_VMEM:
        return (
            f"take up to {TPU_VMEM >> 20} MiB of VMEM, not {taken / 2**20:.0f}, as F={F}, H={H}"
            f" need with {groups} query heads a state"
        )
    return None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(plan: Plan, q, k, v, log_decay, start):
    """Outputs `[B,M,G,H,T]` and the final state."""
    out, _, final = outputs(plan, q, k, v, log_decay, start, keep=False)
    return out, final


def _attend_forward(plan, q, k, v, log_decay, start):
    out, starts, final = outputs(plan, q, k, v, log_decay, start, keep=True)
    return (out, final), (q, k, v, log_decay, starts)


def _attend_backward(plan, residuals, cotangents):
    return gradients(plan, *residuals, *cotangents)


_attend.defvjp(_attend_forward, _attend_backward)
