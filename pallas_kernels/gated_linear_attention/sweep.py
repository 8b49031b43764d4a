"""Sweep over states, 64 features by all values a CTA (first version)."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gated_linear_attention.decay import Decay, after, summed, up_to
from pallas_kernels.gated_linear_attention.plan import Plan, shared
from pallas_kernels.tiles import ALONG_ROWS, TILE, WGMMA, over_columns, zeros

NO_STATE_LEFT = -1e30


def sweep(plan: Plan, x, w, decay: Decay, starts, *, reverse: bool, keep: bool, unsafe=False):
    (B, T, heads, F), H = x.shape, w.shape[3]
    chunks = T // TILE // plan.config.groups
    rows = decay.rows

    def gated_linear_attention_states(x, w, decay, starts, kept, ends, *, scaled, tile):
        batch, group = lax.axis_index("batch"), lax.axis_index("group")
        head, slice_ = lax.axis_index("head"), lax.axis_index("slice")
        gate = head // (heads // decay.levels.shape[2])
        features = pl.ds(slice_ * TILE, TILE)

        def chunk(i):
            return group * chunks + (chunks - 1 - i if reverse else i)

        def spec(head, part, rows=TILE, width=TILE):
            return plgpu.BlockSpec(
                (None, rows, None, width), lambda i: (batch, chunk(i), head, part)
            )

        def strong_at(i):
            return decay.levels[batch, chunk(jnp.minimum(i, chunks - 1)), gate]

        def step(index, x, w, halves, terms, carry):
            state, levels = carry
            following = strong_at(index[0] + 1)
            strong = jnp.where(levels > 1, 1.0, 0.0)
            begin, end = (
                plgpu.load(halves.at[h], layout=ALONG_ROWS) for h in ((1, 0) if reverse else (0, 1))
            )

            @pl.when(levels > 1)
            def _():
                for r in range(rows // TILE):
                    part = terms.at[pl.ds(r * TILE, TILE)]
                    part[...] = jnp.maximum(
                        plgpu.load(part, layout=WGMMA), jnp.asarray(NO_STATE_LEFT, jnp.bfloat16)
                    )
                plgpu.commit_smem()

            if keep:
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                read = strong + (1 - strong) * begin
                tile[...] = (over_columns(read, H) * state).astype(tile.dtype)
            sums = summed(plan.products, up_to if reverse else after, terms)
            numbers = plgpu.load(x, layout=WGMMA).astype(jnp.float32)
            scaled[...] = (numbers * jnp.exp(sums)).astype(scaled.dtype)
            plgpu.commit_smem()
            if keep:
                plgpu.copy_smem_to_gmem(tile, kept.at[batch, head, chunk(index[0]), features])
            state = over_columns(begin * end, H) * state
            return plan.products.accumulate(state, scaled.transpose((1, 0)), w), following

        at = batch, head, group, features
        state = zeros(H)
        if starts is not None:
            state = plgpu.load(starts.at[at], layout=WGMMA, optimized=False)
        halves = plgpu.BlockSpec(
            (None, None, 2, None, TILE), lambda i: (batch, chunk(i), 0, gate, slice_)
        )
        state, _ = plgpu.emit_pipeline(
            step, grid=(chunks,), max_concurrent_steps=plan.config.stages,
            init_carry=(state, strong_at(0)),
            in_specs=[spec(head, slice_), spec(head, 0, TILE, H), halves,
                      spec(gate, slice_, rows)],
        )(x, w, decay.halves, decay.terms)  # fmt: skip
        ends[at] = state
        plgpu.wait_smem_to_gmem(0)

    return plgpu.kernel(
        gated_linear_attention_states,
        out_type=(
            jax.ShapeDtypeStruct((B, heads, T // TILE, F, H), jnp.bfloat16) if keep else None,
            jax.ShapeDtypeStruct((B, heads, plan.config.groups, F, H), jnp.float32),
        ),
        grid=(B, plan.config.groups, F // TILE, heads), grid_names=("batch", "group", "slice", "head"),
        scratch_types={
            "scaled": shared(TILE, TILE), "tile": shared(TILE, H) if keep else None,
        },
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=unsafe),
        interpret=plgpu.InterpretGPUParams() if plan.interpret else None,
    )(x, w, decay, starts)
