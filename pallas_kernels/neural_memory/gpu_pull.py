r"""The walk of `gpu_walk` in reverse, with the gradient of the memory.

With primes for gradients, those of the memory after a chunk, A = W'_after and B = S'_after of each
layer, and g, n, b, f, m the shares of the chunk:

    E_1' = E_1'(read) - g (K A_1) - n (K B_1)
    D'   = E_1' σ'(Z_1)                                          D = E_2 W_2ᵀ
    E_2' = E_2'(read) - g (X_2 A_2) - n (X_2 B_2) + D' W_2       summed over the cluster
    Z_2' = 2 E_2'
    X_2' = X_2'(read) - g (E_2 A_2ᵀ) - n (E_2 B_2ᵀ) + Z_2' W_2ᵀ
    Z_1' = X_2' σ'(Z_1) + E_1' D σ''(Z_1)
    W_1' = b A_1 + W_1'(read) + Kᵀ Z_1'                          S' = f A + m B + S'(read)
    W_2' = b A_2 + W_2'(read) + D'ᵀ E_2 + X_2ᵀ Z_2'

A warpgroup a layer, as in the walk, and one sum over the units of the cluster; with H = 128, the
products with A_1, B_1, and what makes X_2' but what reading gave, are sums over its halves. σ'(Z_1)
and D σ''(Z_1) the walk has kept: to find them here took a product and registers, of which 62 bytes
a thread spilled, and with halves two more sums. Four products stand one behind the other, as in the
walk; reached on an H200, when they were found here: 5.2 us a chunk. From A, B, Z_1' and Z_2' follow
gradients of tokens and shares (`gpu_tokens`).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.neural_memory.gpu_plan import (
    LAYER,
    PART,
    SLICE,
    Course,
    Exchange,
    Plan,
    anew,
    finish_loads,
    follow,
    load,
    load_float32,
    shared,
)
from pallas_kernels.neural_memory.gpu_walk import Memories, Shares, send, send_first
from pallas_kernels.tiles import TILE, over_columns


class Pulled(NamedTuple):
    """Gradients of every chunk, in bfloat16; arrays, or refs inside a kernel.

    Attributes:
      first: of W_1 and S_1 after the chunk, `[B,M,n,H+H,F]`.
      second: of W_2 and S_2 after it, `[B,M,n,F+F,H]`.
      hidden: of Z_1, `[B,M,n,64,F]`.
      outputs: of Z_2, `[B,M,n,64,H]`.
    """

    first: Any
    second: Any
    hidden: Any
    outputs: Any


def pull(
    plan: Plan,
    k: jax.Array,
    shares: jax.Array,
    memories: Memories,
    slopes: jax.Array,
    d_memories: Memories,
    d_ends: tuple[jax.Array, ...],
    course: Course | None,
) -> tuple[Pulled, tuple[jax.Array, ...]]:
    """Gradients through the walk.

    Args:
      plan: options.
      k: as for `walk`.
      shares: as for `walk`.
      memories: what it gave.
      slopes: what it kept.
      d_memories: gradients of memories, from reading them.
      d_ends: gradients of the final W_1, S_1, W_2 and S_2, in float32.
      course: as for `walk`. Shares of 0 cut what a document begins with off from what was before.

    Returns:
      Gradients of each chunk; those of the first W_1, S_1, W_2 and S_2, in float32.
    """
    (B, T, M, H), F = k.shape, d_ends[0].shape[-1]
    chunks, parts, slices = T // TILE, H // TILE, F // TILE
    over_units = Exchange(
        SLICE, slices, jnp.bfloat16, slots=3 if parts == 1 else 2, interpret=plan.interpret
    )
    over_parts = Exchange(PART, parts, jnp.bfloat16, interpret=plan.interpret)
    products = plan.products

    def neural_memory_pull(
        k, shares, memories, slopes, d_memories, d_ends, course, out, d_starts, through,
        *, tiles, pairs, gates, arrivals, ready, mailboxes,
    ):  # fmt: skip
        batch, memory, part, own = (
            lax.axis_index(axis) for axis in ("batch", "memory", PART, SLICE)
        )
        here = batch, memory
        memories, d_memories, out = Memories(*memories), Memories(*d_memories), Pulled(*out)
        length, _ = follow(course, batch, chunks)

        def block(i):
            return pl.ds(i * TILE, TILE)

        units, channels = block(own), block(part)

        def of_first(array, c, i):
            """A tile of 64 rows of the first layer's array."""
            return array.first.at[(*here, c, block(i), units)]

        def of_second(array, c, i):
            """A tile of the second layer's array."""
            return array.second.at[(*here, c, block(i), channels)]

        def of_hidden(array, c):
            return array.hidden.at[(*here, c, slice(None), units)]

        def fetch(barrier, *copies):
            for source, target in copies:
                plgpu.copy_gmem_to_smem(source, target, barrier)

        def put(targets, state):
            for target, numbers in zip(targets, state, strict=True):
                target[...] = numbers.astype(target.dtype)
            plgpu.commit_smem()

        def weigh(shares, written, pending):
            return over_columns(shares.written) * written + over_columns(shares.pending) * pending

        def sum_parts(x, turn):
            return over_parts.sum(x, turn, mailboxes[0], through[0], (*here, own))

        def sum_units(x, turn):
            return over_units.sum(x, turn, mailboxes[1], through[1], (*here, part))

        def sweep(layer, place, states, begin, step):
            """Walks the chunks in reverse with the gradient of one layer's state."""
            ends, starts = (x[2 * layer : 2 * layer + 2] for x in (d_ends, d_starts))
            begin()
            state = tuple(load_float32(x.at[place]) for x in ends)
            put(states, state)
            if layer:
                plgpu.barrier_arrive(ready.stepped)
            state = lax.fori_loop(0, length, step, state)
            for target, numbers in zip(starts, state, strict=True):
                target[place] = numbers
            if not layer:
                plgpu.barrier_wait(ready.stepped)
            plgpu.wait_smem_to_gmem(0)

        @pl.when(lax.axis_index(LAYER) == 0)
        def _():
            def prefetch_keys(c, slot):
                fetch(
                    arrivals.keys.at[slot],
                    (k.at[batch, block(c), memory, channels], pairs.keys.at[slot]),
                    (shares.at[(*here, c)], gates[0].at[slot]),
                )

            def prefetch(c, tile):
                fetch(
                    arrivals.first,
                    (of_first(d_memories, c, part), tile.d_w1),
                    (of_first(d_memories, c, parts + part), tile.d_s1),
                    (of_first(d_memories, c, 2 * parts), tile.d_e1),
                )

            def prefetch_slopes(c, tile):
                fetch(arrivals.slopes, (slopes.at[(*here, c, slice(None), units)], tile.slopes))

            def begin():
                prefetch_keys(length - 1, 0)
                prefetch(length - 1, anew(tiles, own))
                prefetch_slopes(length - 1, anew(tiles, own))

            def step(i, state):
                c, slot, tile = length - 1 - i, lax.rem(i, 2), anew(tiles, i)
                keys, w2, e2 = (x.at[slot] for x in (pairs.keys, pairs.w2, pairs.e2))
                slope, bend = (tile.slopes.at[block(row)] for row in range(2))
                send((tile.a1, of_first(out, c, part)), (tile.b1, of_first(out, c, parts + part)))
                plgpu.wait_smem_to_gmem(1, wait_read_only=True)  # gradients of Z_1 have left
                fetch(arrivals.hidden, (of_hidden(d_memories, c), tile.hidden))
                plgpu.barrier_wait(arrivals.keys.at[slot])
                pl.when(i + 1 < length)(lambda: prefetch_keys(c - 1, 1 - slot))
                share = Shares.read(gates[0].at[slot])
                plgpu.barrier_wait(arrivals.first)
                through_state = weigh(share, *products.products((keys, tile.a1), (keys, tile.b1)))
                d_error = load(tile.d_e1) - sum_parts(through_state, 0)
                plgpu.barrier_wait(arrivals.slopes)
                plgpu.barrier_wait(ready.stepped)
                put([tile.pulled], [d_error * load(slope)])
                plgpu.barrier_arrive(ready.pulled)
                bend = lax.optimization_barrier((load(bend) * d_error).astype(jnp.bfloat16))
                d_weights, d_momentum = share.pull(state, load(tile.d_w1), load(tile.d_s1))
                finish_loads()
                pl.when(i + 1 < length)(lambda: prefetch(c - 1, tile))
                plgpu.barrier_wait(arrivals.both.at[slot])
                a2, b2 = (x.transpose((1, 0)) for x in (tile.a2, tile.b2))
                d_inputs = -weigh(share, *products.products((e2, a2), (e2, b2)))
                plgpu.barrier_wait(ready.outputs)
                d_inputs = products.accumulate(d_inputs, tile.outputs, w2.transpose((1, 0)))
                plgpu.barrier_arrive(ready.used)
                d_inputs = sum_parts(d_inputs, 1)
                plgpu.barrier_wait(arrivals.hidden)
                d_inputs = load(slope) * (d_inputs + load(tile.hidden)) + bend.astype(jnp.float32)
                put([tile.hidden], [d_inputs])
                pl.when(i + 1 < length)(lambda: prefetch_slopes(c - 1, tile))
                send_first(part, (tile.hidden, of_hidden(out, c)))
                d_weights = products.accumulate(d_weights, keys.transpose((1, 0)), tile.hidden)
                plgpu.wait_smem_to_gmem(1, wait_read_only=True)  # the states have left
                put((tile.a1, tile.b1), (d_weights, d_momentum))
                return d_weights, d_momentum

            tile = anew(tiles, own)
            sweep(0, (*here, channels, units), (tile.a1, tile.b1), begin, step)

        @pl.when(lax.axis_index(LAYER) == 1)
        def _():
            def prefetch_pairs(c, slot):
                fetch(
                    arrivals.both.at[slot],
                    (of_second(memories, c, own), pairs.w2.at[slot]),
                    (of_second(memories, c, 2 * slices), pairs.e2.at[slot]),
                    (of_hidden(memories, c), pairs.x2.at[slot]),
                    (shares.at[(*here, c)], gates[1].at[slot]),
                )

            def prefetch(c, tile):
                fetch(
                    arrivals.second,
                    (of_second(d_memories, c, own), tile.d_w2),
                    (of_second(d_memories, c, slices + own), tile.d_s2),
                )

            def begin():
                tile = anew(tiles, own)
                prefetch_pairs(length - 1, 0)
                prefetch(length - 1, tile)

            def step(i, state):
                c, slot, tile = length - 1 - i, lax.rem(i, 2), anew(tiles, i)
                x2, w2, e2 = (x.at[slot] for x in (pairs.x2, pairs.w2, pairs.e2))
                send((tile.a2, of_second(out, c, own)), (tile.b2, of_second(out, c, slices + own)))
                plgpu.wait_smem_to_gmem(1, wait_read_only=True)  # gradients of Z_2 have left
                fetch(arrivals.outputs, (of_second(d_memories, c, 2 * slices), tile.outputs))
                plgpu.barrier_wait(arrivals.both.at[slot])
                pl.when(i + 1 < length)(lambda: prefetch_pairs(c - 1, 1 - slot))
                share = Shares.read(gates[1].at[slot])
                d_error = -weigh(share, *products.products((x2, tile.a2), (x2, tile.b2)))
                plgpu.barrier_wait(arrivals.second)
                d_weights, d_momentum = share.pull(state, load(tile.d_w2), load(tile.d_s2))
                finish_loads()
                pl.when(i + 1 < length)(lambda: prefetch(c - 1, tile))
                plgpu.barrier_wait(ready.pulled)
                d_error = products.accumulate(d_error, tile.pulled, w2)
                d_error = sum_units(d_error, lax.rem(i, 2))
                plgpu.barrier_wait(arrivals.outputs)
                put([tile.outputs], [2 * (d_error + load(tile.outputs))])
                plgpu.barrier_arrive(ready.outputs)
                send_first(own, (tile.outputs, out.outputs.at[(*here, c, slice(None), channels)]))
                d_weights = products.accumulate(d_weights, tile.pulled.transpose((1, 0)), e2)
                d_weights = products.accumulate(d_weights, x2.transpose((1, 0)), tile.outputs)
                plgpu.barrier_wait(ready.used)
                plgpu.wait_smem_to_gmem(1, wait_read_only=True)  # the states have left
                put((tile.a2, tile.b2), (d_weights, d_momentum))
                plgpu.barrier_arrive(ready.stepped)
                return d_weights, d_momentum

            tile = anew(tiles, own)
            sweep(1, (*here, units, channels), (tile.a2, tile.b2), begin, step)

    shapes = Pulled((2 * H, F), (2 * F, H), (TILE, F), (TILE, H))
    out = tuple(jax.ShapeDtypeStruct((B, M, chunks, *shape), jnp.bfloat16) for shape in shapes)
    d_starts = tuple(jax.ShapeDtypeStruct(x.shape, jnp.float32) for x in d_ends)
    tiles = Tiles(*(shared() for _ in Tiles._fields))
    pair = plgpu.SMEM((2, TILE, TILE), jnp.bfloat16)
    pulled, d_starts, _ = plan.launch(
        neural_memory_pull, k, shares, tuple(memories), slopes, tuple(d_memories), tuple(d_ends),
        course,
        grid={"batch": B, "memory": M}, cluster={PART: parts, SLICE: slices},
        out_type=(
            out, d_starts, (over_parts.through(B, M, slices), over_units.through(B, M, parts)),
        ),
        scratch={
            "tiles": tiles._replace(slopes=shared(2 * TILE)),
            "pairs": Pairs(*(pair for _ in Pairs._fields)),
            "gates": (plgpu.SMEM((2, 5, TILE), jnp.float32),) * 2,
            "arrivals": Arrivals(
                keys=plgpu.Barrier(num_arrivals=2, num_barriers=2),
                both=plgpu.Barrier(num_arrivals=4, num_barriers=2),
                first=plgpu.Barrier(num_arrivals=3), second=plgpu.Barrier(num_arrivals=2),
                hidden=plgpu.Barrier(), outputs=plgpu.Barrier(), slopes=plgpu.Barrier(),
            ),
            "ready": Ready(*(plgpu.Barrier() for _ in Ready._fields)),
            "mailboxes": (over_parts.scratch(), over_units.scratch()),
        },
    )  # fmt: skip
    return Pulled(*pulled), tuple(d_starts)


class Tiles(NamedTuple):
    """Tiles in shared memory.

    Attributes:
      a1, b1, a2, b2: gradients of network and momentum after the chunk, of each layer.
      d_w1, d_s1, d_e1, d_w2, d_s2: gradients from reading.
      hidden: gradient of X_2 from reading, then that of Z_1.
      outputs: gradient of E_2 from reading, then that of Z_2.
      pulled: D'.
      slopes: σ'(Z_1) and D σ''(Z_1), one upon the other.
    """

    a1: Any
    b1: Any
    a2: Any
    b2: Any
    d_w1: Any
    d_s1: Any
    d_e1: Any
    d_w2: Any
    d_s2: Any
    hidden: Any
    outputs: Any
    pulled: Any
    slopes: Any


class Pairs(NamedTuple):
    """Tiles of this chunk and the next: they are needed to the end of one."""

    keys: Any
    w2: Any
    e2: Any
    x2: Any


class Arrivals(NamedTuple):
    """Where copies arrive: of keys; of what both layers read; of what either does; of slopes."""

    keys: Any
    both: Any
    first: Any
    second: Any
    hidden: Any
    outputs: Any
    slopes: Any


class Ready(NamedTuple):
    """At which the warpgroup of one layer tells that of the other what is ready.

    Attributes:
      pulled: gradients of what the second layer pulls back.
      outputs: gradients of the second layer's outputs.
      used: the first layer no longer needs them, nor the second layer's state.
      stepped: the gradients of the second layer.
    """

    pulled: Any
    outputs: Any
    used: Any
    stepped: Any
