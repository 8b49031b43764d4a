r"""Softmax attention of one token over a long cache for Hopper GPUs, in Pallas Mosaic GPU.

    o = sum_s e^{x_s} v_s / sum_s e^{x_s},    x_s = scale q·k_s,    begin <= s < end

A cache is read once, and that is all it costs: 4 bytes a number for 2 FLOPs a query head. Few heads
and streams would leave most of the chip idle, so the keys of a row are split among CTAs, whose
outputs and log-sum-exps are merged outside.

A CTA is one warpgroup that walks its keys with copies of the next steps in flight. The query heads
that share a key head are the first rows of a tile of 64, the matrix unit's least; the other rows
are zeros. That wastes FLOPs and exponentials which are not the limit: for a head of 128, 64 rows
take 64 FLOP a byte, a third of what the matrix unit does while a byte arrives.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.decode_attention.config import LaunchConfig, heuristic
from pallas_kernels.products import Products
from pallas_kernels.tiles import (
    ALONG_COLUMNS,
    ALONG_ROWS,
    TILE,
    WGMMA,
    over_columns,
    over_rows,
    zeros,
)

LOG2_E = 1.4426950408889634


def decode_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    bounds: jax.Array,
    *,
    scale: float,
    config: LaunchConfig | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Attention of one query a row over parts of its keys.

    Args:
      q: queries `[B,N,H]`, bfloat16 or float16.
      k: keys `[B,S,K,H]`; K divides N, and at most 64 query heads share a key head.
      v: values `[B,S,K,H]`.
      bounds: `[B,2]` in int32: row b sees the keys from `bounds[b, 0]` up to `bounds[b, 1]`,
        exclusive; both lie between 0 and S.
      scale: factor of scores.
      config: launch parameters; default: by shape.
      interpret: whether to run in the CPU simulator.

    Returns:
      Outputs `[splits,B,N,H]` and log-sum-exps `[splits,B,N]` in float32 over disjoint parts of the
      keys; zeros and -inf where a part is empty.

    Raises:
      ValueError: saying why the kernel does not serve the call.
    """
    (B, N, H), (S, K) = q.shape, k.shape[1:3]
    reason = objection(dtype=q.dtype, F=k.shape[3], H=v.shape[3], S=S, group=N // K)
    if reason is not None:
        raise ValueError(f"decode_attention: the mosaic_gpu kernel {reason}")
    config = config or heuristic(B=B, S=S, K=K, H=H)
    if scale <= 0:  # in the kernel the largest product gives the largest score
        q, scale = q * math.copysign(scale != 0, scale), -scale or 1.0
    group, width = N // K, config.width
    factor = scale * LOG2_E
    products = Products(interpret)

    def decode_attention_part(q, k, v, bounds, out, lse, *, query):
        batch, split, head = (lax.axis_index(name) for name in ("batch", "split", "head"))
        begin, end = bounds[batch, 0], bounds[batch, 1]
        first = lax.div(begin, width)
        # Steps are shared out evenly whatever the number of keys: caches fill up.
        total_steps = jnp.where(begin < end, lax.div(end + width - 1, width) - first, 0)
        start = first + lax.div(split * total_steps, config.splits)
        stop = first + lax.div((split + 1) * total_steps, config.splits)
        rows = plgpu.broadcasted_iota(jnp.int32, (TILE, H), 0, layout=WGMMA)

        def own(g):
            return batch, head * group + g

        def add_row(g, tile):
            row = plgpu.load(q.at[*own(g)], layout=ALONG_COLUMNS, optimized=False)
            return jnp.where(rows == g, over_rows(row.astype(jnp.float32)), tile)

        query[...] = lax.fori_loop(0, group, add_row, zeros(H)).astype(query.dtype)
        plgpu.commit_smem()

        def step(index, key, value, state):
            mixed, total, highest = state
            token = (start + index[0]) * width

            def hide(t):
                keys = token + plgpu.broadcasted_iota(jnp.int32, (TILE, width), 1, layout=WGMMA)
                return jnp.where((begin <= keys) & (keys < end), t, -jnp.inf)

            t = products.product(query, key.transpose((1, 0)))
            whole = (begin <= token) & (token + width <= end)
            t = lax.cond(whole, lambda t: t, hide, t)
            before, highest = highest, jnp.maximum(highest, t.max(axis=1) * factor)
            kept = jnp.exp2(before - highest)
            p = jnp.exp2(t * factor - over_columns(highest, width))
            mixed *= over_columns(kept, H)
            total = total * kept + p.sum(axis=1)
            mixed, total, highest, p = lax.optimization_barrier(
                (mixed, total, highest, p.astype(value.dtype))
            )
            return products.accumulate(mixed, p, value), total, highest

        def spec():
            return plgpu.BlockSpec((None, width, None, H), lambda i: (batch, start + i, head, 0))

        nothing = plgpu.layout_cast(jnp.zeros((TILE,), jnp.float32), ALONG_ROWS)
        mixed, total, highest = plgpu.emit_pipeline(
            step, grid=(stop - start,), in_specs=[spec(), spec()],
            max_concurrent_steps=config.stages, init_carry=(zeros(H), nothing, nothing - jnp.inf),
        )(k, v)  # fmt: skip
        mixed *= over_columns(1 / jnp.maximum(total, 1e-30), H)
        lse[split, batch, head] = jnp.log(total) + highest * (1 / LOG2_E)

        def store_row(g, _):
            out[split, *own(g)] = jnp.where(rows == g, mixed, 0.0).sum(axis=0)
            return _

        lax.fori_loop(0, group, store_row, 0)

    run = plgpu.kernel(
        decode_attention_part,
        out_type=(
            jax.ShapeDtypeStruct((config.splits, B, N, H), jnp.float32),
            jax.ShapeDtypeStruct((config.splits, B, K, TILE), jnp.float32),
        ),
        grid=(B, config.splits, K), grid_names=("batch", "split", "head"),
        scratch_types={"query": plgpu.SMEM((TILE, H), q.dtype)},
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=plgpu.InterpretGPUParams(detect_races=True) if interpret else None,
    )  # fmt: skip
    out, lse = run(q, k, v, bounds)
    return out, lse[..., :group].reshape(config.splits, B, N)


def objection(*, dtype, F: int, H: int, S: int, group: int) -> str | None:
    """Why the kernel does not serve a call, in words, or None."""
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"takes bfloat16 or float16, not {jnp.dtype(dtype).name}"
    if F != H or H % 16 or H > 128:
        return f"takes keys and values of one size, a multiple of 16 up to 128, not F={F}, H={H}"
    if S % 8:
        return f"takes caches of a multiple of 8 slots, not S={S}"
    if group > TILE:
        return f"takes up to {TILE} query heads a key head, not {group}"
    return None
