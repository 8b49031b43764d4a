r"""Causal gated linear attention for Hopper GPUs, in Pallas Mosaic GPU.

    S_t = diag(e^{g_t}) S_{t-1} + k_t v_t^T,      o_t = scale S_t^T q_t

in chunks of 64 tokens. A walk over them carries the state and gives outputs (`forward`); where B·N
is too small to fill the chip, the sequence is split into groups, and a sweep finds first what each
adds to the state (`states`). The same walk from the end, of keys that read what later queries
wrote, gives gradients of the values and stores the state's gradient at every chunk; a sweep stores
the recomputed states; then queries, keys and decays get theirs, all chunks at once (`backward`).
Exponents of decays are sums that no strength of decay can make overflow (`decay`).

Operands of products and stored states are bfloat16; sums, decays and states in a sweep are float32.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.gated_linear_attention.backward import feature_gradients
from pallas_kernels.gated_linear_attention.config import LaunchConfig, heuristic
from pallas_kernels.gated_linear_attention.decay import Decay
from pallas_kernels.gated_linear_attention.forward import outputs
from pallas_kernels.gated_linear_attention.plan import Plan
from pallas_kernels.gated_linear_attention.states import starts_of_groups, sweep
from pallas_kernels.tiles import TILE


def gated_linear_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_decay: jax.Array,
    initial_state: jax.Array | None = None,
    *,
    scale: float,
    config: LaunchConfig | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Causal gated linear attention and its final state; differentiable in every array.

    Args:
      q: queries `[B,T,N,F]`, bfloat16; F is 64 or 128.
      k: keys `[B,T,M,F]`; M, the number of states, divides N.
      v: values `[B,T,M,H]`; H is F, or 128.
      log_decay: `[B,T,M,F]` or `[B,T,M,1]`, <= 0, -inf included; in bfloat16, which is the fastest,
        or any other dtype, of which float32 is kept.
      initial_state: `[B,M,F,H]`, float32; or None for zeros.
      scale: factor of the output.
      config: launch parameters; default: by shape.
      interpret: whether to run in the CPU simulator.

    Returns:
      `[B,T,N,H]` in the dtype of q, and the state after the last token, float32.

    Raises:
      ValueError: saying why these kernels do not serve the call.
    """
    (B, T, N, F), H = q.shape, v.shape[3]
    reason = objection(dtype=q.dtype, F=F, H=H)
    if reason is not None:
        raise ValueError(f"gated_linear_attention: the mosaic_gpu kernels {reason}")
    config = config or heuristic(B=B, T=T, N=N, F=F, H=H)
    # Padding comes last, adds nothing to the state, and does not decay it.
    widths = ((0, 0), (0, -T % (TILE * config.groups)), (0, 0), (0, 0))
    if log_decay.dtype != jnp.bfloat16:
        log_decay = log_decay.astype(jnp.float32)
    q, k, v, log_decay = (jnp.pad(x, widths) for x in (q, k, v, log_decay))
    plan = Plan(scale, config, by_head=log_decay.shape[3] < F, interpret=interpret)
    out, final = _attend(plan, q, k, v, log_decay, initial_state)
    return out[:, :T], final


def objection(*, dtype, F: int, H: int) -> str | None:
    """Why the kernels do not serve a call, in words, or None."""
    if dtype != jnp.bfloat16:
        return f"take bfloat16, not {jnp.dtype(dtype).name}"
    if (F, H) not in ((64, 64), (64, 128), (128, 128)):
        return f"take keys and values of sizes 64 or 128, keys no larger, not F={F}, H={H}"
    return None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(plan: Plan, q, k, v, log_decay, start):
    return _attend_forward(plan, q, k, v, log_decay, start)[0]


def _attend_forward(plan, q, k, v, log_decay, start):
    decay = Decay.of(log_decay, q.shape[3])
    starts = starts_of_groups(plan, k, v, decay, start)
    out, _, ends = outputs(plan, q, k, v, decay, starts)
    residuals = q, k, v, log_decay, start, starts
    return (out, ends[:, :: q.shape[2] // k.shape[2], -1]), residuals


def _attend_backward(plan, residuals, cotangents):
    q, k, v, log_decay, start, starts = residuals
    d_out, d_final = cotangents
    M, shared = k.shape[2], q.shape[2] // k.shape[2]
    decay = Decay.of(log_decay, q.shape[3])
    states, _ = sweep(plan, k, v, decay, starts, keep=True)
    # One of the query heads that share a state, the first, answers for its gradient.
    first = jnp.arange(q.shape[2]) % shared == 0
    d_final = jnp.where(first[:, None, None], jnp.repeat(d_final / plan.scale, shared, axis=1), 0)
    d_ends = starts_of_groups(plan, q, d_out, decay, d_final, reverse=True)
    dv, d_states, d_starts = outputs(plan, k, q, d_out, decay, d_ends, reverse=True, keep=True)
    assert states is not None  # both were kept
    assert d_states is not None
    dq, dk, dg = feature_gradients(plan, q, k, v, d_out, decay, states, d_states)
    if plan.by_head:
        dg = dg.sum(axis=2).swapaxes(1, 2)[..., None]
    dk, dv, dg = (_per_state(x, M, axis=2) for x in (dk, dv, dg))
    d_start = None if start is None else plan.scale * _per_state(d_starts[:, :, 0], M, axis=1)
    return dq, dk.astype(k.dtype), dv.astype(v.dtype), dg.astype(log_decay.dtype), d_start


_attend.defvjp(_attend_forward, _attend_backward)


def _per_state(x: jax.Array, heads: int, axis: int) -> jax.Array:
    """Sums over the query heads that share a state, in float32."""
    if x.shape[axis] == heads:
        return x
    x = x.reshape(*x.shape[:axis], heads, -1, *x.shape[axis + 1 :])
    return x.sum(axis=axis + 1, dtype=jnp.float32)
