r"""Answers to queries, every chunk by itself: queries pass each layer at weights of their own.

    Z = b (Q W_1) + f (Q S_1) - (G * Q Kᵀ) E_1,     X = σ(Z)
    Y = b (X W_2) + f (X S_2) - (G * X X_2ᵀ) E_2

A CTA takes a chunk of one query head, 64 hidden units after the other. Floor: traffic, 0.5 GB for
4 x 8192 tokens of 4 heads and 256 hidden units, 0.12 ms; reached on an H200: 0.15 ms.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.neural_memory.gpu_gates import Views, place
from pallas_kernels.neural_memory.gpu_plan import Course, Plan, anew, load, shared
from pallas_kernels.neural_memory.gpu_walk import Memories, send
from pallas_kernels.tiles import ALONG_ROWS, TILE, WGMMA, over_columns, zeros


def read(
    plan: Plan,
    q: jax.Array,
    k: jax.Array,
    memories: Memories,
    views: Views,
    course: Course | None,
    *,
    keep: bool,
) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
    """Answers `[B,T,N,64]`, and of these X W_2 and X S_2 by themselves.

    Args:
      plan: options.
      q: queries `[B,T,N,64]`.
      k: keys `[B,T,M,64]`; M divides N.
      memories: what every chunk starts from.
      views: of the tokens.
      course: as for `gpu_walk.walk`.
      keep: whether to keep the parts, which gradients of views are made of.
    """
    B, T, N, _ = q.shape
    M, F = k.shape[2], memories.hidden.shape[-1]
    slices = F // TILE
    products = plan.products

    def neural_memory_read(
        q,
        k,
        memories,
        views,
        out,
        kept_part,
        carried_part,
        *,
        query,
        key,
        errors,
        operands,
        barrier,
    ):
        memories, views = Memories(*memories), Views(*views)
        all_tiles = query, key, errors, operands
        batch, chunk, head = (lax.axis_index(axis) for axis in ("batch", "chunk", "head"))
        query, key, errors, operands = anew(all_tiles, head)
        memory = lax.div(head, N // M)
        here, tokens = (batch, memory, chunk), pl.ds(chunk * TILE, TILE)
        for source, target in (
            (q.at[batch, tokens, head], query),
            (k.at[batch, tokens, memory], key),
            (memories.second.at[(*here, pl.ds(2 * F, TILE))], errors),
        ):
            plgpu.copy_gmem_to_smem(source, target, barrier)
        kept, carried = (
            plgpu.load(x.at[here], layout=ALONG_ROWS, optimized=False)
            for x in (views.kept, views.carried)
        )

        def written():
            return plgpu.load(views.written.at[place(*here)], layout=WGMMA, optimized=False)

        shares = written()
        plgpu.barrier_wait(barrier)
        scores = -shares * products.product(query, key.transpose((1, 0)))
        numbers = load(query)
        parts = over_columns(kept) * numbers, over_columns(carried) * numbers, scores
        for part, x in enumerate(parts):
            operands[:, part * TILE : (part + 1) * TILE] = x.astype(operands.dtype)
        plgpu.commit_smem()

        def step(index, first, weights, momentum, inputs, sums):
            query, _, _, operands = anew(all_tiles, index[0])
            x, _, _ = plan.activate(products.product(operands, first))
            query[...] = x.astype(query.dtype)  # queries have been read
            plgpu.commit_smem()
            operands_2 = weights, momentum, inputs.transpose((1, 0))
            return products.accumulate_all(
                *((total, query, x) for total, x in zip(sums, operands_2, strict=True))
            )

        def second(row):
            return plgpu.BlockSpec((None, None, None, TILE, TILE), lambda s: (*here, row + s, 0))

        def columns(rows):
            return plgpu.BlockSpec((None, None, None, rows, TILE), lambda s: (*here, 0, s))

        through, carried_through, scores = plgpu.emit_pipeline(
            step, grid=(slices,), max_concurrent_steps=plan.stages,
            init_carry=(zeros(TILE), zeros(TILE), zeros(TILE)),
            in_specs=[columns(3 * TILE), second(0), second(slices), columns(TILE)],
        )(memories.first, memories.second, memories.second, memories.hidden)  # fmt: skip
        copies = [(errors, out)]
        if keep:
            key[...] = through.astype(key.dtype)
            query[...] = carried_through.astype(query.dtype)
            copies += [(key, kept_part), (query, carried_part)]
        total = over_columns(kept) * through + over_columns(carried) * carried_through
        scores = (-written() * scores).astype(jnp.bfloat16)
        total = products.accumulate(total, scores, errors)
        errors[...] = total.astype(errors.dtype)
        plgpu.commit_smem()
        send(*((source, target.at[batch, tokens, head]) for source, target in copies))
        plgpu.wait_smem_to_gmem(0)

    tokens = jax.ShapeDtypeStruct(q.shape, q.dtype)
    return plan.launch(
        neural_memory_read, q, k, tuple(memories), tuple(views),
        grid={"batch": B, "chunk": T // TILE, "head": N}, course=course,
        out_type=(tokens, *((tokens if keep else None,) * 2)),
        scratch={
            "query": shared(), "key": shared(), "errors": shared(),
            "operands": shared(TILE, 3 * TILE), "barrier": plgpu.Barrier(num_arrivals=3),
        },
    )  # fmt: skip
