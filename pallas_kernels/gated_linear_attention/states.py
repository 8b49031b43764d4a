r"""The sweep over chunks that finds the state at the border of every two.

A warpgroup walks the chunks of 64 tokens of one (batch, group of chunks, head) with a tile of the
state, 64 features by 64 values, in its registers:

    S <- diag(e^{G_C}) S + (x e^{sums})^T w

Forward, x and w are keys and values, sums run from after each token to the end of its chunk, and S
is the state. Reversed, x and w are queries and the output's gradient, sums run from the start of
the chunk up to each token, and S is the gradient of the state.

Where B·N is too small to fill the chip, the sequence is split into groups, and a first sweep that
keeps nothing finds what each adds.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gated_linear_attention.decay import Decay, after, summed, up_to
from pallas_kernels.gated_linear_attention.plan import Plan
from pallas_kernels.tiles import ALONG_ROWS, TILE, WGMMA, over_columns, zeros


def sweep(
    plan: Plan,
    x: jax.Array,
    w: jax.Array,
    decay: Decay,
    starts: jax.Array | None,
    *,
    reverse: bool,
    keep: bool,
) -> tuple[jax.Array | None, jax.Array]:
    """The state that each chunk starts from (reverse: its gradient at the chunk's end), and ends.

    Args:
      plan: options.
      x: `[B,T,heads,F]`.
      w: `[B,T,heads,H]`.
      decay: that of heads of which the heads of x are a multiple.
      starts: the state each group starts from, `[B,heads,groups,F,H]` in float32, or None for
        zeros.
      reverse: whether to walk from the end.
      keep: whether to store states of chunks.

    Returns:
      `[B,heads,chunks,F,H]` in bfloat16, or None; and `[B,heads,groups,F,H]` in float32, the state
      after each group.
    """
    (B, T, heads, F), H = x.shape, w.shape[3]
    chunks = T // TILE // plan.config.groups

    def gated_linear_attention_states(x, w, decay, starts, kept, ends, *, scaled, tile):
        batch, group = lax.axis_index("batch"), lax.axis_index("group")
        head, slice_, block = (lax.axis_index(axis) for axis in ("head", "slice", "block"))
        gate = head // (heads // decay.factor.shape[2])
        features, values = pl.ds(slice_ * TILE, TILE), pl.ds(block * TILE, TILE)

        def chunk(i):
            return group * chunks + (chunks - 1 - i if reverse else i)

        def spec(head, part, rows=TILE):
            return plgpu.BlockSpec(
                (None, rows, None, TILE), lambda i: (batch, chunk(i), head, part)
            )

        def step(index, x, w, factor, terms, state):
            left = plgpu.load(factor, layout=ALONG_ROWS)
            if keep:
                plgpu.wait_smem_to_gmem(0)  # the last chunk's copy has left the tile
                tile[...] = state.astype(tile.dtype)
            sums = summed(plan.products, up_to if reverse else after, terms)
            numbers = plgpu.load(x, layout=WGMMA).astype(jnp.float32)
            scaled[...] = (numbers * jnp.exp(sums)).astype(scaled.dtype)
            plgpu.commit_smem()
            if keep:
                target = kept.at[batch, head, chunk(index[0]), features, values]
                plgpu.copy_smem_to_gmem(tile, target)
            return plan.products.accumulate(over_columns(left) * state, scaled.transpose((1, 0)), w)

        at = batch, head, group, features, values
        state = zeros(TILE)
        if starts is not None:
            state = plgpu.load(starts.at[at], layout=WGMMA, optimized=False)
        factor = plgpu.BlockSpec(
            (None, None, None, TILE), lambda i: (batch, chunk(i), gate, slice_)
        )
        ends[at] = plgpu.emit_pipeline(
            step, grid=(chunks,), max_concurrent_steps=plan.config.stages, init_carry=state,
            in_specs=[
                spec(head, slice_), spec(head, block), factor,
                spec(gate, slice_, decay.rows),
            ],
        )(x, w, decay.factor, decay.terms)  # fmt: skip
        plgpu.wait_smem_to_gmem(0)

    states = (B, heads, T // TILE, F, H)
    return plan.launch(
        gated_linear_attention_states, x, w, decay, starts,
        grid={
            "batch": B, "group": plan.config.groups, "slice": F // TILE, "block": H // TILE,
            "head": heads,
        },
        out_type=(
            jax.ShapeDtypeStruct(states, jnp.bfloat16) if keep else None,
            jax.ShapeDtypeStruct((B, heads, plan.config.groups, F, H), jnp.float32),
        ),
        scratch={
            "scaled": plgpu.SMEM((TILE, TILE), jnp.bfloat16),
            "tile": plgpu.SMEM((TILE, TILE), jnp.bfloat16) if keep else None,
        },
    )  # fmt: skip


def states_of_chunks(
    plan: Plan, x: jax.Array, w: jax.Array, decay: Decay, outer: jax.Array | None, *, reverse: bool
) -> tuple[jax.Array, jax.Array]:
    """The state that each chunk starts from, `[B,heads,chunks,F,H]`, and the last, `[B,heads,F,H]`.

    Args:
      plan: options.
      x, w, decay, reverse: as for `sweep`.
      outer: the state that the sequence starts from (reverse: the gradient of its last), or None.
    """
    B, _, heads, F = x.shape
    groups = plan.config.groups
    starts = None if outer is None else outer[:, :, None]
    if groups > 1:
        _, sums = sweep(plan, x, w, decay, None, reverse=reverse, keep=False)
        gates = decay.factor.shape[2]
        factors = decay.factor.reshape(B, groups, -1, gates, F).prod(axis=2).swapaxes(1, 2)
        factors = jnp.repeat(factors, heads // gates, axis=1)[..., None]
        order = range(groups)[::-1] if reverse else range(groups)
        state = jnp.zeros_like(sums[:, :, 0]) if outer is None else outer
        found = {}
        for group in order:
            found[group] = state
            state = factors[:, :, group] * state + sums[:, :, group]
        starts = jnp.stack([found[group] for group in range(groups)], axis=2)
    kept, ends = sweep(plan, x, w, decay, starts, reverse=reverse, keep=True)
    assert kept is not None
    return kept, ends[:, :, 0 if reverse else -1]
