r"""Gradients of the sums, as sweeps.

With g = d O, already divided by the sum of weights, and e the gradient of that sum, one number a
token (none where outputs are not normalised):

    d v = Pᵀ g + phi(k) dS                       dS = dS' + phi(q)ᵀ g,  dz = dz' + phi(q)ᵀ e

is the sweep of `forward.outputs` transposed: keys read what later queries wrote. Since p is
symmetric in q and k but for constants, d q and d k are one more sweep each:

    d q = (d P * W) k  + J(q)(g Sᵀ + e z)        d P = tril(g vᵀ + e),  W = p'(q kᵀ)
    d k = (d P * W)ᵀ q + J(k)(v dSᵀ + dz)

where J(x) is the chain rule of phi. The one for d q recomputes S forward; those for d k and d v
carry dS from the end and need no S, since outputs are linear in it. So nothing is stored for a
chunk but q, k, v, the output and the sum of weights. One kernel for both d k and d v would share
dS, but its registers do not suffice: it spilled 460 bytes a thread, its products were serialised,
and it took longer than the two.

The identity map needs `outputs` alone, for p(q, k) v is linear in each of the three:
d q = LA(g, v, k), d k = LAᵀ(v, g, q), d v = LAᵀ(k, q, g).

Floor of `input_gradients` for Taylor, F = 16, H = 64, a chunk of one head: 6.3 MFLOP and 22 KiB.
The three sweeps at 32768 tokens x 16 heads: 148 GFLOP, 0.18 ms; 530 MB, 0.12 ms.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.linear_attention.plan import Plan, States
from pallas_kernels.linear_attention.state import absorb, load_state, store_state, zero_state
from pallas_kernels.tiles import (
    ALONG_COLUMNS,
    ALONG_ROWS,
    TILE,
    over_columns,
    over_rows,
)


def input_gradients(
    plan: Plan,
    x: jax.Array,
    y: jax.Array,
    u: jax.Array,
    w: jax.Array,
    e: jax.Array | None,
    starts: States | None,
) -> tuple[jax.Array, States]:
    """`d x`, where x is q, or k if the plan is transposed; and the state after each group.

    Args:
      plan: options, with the Taylor map.
      x: tokens that read, `[B,T,heads,16]`.
      y: tokens that write, `[B,T,heads,16]`.
      u: what x's outputs are multiplied with, `[B,T,heads,H]`: g, or v if transposed.
      w: what y writes, `[B,T,heads,H]`: v, or g if transposed.
      e: gradient of the sums of weights, `[B,N,T]` in float32, or None.
      starts: states that the groups start from, or None for zeros.

    Returns:
      `[blocks,B,T,N,16]`, one part for each block of 64 values, and states of N heads.
    """
    (B, T), N, F = x.shape[:2], max(x.shape[2], y.shape[2]), x.shape[3]
    blocks = w.shape[3] // TILE
    products, slope = plan.products, plan.feature_map.slope
    along, over = (ALONG_COLUMNS, over_rows) if plan.transposed else (ALONG_ROWS, over_columns)

    def linear_attention_input_gradients(
        sources, x, y, u, w, e, starts, dx, ends, *, constants, barrier, copy, tile
    ):
        readers, writers = plan.bind(sources, constants, barrier)
        b, n, h = (lax.axis_index(axis) for axis in ("batch", "head", "block"))
        once = jnp.where(h == 0, 1.0, 0.0)  # one block counts what does not depend on values
        if starts is None:
            state = zero_state(plan.slices, plan.normalize)
        else:
            state = load_state(*plan.of_cta(starts, N), plan.slices)
        copy.renew(state)

        def step(tokens, x, y, u, w, *e_and_state):
            *e, state = e_and_state
            # e belongs to the queries: to the writers if transposed, a number a column of a tile.
            weights = [plgpu.load(ref, layout=along) for ref in e]
            dot, d_weights = products.products((x, y.transpose((1, 0))), (u, w.transpose((1, 0))))
            for number in weights:
                d_weights += over(once * number)
            d_dot = jnp.where(plan.seen(), d_weights * slope(dot), 0.0)
            grad = products.product(d_dot.astype(y.dtype), y)
            for i in range(plan.slices):
                d_rows = products.product(u, copy.tiles[i].transpose((1, 0)))
                if plan.normalize and plan.transposed:
                    d_rows += over_rows(once * copy.totals_of(i))
                elif plan.normalize:
                    d_rows += over(once * weights[0]) * over_rows(copy.totals_of(i))
                grad = readers.pull(i, x, d_rows, grad)
            plgpu.wait_smem_to_gmem(0)  # the last chunk's copy has left the tile
            tile[...] = grad.astype(tile.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(tile, dx.at[h, b, tokens, n])
            state = absorb(state, writers, y, w, products, *(weights if plan.transposed else ()))
            copy.renew(state)
            return state

        arrays = [(x, "whole"), (y, "whole"), (u, "block"), (w, "block")]
        if e is not None:
            arrays.append((e, "token"))
        state = plan.walk(step, arrays, length=T, heads=N, stages=plan.gradient_stages, state=state)
        store_state(state, *plan.of_cta(ends, N))
        plgpu.wait_smem_to_gmem(0)

    dtype = x.dtype if blocks == 1 and x.shape[2] == N else jnp.float32
    return plan.launch(
        linear_attention_input_gradients, x, y, u, w, e, starts, grid=plan.grid(N, w),
        out_type=(
            jax.ShapeDtypeStruct((blocks, B, T, N, F), dtype), plan.states_type(B, N, w.shape[3])
        ),
        scratch={"copy": plan.copy_scratch(), "tile": plgpu.SMEM((TILE, F), dtype)},
    )  # fmt: skip
