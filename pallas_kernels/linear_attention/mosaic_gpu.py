r"""Causal linear attention for Hopper GPUs, in Pallas Mosaic GPU.

    o_t = sum_{s <= t} p(q_t, k_s) v_s  [ / sum_{s <= t} p(q_t, k_s) ],   p(q, k) = phi(q)·phi(k)

in the chunked form: dense inside a chunk of 64 tokens, a state of fixed size between chunks. The
state stays in the registers of one warpgroup that walks the chunks (`forward`); the gradient walks
them three times more, recomputing states rather than storing them (`backward`). Feature maps
(`features`): the second-order Taylor series of exp for F = 16, and the identity. Documents packed
in a row share its state (`documents`). A sequence is split among several warpgroups where batch and
heads are too few to fill the chip (`config`).

Operands of products are bfloat16; scores, sums, normaliser and state are float32.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero

from pallas_kernels.linear_attention.backward import Divided, identity_gradients, taylor_gradients
from pallas_kernels.linear_attention.config import LaunchConfig, heuristic
from pallas_kernels.linear_attention.documents import pack
from pallas_kernels.linear_attention.features import FeatureMap, Identity, Taylor
from pallas_kernels.linear_attention.forward import carried, group_sums, outputs
from pallas_kernels.linear_attention.plan import Plan
from pallas_kernels.tiles import TILE


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
    config: LaunchConfig | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array | None]]:
    """Causal linear attention and its final state; differentiable in every array.

    Args:
      q: queries `[B,T,N,F]`, bfloat16.
      k: keys `[B,T,K,F]`; K divides N.
      v: values `[B,T,K,H]`; H is a multiple of 64.
      initial_state: `[B,K,D,H]` and, if normalised, `[B,K,D]`, float32; or None for zeros. It
        belongs to document 0.
      documents: document of each token `[B,T]` in int32: 0 for the first of a row, larger for later
        ones, negative for padding, which gives zeros. None: one document.
      feature_map: "taylor" (F = 16), whose D = 153 features are 1, the k_i, and k_i k_j for i <= j;
        or "identity" (F = D a multiple of 64).
      scale: factor of q·k: inside the Taylor series, or of the identity's p.
      normalize: whether to divide by the sum of weights; rows where that is 0 give zeros.
      config: launch parameters; default: by shape.
      interpret: whether to run in the CPU simulator.

    Returns:
      `[B,T,N,H]` in the dtype of q, and the state after the last token, of the last document.

    Raises:
      ValueError: saying why these kernels do not serve the call.
    """
    (B, T, N, F), H = q.shape, v.shape[3]
    reason = objection(feature_map=feature_map, dtype=q.dtype, F=F, H=H, scale=scale)
    if reason is not None:
        raise ValueError(f"linear_attention: the mosaic_gpu kernels {reason}")
    if feature_map == "taylor":
        # The weights of query features have to be powers of two; what is left of scale goes to q.
        mantissa, exponent = math.frexp(scale)
        phi: FeatureMap = Taylor(scale=2.0 ** (exponent - 1))
        q = q if mantissa == 0.5 else (2 * mantissa * q.astype(jnp.float32)).astype(q.dtype)
    else:
        # The sum of weights has the same scale.
        phi = Identity(size=F, output_scale=1.0 if normalize else scale, normalized=normalize)
    config = config or heuristic(B=B, T=T, N=N, F=F, H=H)
    padding = -T % (TILE * config.groups)
    plan = Plan(
        feature_map=phi, normalize=normalize, groups=config.groups, stages=config.stages,
        gradient_stages=config.gradient_stages, interpret=interpret,
    )  # fmt: skip
    # Padding comes last, so no token sees it, and its values are 0; but phi(0) counts as one key.
    q, k, v = (jnp.pad(x, ((0, 0), (0, padding), (0, 0), (0, 0))) for x in (q, k, v))
    packed = None
    if documents is not None:
        packed = pack(jnp.pad(documents, ((0, 0), (0, padding)), constant_values=-1))
    out, (sums, totals) = _attend(plan, q, k, v, packed, _in_slices(plan, initial_state))
    out, sums = out[:, :T], sums[:, :, : phi.size]
    if totals is not None:
        totals = totals[:, :, : phi.size]
        if feature_map == "taylor" and packed is None:
            totals = totals.at[:, :, 0].add(-padding)
    return out, (sums, totals)


def objection(*, feature_map: str, dtype, F: int, H: int, scale: float) -> str | None:
    """Why the kernels do not serve a call, in words, or None."""
    if feature_map not in ("taylor", "identity"):
        return f"know the feature maps 'taylor' and 'identity', not {feature_map!r}"
    if dtype != jnp.bfloat16:
        return f"take bfloat16, not {jnp.dtype(dtype).name}"
    if feature_map == "taylor" and F != 16:
        return f"take the Taylor map of F=16, not F={F}"
    if feature_map == "identity" and F not in (64, 128):
        return f"take the identity map of F=64 or 128, not F={F}"
    if H % TILE:
        return f"take values of a size H that {TILE} divides, not H={H}"
    if scale == 0:
        return "need a scale other than 0"
    return None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(plan: Plan, q, k, v, documents, start):
    """Outputs and the final state, its features in whole slices."""
    return _run(plan, q, k, v, documents, start)[0]


def _run(plan, q, k, v, documents, start):
    starts = None if start is None else jax.tree.map(lambda s: s[:, :, None], start)
    if plan.groups > 1:
        starts = carried(group_sums(plan, k, v, documents), starts, documents)
    out, inverse, ends = outputs(plan, q, k, v, starts, documents)
    final = jax.tree.map(lambda s: s[:, :: q.shape[2] // k.shape[2], -1], ends)
    return (out, final), (q, k, v, documents, out, inverse, starts, start is not None)


def _attend_forward(plan, *arguments):
    return _run(plan, *jax.tree.map(lambda x: x.value, arguments, is_leaf=_is_argument))


def _is_argument(x) -> bool:
    return isinstance(x, CustomVJPPrimal)


def _attend_backward(plan, residuals, cotangents):
    q, k, v, documents, out, inverse, starts, has_start = residuals
    d_out, d_final = cotangents
    d_out = _instantiated(d_out)
    heads, scale = q.shape[2], plan.feature_map.output_scale
    d_end = None
    if not all(isinstance(s, SymbolicZero) for s in jax.tree.leaves(d_final)):
        d_end = jax.tree.map(lambda s: _of_query_heads(_instantiated(s) / scale, heads), d_final)
    divided = Divided(out, inverse) if plan.normalize else None
    of = taylor_gradients if isinstance(plan.feature_map, Taylor) else identity_gradients
    dq, dk, dv, d_starts = of(plan, q, k, v, d_out, divided, starts, d_end, documents)
    heads, d_start = k.shape[2], None
    if has_start:
        d_start = jax.tree.map(lambda s: scale * _of_key_heads(s[:, :, 0], heads, axis=1), d_starts)
    return (
        dq.astype(q.dtype),
        _of_key_heads(dk, heads, axis=2).astype(k.dtype),
        _of_key_heads(dv, heads, axis=2).astype(v.dtype),
        None,
        d_start,
    )


_attend.defvjp(_attend_forward, _attend_backward, symbolic_zeros=True)


def _instantiated(x: Any) -> jax.Array:
    zero = x
    return jnp.zeros(zero.shape, zero.dtype) if isinstance(x, SymbolicZero) else x


def _in_slices(plan: Plan, state):
    """A state with its features padded to whole slices."""

    def pad(x):
        missing = plan.slices * TILE - x.shape[2]
        widths = ((0, 0), (0, 0), (0, missing)) + ((0, 0),) * (x.ndim - 3)
        return jnp.pad(x.astype(jnp.float32), widths)

    return jax.tree.map(pad, state)


def _of_query_heads(x: jax.Array, heads: int) -> jax.Array:
    """The final state's gradient `[B,K,...]` as the state of a single group, `[B,N,1,...]`.

    It belongs to one, the first, of the query heads that share a key head.
    """
    others = ((0, 0), (0, 0), (0, heads // x.shape[1] - 1)) + ((0, 0),) * (x.ndim - 2)
    return jnp.pad(x[:, :, None], others).reshape(x.shape[0], heads, 1, *x.shape[2:])


def _of_key_heads(x: jax.Array, heads: int, axis: int) -> jax.Array:
    """Sums over the query heads that share a key head."""
    if x.shape[axis] == heads:
        return x
    return x.reshape(*x.shape[:axis], heads, -1, *x.shape[axis + 1 :]).sum(axis=axis + 1)
