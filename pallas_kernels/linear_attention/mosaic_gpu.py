r"""Causal linear attention for Hopper GPUs, in Pallas Mosaic GPU.

    o_t = sum_{s <= t} p(q_t, k_s) v_s  [ / sum_{s <= t} p(q_t, k_s) ],   p(q, k) = phi(q)·phi(k)

in the chunked form: dense inside a chunk of 64 tokens, a state of fixed size between chunks. The
state stays in the registers of one warpgroup that walks the chunks (`forward`); the gradient walks
them twice more, recomputing states rather than storing them (`backward`). Feature maps (`features`):
the second-order Taylor series of exp for F = 16, and the identity. A sequence is split among
several warpgroups where batch and heads are too few to fill the chip (`config`).

Operands of products are bfloat16; scores, sums, normaliser and state are float32.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.linear_attention import backward, forward
from pallas_kernels.linear_attention.config import LaunchConfig, heuristic
from pallas_kernels.linear_attention.features import FeatureMap, Identity, Taylor
from pallas_kernels.linear_attention.problem import Problem
from pallas_kernels.linear_attention.tiles import TILE


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
    (B, T, N, F), (K, H) = q.shape, v.shape[2:]
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
    config = config or heuristic(B=B, T=T, N=N, H=H)
    padding = -T % (TILE * config.groups)
    problem = Problem(
        B=B, T=T + padding, N=N, K=K, F=F, H=H, feature_map=phi, normalize=normalize,
        groups=config.groups, stages=config.stages, interpret=interpret,
    )  # fmt: skip
    # Padding comes last, so no token sees it, and its values are 0; but phi(0) counts as one key.
    q, k, v = (jnp.pad(x, ((0, 0), (0, padding), (0, 0), (0, 0))) for x in (q, k, v))
    out, (sums, totals) = _attend(problem, q, k, v, _padded(problem, initial_state))
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
def _attend(problem: Problem, q, k, v, start):
    """Outputs and the final state, its features in whole slices."""
    (out, final), _ = _attend_forward(problem, q, k, v, start)
    return out, final


def _attend_forward(problem, q, k, v, start):
    starts = None if start is None else jax.tree.map(lambda s: s[:, :, None], start)
    if problem.groups > 1:
        starts = _carried(forward.group_sums(problem, k, v), starts)
    out, den, ends = forward.outputs(problem, q, k, v, starts)
    final = jax.tree.map(lambda s: s[:, :: problem.queries_per_key, -1], ends)
    return (out, final), (q, k, v, out, den, starts, start is not None)


def _attend_backward(problem, residuals, cotangents):
    q, k, v, out, den, starts, has_start = residuals
    d_out, d_final = cotangents
    g, e = d_out, None
    if problem.normalize:
        # out = sums / den, both linear in the features.
        inverse = 1 / den.swapaxes(1, 2)[..., None]
        g = d_out.astype(jnp.float32) * inverse
        e = -jnp.sum(g * out.astype(jnp.float32), axis=-1).swapaxes(1, 2)
        g = g.astype(q.dtype)
    d_ends = _per_query_head(problem, d_final)
    if problem.groups > 1:
        sums = forward.group_sums(problem, q, g, of_queries=True, weights=e)
        d_ends = _carried(sums, d_ends, reverse=True)
    dq = backward.query_gradients(problem, q, k, v, g, e, starts)
    dk, dv, d_starts = backward.key_gradients(problem, q, k, v, g, e, d_ends)
    d_start = None
    if has_start:
        d_start = jax.tree.map(lambda s: _per_key_head(problem, s[:, :, 0], axis=1), d_starts)
        d_start = jax.tree.map(lambda s: problem.feature_map.output_scale * s, d_start)
    return (
        dq.sum(axis=0).astype(q.dtype),
        _per_key_head(problem, dk.sum(axis=0), axis=2).astype(k.dtype),
        _per_key_head(problem, dv, axis=2).astype(v.dtype),
        d_start,
    )


_attend.defvjp(_attend_forward, _attend_backward)


def _padded(problem: Problem, state):
    """A state with its features in whole slices."""
    if state is None:
        return None

    def pad(x):
        rest = ((0, 0),) * (x.ndim - 3)
        missing = problem.slices * TILE - x.shape[2]
        return jnp.pad(x.astype(jnp.float32), ((0, 0), (0, 0), (0, missing), *rest))

    return jax.tree.map(pad, state)


def _carried(sums, outer, *, reverse: bool = False):
    """States `[B,heads,groups,...]` at the start of each group (reverse: at the end).

    Args:
      sums: what each group adds.
      outer: the state outside the first (last) group, `[B,heads,1,...]`, or None for zeros.
      reverse: whether sums run from the last group to the first.
    """

    def carry(sums, outer):
        inner = sums[:, :, 1:] if reverse else sums[:, :, :-1]
        return lax.cumsum(
            jnp.concatenate([inner, outer] if reverse else [outer, inner], axis=2),
            axis=2, reverse=reverse,
        )  # fmt: skip

    if outer is None:
        outer = jax.tree.map(lambda s: jnp.zeros_like(s[:, :, :1]), sums)
    return jax.tree.map(carry, sums, outer)


def _per_query_head(problem: Problem, d_final):
    """The final state's gradient as `key_gradients` takes it, `[B,N,1,...]`.

    It belongs to the first of the query heads that share a key head, and lacks the output's scale.
    """

    def spread(s):
        s = s[:, :, None] / problem.feature_map.output_scale
        others = ((0, 0), (0, 0), (0, problem.queries_per_key - 1)) + ((0, 0),) * (s.ndim - 3)
        return jnp.pad(s, others).reshape(problem.B, problem.N, 1, *s.shape[3:])

    return jax.tree.map(spread, d_final)


def _per_key_head(problem: Problem, x: jax.Array, axis: int) -> jax.Array:
    """Sums over the query heads that share a key head."""
    if problem.queries_per_key == 1:
        return x
    shape = (*x.shape[:axis], problem.K, problem.queries_per_key, *x.shape[axis + 1 :])
    return x.reshape(shape).sum(axis=axis + 1)
