r"""Gradients of `gpu_read`, every chunk by itself.

With primes for gradients, R_1 = Q Kᵀ and R_2 = X X_2ᵀ what scores are made of:

    X'   = b (Y' W_2ᵀ) + f (Y' S_2ᵀ) + R_2' X_2        R_2' = -G * Y' E_2ᵀ        Z' = X' σ'(Z)
    Q'   = b (Z' W_1ᵀ) + f (Z' S_1ᵀ) + R_1' K          R_1' = -G * Z' E_1ᵀ
    W_2' = Xᵀ (b Y')   S_2' = Xᵀ (f Y')    E_2' = -(G * R_2)ᵀ Y'    X_2' = R_2'ᵀ X
    W_1' = (b Q)ᵀ Z'   S_1' = (f Q)ᵀ Z'    E_1' = -(G * R_1)ᵀ Z'    K'   = R_1'ᵀ Q
    G'   = -(Y' E_2ᵀ) * R_2 - (Z' E_1ᵀ) * R_1
    b'   = Y' · X W_2 + Q · Z' W_1ᵀ                    f'   = Y' · X S_2 + Q · Z' S_1ᵀ

A CTA takes a chunk of one query head, 64 hidden units after the other. Gradients of memories leave
from where the memories came. It takes half the shared memory of a multiprocessor, so that another
CTA computes while this one waits for its tiles. Floor, as for `gpu_read`: 1.0 GB, 0.23 ms; reached
on an H200: 0.44 ms.
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


def read_pull(
    plan: Plan,
    q: jax.Array,
    k: jax.Array,
    memories: Memories,
    views: Views,
    course: Course | None,
    d_out: jax.Array,
) -> tuple[jax.Array, jax.Array, Memories, Views]:
    """Gradients of q, k, memories and views, each of every query head.

    Arguments are those of `read`, and the gradient of its answers. Of the gradients of `views.kept`
    and `views.carried`, what `read` keeps the parts for is left out.
    """
    B, T, N, _ = q.shape
    M, F = k.shape[2], memories.hidden.shape[-1]
    chunks, slices = T // TILE, F // TILE
    products = plan.products

    def neural_memory_read_pull(
        q, k, memories, views, d_out, d_q, d_k, d_memories, d_views,
        *, first, second, inputs, operands, scaled, d_scores, query, tile, four, barrier,
    ):  # fmt: skip
        memories, views = Memories(*memories), Views(*views)
        d_memories, d_views = Memories(*d_memories), Views(*d_views)
        batch, chunk, head = (lax.axis_index(axis) for axis in ("batch", "chunk", "head"))
        memory = lax.div(head, N // M)
        here, there = (batch, memory, chunk), (batch, head, chunk)
        own, tokens = (batch, pl.ds(chunk * TILE, TILE), head), pl.ds(chunk * TILE, TILE)
        keys = k.at[batch, tokens, memory]
        last = pl.ds(2 * F, TILE)

        def fetch(barrier, *copies):
            for source, target in copies:
                plgpu.copy_gmem_to_smem(source, target, barrier)
            plgpu.barrier_wait(barrier)

        def put(target, numbers):
            target[...] = numbers.astype(target.dtype)

        def block(i):
            return pl.ds(i * TILE, TILE)

        def numbers_of(view):
            return over_columns(plgpu.load(view.at[here], layout=ALONG_ROWS, optimized=False))

        def written():
            return plgpu.load(views.written.at[place(*here)], layout=WGMMA, optimized=False)

        def spread(targets, numbers):
            for target, view in zip(targets, (views.kept, views.carried), strict=True):
                put(target, numbers_of(view) * numbers)

        all_tiles = first, second, inputs, operands, scaled, d_scores, query, tile
        first, second, inputs, operands, scaled, d_scores, query, tile = anew(all_tiles, head)
        key, errors = second
        fetch(
            four, (q.at[own], query), (keys, key), (d_out.at[own], tile),
            (memories.second.at[(*here, last)], errors),
        )  # fmt: skip
        raw, d_scores_2 = products.products(
            (query, key.transpose((1, 0))), (tile, errors.transpose((1, 0)))
        )
        shares = written()
        put(d_scores, -shares * d_scores_2)
        put(operands.at[:, block(2)], -shares * raw)
        spread([operands.at[:, block(i)] for i in range(2)], load(query))
        spread(scaled, load(tile))
        plgpu.commit_smem()

        def step(s, sums):
            raw, d_raw, d_query, d_kept, d_carried = sums
            first, second, inputs, operands, scaled, d_scores, query, tile = anew(all_tiles, s)
            units = block(s)
            rows = units, pl.ds(F + s * TILE, TILE)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            fetch(
                four,
                (memories.first.at[(*here, slice(None), units)], first),
                *(
                    (memories.second.at[(*here, row)], target)
                    for row, target in zip(rows, second, strict=True)
                ),
                (memories.hidden.at[(*here, slice(None), units)], inputs),
            )
            z = products.product(operands, first)
            put(tile, plan.activate(z)[0])
            plgpu.commit_smem()
            # Until its slope is needed it waits in bfloat16: registers are short.
            z = lax.optimization_barrier(z.astype(jnp.bfloat16))
            raw, d_x = products.accumulate_both(
                (raw, tile, inputs.transpose((1, 0))),
                (zeros(TILE), scaled[0], second[0].transpose((1, 0))),
            )
            d_x = products.accumulate(d_x, scaled[1], second[1].transpose((1, 0)))
            d_x = products.accumulate(d_x, d_scores, inputs)
            _, slope, _ = plan.activate(z.astype(jnp.float32))
            d_z = (d_x * slope).astype(jnp.bfloat16)
            put(inputs, products.product(d_scores.transpose((1, 0)), tile))
            for target, gradient in zip(second, scaled, strict=True):
                put(target, products.product(tile.transpose((1, 0)), gradient))
            put(tile, d_z)
            plgpu.commit_smem()
            send(
                (inputs, d_memories.hidden.at[(*there, slice(None), units)]),
                *(
                    (target, d_memories.second.at[(*there, row)])
                    for row, target in zip(rows, second, strict=True)
                ),
            )
            d_raw = products.accumulate(d_raw, tile, first.at[block(2)].transpose((1, 0)))
            weights, momentum = (first.at[block(i)].transpose((1, 0)) for i in range(2))
            through, carried = products.products((tile, weights), (tile, momentum))
            d_kept += (load(query) * through).sum(axis=1)
            d_carried += (load(query) * carried).sum(axis=1)
            d_query += numbers_of(views.kept) * through + numbers_of(views.carried) * carried
            for i in range(3):
                operand = operands.at[:, block(i)].transpose((1, 0))
                put(first.at[block(i)], products.product(operand, tile))
            plgpu.commit_smem()
            send((first, d_memories.first.at[(*there, slice(None), units)]))
            return raw, d_raw, d_query, d_kept, d_carried

        empty = plgpu.layout_cast(jnp.zeros((TILE,), jnp.float32), ALONG_ROWS)
        raw, d_raw, d_query, d_kept, d_carried = lax.fori_loop(
            0, slices, step, (*(zeros(TILE) for _ in range(3)), empty, empty)
        )
        _, (key, errors), grad, _, _, d_scores, query, tile = anew(all_tiles, chunk)
        d_views.kept[there] = d_kept
        d_views.carried[there] = d_carried
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        fetch(
            barrier, (keys, key), (memories.second.at[(*here, last)], errors), (d_out.at[own], grad)
        )
        shares = written()
        put(tile, -shares * raw)
        put(d_scores, -shares * d_raw)
        plgpu.commit_smem()
        d_written = -raw * products.product(grad, errors.transpose((1, 0)))
        d_written -= d_raw * products.product(query, key.transpose((1, 0)))
        d_views.written[place(*there)] = d_written
        d_query = products.accumulate(d_query, d_scores, key)
        d_errors = products.product(tile.transpose((1, 0)), grad)
        put(grad, products.product(d_scores.transpose((1, 0)), query))
        put(query, d_query)
        put(tile, d_errors)
        plgpu.commit_smem()
        send(
            (tile, d_memories.second.at[(*there, last)]),
            (query, d_q.at[own]), (grad, d_k.at[own]),
        )  # fmt: skip
        plgpu.wait_smem_to_gmem(0)

    def of_heads(x):
        return jax.ShapeDtypeStruct((B, N, *x.shape[2:]), x.dtype)

    tokens = jax.ShapeDtypeStruct(q.shape, q.dtype)
    d_q, d_k, d_memories, d_views = plan.launch(
        neural_memory_read_pull, q, k, tuple(memories), tuple(views), d_out,
        grid={"batch": B, "chunk": chunks, "head": N}, course=course,
        out_type=(
            tokens, tokens, tuple(map(of_heads, memories)), tuple(map(of_heads, views)),
        ),
        scratch={
            "first": shared(3 * TILE), "second": (shared(),) * 2,
            "inputs": shared(), "operands": shared(TILE, 3 * TILE), "scaled": (shared(),) * 2,
            "d_scores": shared(), "query": shared(), "tile": shared(),
            "four": plgpu.Barrier(num_arrivals=4), "barrier": plgpu.Barrier(num_arrivals=3),
        },
    )  # fmt: skip
    return d_q, d_k, Memories(*d_memories), Views(*d_views)
