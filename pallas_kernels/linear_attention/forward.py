r"""Forward kernels: `outputs`, and the sums of groups where a sequence is split.

A CTA walks its chunks of 64 tokens with the state S, z in registers. Each step, with tiles
q, k `[64, F]` and v `[64, 64]` in shared memory and i running over slices of 64 features:

    P    = tril(p(q kᵀ))
    O    = P v         + sum_i phi_i(q) S_i
    den  = rowsum(P)   + sum_i rowsum(phi_i(q) * z_i)
    S_i += phi_i(k)ᵀ v,  z_i += rowsum(phi_i(k)ᵀ)

Where B·N is too small to fill the chip, the sequence is split into groups: `group_sums` gives what
each group adds to the state, a prefix sum over groups (in XLA) the state each starts from, and
`outputs` then walks all groups at once.

Floor for Taylor, F = 16, H = 64, a chunk of one head: 5.4 MFLOP (selection products 1.6, scores
and P v 0.7, reading the state 1.6, updating it 1.6) and 20 KiB moved. At 32768 tokens x 16 heads
that is 44 GFLOP, 0.055 ms at 800 TFLOP/s, and 168 MB, 0.039 ms at 4.3 TB/s. What bounds it is
latency: chains of small products at two warps a scheduler, since the state fills the registers.
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
    TILE,
    as_operand,
    iota,
    over_columns,
    over_rows,
)


def outputs(problem: Problem, q, k, v, starts):
    """Outputs, the sum of weights of each token, and the state after each group.

    Args:
      problem: sizes and options.
      q: `[B,T,N,F]`.
      k: `[B,T,K,F]`.
      v: `[B,T,K,H]`.
      starts: states that the groups start from (`Problem.state_type(K)`), or None for zeros.

    Returns:
      Outputs `[B,T,N,H]`, sums of weights `[B,N,T]` in float32 (None if not normalised), and
      states after each group (`Problem.state_type(N)`: heads that share a key agree).
    """
    p, normalize, slices = problem, problem.normalize, range(problem.slices)

    def linear_attention_outputs(
        sources, q, k, v, starts, out, den, ends, *, constants, barrier, copy, tile
    ):
        query_side, key_side = p.bind(sources, constants, barrier)
        copy = Copy(*copy)
        b, n = lax.axis_index("batch"), lax.axis_index("head")
        values = pl.ds(lax.axis_index("block") * TILE, TILE)
        if starts is None:
            state = zero_state(p.slices, normalize)
        else:
            state = load_state(*p.state_of_cta(starts, per=p.queries_per_key), p.slices)
        copy.renew(state)

        def step(index, q, k, v, state):
            tokens = pl.ds(p.chunk(index[0]) * TILE, TILE)
            dot = p.products.product(q, k.transpose((1, 0)))
            weights = jnp.where(iota(0) >= iota(1), p.feature_map.score(dot), 0.0)
            sums = p.products.product(as_operand(weights), v)
            if normalize:
                total = weights.sum(axis=1)
            for i in slices:
                rows = query_side.rows(i, q)
                if normalize:
                    total += (rows.values * over_rows(copy.totals_of(i))).sum(axis=1)
                sums = p.products.accumulate(sums, (rows.operand, copy.tiles[i]))
            if normalize:
                sums *= over_columns(1 / total)
                den[b, n, tokens] = total
            plgpu.wait_smem_to_gmem(0)  # the last chunk's copy has left the tile
            tile[...] = (p.feature_map.output_scale * sums).astype(tile.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(tile, out.at[b, tokens, n, values])
            state = absorb(state, key_side, k, v, p.products)
            copy.renew(state)
            return state

        state = plgpu.emit_pipeline(
            step, grid=(p.chunks,), max_concurrent_steps=p.stages, init_carry=state,
            in_specs=[
                p.narrow(), p.narrow(per=p.queries_per_key), p.wide(per=p.queries_per_key),
            ],
        )(q, k, v)  # fmt: skip
        store_state(state, *p.state_of_cta(ends))
        plgpu.wait_smem_to_gmem(0)

    den_type = jax.ShapeDtypeStruct((p.B, p.N, p.T), jnp.float32) if normalize else None
    return p.launch(
        linear_attention_outputs, q, k, v, starts, heads=p.N,
        out_type=(
            jax.ShapeDtypeStruct((p.B, p.T, p.N, p.H), q.dtype), den_type, p.state_type(p.N)
        ),
        scratch={"copy": p.state_scratch(), "tile": plgpu.SMEM((TILE, TILE), q.dtype)},
    )  # fmt: skip


def group_sums(problem: Problem, x, y, *, of_queries: bool = False, weights=None):
    """What each group adds to a state: `phi(x)ᵀ y`, and `phi(x)` times the tokens' weights.

    The slices of a state are independent, so each gets a CTA of its own: with a single slice in
    registers, twice as many CTAs are resident.

    Args:
      problem: sizes and options.
      x: keys `[B,T,K,F]`, or queries `[B,T,N,F]`.
      y: `[B,T,heads,H]`, with as many heads.
      of_queries: whether phi is the feature map of queries.
      weights: `[B,heads,T]` in float32, or None for ones.

    Returns:
      States, `Problem.state_type(heads)`.
    """
    p, heads = problem, x.shape[2]

    def linear_attention_group_sums(sources, x, y, weights, sums, *, constants, barrier):
        side = p.bind(sources, constants, barrier)[0 if of_queries else 1]
        first = lax.axis_index("slice")

        def step(index, x, y, *weights_and_state):
            del index
            *weights, state = weights_and_state
            weights = [plgpu.load(w, layout=ALONG_COLUMNS) for w in weights]
            return absorb(state, side, x, y, p.products, *weights, first=first)

        arrays, specs = (x, y), (p.narrow(), p.wide())
        if weights is not None:
            arrays, specs = (*arrays, weights), (*specs, p.per_token())
        state = plgpu.emit_pipeline(
            step, grid=(p.chunks,), max_concurrent_steps=p.stages, in_specs=specs,
            init_carry=zero_state(1, p.normalize),
        )(*arrays)  # fmt: skip
        store_state(state, *p.state_of_cta(sums), first=first)

    (sums,) = p.launch(
        linear_attention_group_sums, x, y, weights, heads=heads, slices=p.slices,
        out_type=(p.state_type(heads),), scratch={},
    )  # fmt: skip
    return sums
