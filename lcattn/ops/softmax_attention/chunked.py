"""Exact attention in O(T) memory: blocks of queries against blocks of keys, in plain JAX.

The running maximum and sum of Milakov & Gimelshein (2018, arXiv 1805.02867) and Rabe & Staats
(2021, arXiv 2112.05682), with the backward pass of FlashAttention (Dao et al. 2022, arXiv
2205.14135): scores are recomputed from the saved log-sum-exp. Blocks that no query of a block can
see, by causality or window, are never visited.

Arrays inside are `[B, K, G, T, H]` for queries and `[B, K, S, H]` for keys and values, where the
G = N/K query heads of a group share a key head.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from lcattn.ops import dispatch
from lcattn.ops.checks import accumulation_dtype
from lcattn.ops.softmax_attention import dense
from lcattn.ops.softmax_attention.masking import distance_bias, visible
from lcattn.typing import Array

# Tokens a block, and the length up to which T·S scores cost little and fuse well; see benchmarks/.
# A GPU pays for every step of a loop, a CPU for every score that causality hides.
_BLOCK = {"cpu": 256, "gpu": 1024, "tpu": 512}
_MATERIALIZE_UP_TO = {"cpu": 512, "gpu": 1024, "tpu": 1024}


class _Options(NamedTuple):
    """What is fixed while tracing."""

    causal: bool
    window: int | None
    scale: float
    t_block: int
    s_block: int


class _Context(NamedTuple):
    """What scores depend on besides q and k; integer arrays are not differentiated."""

    query_positions: Array  # [T]
    key_positions: Array  # [S]
    segments: tuple[Array, Array] | None  # of queries [B,T] and keys [B,S]


def attend_xla(
    q, k, v, *, segment_ids, alibi_slopes, query_position, key_position, causal, window, scale,
    aligned, return_lse,
) -> tuple[Array, Array | None]:  # fmt: skip
    """The form for any device: materialised when short, blocks otherwise."""
    (_, T, N, F), (S, K), H = q.shape, k.shape[1:3], v.shape[3]
    platform = dispatch.default_platform()
    # JAX's function rounds float64 to float32 inside, and refuses float16 on a CPU.
    served = q.dtype in (jnp.float32, jnp.bfloat16) and F == H and not return_lse
    if max(T, S) <= _MATERIALIZE_UP_TO[platform] and served:
        out = dense.materialized(
            q, k, v, segment_ids=segment_ids, alibi_slopes=alibi_slopes,
            query_position=query_position, key_position=key_position,
            causal=causal, window=window, scale=scale, aligned=aligned,
        )  # fmt: skip
        return out, None

    block = _BLOCK[platform]
    t_block, s_block = min(block, T), min(block, S)
    context = _Context(
        query_positions=_pad(query_position + jnp.arange(T, dtype=jnp.int32), t_block, 0, 0),
        # A negative position marks a key that does not exist, hence also one added as padding.
        key_positions=_pad(key_position + jnp.arange(S, dtype=jnp.int32), s_block, 0, -1),
        segments=None
        if segment_ids is None
        else (_pad(segment_ids, t_block, 1, -1), _pad(segment_ids, s_block, 1, -1)),
    )
    grouped = q.reshape(*q.shape[:2], K, N // K, F).transpose(0, 2, 3, 1, 4)
    slopes = None if alibi_slopes is None else alibi_slopes.reshape(K, N // K)
    out, lse = _attend(
        _Options(causal, window, scale, t_block, s_block),
        _pad(grouped, t_block, 3, 0),
        _pad(k.transpose(0, 2, 1, 3), s_block, 2, 0),
        _pad(v.transpose(0, 2, 1, 3), s_block, 2, 0),
        slopes,
        context,
    )
    out = out[:, :, :, :T].transpose(0, 3, 1, 2, 4).reshape(*q.shape[:3], H)
    return out, lse[:, :, :, :T].transpose(0, 3, 1, 2).reshape(q.shape[:3])


def _pad(x: Array, multiple: int, axis: int, fill: int) -> Array:
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -x.shape[axis] % multiple)
    return jnp.pad(x, widths, constant_values=fill)


def _block(x: Array, index: Array | int, size: int, axis: int) -> Array:
    return lax.dynamic_slice_in_dim(x, index * size, size, axis)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(options, q, k, v, slopes, context):
    return _forward(options, q, k, v, slopes, context)[0]


class _Blocks:
    """The walk over blocks that the forward and the backward pass share."""

    def __init__(self, options: _Options, q: Array, k: Array, slopes, context: _Context):
        self.options, self.q, self.k, self.slopes, self.context = options, q, k, slopes, context
        self.t_size, self.s_size = options.t_block, options.s_block
        self.t_count, self.s_count = q.shape[3] // self.t_size, k.shape[2] // self.s_size
        self.dtype = accumulation_dtype(q.dtype)

    def key_range(self, i: Array) -> tuple[Array, Array]:
        """The first key block that queries of block i can see, and the one after the last."""
        first_query = self.context.query_positions[0] + i * self.t_size
        first_key = self.context.key_positions[0]
        low, high = jnp.int32(0), jnp.int32(self.s_count)
        if self.options.causal:
            keys_before = first_query + self.t_size - first_key
            high = jnp.clip(-(-keys_before // self.s_size), 0, self.s_count)
        if self.options.window is not None:
            keys_passed = first_query - self.options.window + 1 - first_key
            low = jnp.clip(keys_passed // self.s_size, 0, high)
        return low, high

    def scores(self, i: Array, j: Array, q_block: Array, k_block: Array) -> tuple[Array, Array]:
        """Scores `[B,K,G,t,s]` of a pair of blocks, and which of them count."""
        x = self.options.scale * jnp.einsum(
            "bkgth,bksh->bkgts", q_block, k_block, preferred_element_type=self.dtype
        )
        c = self.context
        t = _block(c.query_positions, i, self.t_size, 0)
        s = _block(c.key_positions, j, self.s_size, 0)
        if self.slopes is not None:
            bias = distance_bias(self.slopes.reshape(-1), t, s)
            x += bias.reshape(*self.slopes.shape, *bias.shape[1:])
        segments = None
        if c.segments is not None:
            segments = (
                _block(c.segments[0], i, self.t_size, 1),
                _block(c.segments[1], j, self.s_size, 1),
            )
        seen = visible(t, s, segments, causal=self.options.causal, window=self.options.window)
        return x, seen[:, None, None]


def _forward(options, q, k, v, slopes, context):
    blocks = _Blocks(options, q, k, slopes, context)

    def query_block(_, i):
        q_block = _block(q, i, blocks.t_size, 3)

        def key_block(j, carry):
            out, total, highest = carry
            v_block = _block(v, j, blocks.s_size, 2)
            x, seen = blocks.scores(i, j, q_block, _block(k, j, blocks.s_size, 2))
            new_highest = jnp.maximum(highest, jnp.max(x, axis=-1, where=seen, initial=-jnp.inf))
            # Rows that have seen nothing yet keep -inf; subtract 0 there, not -inf.
            base = jnp.where(jnp.isfinite(new_highest), new_highest, 0)
            weights = jnp.where(seen, jnp.exp(x - base[..., None]), 0)
            kept = jnp.exp(highest - base)
            out = out * kept[..., None] + jnp.einsum(
                "bkgts,bksh->bkgth", weights.astype(v.dtype), v_block,
                preferred_element_type=blocks.dtype,
            )  # fmt: skip
            return out, total * kept + weights.sum(axis=-1), new_highest

        # zeros_like of a product inherits what shard_map knows of q and v.
        rows = jnp.zeros_like(q_block[..., 0], blocks.dtype) + jnp.zeros_like(v[:, :, None, :1, 0])
        start = (jnp.zeros_like(rows[..., None] * v[:, :, None, :1]), rows, rows - jnp.inf)
        out, total, highest = lax.fori_loop(*blocks.key_range(i), key_block, start)
        empty = total == 0
        safe = jnp.where(empty, 1, total)
        lse = jnp.where(empty, -jnp.inf, highest + jnp.log(safe))
        return None, ((out / safe[..., None]).astype(q.dtype), lse)

    _, (out, lse) = lax.scan(query_block, None, jnp.arange(blocks.t_count, dtype=jnp.int32))
    out, lse = _unblock(out), _unblock(lse)
    return (out, lse), (q, k, v, slopes, context, out, lse)


def _backward(options, residuals, cotangents):
    q, k, v, slopes, context, out, lse = residuals
    d_out, d_lse = cotangents
    blocks = _Blocks(options, q, k, slopes, context)
    dtype = blocks.dtype
    empty = jnp.isneginf(lse)
    base = jnp.where(empty, 0, lse)
    # d x_ts = p_ts (d_out_t · v_s - d_out_t · out_t + d_lse_t)
    inner = jnp.sum(d_out.astype(dtype) * out.astype(dtype), axis=-1) - jnp.where(empty, 0, d_lse)

    def query_block(carry, i):
        q_block, do_block = (_block(x, i, blocks.t_size, 3) for x in (q, d_out))
        base_block, inner_block = (_block(x, i, blocks.t_size, 3) for x in (base, inner))

        def key_block(j, carry):
            dq_block, dk, dv, d_slopes = carry
            k_block, v_block = (_block(x, j, blocks.s_size, 2) for x in (k, v))
            x, seen = blocks.scores(i, j, q_block, k_block)
            p = jnp.where(seen, jnp.exp(x - base_block[..., None]), 0)
            dp = jnp.einsum(
                "bkgth,bksh->bkgts", do_block, v_block, preferred_element_type=dtype
            )  # fmt: skip
            dx = p * (dp - inner_block[..., None])
            if slopes is not None:
                distance = distance_bias(
                    jnp.ones_like(slopes).reshape(-1),
                    _block(context.query_positions, i, blocks.t_size, 0),
                    _block(context.key_positions, j, blocks.s_size, 0),
                ).reshape(*slopes.shape, blocks.t_size, blocks.s_size)
                d_slopes += jnp.einsum("bkgts,kgts->kg", dx, distance)
            p, dx = p.astype(q.dtype), (options.scale * dx).astype(q.dtype)
            dq_block += jnp.einsum("bkgts,bksh->bkgth", dx, k_block, preferred_element_type=dtype)
            dk_block = jnp.einsum("bkgts,bkgth->bksh", dx, q_block, preferred_element_type=dtype)
            dv_block = jnp.einsum("bkgts,bkgth->bksh", p, do_block, preferred_element_type=dtype)
            return (
                dq_block, _add_block(dk, dk_block, j, blocks.s_size),
                _add_block(dv, dv_block, j, blocks.s_size), d_slopes,
            )  # fmt: skip

        dk, dv, d_slopes = carry
        dq_start = jnp.zeros_like(q_block, dtype) + jnp.zeros_like(dk[:, :, None, :1, :1])
        dq_block, dk, dv, d_slopes = lax.fori_loop(
            *blocks.key_range(i), key_block, (dq_start, dk, dv, d_slopes)
        )
        return (dk, dv, d_slopes), dq_block.astype(q.dtype)

    # As above: sums over queries vary over a mesh as q and d_out do.
    zero = jnp.zeros_like(q[:, :, 0, :1, :1] * d_out[:, :, 0, :1, :1], dtype)
    d_slopes = None if slopes is None else jnp.zeros_like(slopes) + zero[:1, :1, 0].sum()
    start = (jnp.zeros_like(k, dtype) + zero, jnp.zeros_like(v, dtype) + zero, d_slopes)
    (dk, dv, d_slopes), dq = lax.scan(
        query_block, start, jnp.arange(blocks.t_count, dtype=jnp.int32)
    )
    return _unblock(dq), dk.astype(k.dtype), dv.astype(v.dtype), d_slopes, None


def _add_block(x: Array, update: Array, index: Array, size: int) -> Array:
    return lax.dynamic_update_slice_in_dim(
        x, _block(x, index, size, 2) + update, index * size, axis=2
    )


def _unblock(x: Array) -> Array:
    """`[blocks, B, K, G, t, ...] -> [B, K, G, blocks · t, ...]`."""
    x = jnp.moveaxis(x, 0, 3)
    return x.reshape(*x.shape[:3], -1, *x.shape[5:])


_attend.defvjp(_forward, _backward)
