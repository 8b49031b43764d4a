r"""The sweep that gives outputs, and the one that gives what groups of chunks add to the state.

A CTA walks its chunks of 64 tokens with the state S, z in registers. Each step, with tiles
x, y `[64, F]` and w `[64, 64]` in shared memory and i running over slices of 64 features:

    P    = tril(p(x yᵀ))
    O    = P w         + sum_i phi_i(x) S_i
    den  = rowsum(P)   + sum_i rowsum(phi_i(x) * z_i)
    S_i += phi_i(y)ᵀ w,  z_i += rowsum(phi_i(y)ᵀ)

Where B·N is too small to fill the chip, the sequence is split into groups: `group_sums` gives what
each group adds to the state, a prefix sum over groups (in XLA) the state each starts from, and
`outputs` then walks all groups at once.

Floor for Taylor, F = 16, H = 64, a chunk of one head: 5.4 MFLOP (selection products 1.6, scores
and P w 0.7, reading the state 1.6, updating it 1.6) and 20 KiB moved. At 32768 tokens x 16 heads
that is 44 GFLOP, 0.055 ms at 800 TFLOP/s, and 168 MB, 0.039 ms at 4.3 TB/s. What bounds it is
latency: chains of small products at two warps a scheduler, since the state fills the registers.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.linear_attention.plan import Plan, States
from pallas_kernels.linear_attention.state import absorb, load_state, store_state, zero_state
from pallas_kernels.tiles import ALONG_COLUMNS, TILE, over_columns, over_rows


def outputs(
    plan: Plan, x: jax.Array, y: jax.Array, w: jax.Array, starts: States | None
) -> tuple[jax.Array, jax.Array | None, States]:
    """Outputs, the sum of weights of each token, and the state after each group.

    Args:
      plan: options.
      x: tokens that read, `[B,T,heads,F]`.
      y: tokens that write, `[B,T,heads,F]`.
      w: what they write, `[B,T,heads,H]`; as many heads as y. The numbers of heads of x and of y
        are N, or one of them divides it.
      starts: states that the groups start from, or None for zeros.

    Returns:
      Outputs `[B,T,N,H]`, sums of weights `[B,N,T]` in float32 (None if not normalised), and
      states after each group, of N heads (those that share y agree).
    """
    (B, T), N, H = x.shape[:2], max(x.shape[2], y.shape[2]), w.shape[3]
    products = plan.products

    def linear_attention_outputs(
        sources, x, y, w, starts, out, den, ends, *, constants, barrier, copy, tile
    ):
        readers, writers = plan.bind(sources, constants, barrier)
        b, n = lax.axis_index("batch"), lax.axis_index("head")
        block = pl.ds(lax.axis_index("block") * TILE, TILE)
        if starts is None:
            state = zero_state(plan.slices, plan.normalize)
        else:
            state = load_state(*plan.of_cta(starts, N), plan.slices)
        copy.renew(state)

        def step(tokens, x, y, w, state):
            dot = products.product(x, y.transpose((1, 0)))
            weights = jnp.where(plan.seen(), plan.feature_map.score(dot), 0.0)
            sums = products.product(weights.astype(w.dtype), w)
            total = [weights.sum(axis=1)] if plan.normalize else []
            for i in range(plan.slices):
                rows = readers.rows(i, x)
                total = [
                    t + (rows.values * over_rows(copy.totals_of(i))).sum(axis=1) for t in total
                ]
                sums = products.accumulate(sums, rows.operand, copy.tiles[i])
            for t in total:
                sums *= over_columns(1 / t)
                den[b, n, tokens] = t
            plgpu.wait_smem_to_gmem(0)  # the last chunk's copy has left the tile
            tile[...] = (plan.feature_map.output_scale * sums).astype(tile.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(tile, out.at[b, tokens, n, block])
            state = absorb(state, writers, y, w, products)
            copy.renew(state)
            return state

        arrays = [(x, "whole"), (y, "whole"), (w, "block")]
        state = plan.walk(step, arrays, length=T, heads=N, stages=plan.stages, state=state)
        store_state(state, *plan.of_cta(ends, N))
        plgpu.wait_smem_to_gmem(0)

    # Query heads that share a key head give their own parts of its gradient, summed outside.
    dtype = x.dtype if x.shape[2] == N else jnp.float32
    return plan.launch(
        linear_attention_outputs, x, y, w, starts, grid=plan.grid(N, w),
        out_type=(
            jax.ShapeDtypeStruct((B, T, N, H), dtype),
            jax.ShapeDtypeStruct((B, N, T), jnp.float32) if plan.normalize else None,
            plan.states_type(B, N, H),
        ),
        scratch={"copy": plan.copy_scratch(), "tile": plgpu.SMEM((TILE, TILE), dtype)},
    )  # fmt: skip


def group_sums(plan: Plan, y: jax.Array, w: jax.Array, weights: jax.Array | None = None) -> States:
    """What each group adds to a state: `phi(y)ᵀ w`, and `phi(y)` times the tokens' weights.

    The slices of a state are independent, so each gets a CTA of its own: with a single slice in
    registers, many more CTAs are resident.

    Args:
      plan: options.
      y: tokens that write, `[B,T,heads,F]`.
      w: what they write, `[B,T,heads,H]`.
      weights: `[B,heads,T]` in float32, or None for ones.
    """
    (B, T, N), H = y.shape[:3], w.shape[3]

    def linear_attention_group_sums(sources, y, w, weights, sums, *, constants, barrier):
        first = lax.axis_index("slice")
        _, writers = plan.bind(sources, constants, barrier, first)

        def step(tokens, y, w, *weights_and_state):
            del tokens
            *weights, state = weights_and_state
            weights = [plgpu.load(ref, layout=ALONG_COLUMNS) for ref in weights]
            return absorb(state, writers, y, w, plan.products, *weights)

        arrays = [(y, "whole"), (w, "block")]
        if weights is not None:
            arrays.append((weights, "token"))
        state = zero_state(1, plan.normalize)
        state = plan.walk(step, arrays, length=T, heads=N, stages=plan.stages, state=state)
        store_state(state, *plan.of_cta(sums, N), first=first)

    (sums,) = plan.launch(
        linear_attention_group_sums, y, w, weights, grid=plan.grid(N, w) | {"slice": plan.slices},
        out_type=(plan.states_type(B, N, H),), scratch={}, commits=False,
    )  # fmt: skip
    return sums
