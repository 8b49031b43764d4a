r"""The walk that carries the state and gives outputs.

    O = (Q e^G) S + A V        G: from the start of the chunk up to each token

with S the state that the chunk starts from and A the scores with decays (`decay`). Reversed, keys
read what later queries wrote, and outputs are gradients of the values:

    dV = (K e^{G_C - G}) dS + A^T dO

A CTA walks the chunks of 64 tokens of one (batch, group of chunks, head), a warpgroup for every 64
values, with those columns of the state in its registers. Each warpgroup scales 64 features of the
tokens in shared memory, for all (of 64 features the first does). That is where they wait for each
other, once a mild chunk, and where it is known that nobody reads the last chunk's tiles any more.

Floor at F = H = 128, bfloat16, 32768 tokens x 16 heads: q, k, v, the log decays and the output
moved once are 671 MB, 0.156 ms at 4.3 TB/s; matrix work, 7.3 MFLOP a chunk where decays are mild,
is 0.075 ms at 800 TFLOP/s. Reached on an H200, with mild decays: 0.37 ms, 42 % of it. The walk
takes 0.20, at 77 % of its floor; the sweep that finds where groups start reads k, v and decays once
more (0.11, 3.5 TB/s), XLA sums up decays (0.05).
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gated_linear_attention.decay import (
    Decay,
    after,
    from_middle,
    is_strong,
    make_finite,
    matrix,
    mild_level,
    over_strong_levels,
    passed,
    summed,
    times,
    up_to,
)
from pallas_kernels.gated_linear_attention.plan import Chunk, Plan, shared, store
from pallas_kernels.tiles import ALONG_ROWS, TILE, WGMMA, iota, over_columns, zeros

_STAGES = 2  # as many chunks as fit in shared memory


def outputs(
    plan: Plan,
    x: jax.Array,
    y: jax.Array,
    w: jax.Array,
    decay: Decay,
    starts: jax.Array | None,
    *,
    reverse: bool = False,
    keep: bool = False,
) -> tuple[jax.Array, jax.Array | None, jax.Array]:
    """Outputs, the state that each chunk reads, and the state after each group.

    Args:
      plan: options.
      x: tokens that read, `[B,T,heads,F]`: queries, or reversed keys.
      y: tokens that write, `[B,T,heads,F]`.
      w: what they write, `[B,T,heads,H]`; H is F, or F is 64. The largest number of heads is N, and
        the others divide it.
      decay: log decays of heads that divide N too.
      starts: the state that each group starts from, `[B,heads,groups,F,H]`, or None for zeros.
      reverse: whether to walk from the end.
      keep: whether to store the states that chunks read.

    Returns:
      `[B,T,N,H]`; `[B,N,chunks,F,H]` in bfloat16, in mild chunks decayed up to the middle, or None;
      and `[B,N,groups,F,H]` in float32.
    """
    (B, T), N, F, H = x.shape[:2], max(x.shape[2], y.shape[2]), x.shape[3], w.shape[3]
    chunks = T // TILE // plan.config.groups
    slices, warpgroups = F // TILE, H // TILE
    products = plan.products

    def gated_linear_attention_outputs(
        x, y, w, decay, strong_groups, starts, out, kept, ends,
        *, ring, ready, sums, copy, tile, met,
    ):  # fmt: skip
        batch, group, head = (lax.axis_index(axis) for axis in ("batch", "group", "head"))
        me = lax.axis_index("warpgroup") if warpgroups > 1 else jnp.int32(0)

        def chunk(i):
            return Chunk(batch, group * chunks + (chunks - 1 - i if reverse else i), head, N)

        def fill(i):
            slot, here = lax.rem(i, _STAGES), chunk(i)
            sources = [*(here.of_tokens(z) for z in (x, y, w)), here.terms(decay)]
            for source, target in zip((*sources, here.halves(decay)), ring, strict=True):
                plgpu.copy_gmem_to_smem(source, target.at[slot], ready.at[slot])

        def meet():
            plgpu.commit_smem()
            if warpgroups > 1:
                plgpu.barrier_arrive(met)
                plgpu.barrier_wait(met)

        def step(i, state, *, strong):
            x, y, w, terms, halves = (tile.at[lax.rem(i, _STAGES)] for tile in ring)
            # Found anew in each step, or descriptors of tiles stay in registers.
            here, mine = chunk(i), lax.optimization_barrier(me)
            values = pl.ds(mine * TILE, TILE)
            own = values if slices == warpgroups else pl.ds(0, TILE)
            mixed, read = w.at[:, values], copy.at[mine]
            terms = terms.at[:, own]
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # `tile` and `read`

            def scale_with(sources, queries, keys):
                factors = (keys, queries) if reverse else (queries, keys)

                def write():
                    for target, source, factor in zip((x, y), sources, factors, strict=True):
                        target.at[:, own][...] = times(source, factor)

                write() if slices == warpgroups else pl.when(mine == 0)(write)

            def scores_of_levels():
                make_finite(terms)
                whole = [read.at[pl.ds(0, TILE)], tile.at[mine]]  # which hold nothing yet
                for source, target in zip((x, y), whole, strict=True):
                    target[...] = plgpu.load(source.at[:, own], layout=WGMMA)
                plgpu.commit_smem()

                def add(level, scores):
                    scale_with(whole, level.queries, level.keys)
                    meet()
                    part = products.product(x, y.transpose((1, 0)))
                    meet()
                    return jnp.where(level.part, part.astype(scores.dtype), scores)

                scores = over_strong_levels(
                    add, zeros(TILE).astype(mixed.dtype), products=products, terms=terms,
                    transposed=reverse,
                )  # fmt: skip
                scale_with(whole, *(jnp.exp(summed(products, t, terms)) for t in (up_to, after)))
                plgpu.commit_smem()
                return scores

            if strong:
                scores = scores_of_levels()
            else:
                level = mild_level(summed(products, sums, terms))
                scale_with([z.at[:, own] for z in (x, y)], level.queries, level.keys)
                scores = None

            # What tokens read, what is left before they write, and what is left of that.
            before, left = [], []
            for j in range(slices):
                features = pl.ds(j * TILE, TILE)
                first, second = passed(halves.at[:, features], ALONG_ROWS, reverse=reverse)
                to_middle = state[j] if strong else over_columns(first) * state[j]
                read.at[features][...] = to_middle.astype(read.dtype)
                before.append(over_columns(first * second) * state[j] if strong else to_middle)
                left.append(second)
            meet()

            @pl.when((me == 0) & (i >= 1) & (i - 1 + _STAGES < chunks))
            def _():
                fill(i - 1 + _STAGES)

            if keep:
                plgpu.copy_smem_to_gmem(read, here.of_state(kept).at[:, values])
            if strong:
                total = products.product(x, read)
            else:
                scores, total = products.products((x, y.transpose((1, 0))), (x, read))
                scores = causal(scores).astype(mixed.dtype)
            total = products.accumulate(total, scores, mixed)
            writes = [
                (before[j], y.at[:, pl.ds(j * TILE, TILE)].transpose((1, 0)), mixed)
                for j in range(slices)
            ]
            if slices > 1:
                state = products.accumulate_both(writes[0], writes[1])
            else:
                state = (products.accumulate(*writes[0]),)
            if not strong:
                state = tuple(over_columns(f) * s for f, s in zip(left, state, strict=True))
            store(plan.scale * total, here.of_tokens(out).at[:, values], tile.at[mine])
            return state

        def causal(scores):
            readers, writers = (iota(1), iota(0)) if reverse else (iota(0), iota(1))
            return jnp.where(readers >= writers, scores, 0.0)

        def wait(i):
            slot = lax.rem(i, _STAGES)
            plgpu.barrier_wait(ready.at[slot])
            return slot

        def mild_step(i, state):
            wait(i)
            return step(i, state, strong=False)

        def any_step(i, state):
            strong = is_strong(ring[-1].at[wait(i)])
            steps = (functools.partial(step, i, strong=strong) for strong in (True, False))
            return lax.cond(strong > 0, *steps, state)

        values = pl.ds(me * TILE, TILE)
        state = (zeros(TILE),) * slices
        if starts is not None:
            start = starts.at[batch, head // (N // starts.shape[1]), group]
            state = tuple(
                plgpu.load(
                    start.at[pl.ds(j * TILE, TILE), values], layout=WGMMA, optimized=False
                )
                for j in range(slices)
            )  # fmt: skip

        @pl.when(me == 0)
        def _():
            sums[...] = matrix(from_middle)
            for i in range(min(_STAGES, chunks)):
                fill(jnp.int32(i))

        meet()
        gate = head // (N // strong_groups.shape[1])
        state = lax.cond(
            strong_groups[batch, gate, group] > 0,
            lambda state: lax.fori_loop(0, chunks, any_step, state),
            lambda state: lax.fori_loop(0, chunks, mild_step, state),
            state,
        )
        for j in range(slices):
            ends[batch, head, group, pl.ds(j * TILE, TILE), values] = state[j]
        plgpu.wait_smem_to_gmem(0)

    def ring(rows, width, dtype=jnp.bfloat16):
        return plgpu.SMEM((_STAGES, rows, width), dtype)

    return plan.launch(
        gated_linear_attention_outputs, x, y, w, decay,
        decay.strong_groups(plan.config.groups), starts, warpgroups=warpgroups, commits=True,
        grid={"batch": B, "group": plan.config.groups, "head": N},
        out_type=(
            jax.ShapeDtypeStruct((B, T, N, H), x.dtype),
            jax.ShapeDtypeStruct((B, N, T // TILE, F, H), jnp.bfloat16) if keep else None,
            jax.ShapeDtypeStruct((B, N, plan.config.groups, F, H), jnp.float32),
        ),
        scratch={
            "ring": (
                *(ring(TILE, size) for size in (F, F, H)), ring(decay.rows, F),
                ring(2, F, jnp.float32),
            ),
            "ready": plgpu.Barrier(num_barriers=_STAGES, num_arrivals=5),
            "sums": shared(TILE, TILE),
            "copy": plgpu.SMEM((warpgroups, F, TILE), jnp.bfloat16),
            "tile": plgpu.SMEM((warpgroups, TILE, TILE), jnp.bfloat16),
            "met": plgpu.Barrier(num_arrivals=warpgroups),
        },
    )  # fmt: skip
