"""Exact attention in O(T) memory: blocks of queries against blocks of keys, in plain JAX.

The running maximum and sum of Milakov & Gimelshein (2018, arXiv 1805.02867) and Rabe & Staats
(2021, arXiv 2112.05682), with the backward pass of FlashAttention (Dao et al. 2022, arXiv
2205.14135): scores are recomputed from the saved log-sum-exp. Blocks that no query of a block can
see, by causality, window or document, are never visited.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from lcattn.ops import blocks, dispatch
from lcattn.ops.blocks import Walk
from lcattn.ops.checks import accumulation_dtype
from lcattn.ops.softmax_attention import dense
from lcattn.ops.softmax_attention.alibi import Alibi
from lcattn.ops.visibility import Visibility
from lcattn.typing import Array

# Tokens up to which T·S scores cost little and fuse well; see benchmarks/.
_MATERIALIZE_UP_TO = {"cpu": 512, "gpu": 1024, "tpu": 1024}


class _Options(NamedTuple):
    """What is fixed while tracing."""

    scale: float
    t_block: int
    s_block: int


def attend_xla(
    q, k, v, *, visibility: Visibility, alibi: Alibi | None, scale: float, causal: bool,
    window: int | None, is_plain: bool, return_lse: bool, **rest,
) -> tuple[Array, Array | None]:  # fmt: skip
    """The form for any device: materialised when few, blocks otherwise."""
    del rest
    limit = _MATERIALIZE_UP_TO[dispatch.default_platform()]
    # Scores of one query are fewer than the numbers in its keys.
    short = q.shape[1] == 1 or max(q.shape[1], k.shape[1]) <= limit
    # JAX's function rounds float64 to float32 inside, and refuses float16 on a CPU.
    served = q.dtype in (jnp.float32, jnp.bfloat16) and q.shape[3] == v.shape[3]
    if short and served and not return_lse:
        out = dense.materialized(
            q, k, v, visibility=visibility, alibi=alibi, scale=scale,
            causal=causal, window=window, is_plain=is_plain,
        )  # fmt: skip
        return out, None
    return attend(q, k, v, visibility, scale=scale, alibi=alibi)


def attend(
    q: Array,
    k: Array,
    v: Array,
    visibility: Visibility,
    *,
    scale: float,
    alibi: Alibi | None = None,
) -> tuple[Array, Array]:
    """Attention to whatever is visible: outputs `[B,T,N,H]` and log-sum-exps `[B,T,N]`."""
    T, S, K = q.shape[1], *k.shape[1:3]
    t_block, s_block = min(blocks.default_block(), T), min(blocks.default_block(), S)
    if alibi is not None:
        alibi = Alibi(
            alibi.slopes.reshape(K, -1),
            blocks.pad(alibi.query_positions, t_block, 0),
            blocks.pad(alibi.key_positions, s_block, 0),
        )
    out, lse = _attend(
        _Options(scale, t_block, s_block),
        blocks.group_queries(q, K, t_block),
        blocks.group_keys(k, s_block),
        blocks.group_keys(v, s_block),
        alibi,
        blocks.pad_visibility(visibility, t_block, s_block),
    )
    return blocks.ungroup(out, T), blocks.ungroup(lse, T)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(options, q, k, v, alibi, visibility):
    return _forward(options, q, k, v, alibi, visibility)[0]


def _scores(options: _Options, walk: Walk, alibi: Alibi | None, i, j, q_block, k_block) -> Array:
    x = options.scale * blocks.scores(q_block, k_block, dtype=accumulation_dtype(q_block.dtype))
    if alibi is None:
        return x
    return x - alibi.slopes[..., None, None] * _distance(options, alibi, i, j)


def _distance(options: _Options, alibi: Alibi, i: Array, j: Array) -> Array:
    return alibi._replace(
        query_positions=lax.dynamic_slice_in_dim(
            alibi.query_positions, i * options.t_block, options.t_block
        ),
        key_positions=lax.dynamic_slice_in_dim(
            alibi.key_positions, j * options.s_block, options.s_block
        ),
    ).distance()


def _forward(options, q, k, v, alibi, visibility):
    walk = Walk(visibility, options.t_block, options.s_block)
    dtype = accumulation_dtype(q.dtype)

    def query_block(_, i):
        q_block = walk.queries(q, i)

        def key_block(j, carry):
            out, total, highest = carry
            x = _scores(options, walk, alibi, i, j, q_block, walk.keys(k, j))
            seen = walk.seen(i, j)
            new_highest = jnp.maximum(highest, jnp.max(x, axis=-1, where=seen, initial=-jnp.inf))
            # Rows that have seen nothing yet keep -inf; subtract 0 there, not -inf.
            base = jnp.where(jnp.isfinite(new_highest), new_highest, 0)
            weights = jnp.where(seen, _exp_below(x - base[..., None]), 0)
            kept = jnp.exp(highest - base)
            mixed = blocks.mix(weights.astype(v.dtype), walk.keys(v, j), dtype=dtype)
            return out * kept[..., None] + mixed, total * kept + weights.sum(axis=-1), new_highest

        # zeros_like of a product inherits what shard_map knows of q and v.
        rows = jnp.zeros_like(q_block[..., 0], dtype) + jnp.zeros_like(v[:, :, None, :1, 0])
        start = (jnp.zeros_like(rows[..., None] * v[:, :, None, :1]), rows, rows - jnp.inf)
        out, total, highest = walk.over_keys(i, key_block, start)
        empty = total == 0
        safe = jnp.where(empty, 1, total)
        lse = jnp.where(empty, -jnp.inf, highest + jnp.log(safe))
        return None, ((out / safe[..., None]).astype(q.dtype), lse)

    _, (out, lse) = walk.over_queries(query_block, None)
    return (out, lse), (q, k, v, alibi, visibility, out, lse)


def _backward(options, residuals, cotangents):
    q, k, v, alibi, visibility, out, lse = residuals
    d_out, d_lse = cotangents
    walk = Walk(visibility, options.t_block, options.s_block)
    dtype = accumulation_dtype(q.dtype)
    empty = jnp.isneginf(lse)
    base = jnp.where(empty, 0, lse)
    # d x_ts = p_ts (d_out_t · v_s - d_out_t · out_t + d_lse_t)
    inner = jnp.sum(d_out.astype(dtype) * out.astype(dtype), axis=-1) - jnp.where(empty, 0, d_lse)

    def query_block(carry, i):
        q_block, do_block, base_block, inner_block = (
            walk.queries(x, i) for x in (q, d_out, base, inner)
        )

        def key_block(j, carry):
            dq_block, dk, dv, d_slopes = carry
            k_block = walk.keys(k, j)
            x = _scores(options, walk, alibi, i, j, q_block, k_block)
            p = jnp.where(walk.seen(i, j), _exp_below(x - base_block[..., None]), 0)
            dp = blocks.scores(do_block, walk.keys(v, j), dtype=dtype)
            dx = p * (dp - inner_block[..., None])
            if alibi is not None:
                d_slopes -= jnp.einsum("bkgts,ts->kg", dx, _distance(options, alibi, i, j))
            p, dx = p.astype(q.dtype), (options.scale * dx).astype(q.dtype)
            dq_block += blocks.mix(dx, k_block, dtype=dtype)
            dk = walk.add_keys(dk, blocks.unmix(dx, q_block, dtype=dtype), j)
            dv = walk.add_keys(dv, blocks.unmix(p, do_block, dtype=dtype), j)
            return dq_block, dk, dv, d_slopes

        dk, dv, d_slopes = carry
        dq_start = jnp.zeros_like(q_block, dtype) + jnp.zeros_like(dk[:, :, None, :1, :1])
        dq_block, dk, dv, d_slopes = walk.over_keys(i, key_block, (dq_start, dk, dv, d_slopes))
        return (dk, dv, d_slopes), (dq_block.astype(q.dtype),)

    # As above: sums over queries vary over a mesh as q and d_out do.
    zero = jnp.zeros_like(q[:, :, 0, :1, :1] * d_out[:, :, 0, :1, :1], dtype)
    d_slopes = None if alibi is None else jnp.zeros_like(alibi.slopes) + zero[:1, :1, 0].sum()
    start = (jnp.zeros_like(k, dtype) + zero, jnp.zeros_like(v, dtype) + zero, d_slopes)
    (dk, dv, d_slopes), (dq,) = walk.over_queries(query_block, start)
    d_alibi = alibi and alibi._replace(slopes=d_slopes, query_positions=None, key_positions=None)
    return dq, dk.astype(k.dtype), dv.astype(v.dtype), d_alibi, None


def _exp_below(x: Array) -> Array:
    """Exp of what is at most 0, but for a fused multiply-add of huge scores."""
    return jnp.exp(jnp.minimum(x, 0))


_attend.defvjp(_forward, _backward)
