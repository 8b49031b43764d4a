r"""The walks of a memory of one layer: a warpgroup a memory, with W and S in its registers.

In the notation of `gpu_walk` and `gpu_pull`:

    E  = 2 (K W - V)                               W' = b W + f S - Kᵀ (g E)
                                                   S' = m S - Kᵀ (n E)
    Z' = 2 (E'(read) - g (K A) - n (K B))          W' = b A + W'(read) + Kᵀ Z'
                                                   S' = f A + m B + S'(read)

The chain of a chunk is two products forward and two back, with no sum over a cluster.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.neural_memory.gpu_plan import (
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
    parts = H // TILE
    products = plan.products

    def neural_memory_linear_walk(k, v, shares, starts, course, kept, ends, *, layer, error):
        batch, memory, part = (lax.axis_index(axis) for axis in ("batch", "memory", PART))
        here, channels = (batch, memory), _block(part)
        length, renew = follow(course, batch, T // TILE)

        def put(target, numbers):
            target[...] = numbers.astype(target.dtype)

        def step(index, keys, values, gates, state):
            (i,) = index
            at = *here, i
            tiles, e = anew((layer, error), i)
            share = Shares.read(gates)
            z = products.product(keys, tiles.weights)
            x = 2 * (z - load(values))
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            share.scale(x, tiles)
            put(e, x)
            put(tiles.momentum, state[1])
            plgpu.commit_smem()
            send(
                *(
                    (tile, kept.at[(*at, pl.ds(part * TILE, TILE))])
                    for part, tile in enumerate((tiles.weights, tiles.momentum, e))
                )
            )
            state = renew(i, 0, here, write(products, share.decay(*state), keys, tiles))
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            put(tiles.weights, state[0])
            plgpu.commit_smem()
            return state

        state = tuple(load_float32(x.at[here]) for x in starts)
        put(anew(layer, batch).weights, state[0])
        plgpu.commit_smem()
        tokens = plgpu.BlockSpec((None, TILE, None, TILE), lambda i: (batch, i, memory, 0))
        gates = plgpu.BlockSpec((None, None, None, 5, TILE), lambda i: (*here, i, 0, 0))
        state = plgpu.emit_pipeline(
            step, grid=(length,), max_concurrent_steps=2, in_specs=[tokens, tokens, gates],
            init_carry=state,
        )(k, v, shares)  # fmt: skip
        for target, numbers in zip(ends, state, strict=True):
            target[here] = numbers
        plgpu.wait_smem_to_gmem(0)

    kept = jax.ShapeDtypeStruct((B, M, T // TILE, 3 * TILE, TILE), jnp.bfloat16)
    end = jax.ShapeDtypeStruct(starts[0].shape, jnp.float32)
    return plan.launch(
        neural_memory_linear_walk, k, v, shares, tuple(starts), course,
        grid={"batch": B, "memory": M},
        out_type=(kept, (end, end)),
        scratch={"layer": Layer(*(shared() for _ in Layer._fields)), "error": shared()},
    )  # fmt: skip


def linear_pull(
    plan: Plan,
    k: jax.Array,
    shares: jax.Array,
    d_kept: jax.Array,
    d_ends: tuple[jax.Array, ...],
    course: Course | None,
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """A, B and Z' of all chunks, `[B,M,n,64+64+64,64]`; gradients of the first W and S.

    Args:
      plan: options.
      k, shares: as for `linear_walk`.
      d_kept: gradient of what it kept, from reading it.
      d_ends: gradients of the final W and S, in float32.
      course: as for `linear_walk`.
    """
    B, T, M, _ = k.shape
    chunks = T // TILE
    products = plan.products

    def neural_memory_linear_pull(k, shares, d_kept, d_ends, course, out, d_starts, *, tiles):
        batch, memory = (lax.axis_index(axis) for axis in ("batch", "memory"))
        here = batch, memory
        length, _ = follow(course, batch, chunks)

        def put(targets, numbers):
            for target, x in zip(targets, numbers, strict=True):
                target[...] = x.astype(target.dtype)
            plgpu.commit_smem()

        def step(index, keys, gates, d_kept, state):
            at = *here, length - 1 - index[0]
            a, b, z = anew(tiles, index[0])
            share = Shares.read(gates)
            d_weights, d_momentum, d_error = (
                load(d_kept.at[pl.ds(part * TILE, TILE)]) for part in range(3)
            )
            through, pending = products.products((keys, a), (keys, b))
            d_error -= over_columns(share.written) * through
            d_error -= over_columns(share.pending) * pending
            put([z], [2 * d_error])
            send(
                *(
                    (tile, out.at[(*at, pl.ds(part * TILE, TILE))])
                    for part, tile in enumerate((a, b, z))
                )
            )
            d_weights, d_momentum = share.pull(state, d_weights, d_momentum)
            d_weights = products.accumulate(d_weights, keys.transpose((1, 0)), z)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            put((a, b), (d_weights, d_momentum))
            return d_weights, d_momentum

        state = tuple(load_float32(x.at[here]) for x in d_ends)
        put(anew(tiles, batch)[:2], state)

        def chunk(i):
            return length - 1 - i

        state = plgpu.emit_pipeline(
            step, grid=(length,), max_concurrent_steps=2, init_carry=state,
            in_specs=[
                plgpu.BlockSpec((None, TILE, None, TILE), lambda i: (batch, chunk(i), memory, 0)),
                plgpu.BlockSpec((None, None, None, 5, TILE), lambda i: (*here, chunk(i), 0, 0)),
                plgpu.BlockSpec(
                    (None, None, None, 3 * TILE, TILE), lambda i: (*here, chunk(i), 0, 0)
                ),
            ],
        )(k, shares, d_kept)  # fmt: skip
        for target, numbers in zip(d_starts, state, strict=True):
            target[here] = numbers
        plgpu.wait_smem_to_gmem(0)

    d_start = jax.ShapeDtypeStruct(d_ends[0].shape, jnp.float32)
    return plan.launch(
        neural_memory_linear_pull, k, shares, d_kept, tuple(d_ends), course,
        grid={"batch": B, "memory": M},
        out_type=(jax.ShapeDtypeStruct(d_kept.shape, d_kept.dtype), (d_start, d_start)),
        scratch={"tiles": (shared(),) * 3},
    )  # fmt: skip
