r"""The sweep that finds what groups of chunks add to the state, or the state that each chunk reads.

A warpgroup walks the chunks of 64 tokens of one (batch, group of chunks, head) with 64 features of
the state in its registers:

    S <- diag(e^{G_C}) S + (x e^{sums})^T w

Forward, x and w are keys and values, sums run from after each token to the end of its chunk, and S
is the state. Reversed, x and w are queries and the output's gradient, sums run from the start of
the chunk up to each token, and S is the gradient of the state.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gated_linear_attention.decay import (
    Decay,
    after,
    is_strong,
    make_finite,
    passed,
    summed,
    times,
    up_to,
)
from pallas_kernels.gated_linear_attention.plan import Chunk, Plan, shared
from pallas_kernels.tiles import ALONG_ROWS, TILE, WGMMA, over_columns, zeros


def sweep(
    plan: Plan,
    x: jax.Array,
    w: jax.Array,
    decay: Decay,
    starts: jax.Array | None = None,
    *,
    reverse: bool = False,
    keep: bool = False,
) -> tuple[jax.Array | None, jax.Array]:
    """The state that each chunk reads, and the state after each group.

    Args:
      plan: options.
      x: `[B,T,heads,F]`.
      w: `[B,T,heads,H]`.
      decay: that of heads of which the heads of x are a multiple.
      starts: the state each group starts from, `[B,heads,groups,F,H]` in float32, or None for
        zeros.
      reverse: whether to walk from the end.
      keep: whether to store the states that chunks read.

    Returns:
      `[B,heads,chunks,F,H]` in bfloat16, in mild chunks decayed up to the middle, or None; and
      `[B,heads,groups,F,H]` in float32.
    """
    (B, T, heads, F), H = x.shape, w.shape[3]
    chunks = T // TILE // plan.config.groups

    def gated_linear_attention_states(x, w, decay, starts, kept, ends, *, scaled, tile):
        batch, group = lax.axis_index("batch"), lax.axis_index("group")
        head, features = lax.axis_index("head"), pl.ds(lax.axis_index("slice") * TILE, TILE)
        gate = head // (heads // decay.halves.shape[3])

        def chunk(i):
            return group * chunks + (chunks - 1 - i if reverse else i)

        def spec(head, rows, width, column):
            return plgpu.BlockSpec(
                (None, rows, None, width), lambda i: (batch, chunk(i), head, column)
            )

        def step(index, x, w, halves, terms, state):
            strong = is_strong(halves)
            first, second = passed(halves.at[:, features], ALONG_ROWS, reverse=reverse)
            pl.when(strong > 0)(lambda: make_finite(terms))
            sums = summed(plan.products, up_to if reverse else after, terms)
            scaled[...] = times(x, jnp.exp(sums))
            if keep:
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the last chunk's copy
                whole = jnp.where(strong > 0, 1.0, 0.0)
                to_middle = whole + (1 - whole) * first
                tile[...] = (over_columns(to_middle, H) * state).astype(tile.dtype)
            plgpu.commit_smem()
            if keep:
                here = Chunk(batch, chunk(index[0]), head, heads)
                plgpu.copy_smem_to_gmem(tile, here.of_state(kept).at[features])
            state *= over_columns(first * second, H)
            return plan.products.accumulate(state, scaled.transpose((1, 0)), w)

        at = batch, head, group, features
        state = zeros(H)
        if starts is not None:
            state = plgpu.load(starts.at[at], layout=WGMMA, optimized=False)
        slice_ = lax.axis_index("slice")
        halves = plgpu.BlockSpec((None, None, 2, None, F), lambda i: (batch, chunk(i), 0, gate, 0))
        ends[at] = plgpu.emit_pipeline(
            step, grid=(chunks,), max_concurrent_steps=plan.config.stages,
            init_carry=state,
            in_specs=[
                spec(head, TILE, TILE, slice_), spec(head, TILE, H, 0), halves,
                spec(gate, decay.rows, TILE, slice_),
            ],
        )(x, w, decay.halves, decay.terms)  # fmt: skip
        plgpu.wait_smem_to_gmem(0)

    return plan.launch(
        gated_linear_attention_states, x, w, decay, starts,
        grid={"batch": B, "group": plan.config.groups, "slice": F // TILE, "head": heads},
        out_type=(
            jax.ShapeDtypeStruct((B, heads, T // TILE, F, H), jnp.bfloat16) if keep else None,
            jax.ShapeDtypeStruct((B, heads, plan.config.groups, F, H), jnp.float32),
        ),
        scratch={"scaled": shared(TILE, TILE), "tile": shared(TILE, H) if keep else None},
    )  # fmt: skip


def starts_of_groups(
    plan: Plan,
    x: jax.Array,
    w: jax.Array,
    decay: Decay,
    outer: jax.Array | None,
    *,
    reverse: bool = False,
) -> jax.Array | None:
    """The state that each group starts from, `[B,heads,groups,F,H]`, or None for zeros.

    Args:
      plan: options.
      x, w, decay, reverse: as for `sweep`.
      outer: the state that the sequence starts from (reverse: the gradient of its last), or None.
    """
    groups = plan.config.groups
    if groups == 1:
        return None if outer is None else outer[:, :, None]
    _, sums = sweep(plan, x, w, decay, reverse=reverse)
    left = jnp.repeat(decay.over_groups(groups), x.shape[2] // decay.halves.shape[3], axis=1)
    state = jnp.zeros_like(sums[:, :, 0]) if outer is None else outer
    starts = {}
    for group in range(groups)[::-1] if reverse else range(groups):
        starts[group] = state
        state = left[:, :, group, :, None] * state + sums[:, :, group]
    return jnp.stack([starts[group] for group in range(groups)], axis=2)
