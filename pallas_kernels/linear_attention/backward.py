r"""Backward kernels: a sweep forward for d q, a sweep in reverse for d k, d v and the state.

With g = d O (already divided by the sum of weights) and e the gradient of that sum, one number a
token (zero where outputs are not normalised), and W = p'(q kᵀ) the slope of the similarity:

    d P     = tril(g vᵀ + e)
    d q     = (d P * W) k    + sum_i J_i(q) (g S_iᵀ + e z_i)
    d k     = (d P * W)ᵀ q   + sum_i J_i(k) (v dS_iᵀ + dz_i)
    d v     = Pᵀ g           + sum_i phi_i(k) dS_i
    dS_i   += phi_i(q)ᵀ g,     dz_i += phi_i(q)ᵀ e

where J_i(x) is the chain rule of phi_i. `query_gradients` recomputes S forward, as the forward pass
does; `key_gradients` carries dS backward and needs no S, since outputs are linear in it. Nothing
is stored for a chunk but q, k, v, the output and the sum of weights. In the reverse sweep tiles
within a chunk are formed transposed, `[keys, queries]`, so that Pᵀ and d Pᵀ are left operands.

A block of 64 values gives its part of d q and d k, and a query head its part of the gradients of
its key head; where there is more than one, parts are summed outside.

Floor for Taylor, F = 16, H = 64, a chunk of one head: 6.3 MFLOP and 22 KiB forward, 8.4 MFLOP and
34 KiB in reverse: at 32768 tokens x 16 heads 120 GFLOP, 0.15 ms, and 460 MB, 0.11 ms.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.linear_attention.problem import Problem
from pallas_kernels.linear_attention.state import (
    Copy,
    absorb,
    load_state,
    store_state,
    zero_state,
)
from pallas_kernels.linear_attention.tiles import (
    ALONG_COLUMNS,
    ALONG_ROWS,
    TILE,
    as_operand,
    columns_of,
    iota,
    over_columns,
    over_rows,
)


def query_gradients(problem: Problem, q, k, v, g, e, starts):
    """`d q`, one part for each block of values.

    Args:
      problem: sizes and options.
      q: `[B,T,N,F]`.
      k: `[B,T,K,F]`.
      v: `[B,T,K,H]`.
      g: gradient of the sums of values, `[B,T,N,H]`.
      e: gradient of the sums of weights, `[B,N,T]` in float32, or None.
      starts: states that the groups start from, as in the forward pass.

    Returns:
      `[blocks,B,T,N,F]`.
    """
    p = problem
    widths = p.feature_map.gradient_widths

    def linear_attention_query_gradients(
        sources, q, k, v, g, e, starts, dq, *, constants, barrier, copy, tile
    ):
        query_side, key_side = p.bind(sources, constants, barrier)
        copy = Copy(*copy)
        b, n, h = (lax.axis_index(axis) for axis in ("batch", "head", "block"))
        once = jnp.where(h == 0, 1.0, 0.0)  # one block counts what does not depend on values
        if starts is None:
            state = zero_state(p.slices, p.normalize)
        else:
            state = load_state(*p.state_of_cta(starts, per=p.queries_per_key), p.slices)
        copy.renew(state)

        def step(index, q, k, v, g, *e_and_state):
            *e, state = e_and_state
            tokens = pl.ds(p.chunk(index[0]) * TILE, TILE)
            if e:
                e = once * plgpu.load(e[0], layout=ALONG_ROWS)
            dot, d_weights = p.products.products(
                (q, k.transpose((1, 0))), (g, v.transpose((1, 0)))
            )
            if p.normalize:
                d_weights += over_columns(e)
            causal = iota(0) >= iota(1)
            d_dot = as_operand(jnp.where(causal, d_weights * p.feature_map.slope(dot), 0.0))
            grads = tuple(p.products.product(d_dot, part) for part in columns_of(k, widths))
            for i in range(p.slices):
                d_rows = p.products.product(g, copy.tiles[i].transpose((1, 0)))
                if p.normalize:
                    d_rows += over_columns(e) * over_rows(copy.totals_of(i))
                grads = query_side.rows(i, q).pull(grads, d_rows)
            plgpu.wait_smem_to_gmem(0)
            for part, grad in zip(columns_of(tile, widths), grads, strict=True):
                part[...] = (p.feature_map.output_scale * grad).astype(tile.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(tile, dq.at[h, b, tokens, n])
            state = absorb(state, key_side, k, v, p.products)
            copy.renew(state)
            return state

        per = p.queries_per_key
        arrays = (q, k, v, g)
        specs = (p.narrow(), p.narrow(per=per), p.wide(per=per), p.wide())
        if e is not None:
            arrays, specs = (*arrays, e), (*specs, p.per_token())
        plgpu.emit_pipeline(
            step, grid=(p.chunks,), max_concurrent_steps=p.stages, in_specs=specs, init_carry=state
        )(*arrays)
        plgpu.wait_smem_to_gmem(0)

    dtype = jnp.float32 if p.blocks > 1 else q.dtype
    return p.launch(
        linear_attention_query_gradients, q, k, v, g, e, starts, heads=p.N,
        out_type=jax.ShapeDtypeStruct((p.blocks, p.B, p.T, p.N, p.F), dtype),
        scratch={"copy": p.state_scratch(), "tile": plgpu.SMEM((TILE, p.F), dtype)},
    )  # fmt: skip


def key_gradients(problem: Problem, q, k, v, g, e, ends):
    """`d k`, one part for each block of values, `d v`, and the state's gradient; by query head.

    Args:
      problem: sizes and options.
      q: `[B,T,N,F]`.
      k: `[B,T,K,F]`.
      v: `[B,T,K,H]`.
      g: gradient of the sums of values, `[B,T,N,H]`.
      e: gradient of the sums of weights, `[B,N,T]` in float32, or None.
      ends: gradients of the states after each group, `Problem.state_type(N)`.

    Returns:
      `d k` `[blocks,B,T,N,F]`, `d v` `[B,T,N,H]`, and gradients of the states before each group,
      `Problem.state_type(N)`.
    """
    p = problem
    widths, scale = p.feature_map.gradient_widths, p.feature_map.output_scale

    def linear_attention_key_gradients(
        sources, q, k, v, g, e, ends, dk, dv, starts, *, constants, barrier, copy, k_tile, v_tile
    ):
        query_side, key_side = p.bind(sources, constants, barrier)
        copy = Copy(*copy)
        b, n, h = (lax.axis_index(axis) for axis in ("batch", "head", "block"))
        once = jnp.where(h == 0, 1.0, 0.0)  # one block counts what does not depend on values
        state = load_state(*p.state_of_cta(ends), p.slices)
        copy.renew(state)

        def step(index, q, k, v, g, *e_and_state):
            *e, state = e_and_state
            tokens = pl.ds(p.chunk(index[0], reverse=True) * TILE, TILE)
            e = [plgpu.load(ref, layout=ALONG_COLUMNS) for ref in e]
            dot, d_weights = p.products.products(
                (k, q.transpose((1, 0))), (v, g.transpose((1, 0)))
            )
            if p.normalize:
                d_weights += over_rows(once * e[0])
            causal = iota(0) <= iota(1)
            weights = as_operand(jnp.where(causal, p.feature_map.score(dot), 0.0))
            d_dot = as_operand(jnp.where(causal, d_weights * p.feature_map.slope(dot), 0.0))
            d_values = p.products.product(weights, g)
            grads = tuple(p.products.product(d_dot, part) for part in columns_of(q, widths))
            for i in range(p.slices):
                rows = key_side.rows(i, k)
                d_values = p.products.accumulate(d_values, (rows.operand, copy.tiles[i]))
                d_rows = p.products.product(v, copy.tiles[i].transpose((1, 0)))
                if p.normalize:
                    d_rows += over_rows(once * copy.totals_of(i))
                grads = rows.pull(grads, d_rows)
            plgpu.wait_smem_to_gmem(0)
            v_tile[...] = (scale * d_values).astype(v_tile.dtype)
            for part, grad in zip(columns_of(k_tile, widths), grads, strict=True):
                part[...] = (scale * grad).astype(k_tile.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(v_tile, dv.at[b, tokens, n, pl.ds(h * TILE, TILE)])
            plgpu.copy_smem_to_gmem(k_tile, dk.at[h, b, tokens, n])
            state = absorb(state, query_side, q, g, p.products, *e)
            copy.renew(state)
            return state

        per = p.queries_per_key
        arrays = (q, k, v, g)
        specs = (
            p.narrow(reverse=True), p.narrow(per=per, reverse=True),
            p.wide(per=per, reverse=True), p.wide(reverse=True),
        )  # fmt: skip
        if e is not None:
            arrays, specs = (*arrays, e), (*specs, p.per_token(reverse=True))
        state = plgpu.emit_pipeline(
            step, grid=(p.chunks,), max_concurrent_steps=p.stages, in_specs=specs, init_carry=state
        )(*arrays)
        store_state(state, *p.state_of_cta(starts))
        plgpu.wait_smem_to_gmem(0)

    shared = p.queries_per_key > 1
    k_dtype = jnp.float32 if shared or p.blocks > 1 else q.dtype
    v_dtype = jnp.float32 if shared else q.dtype
    return p.launch(
        linear_attention_key_gradients, q, k, v, g, e, ends, heads=p.N,
        out_type=(
            jax.ShapeDtypeStruct((p.blocks, p.B, p.T, p.N, p.F), k_dtype),
            jax.ShapeDtypeStruct((p.B, p.T, p.N, p.H), v_dtype),
            p.state_type(p.N),
        ),
        scratch={
            "copy": p.state_scratch(),
            "k_tile": plgpu.SMEM((TILE, p.F), k_dtype),
            "v_tile": plgpu.SMEM((TILE, TILE), v_dtype),
        },
    )  # fmt: skip
