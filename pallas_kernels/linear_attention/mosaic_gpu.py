r"""Causal linear attention for Hopper GPUs, in Pallas Mosaic GPU.

    o_t = sum_{s <= t} p(q_t, k_s) v_s  [ / sum_{s <= t} p(q_t, k_s) ],   p(q, k) = phi(q)·phi(k)

in the chunked form: dense inside a chunk of 64 tokens, a state of fixed size between chunks. The
state stays in the registers of one warpgroup that walks the chunks (`forward`); the gradient walks
them three times more, recomputing states rather than storing them (`backward`). Feature maps
(`features`): the second-order Taylor series of exp for F = 16, and the identity. A sequence is
split among several warpgroups where batch and heads are too few to fill the chip (`config`).

Operands of products are bfloat16; scores, sums, normaliser and state are float32.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.linear_attention.backward import input_gradients
from pallas_kernels.linear_attention.config import LaunchConfig, heuristic
from pallas_kernels.linear_attention.features import FeatureMap, Identity, Taylor
from pallas_kernels.linear_attention.forward import group_sums, outputs
from pallas_kernels.linear_attention.plan import Plan, States
from pallas_kernels.tiles import TILE


def linear_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    initial_state: tuple[jax.Array, jax.Array | None] | None = None,
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
      initial_state: `[B,K,D,H]` and, if normalised, `[B,K,D]`, float32; or None for zeros.
      feature_map: "taylor" (F = 16), whose D = 153 features are 1, the k_i, and k_i k_j for i <= j;
        or "identity" (F = D a multiple of 64).
      scale: factor of q·k: inside the Taylor series, or of the identity's p.
      normalize: whether to divide by the sum of weights; not with "identity".
      config: launch parameters; default: by shape.
      interpret: whether to run in the CPU simulator.

    Returns:
      `[B,T,N,H]` in the dtype of q, and the state after the last token.

    Raises:
      ValueError: saying why these kernels do not serve the call.
    """
    (B, T, N, F), H = q.shape, v.shape[3]
    reason = objection(
        feature_map=feature_map, normalize=normalize, dtype=q.dtype, F=F, H=H, scale=scale
    )
    if reason is not None:
        raise ValueError(f"linear_attention: the mosaic_gpu kernels {reason}")
    if feature_map == "taylor":
        # The weights of query features have to be powers of two; what is left of scale goes to q.
        mantissa, exponent = math.frexp(scale)
        phi: FeatureMap = Taylor(scale=2.0 ** (exponent - 1))
        q = q if mantissa == 0.5 else (2 * mantissa * q.astype(jnp.float32)).astype(q.dtype)
    else:
        phi = Identity(size=F, output_scale=scale)
    config = config or heuristic(B=B, T=T, N=N, F=F, H=H)
    padding = -T % (TILE * config.groups)
    plan = Plan(
        feature_map=phi, normalize=normalize, groups=config.groups, stages=config.stages,
        gradient_stages=config.gradient_stages, interpret=interpret,
    )  # fmt: skip
    # Padding comes last, so no token sees it, and its values are 0; but phi(0) counts as one key.
    q, k, v = (jnp.pad(x, ((0, 0), (0, padding), (0, 0), (0, 0))) for x in (q, k, v))
    out, (sums, totals) = _attend(plan, q, k, v, _in_slices(plan, initial_state))
    out, sums = out[:, :T], sums[:, :, : phi.size]
    if totals is not None:
        totals = totals[:, :, : phi.size].at[:, :, 0].add(-padding)
    return out, (sums, totals)


def objection(
    *, feature_map: str, normalize: bool, dtype, F: int, H: int, scale: float
) -> str | None:
    """Why the kernels do not serve a call, in words, or None."""
    if feature_map not in ("taylor", "identity"):
        return f"know the feature maps 'taylor' and 'identity', not {feature_map!r}"
    if dtype != jnp.bfloat16:
        return f"take bfloat16, not {jnp.dtype(dtype).name}"
    if feature_map == "taylor" and F != 16:
        return f"take the Taylor map of F=16, not F={F}"
    if feature_map == "identity" and F not in (64, 128):
        return f"take the identity map of F=64 or 128, not F={F}"
    if feature_map == "identity" and normalize:
        return "do not normalise the identity map"
    if H % TILE:
        return f"take values of a size H that {TILE} divides, not H={H}"
    if scale == 0:
        return "need a scale other than 0"
    return None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(plan: Plan, q, k, v, start):
    """Outputs and the final state, its features in whole slices."""
    return _attend_forward(plan, q, k, v, start)[0]


def _attend_forward(plan, q, k, v, start):
    starts = None if start is None else jax.tree.map(lambda s: s[:, :, None], start)
    if plan.groups > 1:
        starts = _carried(group_sums(plan, k, v), starts)
    out, den, ends = outputs(plan, q, k, v, starts)
    final = jax.tree.map(lambda s: s[:, :: q.shape[2] // k.shape[2], -1], ends)
    return (out, final), (q, k, v, out, den, starts, start is not None)


def _attend_backward(plan, residuals, cotangents):
    q, k, v, out, den, starts, has_start = residuals
    d_out, d_final = cotangents
    g, e = d_out, None
    if plan.normalize:
        # out = sums / den, and both are linear in the features.
        g = d_out.astype(jnp.float32) / den.swapaxes(1, 2)[..., None]
        e = -jnp.sum(g * out.astype(jnp.float32), axis=-1).swapaxes(1, 2)
        g = g.astype(q.dtype)
    scale, transposed = plan.feature_map.output_scale, plan.replace(transposed=True)
    d_ends = _per_query_head(jax.tree.map(lambda s: s / scale, d_final), q.shape[2])
    if plan.groups > 1:
        d_ends = _carried(group_sums(transposed, q, g, e), d_ends, reverse=True)
    values_only = transposed.replace(normalize=False)
    dv, _, d_starts = outputs(values_only, k, q, g, (d_ends[0], None))
    if isinstance(plan.feature_map, Identity):
        plan, transposed = (
            p.replace(feature_map=dataclasses.replace(plan.feature_map, size=v.shape[3]))
            for p in (plan, transposed)
        )
        dq, _, _ = outputs(plan, g, v, k, _swapped(starts))
        dk, _, _ = outputs(transposed, v, g, q, _swapped(d_ends))
    else:
        dq, _ = input_gradients(plan, q, k, g, v, e, starts)
        dk, d_starts = input_gradients(transposed, k, q, v, g, e, d_ends)
        dq, dk = dq.sum(axis=0), dk.sum(axis=0)
    heads = k.shape[2]
    d_start = None
    if has_start:
        d_start = jax.tree.map(lambda s: scale * _per_key_head(s[:, :, 0], heads, axis=1), d_starts)
    return (
        dq.astype(q.dtype),
        _per_key_head(dk, heads, axis=2).astype(k.dtype),
        _per_key_head(dv, heads, axis=2).astype(v.dtype),
        d_start,
    )


_attend.defvjp(_attend_forward, _attend_backward)


def _in_slices(plan: Plan, state):
    """A state with its features padded to whole slices."""

    def pad(x):
        missing = plan.slices * TILE - x.shape[2]
        widths = ((0, 0), (0, 0), (0, missing)) + ((0, 0),) * (x.ndim - 3)
        return jnp.pad(x.astype(jnp.float32), widths)

    return jax.tree.map(pad, state)


def _carried(sums: States, outer: States | None, *, reverse: bool = False) -> States:
    """States at the start of each group (reverse: at the end).

    Args:
      sums: what each group adds.
      outer: the state outside the first (last) group, as that of a single group, or None for zeros.
      reverse: whether sums run from the last group to the first.
    """

    def carry(sums, outer):
        inner = sums[:, :, 1:] if reverse else sums[:, :, :-1]
        ordered = [inner, outer] if reverse else [outer, inner]
        return lax.cumsum(jnp.concatenate(ordered, axis=2), axis=2, reverse=reverse)

    if outer is None:
        outer = jax.tree.map(lambda s: jnp.zeros_like(s[:, :, :1]), sums)
    return jax.tree.map(carry, sums, outer)


def _swapped(states: States | None) -> States | None:
    """The states of a map whose features are this one's values, and the other way round."""
    return None if states is None else (states[0].swapaxes(-1, -2), None)


def _per_query_head(d_final, heads: int) -> States:
    """The final state's gradient `[B,K,...]` as states of a single group, `[B,N,1,...]`.

    It belongs to one, the first, of the query heads that share a key head.
    """

    def spread(s):
        others = ((0, 0), (0, 0), (0, heads // s.shape[1] - 1)) + ((0, 0),) * (s.ndim - 2)
        return jnp.pad(s[:, :, None], others).reshape(s.shape[0], heads, 1, *s.shape[2:])

    return jax.tree.map(spread, d_final)


def _per_key_head(x: jax.Array, heads: int, axis: int) -> jax.Array:
    """Sums over the query heads that share a key head."""
    if x.shape[axis] == heads:
        return x
    return x.reshape(*x.shape[:axis], heads, -1, *x.shape[axis + 1 :]).sum(axis=axis + 1)
