"""The listed blocks in plain JAX, in memory of O(T) beside the lists.

Turns of a few blocks of queries walk to the end of the longest of their lists with a running
maximum and sum, as exact attention in blocks does (`softmax_attention.chunked`). The backward pass
walks once more and computes the scores again from the saved log-sum-exp, whose gradient it honours.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from lcattn.ops.block_sparse_attention.plan import BlockPlan
from lcattn.ops.block_sparse_attention.rows import Layout, place, take
from lcattn.ops.block_sparse_attention.tiles import whole_blocks
from lcattn.ops.checks import accumulation_dtype
from lcattn.ops.visibility import NEVER, sees
from lcattn.typing import Array


class _Lists(NamedTuple):
    """The lists of blocks of queries, `[m,b,h,...]`, and the positions of these."""

    blocks: Array
    count: Array
    positions: Array
    log_weight: Array | None


class _Keys(NamedTuple):
    """Blocks of keys: `k` and `v` `[B,K,n,s,...]`, begins and ends `[b,h,n,s]`."""

    k: Array
    v: Array
    begin: Array
    end: Array


def attend(
    q: Array, k: Array, v: Array, plan: BlockPlan, *, scale: float, is_part: bool = False
) -> tuple[Array, Array]:
    """Outputs `[B,T,N,H]` and log-sum-exps `[B,T,N]` over the listed blocks."""
    layout = Layout.of(plan, q.shape[2], k.shape[2])
    lists = _Lists(
        jnp.moveaxis(plan.blocks, 2, 0),
        jnp.moveaxis(plan.count, 2, 0),
        layout.positions(plan.seen.queries),
        None if plan.log_weight is None else jnp.moveaxis(plan.log_weight, 2, 0),
    )
    begin, end = (whole_blocks(x, plan.key_block, constant_values=NEVER) for x in plan.seen[1:])
    k, v = (
        jnp.moveaxis(whole_blocks(jnp.moveaxis(x, 1, -1), plan.key_block), 2, -1) for x in (k, v)
    )
    out, lse = _attend(layout, scale, is_part, layout.rows(q), k, v, lists, begin, end)
    return layout.unrows(out), layout.unrows(lse)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _attend(layout, scale, is_part, q, k, v, lists, begin, end):
    return _forward(layout, scale, is_part, q, k, v, lists, begin, end)[0]


def _scores(
    layout: Layout, scale: float, q: Array, keys: _Keys, lists: _Lists, e: Array
) -> tuple[Array, Array, Array]:
    """The e-th blocks of lists `[R,B,P]`, their scores `[R,B,P,r,s]`, and which of them count."""
    dtype, rows = accumulation_dtype(q.dtype), q.shape[1]
    index = layout.spread(_entry(lists.blocks, e), rows)
    x = scale * _product("...rf,...sf->...rs", q, take(keys.k, index), dtype)
    if lists.log_weight is not None:
        x += layout.spread(_entry(lists.log_weight, e), rows)[..., None, None].astype(dtype)
    position = layout.spread(lists.positions, rows)[..., :, None]
    begin, end = (take(edge, index)[..., None, :] for edge in (keys.begin, keys.end))
    is_listed = layout.spread(e < lists.count, rows)[..., None, None]
    return index, x, is_listed & sees(position, begin, end)


def _forward(layout, scale, is_part, q, k, v, lists, begin, end):
    del is_part
    keys, dtype = _Keys(k, v, begin, end), accumulation_dtype(q.dtype)
    # zeros_like of a product inherits what shard_map knows of q, k and v.
    zero = _zero(dtype, q, k, v)

    def turn(_, part):
        q, lists = part

        def entry(e, carry):
            out, total, highest = carry
            index, x, seen = _scores(layout, scale, q, keys, lists, e)
            new_highest = jnp.maximum(highest, jnp.max(x, axis=-1, where=seen, initial=-jnp.inf))
            # Rows that have seen nothing yet keep -inf; subtract 0 there, not -inf.
            base = jnp.where(jnp.isfinite(new_highest), new_highest, 0)
            weights = jnp.where(seen, _exp_below(x - base[..., None]), 0)
            kept = jnp.exp(highest - base)
            mixed = _product("...rs,...sh->...rh", weights.astype(v.dtype), take(v, index), dtype)
            out = out * kept[..., None] + mixed
            return out, total * kept + weights.sum(axis=-1), new_highest

        rows = jnp.zeros(q.shape[:-1], dtype) + zero
        start = (rows[..., None] + jnp.zeros(v.shape[-1], dtype), rows, rows - jnp.inf)
        out, total, highest = lax.fori_loop(0, lists.count.max(initial=0), entry, start)
        empty = total == 0
        safe = jnp.where(empty, 1, total)
        lse = jnp.where(empty, -jnp.inf, highest + jnp.log(safe))
        return None, ((out / safe[..., None]).astype(q.dtype), lse)

    _, rows = lax.scan(turn, None, jax.tree.map(layout.turns, (q, lists)))
    out, lse = (layout.unturns(x, len(q)) for x in rows)
    return (out, lse), (q, k, v, lists, begin, end, out, lse)


def _backward(layout, scale, is_part, residuals, cotangents):
    q, k, v, lists, begin, end, out, lse = residuals
    d_out, d_lse = cotangents
    keys, dtype = _Keys(k, v, begin, end), accumulation_dtype(q.dtype)
    empty = jnp.isneginf(lse)
    base = jnp.where(empty, 0, lse)
    # d x_ts = p_ts (d_out_t · v_s - d_out_t · out_t + d_lse_t)
    inner = -jnp.where(empty, 0, d_lse)
    if not is_part:
        inner += jnp.sum(d_out.astype(dtype) * out.astype(dtype), axis=-1)
    zero = _zero(dtype, q, k, v, d_out)

    def turn(sums, part):
        q, d_out, base, inner, lists = part

        def entry(e, carry):
            dq, dk, dv = carry
            index, x, seen = _scores(layout, scale, q, keys, lists, e)
            p = jnp.where(seen, _exp_below(x - base[..., None]), 0)
            dp = _product("...rh,...sh->...rs", d_out, take(v, index), dtype)
            dx = p * (dp - inner[..., None])
            p, dx = p.astype(q.dtype), (scale * dx).astype(q.dtype)
            dq += _product("...rs,...sf->...rf", dx, take(k, index), dtype)
            at = place(layout.heads, index, k.shape)
            dk = dk.at[at].add(_product("...rs,...rf->...sf", dx, q, dtype))
            dv = dv.at[at].add(_product("...rs,...rh->...sh", p, d_out, dtype))
            return dq, dk, dv

        start = (jnp.zeros(q.shape, dtype) + zero, *sums)
        dq, *sums = lax.fori_loop(0, lists.count.max(initial=0), entry, start)
        return tuple(sums), dq.astype(q.dtype)

    start = tuple(jnp.zeros(x.shape, dtype) + zero for x in (k, v))
    parts = jax.tree.map(layout.turns, (q, d_out, base, inner, lists))
    (dk, dv), dq = lax.scan(turn, start, parts)
    dq = layout.unturns(dq, len(q))
    return dq, dk.astype(k.dtype), dv.astype(v.dtype), None, None, None


_attend.defvjp(_forward, _backward)


def _product(spec: str, x: Array, y: Array, dtype: jnp.dtype) -> Array:
    return jnp.einsum(spec, x, y, preferred_element_type=dtype)


def _entry(lists: Array, e: Array) -> Array:
    return lax.dynamic_index_in_dim(lists, e, axis=-1, keepdims=False)


def _exp_below(x: Array) -> Array:
    """Exp of what is at most 0, but for a fused multiply-add of huge scores."""
    return jnp.exp(jnp.minimum(x, 0))


def _zero(dtype: jnp.dtype, *arrays: Array) -> Array:
    zeros = (jnp.zeros_like(x.reshape(-1)[:1].sum(), dtype) for x in arrays)
    return functools.reduce(jnp.add, zeros)
