r"""Gradients of the sums, as sweeps.

With g = d O, already divided by the sum of weights, and e the gradient of that sum, one number a
token (none where outputs are not normalised):

    d v = Pᵀ g + phi(k) dS                       dS = dS' + phi(q)ᵀ g,  dz = dz' + phi(q)ᵀ e

is the sweep of `forward.outputs` transposed: keys read what later queries wrote. Since p is
symmetric in q and k but for constants, d q and d k are one more sweep each:

    d q = J(q)(g Sᵀ + e z)  + (d P * W) k        d P = tril(g vᵀ + e),  W = p'(q kᵀ)
    d k = J(k)(v dSᵀ + dz)  + (d P * W)ᵀ q

where J(x) is the chain rule of phi. The one for d q recomputes S forward, and makes g and e of the
output's gradient on its way; those for d k and d v carry dS from the end and need no S, since
outputs are linear in it. So nothing is stored for a chunk but q, k, v, the output and the sum of
weights. One kernel for both d k and d v would share dS, but its registers do not suffice: it
spilled 460 bytes a thread, its products were serialised, and it took longer than the two.

The identity map needs `outputs` alone, for p(q, k) v is linear in each of the three:
d q = LA(g, v, k), d k = LAᵀ(v, g, q), d v = LAᵀ(k, q, g), where e, if outputs are normalised, is
the one more feature of g that meets 1 in v.

Floor of `input_gradients` for Taylor, F = 16, H = 64, a chunk of one head: 6.3 MFLOP and 30 KiB.
The three sweeps at 32768 tokens x 16 heads: 148 GFLOP, 0.18 ms; 671 MB, 0.16 ms. Reached on an
H200, as 16 rows of 2048 tokens: 0.37 ms, of which d v takes 0.09; before descriptors of products
were found where they are used (`tiles.unknown_zero`), and g and e in XLA, it was 0.54.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.linear_attention.documents import Documents
from pallas_kernels.linear_attention.features import Identity
from pallas_kernels.linear_attention.forward import carried, group_sums, outputs
from pallas_kernels.linear_attention.plan import Plan, States
from pallas_kernels.linear_attention.state import absorb, store_state
from pallas_kernels.tiles import (
    ALONG_COLUMNS,
    ALONG_ROWS,
    TILE,
    WGMMA,
    over_columns,
    over_rows,
    zeros,
)


class Divided(NamedTuple):
    """What outputs were divided by, to find the gradients of sums.

    Attributes:
      out: outputs `[B,T,N,H]`.
      inverse: one over the sums of weights, `[B,N,T]` in float32.
    """

    out: jax.Array
    inverse: jax.Array


def taylor_gradients(
    plan: Plan,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    d_out: jax.Array,
    divided: Divided | None,
    starts: States | None,
    d_end: States | None,
    documents: Documents | None,
) -> tuple[jax.Array, jax.Array, jax.Array, States]:
    """Gradients of q, k, v, the latter two for each head of q, and of the states before each group.

    Args:
      plan: options, with the Taylor map.
      q: queries `[B,T,N,F]`.
      k: keys `[B,T,K,F]`.
      v: values `[B,T,K,H]`.
      d_out: the gradient of the output.
      divided: given if the output is normalised.
      starts: states that the groups start from, or None for zeros.
      d_end: the gradient of the final state, as that of one group, or None for zeros.
      documents: packed documents, or None.
    """
    transposed, ends = plan.replace(transposed=True), d_end
    dq, g, e, _ = _input_gradients(plan, q, k, d_out, v, None, divided, starts, documents)
    g, e = (d_out, None) if divided is None else (g, e.sum(axis=0))
    if plan.groups > 1:
        sums = group_sums(transposed, q, g, documents, e)
        ends = carried(sums, d_end, documents, reverse=True)
    dk, _, _, d_starts = _input_gradients(transposed, k, q, v, g, e, None, ends, documents)
    plain = None if ends is None else (ends[0], None)
    dv, _, _ = outputs(transposed.replace(normalize=False), k, q, g, plain, documents)
    return dq.sum(axis=0), dk.sum(axis=0), dv, d_starts


def identity_gradients(
    plan: Plan,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    d_out: jax.Array,
    divided: Divided | None,
    starts: States | None,
    d_end: States | None,
    documents: Documents | None,
) -> tuple[jax.Array, jax.Array, jax.Array, States]:
    """The same for the identity map."""
    g, e, H = d_out, None, v.shape[3]
    if divided is not None:
        g = d_out.astype(jnp.float32) * divided.inverse.swapaxes(1, 2)[..., None]
        e = -jnp.sum(g * divided.out.astype(jnp.float32), axis=-1).swapaxes(1, 2)
        g = g.astype(q.dtype)
    scale = plan.feature_map.output_scale
    of_values = Identity(size=H, output_scale=scale, has_constant=e is not None)
    of_keys = Identity(size=q.shape[3], output_scale=scale)
    forward = plan.replace(normalize=False, feature_map=of_values)
    reverse = forward.replace(transposed=True)
    ends = _of_values(d_end)
    if plan.groups > 1:
        ends = carried(group_sums(reverse, g, q, documents, bias=e), ends, documents, reverse=True)
    dq, _, _ = outputs(forward, g, v, k, _of_values(starts), documents, e)
    dk, _, d_starts = outputs(reverse, v, g, q, ends, documents, e)
    plain = None if ends is None else (_of_keys(ends, H)[0], None)
    dv, _, _ = outputs(reverse.replace(feature_map=of_keys), k, q, g, plain, documents)
    return dq, dk, dv, _of_keys(d_starts, H)


def _of_values(states: States | None) -> States | None:
    """States whose features are values, and 1 if there are totals."""
    if states is None:
        return None
    sums, totals = states
    sums = sums.swapaxes(-1, -2)
    if totals is not None:
        rest = ((0, 0),) * (totals.ndim - 1) + ((0, TILE - 1), (0, 0))
        sums = jnp.concatenate([sums, jnp.pad(totals[..., None, :], rest)], axis=-2)
    return sums, None


def _of_keys(states: States, values: int) -> States:
    """Undoes `_of_values`."""
    sums, _ = states
    totals = sums[..., values, :] if sums.shape[-2] > values else None
    return sums[..., :values, :].swapaxes(-1, -2), totals


def _input_gradients(
    plan: Plan,
    x: jax.Array,
    y: jax.Array,
    u: jax.Array,
    w: jax.Array,
    e: jax.Array | None,
    divided: Divided | None,
    starts: States | None,
    documents: Documents | None,
):
    """The sweep for d q, or transposed for d k.

    Args:
      plan: options, with the Taylor map.
      x: tokens that read, `[B,T,heads,16]`: q, or k if transposed.
      y: tokens that write, `[B,T,heads,16]`.
      u: what x's outputs are multiplied with, `[B,T,heads,H]`: the output's gradient, or v.
      w: what y writes, `[B,T,heads,H]`: v, or g.
      e: if transposed and normalised, the gradient of the sums of weights, `[B,N,T]` in float32.
      divided: if normalised and not transposed.
      starts: states that the groups start from, or None for zeros.
      documents: packed documents, or None.

    Returns:
      `[blocks,B,T,N,16]`, one part for each block of 64 values; g, and e in as many parts, given
      `divided`; and the states after each group, of N heads.
    """
    (B, T), N, F = x.shape[:2], max(x.shape[2], y.shape[2]), x.shape[3]
    blocks = w.shape[3] // TILE
    products, slope = plan.products, plan.feature_map.slope

    def linear_attention_input_gradients(
        sources, x, y, u, w, e, divided, starts, documents, dx, g, e_parts, ends,
        *, constants, barrier, copy, tile,
    ):  # fmt: skip
        readers, writers = plan.bind(sources, constants, barrier)
        b, n, h = (lax.axis_index(axis) for axis in ("batch", "head", "block"))
        once = jnp.where(h == 0, 1.0, 0.0)  # one block counts what does not depend on values
        state = plan.start(starts, N)
        copy.renew(state)

        def of_sums(chunk, d_out, out, inverse):
            """Makes g of the gradient of outputs, in place, and gives e of this block."""
            grad = plgpu.load(d_out, layout=WGMMA).astype(jnp.float32)
            grad *= over_columns(plgpu.load(inverse, layout=ALONG_ROWS))
            number = -(grad * plgpu.load(out, layout=WGMMA).astype(jnp.float32)).sum(axis=1)
            d_out[...] = grad.astype(d_out.dtype)
            plgpu.commit_smem()
            target = g.at[b, chunk.tokens, n, pl.ds(h * TILE, TILE)]
            plgpu.copy_smem_to_gmem(d_out, target)
            e_parts[h, b, n, chunk.tokens] = number
            return number

        def step(chunk, x, y, u, w, e, out, inverse, state):
            number = weights = None
            if out is not None:
                number = over_columns(of_sums(chunk, u, out, inverse))
            elif e is not None:
                weights = plgpu.load(e, layout=ALONG_COLUMNS)
                number = over_rows(once * weights)

            grad = zeros(F)
            for i in range(plan.slices):

                def with_totals(d_rows, i=i):
                    if number is None:
                        return d_rows
                    totals = over_rows(copy.totals_of(i))
                    return d_rows + totals * (once if plan.transposed else number)

                past = u, copy.tile(i).transpose((1, 0))
                grad = readers.pull(i, x, past, with_totals, grad)
            dot, d_weights = products.products((x, y.transpose((1, 0))), (u, w.transpose((1, 0))))
            if number is not None:
                d_weights += number
            d_dot = jnp.where(chunk.seen(), d_weights * slope(dot), 0.0)
            grad = products.accumulate(chunk.read(grad), d_dot.astype(y.dtype), y)
            if divided is None:
                plgpu.wait_smem_to_gmem(0)  # the last chunk's copy has left the tile
            tile[...] = grad.astype(tile.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(tile, dx.at[h, b, chunk.tokens, n])
            state = absorb(state, writers, chunk, y, w, products, weights)
            copy.renew(state)
            if divided is not None:
                plgpu.wait_smem_to_gmem(0)  # g has left what the next chunk will be copied to
            return state

        out, inverse = divided or (None, None)
        arrays = [
            (x, "whole"), (y, "whole"), (u, "block"), (w, "block"),
            (e, "token"), (out, "block"), (inverse, "token"),
        ]  # fmt: skip
        state = plan.walk(
            step, arrays, documents, heads=N, stages=plan.gradient_stages, state=state
        )
        store_state(state, *plan.of_cta(ends, N))
        plgpu.wait_smem_to_gmem(0)

    dtype = x.dtype if blocks == 1 and x.shape[2] == N else jnp.float32
    numbers = jax.ShapeDtypeStruct((blocks, B, N, T), jnp.float32)
    return plan.launch(
        linear_attention_input_gradients, x, y, u, w, e, divided, starts, documents,
        grid=plan.grid(N, w),
        out_type=(
            jax.ShapeDtypeStruct((blocks, B, T, N, F), dtype),
            None if divided is None else jax.ShapeDtypeStruct(u.shape, u.dtype),
            None if divided is None else numbers, plan.states_type(B, N, w.shape[3]),
        ),
        scratch={"copy": plan.copy_scratch(), "tile": plgpu.SMEM((TILE, F), dtype)},
    )  # fmt: skip
