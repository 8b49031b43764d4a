"""The fused walk (first version)."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gated_linear_attention.decay import Decay, after, over_levels, summed, up_to
from pallas_kernels.gated_linear_attention.plan import Plan, shared
from pallas_kernels.tiles import ALONG_ROWS, TILE, WGMMA, iota, over_columns, zeros

NO_STATE_LEFT = -1e30


def walk(plan: Plan, x, y, w, decay: Decay, starts, *, reverse: bool, keep: bool, unsafe=False, strong_too=True):
    """Outputs, kept states, states after each group."""
    (B, T), N, F, H = x.shape[:2], max(x.shape[2], y.shape[2]), x.shape[3], w.shape[3]
    chunks = T // TILE // plan.config.groups
    warpgroups, slices = H // TILE, F // TILE
    rows, stages = decay.rows, 2

    def gated_linear_attention_walk(
        x, y, w, decay, starts, out, kept, ends, *, matrix, copy, tile, turn, ring, ready
    ):
        batch, group, head = (lax.axis_index(axis) for axis in ("batch", "group", "head"))
        me = lax.axis_index("warpgroup")
        gate = head // (N // decay.levels.shape[2])

        def chunk(i):
            return group * chunks + (chunks - 1 - i if reverse else i)

        def fill(i):
            slot, rows_of = lax.rem(i, stages), lambda n: pl.ds(chunk(i) * n, n)
            sources = [z.at[batch, rows_of(TILE), head // (N // z.shape[2])] for z in (x, y, w)]
            sources.append(decay.terms.at[batch, rows_of(rows), gate])
            sources.append(decay.halves.at[batch, chunk(i), :, gate])
            for source, target in zip(sources, ring):
                plgpu.copy_gmem_to_smem(source, target.at[slot], ready.at[slot])

        def meet():
            plgpu.commit_smem()
            plgpu.barrier_arrive(turn)
            plgpu.barrier_wait(turn)

        def strong_at(i):
            return decay.levels[batch, chunk(jnp.minimum(i, chunks - 1)), gate]

        def compute():
            values = pl.ds(me * TILE, TILE)
            at = batch, head, group
            state = (zeros(TILE),) * slices
            if starts is not None:
                own = batch, head // (N // starts.shape[1]), group
                state = tuple(
                    plgpu.load(
                        starts.at[own].at[pl.ds(i * TILE, TILE), values],
                        layout=WGMMA, optimized=False,
                    )
                    for i in range(slices)
                )  # fmt: skip
            t, s = (iota(a) for a in (0, 1))
            right = t >= TILE // 2
            plus = (s >= TILE // 2) & (s <= t)
            minus = (s < TILE // 2) & (s > t)
            numbers = jnp.where(plus, 1.0, jnp.where(minus, -1.0, 0.0))
            del right

            @pl.when(me == 0)
            def _():
                matrix[...] = numbers.astype(jnp.bfloat16)

                for i in range(min(stages, chunks)):
                    fill(jnp.int32(i))

            meet()
            state, _ = lax.fori_loop(0, chunks, step, (state, strong_at(0)))
            for i in range(slices):
                ends[(*at, pl.ds(i * TILE, TILE), values)] = state[i]
            plgpu.wait_smem_to_gmem(0)

        def step(i, carry):
            state, levels = carry
            following = strong_at(i + 1)
            slot = lax.rem(i, stages)
            x, y, w, terms, halves = (tile.at[slot] for tile in ring)
            plgpu.barrier_wait(ready.at[slot])
            mine = lax.optimization_barrier(me)
            values = pl.ds(mine * TILE, TILE)
            products = plan.products
            own = [pl.ds((mine * (slices // warpgroups) + j) * TILE, TILE)
                   for j in range(slices // warpgroups)]

            def strong():
                scores = zeros(TILE)
                originals = []
                for columns in own:
                    originals.append([])
                    for z in (x, y):
                        n = sum(map(len, originals))
                        original = copy.at[mine, pl.ds(n * TILE, TILE)]
                        original[...] = plgpu.load(z.at[:, columns], layout=WGMMA)
                        originals[-1].append(original)
                    for r in range(rows // TILE):
                        part = terms.at[pl.ds(r * TILE, TILE), columns]
                        part[...] = jnp.maximum(plgpu.load(part, layout=WGMMA),
                                                jnp.asarray(NO_STATE_LEFT, jnp.bfloat16))
                plgpu.commit_smem()

                def put(columns, original, fx, fy):
                    for z, source, factor in zip((x, y), original, (fx, fy)):
                        numbers = plgpu.load(source, layout=WGMMA).astype(jnp.float32)
                        z.at[:, columns][...] = (numbers * factor).astype(x.dtype)

                def add(level, scores):
                    for columns, original, (a, b) in zip(own, originals, level.factors):
                        put(columns, original, *((b, a) if reverse else (a, b)))
                    meet()
                    part = products.product(x, y.transpose((1, 0)))
                    meet()
                    return jnp.where(level.part, part, scores)

                scores = over_levels_own(
                    add, scores, products=products, terms=[terms.at[:, c] for c in own],
                    reverse=reverse,
                )
                for columns, original in zip(own, originals):
                    a, b = (
                        jnp.exp(summed(products, which, terms.at[:, columns]))
                        for which in (up_to, after)
                    )
                    put(columns, original, *((b, a) if reverse else (a, b)))
                return scores

            def mild():
                for columns in own:
                    sums = products.product(matrix, terms.at[pl.ds(0, TILE), columns])
                    if rows > TILE:
                        sums += products.product(matrix, terms.at[pl.ds(TILE, TILE), columns])
                    a, b = jnp.exp(sums), jnp.exp(-sums)
                    a, b = (b, a) if reverse else (a, b)
                    for z, factor in ((x, a), (y, b)):
                        numbers = plgpu.load(z.at[:, columns], layout=WGMMA).astype(jnp.float32)
                        z.at[:, columns][...] = (numbers * factor).astype(z.dtype)
                return zeros(TILE)

            is_strong = levels > 1
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            strong_scores = lax.cond(is_strong, strong, mild) if strong_too else mild()
            first, last = (1, 0) if reverse else (0, 1)
            grown, left = [], []
            for j in range(slices):
                features = pl.ds(j * TILE, TILE)
                begin, end = (
                    plgpu.load(halves.at[h, features], layout=ALONG_ROWS) for h in (first, last)
                )
                f = jnp.where(is_strong, 1.0, 0.0)
                read = f + (1 - f) * begin
                forget = begin * (f * end + (1 - f))
                left.append(f + (1 - f) * end)
                copy.at[mine, features][...] = (over_columns(read) * state[j]).astype(copy.dtype)
                grown.append(over_columns(forget) * state[j])
            meet()

            @pl.when((me == 0) & (i >= 1) & (i - 1 + stages < chunks))
            def _():
                fill(i - 1 + stages)

            if keep:
                plgpu.copy_smem_to_gmem(
                    copy.at[mine],
                    kept.at[batch, head, chunk(i), :, values],
                )
            mixed = w.at[:, values]
            scores, total = products.products((x, y.transpose((1, 0))), (x, copy.at[mine]))
            distance = (iota(1) - iota(0)) if reverse else (iota(0) - iota(1))
            seen = distance >= jnp.where(is_strong, TILE, 0)
            scores = strong_scores + jnp.where(seen, scores, 0.0)
            total = products.accumulate(total, scores.astype(x.dtype), mixed)
            new = [
                (grown[j], y.at[:, pl.ds(j * TILE, TILE)].transpose((1, 0)), mixed)
                for j in range(slices)
            ]
            if slices == 2:
                new = products.accumulate_both(*new)
            else:
                new = [products.accumulate(*one) for one in new]
            state = tuple(over_columns(f) * z for f, z in zip(left, new))
            tile.at[mine][...] = (plan.scale * total).astype(tile.dtype)
            plgpu.commit_smem()
            tokens = pl.ds(chunk(i) * TILE, TILE)
            plgpu.copy_smem_to_gmem(tile.at[mine], out.at[batch, tokens, head, values])
            return state, following

        compute()

    return plgpu.kernel(
        gated_linear_attention_walk,
        out_type=(
            jax.ShapeDtypeStruct((B, T, N, H), x.dtype if x.shape[2] == N else jnp.float32),
            jax.ShapeDtypeStruct((B, N, T // TILE, F, H), jnp.bfloat16) if keep else None,
            jax.ShapeDtypeStruct((B, N, plan.config.groups, F, H), jnp.float32),
        ),
        grid=(B, plan.config.groups, N), grid_names=("batch", "group", "head"),
        num_threads=warpgroups, thread_name="warpgroup",
        scratch_types={
            "matrix": shared(TILE, TILE),
            "copy": plgpu.SMEM((warpgroups, F, TILE), jnp.bfloat16),
            "tile": plgpu.SMEM((warpgroups, TILE, TILE), x.dtype if x.shape[2] == N else jnp.float32),
            "ring": (
                *(plgpu.SMEM((stages, TILE, z.shape[3]), z.dtype) for z in (x, y, w)),
                plgpu.SMEM((stages, rows, F), jnp.bfloat16),
                plgpu.SMEM((stages, 2, F), jnp.float32),
            ),
            "ready": plgpu.Barrier(num_barriers=stages, num_arrivals=5),
            "turn": plgpu.Barrier(num_arrivals=warpgroups),
        },
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=unsafe),
        interpret=plgpu.InterpretGPUParams() if plan.interpret else None,
    )(x, y, w, decay, starts)


def over_levels_own(body, state, *, products, terms, reverse):
    """The levels of strong decay."""
    from pallas_kernels.gated_linear_attention.decay import LEVELS, Level, _MIDDLE
    from typing import NamedTuple, Any

    class Both(NamedTuple):
        factors: Any
        part: Any

    def step(i, state):
        diagonal = jnp.where(i == LEVELS - 1, 1, 0)
        shift = jnp.maximum(_MIDDLE - i, 0)

        def block(x):
            return lax.shift_right_logical(x, jnp.broadcast_to(shift, x.shape))

        def own(t, s):
            right = block(t) & 1
            inside = block(t) == block(s) + TILE * diagonal
            return inside & ((2 * right - 1) * (t - s) >= 1 - right)

        t, s = (iota(1), iota(0)) if reverse else (iota(0), iota(1))
        rows, columns, distance = block(t), block(s), t - s
        beside = (rows == columns + 1 - diagonal) & ((rows & 1) + diagonal >= 1)
        part = beside & (distance >= 0)
        factors = []
        for one in terms:
            sums = summed(products, own, one)
            right = block(iota(0, sums.shape[1])) & 1
            del right
            factors.append((jnp.exp(sums), jnp.exp(sums)))
        return body(Both(factors, part), state)

    return lax.fori_loop(0, LEVELS, step, state)
