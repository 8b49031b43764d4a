r"""The walk over chunks that trains the memory: one cluster a memory.

With gradients at the network before the chunk, and g, n the shares of its writes that the last
token sees in the network and in momentum (b, f and m those of what came in):

    Z_1 = K W_1,  X_2 = σ(Z_1),  E_2 = 2 (X_2 W_2 - V),  E_1 = (E_2 W_2ᵀ) σ'(Z_1)
    W' = b W + f S - Xᵀ (g E),   S' = m S - Xᵀ (n E)          X = K, X_2;  E = E_1, E_2

A CTA has 64 hidden units, and 64 of the H numbers of keys and values. Of these, network and
momentum are four tiles of 64 x 64 in float32: two for each of two warpgroups, one a layer, which
stay in registers, 64 a thread. X_2 W_2 is a sum over the units of the cluster; with H = 128, K W_1
and E_2 W_2ᵀ are sums over its two halves of keys and values.

H = 128 and F = 512 make four times the memory of H = 64 and F = 256, 1 MB with momentum. With both
halves in a CTA, its 64 units would take 128 registers of every thread, and with them 128 x 64
accumulators as many again; operands in shared memory would take 213 KB here and 312 KB in
`gpu_pull`, of 227. In halves a thread has what it has with H = 64. Shared memory, in KB:

                                            walk             pull
    operands of states and errors           64               -
    tiles of a chunk, slopes included       40               112
    tokens, two chunks of them              32               64
    gates                                    5               5
    sum over units: sent, received          16 + 2 x 16      8 + 2 x 8    (of 4 units: 3 received)
    sum over halves: sent, received         16 + 16          8 + 8
                                            221              221

at clusters of 2 x 8. More than 8 CTAs are beyond what every GPU must offer; an H200 grants 16.

A chunk waits for the one before it through this chain of products and what lies between:

    K W_1 -> σ -> X_2 W_2 -> sum over the cluster -> E_2 W_2ᵀ -> Kᵀ (g E_1) -> W_1 in bfloat16

Everything else (momentum, the second layer's update, σ', copies) is done while a warpgroup waits.
A product of 64 x 64 x 64 takes about 0.1 us from operand to operand, σ 0.25 us, and two ways across
the chip 0.5 us: about 1.2 us a chunk, 0.15 ms for 128 chunks, however few the memories are. That is
the floor; the matrix work, 14.7 MFLOP a chunk for 256 hidden units, is 0.6 us of four
multiprocessors. Reached on an H200: 4.6 us a chunk, 5.5 with what is kept for gradients. A sum over
the cluster takes 1.9 us of them; between products, tiles are rounded, stored and fenced, with a
barrier of the warpgroup each.
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
    follow,
    load,
    load_float32,
    shared,
)
from pallas_kernels.tiles import ALONG_ROWS, TILE, over_columns


class Memories(NamedTuple):
    """What every chunk starts from, and writes, in bfloat16; arrays, or refs inside a kernel.

    Attributes:
      first: W_1, S_1 and E_1 one upon another, `[B,M,n,H+H+64,F]`.
      second: W_2, S_2 and E_2, `[B,M,n,F+F+64,H]`.
      hidden: the inputs X_2 of the second layer, `[B,M,n,64,F]`.
    """

    first: Any
    second: Any
    hidden: Any


def walk(
    plan: Plan,
    k: jax.Array,
    v: jax.Array,
    shares: jax.Array,
    starts: tuple[jax.Array, ...],
    course: Course | None,
    *,
    keep: bool,
) -> tuple[Memories, tuple[jax.Array, ...], jax.Array | None]:
    """The memories of all chunks, and the last.

    Args:
      plan: options.
      k: keys `[B,T,M,H]`.
      v: values `[B,T,M,H]`.
      shares: what a chunk's last token holds, `[B,M,n,5,64]`: of the gradient of every token, in
        the network and in momentum; and of what came in, of network in network, momentum in network
        and momentum in momentum, each repeated.
      starts: the first W_1, S_1 `[B,M,H,F]`, W_2 and S_2 `[B,M,F,H]`, in float32.
      course: of the rows, or None where all walk all chunks, of one document.
      keep: whether to keep what `gpu_pull` needs of σ.

    Returns:
      Memories; the final W_1, S_1, W_2 and S_2; and of every chunk σ'(Z_1) and D σ''(Z_1), D = E_2
      W_2ᵀ, one upon another, `[B,M,n,64+64,F]` in bfloat16.
    """
    (B, T, M, H), F = k.shape, starts[0].shape[-1]
    chunks, parts, slices = T // TILE, H // TILE, F // TILE
    over_units = Exchange(
        SLICE, slices, jnp.float32, slots=3 if parts == 1 else 2, interpret=plan.interpret
    )
    over_parts = Exchange(PART, parts, jnp.float32, interpret=plan.interpret)
    products = plan.products

    def neural_memory_walk(
        k, v, shares, starts, course, kept, ends, slopes, through,
        *, layers, x2, e2, pulled, slope_tiles, tokens, gates, arrivals, mailboxes, ready,
    ):  # fmt: skip
        batch, memory, part, own = (
            lax.axis_index(axis) for axis in ("batch", "memory", PART, SLICE)
        )
        here = batch, memory
        first, second, hidden = kept
        all_tiles = layers, x2, e2, pulled, slope_tiles
        length, renew = follow(course, batch, chunks)

        def block(i):
            return pl.ds(i * TILE, TILE)

        units, channels = block(own), block(part)
        places = (*here, channels, units), (*here, units, channels)

        def sum_parts(x, turn):
            return over_parts.sum(x, turn, mailboxes[0], through[0], (*here, own))

        def sum_units(x, turn):
            return over_units.sum(x, turn, mailboxes[1], through[1], (*here, part))

        def sweep(layer, array, step):
            """Walks the chunks with the state of one layer, from tokens of its array."""
            place = places[layer]
            here_slots = tokens[layer], gates[layer], arrivals[layer]

            def prefetch(i, slot):
                token, gate, arrival = (x.at[slot] for x in here_slots)
                plgpu.copy_gmem_to_smem(array.at[batch, block(i), memory, channels], token, arrival)
                plgpu.copy_gmem_to_smem(shares.at[(*here, i)], gate, arrival)

            def body(i, state):
                slot = lax.rem(i, 2)
                token, gate, arrival = (x.at[slot] for x in here_slots)
                plgpu.barrier_wait(arrival)
                pl.when(i + 1 < length)(lambda: prefetch(i + 1, 1 - slot))
                return step(i, token, Shares.read(gate), state)

            prefetch(0, 0)
            own_starts, own_ends = (x[2 * layer : 2 * layer + 2] for x in (starts, ends))
            state = tuple(load_float32(x.at[place]) for x in own_starts)
            put(anew(layers[layer], own)[:2], state)
            state = lax.fori_loop(0, length, body, state)
            for target, numbers in zip(own_ends, state, strict=True):
                target[place] = numbers
            if layer == 0:
                plgpu.barrier_wait(ready.stepped)
            plgpu.wait_smem_to_gmem(0)

        def put(tiles, state):
            for tile, numbers in zip(tiles, state, strict=True):
                tile[...] = numbers.astype(tile.dtype)
            plgpu.commit_smem()

        @pl.when(lax.axis_index(LAYER) == 0)
        def _():
            def step(i, k, shares, state):
                at = *here, i
                (tiles, (second_weights, *_)), x2, e2, pulled, slope_tiles = anew(all_tiles, i)
                z = sum_parts(products.product(k, tiles.weights), 0)
                x, _, _ = plan.activate(z)
                pl.when(i > 0)(lambda: plgpu.barrier_wait(ready.stepped))
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                x2[...] = x.astype(x2.dtype)
                plgpu.commit_smem()
                plgpu.barrier_arrive(ready.inputs)
                # What the other warpgroup does not wait for comes while this one waits for it.
                put([tiles.momentum], state[1:])
                send(
                    (tiles.weights, first.at[(*at, channels, units)]),
                    (tiles.momentum, first.at[(*at, block(parts + part), units)]),
                )
                _, slope, bend = plan.activate(lax.optimization_barrier(z))
                rows = [slope_tiles.at[block(i)] for i in range(2)] if keep else []
                if keep:
                    put(rows, (slope, bend))
                state = shares.decay(*state)
                plgpu.barrier_wait(ready.errors)
                error = products.product(e2, second_weights.transpose((1, 0)))
                plgpu.barrier_arrive(ready.pulled)
                error = sum_parts(error, 1)
                copies = [
                    (x2, hidden.at[(*at, slice(None), units)]),
                    (pulled, first.at[(*at, block(2 * parts), units)]),
                ]
                if keep:
                    put(rows[1:], [load(rows[1]) * error])
                    copies.append((slope_tiles, slopes.at[(*at, slice(None), units)]))
                error *= slope
                shares.scale(error, tiles)
                plgpu.commit_smem()

                def send_writes():
                    put([pulled], [error])
                    send_first(part, *copies)

                state = renew(i, 0, places[0], write(products, state, k, tiles, send_writes))
                plgpu.wait_smem_to_gmem(1, wait_read_only=True)
                put([tiles.weights], state[:1])
                return state

            sweep(0, k, step)

        @pl.when(lax.axis_index(LAYER) == 1)
        def _():
            def step(i, v, shares, state):
                at = *here, i
                (_, tiles), x2, e2, *_ = anew(all_tiles, i)
                send(
                    (tiles.weights, second.at[(*at, units, channels)]),
                    (tiles.momentum, second.at[(*at, block(slices + own), channels)]),
                )
                state = shares.decay(*state)
                plgpu.barrier_wait(ready.inputs)
                total = sum_units(products.product(x2, tiles.weights), lax.rem(i, 2))
                error = 2 * (total - load(v))
                plgpu.wait_smem_to_gmem(1, wait_read_only=True)
                e2[...] = error.astype(e2.dtype)
                plgpu.commit_smem()
                plgpu.barrier_arrive(ready.errors)
                send_first(own, (e2, second.at[(*at, block(2 * slices), channels)]))
                shares.scale(error, tiles)
                plgpu.commit_smem()
                state = renew(i, 1, places[1], write(products, state, x2, tiles))
                plgpu.wait_smem_to_gmem(1, wait_read_only=True)
                plgpu.barrier_wait(ready.pulled)
                put((tiles.weights, tiles.momentum), state)
                plgpu.barrier_arrive(ready.stepped)
                return state

            sweep(1, v, step)

    kept = Memories(
        *(
            jax.ShapeDtypeStruct((B, M, chunks, *shape), jnp.bfloat16)
            for shape in ((2 * H + TILE, F), (2 * F + TILE, H), (TILE, F))
        )
    )
    ends = tuple(jax.ShapeDtypeStruct(x.shape, jnp.float32) for x in starts)
    slopes = jax.ShapeDtypeStruct((B, M, chunks, 2 * TILE, F), jnp.bfloat16) if keep else None
    kept, ends, slopes, _ = plan.launch(
        neural_memory_walk, k, v, shares, tuple(starts), course,
        grid={"batch": B, "memory": M}, cluster={PART: parts, SLICE: slices},
        out_type=(
            tuple(kept), ends, slopes,
            (over_parts.through(B, M, slices), over_units.through(B, M, parts)),
        ),
        scratch={
            "layers": (Layer(*(shared() for _ in Layer._fields)),) * 2,
            "x2": shared(), "e2": shared(), "pulled": shared(),
            "slope_tiles": shared(2 * TILE) if keep else None,
            "tokens": (plgpu.SMEM((2, TILE, TILE), jnp.bfloat16),) * 2,
            "gates": (plgpu.SMEM((2, 5, TILE), jnp.float32),) * 2,
            "arrivals": (plgpu.Barrier(num_arrivals=2, num_barriers=2),) * 2,
            "ready": Ready(*(plgpu.Barrier() for _ in Ready._fields)),
            "mailboxes": (over_parts.scratch(), over_units.scratch()),
        },
    )  # fmt: skip
    return Memories(*kept), tuple(ends), slopes


class Layer(NamedTuple):
    """Operands of a layer in shared memory: network, momentum, and errors times what is left."""

    weights: Any
    momentum: Any
    written: Any
    pending: Any


class Ready(NamedTuple):
    """At which the warpgroup of one layer tells that of the other what is ready.

    Attributes:
      inputs: of the second layer.
      errors: of the second layer.
      pulled: through the weights of the second layer, which may now change.
      stepped: the second layer, which no longer needs its inputs.
    """

    inputs: Any
    errors: Any
    pulled: Any
    stepped: Any


class Shares(NamedTuple):
    """What the last token of a chunk holds, `[64]`; see `walk`."""

    written: jax.Array
    pending: jax.Array
    kept: jax.Array
    carried: jax.Array
    left: jax.Array

    @classmethod
    def read(cls, gates) -> "Shares":
        """From shared memory."""
        return cls(*(plgpu.load(gates.at[row], layout=ALONG_ROWS) for row in range(5)))

    def decay(self, weights: jax.Array, momentum: jax.Array) -> tuple[jax.Array, jax.Array]:
        """A state after the chunk, but for what the chunk writes."""
        kept, carried, left = (over_columns(x) for x in (self.kept, self.carried, self.left))
        return kept * weights + carried * momentum, left * momentum

    def pull(self, d_after, d_weights: jax.Array, d_momentum: jax.Array):
        """The gradient of a state before the chunk, but for what the chunk's writes pull back.

        Args:
          d_after: of the state after it.
          d_weights: of the network, from reading it.
          d_momentum: of the momentum, likewise.
        """
        a, b = d_after
        kept, carried, left = (over_columns(x) for x in (self.kept, self.carried, self.left))
        return kept * a + d_weights, carried * a + left * b + d_momentum

    def scale(self, error: jax.Array, tiles: Layer) -> None:
        """What the last token holds of each error, as an operand, with the sign of a step down."""
        for share, tile in ((self.written, tiles.written), (self.pending, tiles.pending)):
            tile[...] = (over_columns(-share) * error).astype(tile.dtype)


def write(products, state, inputs, tiles: Layer, meanwhile=lambda: None):
    """Adds a chunk's outer products to network and momentum."""
    weights, momentum = state
    inputs = inputs.transpose((1, 0))
    return products.accumulate_both(
        (weights, inputs, tiles.written), (momentum, inputs, tiles.pending), meanwhile
    )


def send(*copies: tuple[Any, Any]) -> None:
    """Starts copies from shared to global memory, as one group."""
    for n, (source, target) in enumerate(copies, 1):
        plgpu.copy_smem_to_gmem(source, target, commit_group=n == len(copies))


def send_first(own, *copies: tuple[Any, Any]) -> None:
    """The same, from the first CTA of those that have the same but for rounding."""

    @pl.when(own == 0)
    def _():
        for source, target in copies:
            plgpu.copy_smem_to_gmem(source, target, commit_group=False)

    plgpu.commit_smem_to_gmem_group()
