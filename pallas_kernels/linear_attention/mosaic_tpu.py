r"""Causal linear attention for TPUs, in Pallas Mosaic TPU.

    o_t = sum_{s <= t} p(q_t, k_s) v_s  [ / sum_{s <= t} p(q_t, k_s) ],   p(q, k) = phi(q)·phi(k)

in the chunked form, as `mosaic_gpu`: dense inside a chunk, a state of fixed size between chunks,
which stays in VMEM while a core walks the chunks of a head (`tpu_sweeps`). The gradient walks them
twice more, recomputing states rather than storing them. The normaliser is one more row of values,
of ones, so that sweeps hardly know of it. Documents packed in a row share its state.

Operands of products have the dtype of q, bfloat16 or float32; sums and states are float32.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.linear_attention.config import TpuLaunchConfig, tpu_heuristic
from pallas_kernels.linear_attention.tpu_features import FeatureMap, Identity, Taylor
from pallas_kernels.linear_attention.tpu_plan import Plan, make_marks
from pallas_kernels.linear_attention.tpu_sweeps import key_gradients, outputs, query_gradients
from pallas_kernels.tpu import DTYPES, PACKED_SUBLANES, SUBLANES, feature_major, token_major


def linear_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    initial_state: tuple[jax.Array, jax.Array | None] | None = None,
    documents: jax.Array | None = None,
    *,
    feature_map: str,
    scale: float,
    normalize: bool,
    config: TpuLaunchConfig | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array | None]]:
    """Causal linear attention and its final state; differentiable in every array.

    Args:
      q: queries `[B,T,N,F]`, bfloat16 or float32; F is a multiple of 8.
      k: keys `[B,T,K,F]`; K divides N.
      v: values `[B,T,K,H]`; H is a multiple of 8.
      initial_state: `[B,K,D,H]` and, if normalised, `[B,K,D]`, float32; or None for zeros. It
        belongs to document 0.
      documents: document of each token `[B,T]` in int32: 0 for the first of a row, larger for later
        ones, negative for padding, which gives zeros. None: one document.
      feature_map: "taylor", whose D features are 1, the k_i, and k_i k_j for i <= j; or "identity".
      scale: factor of q·k: inside the Taylor series, or of the identity's p.
      normalize: whether to divide by the sum of weights; rows where that is 0 give zeros.
      config: launch parameters; default: by shape.
      interpret: whether to run in the TPU simulator.

    Returns:
      `[B,T,N,H]` in the dtype of q, and the state after the last token, of the last document.

    Raises:
      ValueError: saying why these kernels do not serve the call.
    """
    (B, T, N, F), (K, H) = q.shape, v.shape[2:]
    reason = objection(feature_map=feature_map, dtype=q.dtype, F=F, H=H)
    if reason is not None:
        raise ValueError(f"linear_attention: the mosaic_tpu kernels {reason}")
    config = config or tpu_heuristic(T=T, feature_map=feature_map, F=F)
    phi: FeatureMap = (Taylor if feature_map == "taylor" else Identity)(F, scale)
    plan = Plan(phi, normalize, groups=N // K, H=H, chunk=config.chunk, interpret=interpret)
    length = T + -T % config.chunk
    if documents is None and length > T:
        documents = jnp.zeros((B, T), jnp.int32)
    marks = None
    if documents is not None:
        documents = jnp.pad(documents, ((0, 0), (0, length - T)), constant_values=-1)
        marks = make_marks(documents, config.chunk)
    queries = feature_major(q, length).reshape(B, K, N // K, F, length)
    keys, values = feature_major(k, length), feature_major(v, length)
    if normalize:
        ones = jnp.ones_like(values[:, :, :1])
        fill = ((0, 0), (0, 0), (0, PACKED_SUBLANES - 1), (0, 0))
        values = jnp.concatenate([values, jnp.pad(ones, fill)], axis=2)
    if initial_state is None:
        start = jnp.zeros((B, K, phi.size, values.shape[2]), jnp.float32)
    else:
        start = phi.to_kernel(_joined(initial_state, values.shape[2]))
    out, final = _attend(plan, queries, keys, values, marks, start)
    out = token_major(out.reshape(B, N, H, length), T)
    final = phi.from_kernel(final)
    return out, (final[..., :H], final[..., H] if normalize else None)


def objection(*, feature_map: str, dtype, F: int, H: int) -> str | None:
    """Why the kernels do not serve a call, in words, or None."""
    if feature_map not in ("taylor", "identity"):
        return f"know the feature maps 'taylor' and 'identity', not {feature_map!r}"
    if dtype not in DTYPES:
        return f"take bfloat16 or float32, not {jnp.dtype(dtype).name}"
    largest = 32 if feature_map == "taylor" else 256
    if F % SUBLANES or largest < F:
        return f"take the {feature_map} map of F = 8, 16, ... {largest}, not F={F}"
    if H % SUBLANES or H > 256:
        return f"take values of a size H = 8, 16, ... 256, not H={H}"
    return None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(plan: Plan, q, k, w, marks, start):
    """Outputs `[B,K,G,H,T]` and the final state, with the kernel's features."""
    return _attend_forward(plan, q, k, w, marks, start)[0]


def _attend_forward(plan, q, k, w, marks, start):
    out, totals, final = outputs(plan, q, k, w, marks, start)
    return (out, final), (q, k, w, marks, start, out, totals)


def _attend_backward(plan, residuals, cotangents):
    q, k, w, marks, start, out, totals = residuals
    g, d_final = cotangents
    if plan.normalize:
        # out = sums / totals: the gradients of the sums, then of the total, as w has its ones.
        g = g.astype(jnp.float32) * jnp.where(totals == 0, 0, 1 / jnp.where(totals == 0, 1, totals))
        d_total = -jnp.sum(g * out.astype(jnp.float32), axis=3, keepdims=True)
        rest = jnp.zeros((*g.shape[:3], PACKED_SUBLANES - 1, g.shape[4]))
        g = jnp.concatenate([g, d_total, rest], axis=3).astype(q.dtype)
    dq = query_gradients(plan, q, g, k, w, marks, start)
    dk, dw, d_start = key_gradients(plan, q, g, k, w, marks, d_final)
    return dq, dk, dw, None, d_start


_attend.defvjp(_attend_forward, _attend_backward)


def _joined(state: tuple[jax.Array, jax.Array | None], width: int) -> jax.Array:
    """Sums and normaliser in one array `[B,K,D,W]`."""
    sums, normalizer = state
    if normalizer is not None:
        sums = jnp.concatenate([sums, normalizer[..., None]], axis=-1)
    missing = width - sums.shape[-1]
    return jnp.pad(sums.astype(jnp.float32), ((0, 0), (0, 0), (0, 0), (0, missing)))
