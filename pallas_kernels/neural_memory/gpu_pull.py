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

Gradients of tokens and shares follow from A, B, Z_1' and Z_2' of each chunk by itself (`mosaic_gpu`).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.neural_memory.gpu_plan import LAYER, SLICE, Exchange, Plan, load, shared
from pallas_kernels.neural_memory.gpu_walk import Memories, Shares, send
from pallas_kernels.tiles import TILE, WGMMA, over_columns


class Pulled(NamedTuple):
    """Gradients of every chunk, in bfloat16.

    Attributes:
      first: of W_1 and S_1 after the chunk, `[B,M,n,64+64,F]`.
      second: of W_2 and S_2 after it, `[B,M,n,F+F,64]`.
      hidden: of Z_1, `[B,M,n,64,F]`.
      outputs: of Z_2, `[B,M,n,64,64]`.
    """

    first: jax.Array
    second: jax.Array
    hidden: jax.Array
    outputs: jax.Array


def pull(
    plan: Plan,
    k: jax.Array,
    shares: jax.Array,
    memories: Memories,
    d_memories: Memories,
    d_ends: tuple[jax.Array, ...],
) -> tuple[Pulled, tuple[jax.Array, ...]]:
    """Gradients through the walk.

    Args:
      plan: options.
      k: as for `walk`.
      shares: as for `walk`.
      memories: what it gave.
      d_memories: gradients of that, from reading it.
      d_ends: gradients of the final W_1, S_1, W_2 and S_2, in float32.

    Returns:
      Gradients of each chunk; those of the first W_1, S_1, W_2 and S_2, in float32.
    """
    (B, T, M, _), F = k.shape, d_ends[0].shape[-1]
    chunks, slices = T // TILE, F // TILE
    exchange = Exchange(slices, jnp.bfloat16)
    products = plan.products

    def neural_memory_pull(
        k, shares, memories, d_memories, d_ends, out, d_starts, through,
        *, own_first, own_second, both, gates, states, square, mailbox, ready,
    ):  # fmt: skip
        batch, memory, own = (lax.axis_index(axis) for axis in ("batch", "memory", SLICE))
        here = batch, memory
        units = pl.ds(own * TILE, TILE)
        memories, d_memories, out = Memories(*memories), Memories(*d_memories), Pulled(*out)
        ready, both = Ready(*ready), Both(*both)
        a1, b1, a2, b2 = states

        def rows(part):
            return pl.ds(part * TILE, TILE)

        def fetch(barrier, *copies):
            for source, target in copies:
                plgpu.copy_gmem_to_smem(source, target, barrier)

        def put(tiles, state):
            for tile, numbers in zip(tiles, state, strict=True):
                tile[...] = numbers.astype(tile.dtype)
            plgpu.commit_smem()

        def decay(shares, state, d_weights, d_momentum):
            """Gradients before the chunk, but for what its writes pull back."""
            a, b = state
            kept, carried, left = (
                over_columns(x) for x in (shares.kept, shares.carried, shares.left)
            )
            return kept * a + load(d_weights), carried * a + left * b + load(d_momentum)

        def both_shares(shares, written, pending):
            return over_columns(shares.written) * written + over_columns(shares.pending) * pending

        @pl.when(lax.axis_index(LAYER) == 0)
        def _():
            tiles = First(*own_first)

            def prefetch_keys(c, slot):
                fetch(
                    tiles.keys_here.at[slot],
                    (k.at[batch, rows(c), memory], tiles.keys.at[slot]),
                    (shares.at[(*here, c)], gates[0].at[slot]),
                )

            def prefetch(c):
                at = *here, c
                fetch(
                    tiles.here,
                    (memories.first.at[(*at, rows(0), units)], tiles.weights),
                    (d_memories.first.at[(*at, rows(0), units)], tiles.d_weights),
                    (d_memories.first.at[(*at, rows(1), units)], tiles.d_momentum),
                    (d_memories.first.at[(*at, rows(2), units)], tiles.d_errors),
                )

            def step(i, state):
                c, slot = chunks - 1 - i, lax.rem(i, 2)
                at = *here, c
                keys = tiles.keys.at[slot]
                w2, e2 = both.weights.at[slot], both.errors.at[slot]
                send(
                    (a1, out.first.at[(*at, rows(0), units)]),
                    (b1, out.first.at[(*at, rows(1), units)]),
                )
                plgpu.wait_smem_to_gmem(1, wait_read_only=True)  # gradients of Z_1 have left
                fetch(
                    tiles.square_here,
                    (d_memories.hidden.at[(*at, slice(None), units)], square[0]),
                )
                plgpu.barrier_wait(tiles.keys_here.at[slot])
                pl.when(i + 1 < chunks)(lambda: prefetch_keys(c - 1, 1 - slot))
                gates_here = Shares.read(gates[0].at[slot])
                plgpu.barrier_wait(tiles.here)
                plgpu.barrier_wait(both.here.at[slot])
                slope, bend = slope_and_bend(plan, products.product(keys, tiles.weights))
                bend = bend.astype(jnp.float32) * products.product(e2, w2.transpose((1, 0)))
                d_error = load(tiles.d_errors) - both_shares(
                    gates_here, *products.products((keys, a1), (keys, b1))
                )
                plgpu.barrier_wait(ready.stepped)
                both.pulled[...] = (d_error * slope.astype(jnp.float32)).astype(both.pulled.dtype)
                bend = lax.optimization_barrier((bend * d_error).astype(jnp.bfloat16))
                plgpu.commit_smem()
                plgpu.barrier_arrive(ready.pulled)
                state = decay(gates_here, state, tiles.d_weights, tiles.d_momentum)
                pl.when(i + 1 < chunks)(lambda: prefetch(c - 1))
                plgpu.barrier_wait(tiles.square_here)
                d_inputs = load(square[0]) - both_shares(
                    gates_here,
                    *products.products((e2, a2.transpose((1, 0))), (e2, b2.transpose((1, 0)))),
                )
                plgpu.barrier_wait(ready.outputs)
                d_inputs = products.accumulate(d_inputs, square[1], w2.transpose((1, 0)))
                plgpu.barrier_arrive(ready.used)
                square[0][...] = (slope.astype(jnp.float32) * d_inputs + bend.astype(jnp.float32)).astype(jnp.bfloat16)
                plgpu.commit_smem()
                send((square[0], out.hidden.at[(*at, slice(None), units)]))
                d_weights, d_momentum = state
                d_weights = products.accumulate(d_weights, keys.transpose((1, 0)), square[0])
                plgpu.wait_smem_to_gmem(1, wait_read_only=True)  # the states have left
                put((a1, b1), (d_weights, d_momentum))
                return d_weights, d_momentum

            prefetch_keys(chunks - 1, 0)
            prefetch(chunks - 1)
            place = (*here, slice(None), units)
            state = tuple(
                plgpu.load(x.at[place], layout=WGMMA, optimized=False) for x in d_ends[:2]
            )
            put((a1, b1), state)
            starts = lax.fori_loop(0, chunks, step, state)
            for target, numbers in zip(d_starts[:2], starts, strict=True):
                target[place] = numbers
            plgpu.barrier_wait(ready.stepped)
            plgpu.wait_smem_to_gmem(0)

        @pl.when(lax.axis_index(LAYER) == 1)
        def _():
            tiles = Second(*own_second)

            def prefetch_both(c, slot):
                at = *here, c
                fetch(
                    both.here.at[slot],
                    (memories.second.at[(*at, rows(own))], both.weights.at[slot]),
                    (memories.second.at[(*at, rows(2 * slices))], both.errors.at[slot]),
                    (memories.hidden.at[(*at, slice(None), units)], tiles.inputs.at[slot]),
                    (shares.at[(*here, c)], gates[1].at[slot]),
                )

            def prefetch(c):
                at = *here, c
                fetch(
                    tiles.here,
                    (d_memories.second.at[(*at, rows(own))], tiles.d_weights),
                    (d_memories.second.at[(*at, rows(slices + own))], tiles.d_momentum),
                )

            def step(i, state):
                c, slot = chunks - 1 - i, lax.rem(i, 2)
                at = *here, c
                inputs, w2, e2 = (
                    x.at[slot] for x in (tiles.inputs, both.weights, both.errors)
                )
                send(
                    (a2, out.second.at[(*at, rows(own))]),
                    (b2, out.second.at[(*at, rows(slices + own))]),
                )
                plgpu.wait_smem_to_gmem(1, wait_read_only=True)  # gradients of Z_2 have left
                fetch(
                    tiles.square_here, (d_memories.second.at[(*at, rows(2 * slices))], square[1])
                )
                plgpu.barrier_wait(both.here.at[slot])
                pl.when(i + 1 < chunks)(lambda: prefetch_both(c - 1, 1 - slot))
                gates_here = Shares.read(gates[1].at[slot])
                part = -both_shares(
                    gates_here, *products.products((inputs, a2), (inputs, b2))
                )
                plgpu.barrier_wait(tiles.here)
                d_weights, d_momentum = decay(
                    gates_here, state, tiles.d_weights, tiles.d_momentum
                )
                pl.when(i + 1 < chunks)(lambda: prefetch(c - 1))
                plgpu.barrier_wait(ready.pulled)
                part = products.accumulate(part, both.pulled, w2)
                total = exchange.sum(
                    part, lax.rem(i, 2), mailbox, None if through is None else through.at[here]
                )  # fmt: skip
                plgpu.barrier_wait(tiles.square_here)
                total = 2 * (total + load(square[1]))
                square[1][...] = total.astype(jnp.bfloat16)
                plgpu.commit_smem()
                plgpu.barrier_arrive(ready.outputs)
                send((square[1], out.outputs.at[at]))
                d_weights = products.accumulate(d_weights, both.pulled.transpose((1, 0)), e2)
                d_weights = products.accumulate(d_weights, inputs.transpose((1, 0)), square[1])
                plgpu.barrier_wait(ready.used)
                plgpu.wait_smem_to_gmem(1, wait_read_only=True)  # the states have left
                put((a2, b2), (d_weights, d_momentum))
                plgpu.barrier_arrive(ready.stepped)
                return d_weights, d_momentum

            prefetch_both(chunks - 1, 0)
            prefetch(chunks - 1)
            place = (*here, units)
            state = tuple(
                plgpu.load(x.at[place], layout=WGMMA, optimized=False) for x in d_ends[2:]
            )
            put((a2, b2), state)
            plgpu.barrier_arrive(ready.stepped)
            starts = lax.fori_loop(0, chunks, step, state)
            for target, numbers in zip(d_starts[2:], starts, strict=True):
                target[place] = numbers
            plgpu.wait_smem_to_gmem(0)

    shapes = Pulled((2 * TILE, F), (2 * F, TILE), (TILE, F), (TILE, TILE))
    out = tuple(jax.ShapeDtypeStruct((B, M, chunks, *shape), jnp.bfloat16) for shape in shapes)
    d_starts = tuple(jax.ShapeDtypeStruct(x.shape, jnp.float32) for x in d_ends)
    pair = plgpu.SMEM((2, TILE, TILE), jnp.bfloat16)
    pulled, d_starts, _ = plan.launch(
        neural_memory_pull, k, shares, tuple(memories), tuple(d_memories), tuple(d_ends),
        grid={"batch": B, "memory": M}, slices=slices,
        out_type=(out, d_starts, exchange.through(B, M)),
        scratch={
            "own_first": First(
                keys=pair, keys_here=plgpu.Barrier(num_arrivals=2, num_barriers=2),
                weights=shared(), d_weights=shared(), d_momentum=shared(), d_errors=shared(),
                here=plgpu.Barrier(num_arrivals=4), square_here=plgpu.Barrier(),
            ),
            "own_second": Second(
                inputs=pair, d_weights=shared(), d_momentum=shared(),
                here=plgpu.Barrier(num_arrivals=2), square_here=plgpu.Barrier(),
            ),
            "both": Both(
                weights=pair, errors=pair, pulled=shared(),
                here=plgpu.Barrier(num_arrivals=4, num_barriers=2),
            ),
            "gates": (plgpu.SMEM((2, 5, TILE), jnp.float32),) * 2,
            "states": (shared(),) * 4, "square": (shared(),) * 2,
            "ready": Ready(*(plgpu.Barrier() for _ in Ready._fields)),
            "mailbox": exchange.scratch(),
        },
    )  # fmt: skip
    return Pulled(*pulled), tuple(d_starts)


def slope_and_bend(plan: Plan, z: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The first two derivatives of σ, in bfloat16.

    Half the columns after the other: arithmetic runs through whole tiles, one operation after the
    other, and its intermediate tiles do not fit the registers.
    """
    halves = []
    for start in (0, TILE // 2):
        _, slope, bend = plan.activate(z[:, start : start + TILE // 2])
        half = slope.astype(jnp.bfloat16), bend.astype(jnp.bfloat16)
        *half, z = lax.optimization_barrier((*half, z))
        halves.append(half)
    return tuple(jnp.concatenate(parts, axis=1) for parts in zip(*halves, strict=True))


class First(NamedTuple):
    """What the first layer's warpgroup reads alone, and where it arrives."""

    keys: Any
    keys_here: Any
    weights: Any
    d_weights: Any
    d_momentum: Any
    d_errors: Any
    here: Any
    square_here: Any


class Second(NamedTuple):
    """What the second layer's warpgroup reads alone, and where it arrives."""

    inputs: Any
    d_weights: Any
    d_momentum: Any
    here: Any
    square_here: Any


class Both(NamedTuple):
    """What both read: weights and errors of the second layer, and gradients of what it pulls."""

    weights: Any
    errors: Any
    pulled: Any
    here: Any


class Ready(NamedTuple):
    """At which the warpgroup of one layer tells that of the other what is ready.

    Attributes:
      pulled: gradients of what the second layer pulls back.
      outputs: gradients of the second layer's outputs,
      used: which have been pulled back in turn.
      stepped: the gradients of the second layer.
    """

    pulled: Any
    outputs: Any
    used: Any
    stepped: Any
