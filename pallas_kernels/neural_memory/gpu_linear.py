r"""The walks of a memory of one layer: a warpgroup a memory, with W and S in its registers.

In the notation of `gpu_walk` and `gpu_pull`:

    E  = 2 (K W - V)                               W' = b W + f S - Kᵀ (g E)
                                                   S' = m S - Kᵀ (n E)
    Z' = 2 (E'(read) - g (K A) - n (K B))          W' = b A + W'(read) + Kᵀ Z'
                                                   S' = f A + m B + S'(read)

The chain of a chunk is two products forward and two back, with no sum over a cluster: columns of W
that belong to 64 numbers of the values have nothing to do with the others, and are a CTA. Of keys
of 128 a warpgroup has two tiles of W and two of S, 128 registers a thread.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.neural_memory.gpu_plan import (
    PART,
    Course,
    Plan,
    anew,
    follow,
    load,
    load_float32,
    shared,
)
from pallas_kernels.neural_memory.gpu_walk import Layer, Shares, send, write
from pallas_kernels.tiles import TILE, over_columns


def linear_walk(
    plan: Plan,
    k: jax.Array,
    v: jax.Array,
    shares: jax.Array,
    starts: tuple[jax.Array, ...],
    course: Course | None,
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """W, S and E of all chunks, `[B,M,n,H+H+64,H]`, and the final W and S, `[B,M,H,H]`.

    Arguments are those of `gpu_walk.walk`, of one layer.
    """
    B, T, M, H = k.shape
    chunks, parts = T // TILE, H // TILE
    products = plan.products

    def neural_memory_linear_walk(k, v, shares, starts, course, kept, ends, *, layer, error):
        batch, memory, part = (lax.axis_index(axis) for axis in ("batch", "memory", PART))
        here, columns = (batch, memory), _block(part)
        length, renew = follow(course, batch, chunks)

        def put(target, tiles):
            for i, numbers in enumerate(tiles):
                target[_block(i)] = numbers.astype(target.dtype)

        def step(index, keys, values, gates, state):
            (i,) = index
            at = *here, i
            tiles, e = anew((layer, error), i)
            share = Shares.read(gates)
            x = 2 * (products.product(keys, tiles.weights) - load(values))
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            share.scale(x, tiles)
            put(e, [x])
            put(tiles.momentum, [momentum for _, momentum in state])
            plgpu.commit_smem()
            send(
                (tiles.weights, kept.at[(*at, pl.ds(0, H), columns)]),
                (tiles.momentum, kept.at[(*at, pl.ds(H, H), columns)]),
                (e, kept.at[(*at, _block(2 * parts), columns)]),
            )
            state = [
                write(products, share.decay(*tile), keys.at[:, _block(row)], tiles)
                for row, tile in enumerate(state)
            ]
            state = [
                renew(i, 0, (*here, _block(row), columns), tile) for row, tile in enumerate(state)
            ]
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            put(tiles.weights, [weights for weights, _ in state])
            plgpu.commit_smem()
            return state

        state = _load(starts, here, parts, columns)
        put(anew(layer, batch).weights, [weights for weights, _ in state])
        plgpu.commit_smem()
        state = plgpu.emit_pipeline(
            step, grid=(length,), max_concurrent_steps=2, init_carry=state,
            in_specs=[
                plgpu.BlockSpec((None, TILE, None, H), lambda i: (batch, i, memory, 0)),
                plgpu.BlockSpec((None, TILE, None, TILE), lambda i: (batch, i, memory, part)),
                plgpu.BlockSpec((None, None, None, 5, TILE), lambda i: (*here, i, 0, 0)),
            ],
        )(k, v, shares)  # fmt: skip
        _store(ends, here, columns, state)
        plgpu.wait_smem_to_gmem(0)

    kept = jax.ShapeDtypeStruct((B, M, chunks, 2 * H + TILE, H), jnp.bfloat16)
    end = jax.ShapeDtypeStruct(starts[0].shape, jnp.float32)
    return plan.launch(
        neural_memory_linear_walk, k, v, shares, tuple(starts), course,
        grid={"batch": B, "memory": M, PART: parts},
        out_type=(kept, (end, end)),
        scratch={
            "layer": Layer(shared(H), shared(H), written=shared(), pending=shared()),
            "error": shared(),
        },
    )  # fmt: skip


def linear_pull(
    plan: Plan,
    k: jax.Array,
    shares: jax.Array,
    d_kept: jax.Array,
    d_ends: tuple[jax.Array, ...],
    course: Course | None,
) -> tuple[jax.Array, jax.Array, tuple[jax.Array, ...]]:
    """A and B of all chunks, `[B,M,n,H+H,H]`, and Z', `[B,M,n,64,H]`; gradients of the first W, S.

    Args:
      plan: options.
      k, shares: as for `linear_walk`.
      d_kept: gradient of what it kept, from reading it.
      d_ends: gradients of the final W and S, in float32.
      course: as for `linear_walk`.
    """
    B, T, M, H = k.shape
    chunks, parts = T // TILE, H // TILE
    products = plan.products

    def neural_memory_linear_pull(
        k, shares, d_kept, d_ends, course, out, d_outputs, d_starts, *, tiles
    ):
        batch, memory, part = (lax.axis_index(axis) for axis in ("batch", "memory", PART))
        here, columns = (batch, memory), _block(part)
        length, _ = follow(course, batch, chunks)

        def put(targets, state):
            for target, blocks in zip(targets, zip(*state, strict=True), strict=True):
                for i, numbers in enumerate(blocks):
                    target[_block(i)] = numbers.astype(target.dtype)
            plgpu.commit_smem()

        def step(index, keys, gates, d_kept, state):
            at = *here, length - 1 - index[0]
            a, b, z = anew(tiles, index[0])
            share = Shares.read(gates)
            d_error = load(d_kept.at[_block(2 * parts)])
            through, pending = products.products((keys, a), (keys, b))
            d_error -= over_columns(share.written) * through
            d_error -= over_columns(share.pending) * pending
            put([z], [[2 * d_error]])
            send(
                (a, out.at[(*at, pl.ds(0, H), columns)]),
                (b, out.at[(*at, pl.ds(H, H), columns)]),
                (z, d_outputs.at[(*at, slice(None), columns)]),
            )
            after = []
            for row, tile in enumerate(state):
                d_weights, d_momentum = share.pull(
                    tile, *(load(d_kept.at[_block(i + row)]) for i in (0, parts))
                )
                keys_row = keys.at[:, _block(row)].transpose((1, 0))
                after.append((products.accumulate(d_weights, keys_row, z), d_momentum))
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            put((a, b), after)
            return after

        state = _load(d_ends, here, parts, columns)
        put(anew(tiles, batch)[:2], state)

        def chunk(i):
            return length - 1 - i

        state = plgpu.emit_pipeline(
            step, grid=(length,), max_concurrent_steps=2, init_carry=state,
            in_specs=[
                plgpu.BlockSpec((None, TILE, None, H), lambda i: (batch, chunk(i), memory, 0)),
                plgpu.BlockSpec((None, None, None, 5, TILE), lambda i: (*here, chunk(i), 0, 0)),
                plgpu.BlockSpec(
                    (None, None, None, 2 * H + TILE, TILE), lambda i: (*here, chunk(i), 0, part)
                ),
            ],
        )(k, shares, d_kept)  # fmt: skip
        _store(d_starts, here, columns, state)
        plgpu.wait_smem_to_gmem(0)

    d_start = jax.ShapeDtypeStruct(d_ends[0].shape, jnp.float32)
    return plan.launch(
        neural_memory_linear_pull, k, shares, d_kept, tuple(d_ends), course,
        grid={"batch": B, "memory": M, PART: parts},
        out_type=(
            jax.ShapeDtypeStruct((B, M, chunks, 2 * H, H), d_kept.dtype),
            jax.ShapeDtypeStruct((B, M, chunks, TILE, H), d_kept.dtype),
            (d_start, d_start),
        ),
        scratch={"tiles": (shared(H), shared(H), shared())},
    )  # fmt: skip


def _block(i):
    return pl.ds(i * TILE, TILE)


def _load(arrays, here, parts: int, columns) -> list[tuple[jax.Array, ...]]:
    """Tiles of W and S, a pair for every 64 rows, of `[B,M,H,H]`."""
    return [
        tuple(load_float32(x.at[(*here, _block(row), columns)]) for x in arrays)
        for row in range(parts)
    ]


def _store(arrays, here, columns, state) -> None:
    for row, tile in enumerate(state):
        for array, numbers in zip(arrays, tile, strict=True):
            array[(*here, _block(row), columns)] = numbers
