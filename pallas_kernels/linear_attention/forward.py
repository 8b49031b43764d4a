r"""The sweep that gives outputs, and the one that gives what groups of chunks add to the state.

A CTA walks its chunks of 64 tokens with the state S, z in registers. Each step, with tiles
x, y `[64, F]` and w `[64, 64]` in shared memory and i running over slices of 64 features:

    O    = sum_i phi_i(x) S_i              + P w         P = tril(p(x yᵀ))
    den  = sum_i rowsum(phi_i(x) * z_i)    + rowsum(P)
    S_i += phi_i(y)ᵀ w,  z_i += rowsum(phi_i(y)ᵀ)

Where B·N is too small to fill the chip, the sequence is split into groups: `group_sums` gives what
each group adds to the state, a prefix sum over groups (in XLA) the state each starts from, and
`outputs` then walks all groups at once.

Floor for Taylor, F = 16, H = 64, a chunk of one head: 5.4 MFLOP (selection products 1.6, scores
and P w 0.7, reading the state 1.6, updating it 1.6) and 20 KiB moved. At 32768 tokens x 16 heads
that is 44 GFLOP, 0.055 ms at 800 TFLOP/s, and 168 MB, 0.039 ms at 4.3 TB/s. Reached on an H200:
0.109 ms as 16 rows of 2048 tokens; as one row 0.188, with 0.055 for `group_sums` and 0.018 for the
prefix sum. What bounds it is latency: chains of small products at two warps a scheduler, since the
state fills the registers. So a chunk's products are in flight two at a time, as many as fit.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.linear_attention.documents import Documents
from pallas_kernels.linear_attention.plan import Plan, States
from pallas_kernels.linear_attention.state import absorb, store_state, zero_state
from pallas_kernels.tiles import ALONG_COLUMNS, ALONG_ROWS, TILE, over_columns, over_rows, zeros


def outputs(
    plan: Plan,
    x: jax.Array,
    y: jax.Array,
    w: jax.Array,
    starts: States | None,
    documents: Documents | None,
    bias: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array | None, States]:
    """Outputs, what they were divided by, and the state after each group.

    Args:
      plan: options.
      x: tokens that read, `[B,T,heads,F]`.
      y: tokens that write, `[B,T,heads,F]`.
      w: what they write, `[B,T,heads,H]`; as many heads as y. The numbers of heads of x and of y
        are N, or one of them divides it.
      starts: states that the groups start from, or None for zeros.
      documents: packed documents, or None.
      bias: a number of each query, `[B,N,T]` in float32, that is added to p of it and any key: the
        feature map then has a constant feature. Or None.

    Returns:
      Outputs `[B,T,N,H]`, one over the sums of weights `[B,N,T]` in float32, 0 where a sum is 0
      (None if not normalised), and states after each group, of N heads (those that share y agree).
    """
    (B, T), N, H = x.shape[:2], max(x.shape[2], y.shape[2]), w.shape[3]
    products, last = plan.products, plan.slices - 1
    along, over = (ALONG_COLUMNS, over_rows) if plan.transposed else (ALONG_ROWS, over_columns)

    def linear_attention_outputs(
        sources, x, y, w, bias, starts, documents, out, inverse, ends,
        *, constants, barrier, copy, tile,
    ):  # fmt: skip
        readers, writers = plan.bind(sources, constants, barrier)
        b, n = lax.axis_index("batch"), lax.axis_index("head")
        block = pl.ds(lax.axis_index("block") * TILE, TILE)
        state = plan.start(starts, N)
        copy.renew(state)

        def step(chunk, x, y, w, bias, state):
            constant = None if bias is None else plgpu.load(bias, layout=along)
            sums, total = zeros(TILE), []
            product = products.maybe(readers.row_product(0, x))
            for i in range(plan.slices):
                rows = readers.rows(i, x, product, None if plan.transposed else constant)
                if plan.normalize:
                    total.append(rows.dot(copy.totals_of(i)))
                # While one slice is being read, the features of the next are made; last the scores.
                following = readers.row_product(i + 1, x) if i < last else (x, y.transpose((1, 0)))
                sums, product = products.accumulate_beside(
                    sums, rows.operand, copy.tile(i), following
                )
            score = plan.feature_map.score(product)
            if constant is not None:
                score += over(constant)
            weights = jnp.where(chunk.seen(), score, 0.0)
            sums = products.accumulate(chunk.read(sums), weights.astype(w.dtype), w)
            if plan.normalize:
                divisor = chunk.read(sum(total[1:], total[0])) + weights.sum(axis=1)
                factor = jnp.where(divisor == 0, 0.0, 1 / divisor)
                sums *= over_columns(factor)
                inverse[b, n, chunk.tokens] = factor
            plgpu.wait_smem_to_gmem(0)  # the last chunk's copy has left the tile
            tile[...] = (plan.feature_map.output_scale * sums).astype(tile.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(tile, out.at[b, chunk.tokens, n, block])
            state = absorb(
                state, writers, chunk, y, w, products,
                constant=constant if plan.transposed else None,
            )  # fmt: skip
            copy.renew(state)
            return state

        arrays = [(x, "whole"), (y, "whole"), (w, "block"), (bias, "token")]
        state = plan.walk(step, arrays, documents, heads=N, stages=plan.stages, state=state)
        store_state(state, *plan.of_cta(ends, N))
        plgpu.wait_smem_to_gmem(0)

    # Query heads that share a key head give their own parts of its gradient, summed outside.
    dtype = x.dtype if x.shape[2] == N else jnp.float32
    return plan.launch(
        linear_attention_outputs, x, y, w, bias, starts, documents, grid=plan.grid(N, w),
        out_type=(
            jax.ShapeDtypeStruct((B, T, N, H), dtype),
            jax.ShapeDtypeStruct((B, N, T), jnp.float32) if plan.normalize else None,
            plan.states_type(B, N, H),
        ),
        scratch={"copy": plan.copy_scratch(), "tile": plgpu.SMEM((TILE, TILE), dtype)},
    )  # fmt: skip


def group_sums(
    plan: Plan,
    y: jax.Array,
    w: jax.Array,
    documents: Documents | None,
    weights: jax.Array | None = None,
    bias: jax.Array | None = None,
) -> States:
    """What each group adds to a state: `phi(y)ᵀ w`, and `phi(y)` times the tokens' weights.

    The slices of a state are independent, so each gets a CTA of its own: with a single slice in
    registers, many more CTAs are resident. Only a constant feature needs to know which slice it is.

    Args:
      plan: options.
      y: tokens that write, `[B,T,heads,F]`.
      w: what they write, `[B,T,heads,H]`.
      documents: packed documents, or None.
      weights: `[B,heads,T]` in float32, or None for ones.
      bias: the constant feature of y, `[B,heads,T]` in float32, if the feature map has one.
    """
    (B, _, N), H = y.shape[:3], w.shape[3]
    slices = 1 if bias is None else plan.slices

    def linear_attention_group_sums(
        sources, y, w, weights, bias, documents, sums, *, constants, barrier
    ):
        first = lax.axis_index("slice") if bias is None else 0
        _, writers = plan.bind(sources, constants, barrier, first)

        def step(chunk, y, w, weights, bias, state):
            numbers = (
                None if ref is None else plgpu.load(ref, layout=ALONG_COLUMNS)
                for ref in (weights, bias)
            )  # fmt: skip
            return absorb(state, writers, chunk, y, w, plan.products, *numbers)

        arrays = [(y, "whole"), (w, "block"), (weights, "token"), (bias, "token")]
        state = zero_state(slices, plan.normalize)
        state = plan.walk(step, arrays, documents, heads=N, stages=plan.stages, state=state)
        store_state(state, *plan.of_cta(sums, N), first=first)

    (sums,) = plan.launch(
        linear_attention_group_sums, y, w, weights, bias, documents,
        grid=plan.grid(N, w) | {"slice": plan.slices // slices},
        out_type=(plan.states_type(B, N, H),), scratch={}, commits=False,
    )  # fmt: skip
    return sums


def carried(
    sums: States, outer: States | None, documents: Documents | None, *, reverse: bool = False
) -> States:
    """States at the start of each group (reverse: at the end).

    Args:
      sums: what each group adds.
      outer: the state outside the first (last) group, as that of a single group, or None for zeros.
      documents: packed documents, or None.
      reverse: whether sums run from the last group to the first.
    """
    groups = sums[0].shape[2]
    if outer is None:
        outer = jax.tree.map(lambda s: jnp.zeros_like(s[:, :, :1]), sums)
    counts = jnp.tri(groups)[None]
    if documents is not None:
        owners = documents.owners
        before = owners[:, :: owners.shape[1] // groups, 0]
        owner = jnp.concatenate([before, owners[:, -1:, 1]], axis=1)
        owner = owner[:, 1:] if reverse else owner[:, :-1]
        counts = counts * (owner[:, :, None] == owner[:, None, :])

    def carry(sums, outer):
        ordered = [sums[:, :, 1:], outer] if reverse else [outer, sums[:, :, :-1]]
        ordered = jnp.concatenate(ordered, axis=2)
        if documents is None:
            return lax.cumsum(ordered, axis=2, reverse=reverse)
        which = "bji" if reverse else "bij"
        return jnp.einsum(
            f"{which},bnj...->bni...", counts, ordered, precision=lax.Precision.HIGHEST
        )

    return jax.tree.map(carry, sums, outer)
