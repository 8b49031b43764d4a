"""The form in O(T · block) memory: blocks of queries against blocks of keys.

Forward, for each block of queries: one pass over the keys sums a row's weights a and finds their
maximum, and a second one mixes the values by the re-weighted P (LSSA needs one pass only). There is
no running maximum to correct for, since softplus does not overflow.

Backward, with d = dO·O, the saved sums S = sum a and W = sum r^p, and r = y / y_max:

    g_s  = p r_s^(p-1) (dO·v_s - d) / (y_max W)    where y_s > 0       (the gradient of n a_s / S)
    e    = sum_s g_s a_s / S                       one pass over the keys
    da_s = (n / S) (g_s - e)                       for every key seen, dropped ones too
    dk, dq from da_s sigmoid(c u_s) c;   dv_s = P_s dO                  a second pass

For LSSA and for flat rows, da_s = (dO·v_s - d) / S. No gradient flows through the maximum.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lcattn.ops import blocks
from lcattn.ops.blocks import Walk
from lcattn.ops.checks import accumulation_dtype
from lcattn.ops.softplus_attention.rows import Reweighting, Rows, unit
from lcattn.ops.visibility import Visibility
from lcattn.typing import Array


class _Options(NamedTuple):
    """What is fixed while tracing."""

    reweighting: Reweighting | None
    t_block: int
    s_block: int


class _Statistics(NamedTuple):
    """Sums of each row `[B,K,G,T]`, 1 where nothing is seen."""

    total: Array  # S, of the weights of the first stage
    highest: Array  # y_max, the largest excess over the threshold
    raised_total: Array  # W, of the weights of the second stage


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
    """Attention in blocks."""
    del is_packed
    q, k = (unit(x).astype(x.dtype) for x in (q, k))
    T, S, K = q.shape[1], *k.shape[1:3]
    t_block, s_block = min(blocks.default_block(), T), min(blocks.default_block(), S)
    out = _attend(
        _Options(reweighting, t_block, s_block),
        blocks.group_queries(q, K, t_block),
        blocks.group_keys(k, s_block),
        blocks.group_keys(v, s_block),
        Rows(*(blocks.pad(x, t_block, 1, mode="edge")[:, None, None] for x in rows)),
        blocks.pad_visibility(visibility, t_block, s_block),
    )
    return blocks.ungroup(out, T)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(options, q, k, v, rows, visibility):
    return _forward(options, q, k, v, rows, visibility)[0]


class _QueryBlock:
    """One block of queries, and its weights for one block of keys after another."""

    def __init__(self, options: _Options, walk: Walk, q: Array, k: Array, rows: Rows, i: Array):
        self.reweighting, self.walk, self.k, self.i = options.reweighting, walk, k, i
        self.q = walk.queries(q, i)
        self.rows = Rows(*(walk.queries(x, i) for x in rows))
        self.dtype = accumulation_dtype(q.dtype)

    def scores(self, j: Array) -> Array:
        cosines = blocks.scores(self.q, self.walk.keys(self.k, j), dtype=self.dtype)
        return self.rows.length_scale[..., None] * cosines

    def weights(self, scores: Array, j: Array) -> Array:
        """a, of the first stage."""
        return jnp.where(self.walk.seen(self.i, j), jax.nn.softplus(scores), 0)

    def ratio(self, weights: Array, total: Array, highest: Array) -> Array:
        """r, the excess relative to the row's largest; of no use in flat rows, but finite."""
        assert self.reweighting is not None
        safe = jnp.where(self.reweighting.is_flat(highest), 1, highest)
        return self.reweighting.excess(weights, total, self.rows) / safe[..., None]

    def raised(self, weights: Array, total: Array, highest: Array) -> Array:
        """The weights of the second stage, before they are normalised."""
        if self.reweighting is None:
            return weights
        raised = self.reweighting.raised(self.ratio(weights, total, highest))
        return jnp.where(self.reweighting.is_flat(highest)[..., None], weights, raised)

    def over_keys(self, step, start):
        """As `Walk.over_keys`, for this block of queries."""
        return self.walk.over_keys(self.i, step, start)


def _forward(options, q, k, v, rows, visibility):
    walk = Walk(visibility, options.t_block, options.s_block)
    dtype = accumulation_dtype(q.dtype)

    def query_block(_, i):
        block = _QueryBlock(options, walk, q, k, rows, i)
        # zeros_like of a product inherits what shard_map knows of q and v.
        zeros = jnp.zeros_like(block.q[..., 0], dtype) + jnp.zeros_like(v[:, :, None, :1, 0])

        def sum_weights(j, carry):
            total, highest = carry
            weights = block.weights(block.scores(j), j)
            return total + weights.sum(axis=-1), jnp.maximum(highest, weights.max(axis=-1))

        total = highest = zeros
        if options.reweighting is not None:
            total, highest = block.over_keys(sum_weights, (zeros, zeros))
            total = _not_zero(total)
            highest = options.reweighting.excess(highest[..., None], total, block.rows)[..., 0]

        def mix_values(j, carry):
            out, raised_total = carry
            raised = block.raised(block.weights(block.scores(j), j), total, highest)
            out += blocks.mix(raised.astype(v.dtype), walk.keys(v, j), dtype=dtype)
            return out, raised_total + raised.sum(axis=-1)

        start = (jnp.zeros_like(zeros[..., None] * v[:, :, None, :1]), zeros)
        out, raised_total = block.over_keys(mix_values, start)
        raised_total = _not_zero(raised_total)
        if options.reweighting is None:
            total = raised_total
        out = (out / raised_total[..., None]).astype(q.dtype)
        return None, (out, _Statistics(total, highest, raised_total))

    _, (out, statistics) = walk.over_queries(query_block, None)
    return out, (q, k, v, rows, visibility, out, statistics)


def _backward(options, residuals, d_out):
    q, k, v, rows, visibility, out, statistics = residuals
    walk = Walk(visibility, options.t_block, options.s_block)
    dtype = accumulation_dtype(q.dtype)
    mean = jnp.sum(d_out.astype(dtype) * out.astype(dtype), axis=-1)  # sum of P (dO·v)

    def query_block(carry, i):
        block = _QueryBlock(options, walk, q, k, rows, i)
        do_block, mean_block, total, highest, raised_total = (
            walk.queries(x, i) for x in (d_out, mean, *statistics)
        )

        def centred(j):
            """DO·v - d: how much better than the row's output each value would have been."""
            pull = blocks.scores(do_block, walk.keys(v, j), dtype=dtype)
            return pull - mean_block[..., None]

        def second_stage(weights, j):
            """G, zero in flat rows and wherever a key was dropped."""
            ratio = block.ratio(weights, total, highest)
            slope = options.reweighting.raised(ratio, derivative=True)
            flat = options.reweighting.is_flat(highest)
            factor = jnp.where(flat, 0, 1 / (jnp.where(flat, 1, highest) * raised_total))
            return jnp.where(ratio > 0, slope * factor[..., None] * centred(j), 0)

        def sum_gradients(j, e):
            weights = block.weights(block.scores(j), j)
            return e + jnp.sum(second_stage(weights, j) * weights, axis=-1)

        zeros = jnp.zeros_like(carry[0][:, :, None, :1, 0] * mean_block)
        if options.reweighting is not None:
            e = block.over_keys(sum_gradients, zeros) / total

        def weight_gradients(weights, j):
            first_stage = centred(j) / total[..., None]
            if options.reweighting is None:
                return first_stage
            both = second_stage(weights, j) - e[..., None]
            both *= (block.rows.length / total)[..., None]
            return jnp.where(options.reweighting.is_flat(highest)[..., None], first_stage, both)

        def key_block(j, carry):
            dq_block, dk, dv = carry
            scores = block.scores(j)
            weights = block.weights(scores, j)
            p = block.raised(weights, total, highest) / raised_total[..., None]
            d_cosines = jnp.where(
                weights > 0, weight_gradients(weights, j) * jax.nn.sigmoid(scores), 0
            )
            d_cosines = _operand(block.rows.length_scale[..., None] * d_cosines, q)
            dq_block += blocks.mix(d_cosines, walk.keys(k, j), dtype=dtype)
            dk = walk.add_keys(dk, blocks.unmix(d_cosines, block.q, dtype=dtype), j)
            dv = walk.add_keys(dv, blocks.unmix(_operand(p, v), do_block, dtype=dtype), j)
            return dq_block, dk, dv

        dk, dv = carry
        dq_start = jnp.zeros_like(zeros[..., None] * block.q)
        dq_block, dk, dv = block.over_keys(key_block, (dq_start, dk, dv))
        return (dk, dv), (dq_block.astype(q.dtype),)

    # Sums over queries vary over a mesh as q and d_out do.
    zero = jnp.zeros_like(q[:, :, 0, :1, :1] * d_out[:, :, 0, :1, :1], dtype)
    start = (jnp.zeros_like(k, dtype) + zero, jnp.zeros_like(v, dtype) + zero)
    (dk, dv), (dq,) = walk.over_queries(query_block, start)
    return dq, dk.astype(k.dtype), dv.astype(v.dtype), None, None


def _not_zero(total: Array) -> Array:
    return jnp.where(total == 0, 1, total)


def _operand(x: Array, like: Array) -> Array:
    """What matrix units multiply: bfloat16 stays; float16 cannot hold these gradients."""
    return x.astype(jnp.bfloat16) if like.dtype == jnp.bfloat16 else x


_attend.defvjp(_forward, _backward)
