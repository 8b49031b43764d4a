r"""What gates leave of every write at every later token of a chunk, every chunk by itself.

With a_t = 1 - decay_t, learning rates θ and momenta η, network and momentum after a token are

    W_t = b_t W_0 + f_t S_0 - sum_j G_tj g_j        S_t = m_t S_0 - sum_j P_tj g_j

for gradients g taken at the start of the chunk, where from one token to the next

    P_tj = η_t P_{t-1,j},  P_jj = θ_j               m_t = η_t m_{t-1}
    G_tj = a_t G_{t-1,j} + P_tj                     f_t = a_t f_{t-1} + m_t        b_t = a_t b_{t-1}

and m = b = 1, f = 0 before the first. Products are formed as products, token after token: exact for
gates of 0 and 1, and with gradients there. A chunk may hold several documents, each of which starts
from W_0 and S_0, and slots without a token, which change nothing.

A lane has a column j, a warpgroup two chunks. b, f and m are the same in all lanes of a chunk, and
each computes them. The gradient's kernel goes that way first, to have P and G before every token in
shared memory, and then back. Floor: traffic of G, or its gradient, in float32: 33 MB, 0.01 ms for
4 x 8192 tokens of 4 heads; reached on an H200: 0.013 and 0.059 ms.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.neural_memory.gpu_plan import Plan
from pallas_kernels.tiles import TILE, WGMMA

PAIR = 2
"""Chunks of a CTA."""

LANES = PAIR * TILE
_BY_LANE = plgpu.Layout.WG_STRIDED((LANES,), vec_size=1)


class Gates(NamedTuple):
    """Of every slot of every chunk, `[B,M,n,64]`.

    Attributes:
      learning_rate: θ.
      momentum: η.
      decay: what the network forgets, 1 - a.
      used: slots that hold a token, or None: all do.
      first: tokens that see the incoming state right before themselves, or None: those that chunks
        begin with.
    """

    learning_rate: jax.Array
    momentum: jax.Array
    decay: jax.Array
    used: jax.Array | None = None
    first: jax.Array | None = None


class Views(NamedTuple):
    """How each token of a chunk sees the memory, in float32; arrays, or refs inside a kernel.

    Attributes:
      kept: b, `[B,M,n,64]`.
      carried: f, `[B,M,n,64]`.
      written: G, of two chunks beside each other, `[B,M,⌈n/2⌉,64,128]`.
    """

    kept: Any
    carried: Any
    written: Any


class _Factors(NamedTuple):
    """Of each slot; rows of an array, or by lane at one token inside a kernel.

    Attributes:
      keep: a, or 0 where what was before is forgotten.
      momentum: η, likewise.
      keep_start: a where the incoming network is seen right before the slot, else 0.
      momentum_start: η where the incoming momentum is, else 0.
      learning_rate: θ.
      used: 1 where momentum enters the network, else 0.
    """

    keep: Any
    momentum: Any
    keep_start: Any
    momentum_start: Any
    learning_rate: Any
    used: Any


class _Running(NamedTuple):
    """At one token, by lane: P, G, b, f and m; or the gradients of these."""

    pending: Any
    written: Any
    kept: Any
    carried: Any
    momentum: Any

    @classmethod
    def zero(cls) -> "_Running":
        """Before the first token."""
        return cls(*(_zeros() for _ in cls._fields))

    def after(self, gates: _Factors, here: jax.Array) -> "_Running":
        """After one more token, that of the lanes `here`."""
        pending = jnp.where(here, gates.learning_rate, gates.momentum * self.pending)
        momentum = gates.momentum * self.momentum + gates.momentum_start
        return _Running(
            pending=pending,
            written=gates.keep * self.written + gates.used * pending,
            kept=gates.keep * self.kept + gates.keep_start,
            carried=gates.keep * self.carried + gates.used * momentum,
            momentum=momentum,
        )


def views_and_shares(plan: Plan, gates: Gates) -> tuple[Views, jax.Array]:
    """What tokens see, and what the last of each chunk holds, as `gpu_walk.walk` takes it."""
    factors = jnp.stack(_factors(gates), axis=3)
    chunks = factors.shape[2]
    factors = jnp.pad(factors, ((0, 0), (0, 0), (0, -chunks % PAIR), (0, 0), (0, 0)))
    vectors, written = _gates(plan, pair(factors))
    vectors = unpair(vectors)[:, :, :chunks]
    return Views(vectors[..., 0, :], vectors[..., 1, :], written), vectors[..., 2:, :]


def pair(x: jax.Array) -> jax.Array:
    """Two chunks beside each other, `[B,M,n,rows,64] -> [B,M,n/2,rows,128]`."""
    x = x.reshape(*x.shape[:2], -1, PAIR, *x.shape[3:]).swapaxes(3, 4)
    return x.reshape(*x.shape[:4], LANES)


def unpair(x: jax.Array) -> jax.Array:
    """Undoes `pair`."""
    x = x.reshape(*x.shape[:4], PAIR, TILE).swapaxes(3, 4)
    return x.reshape(*x.shape[:2], -1, *x.shape[4:])


def place(batch, head, chunk) -> tuple[Any, ...]:
    """Where a chunk stands in an array of pairs."""
    columns = pl.ds(lax.rem(chunk, PAIR) * TILE, TILE)
    return batch, head, lax.div(chunk, PAIR), slice(None), columns


def _factors(gates: Gates) -> _Factors:
    """`[B,M,n,64]` each, in float32."""
    theta, momentum, decay = (x.astype(jnp.float32) for x in gates[:3])
    keep, used, first = 1 - decay, gates.used, gates.first
    if used is not None:
        theta = jnp.where(used, theta, 0)
        momentum, keep = jnp.where(used, momentum, 1), jnp.where(used, keep, 1)
    if first is None:
        first = jnp.arange(TILE) == 0
    return _Factors(
        keep=jnp.where(first, 0, keep), momentum=jnp.where(first, 0, momentum),
        keep_start=jnp.where(first, keep, 0), momentum_start=jnp.where(first, momentum, 0),
        learning_rate=theta,
        used=jnp.broadcast_to(1.0 if used is None else used.astype(jnp.float32), decay.shape),
    )  # fmt: skip


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gates(plan: Plan, factors: jax.Array) -> tuple[jax.Array, jax.Array]:
    """b and f of every token, and of the last one G, P, b, f and m; and every G.

    Takes `[B,M,pairs,6,128]`, returns `[B,M,pairs,7,128]`, where b, f and m of the last token stand
    in all of a row, and `[B,M,pairs,64,128]`.
    """

    def neural_memory_gates(factors, vectors, written, *, gates, barrier):
        here = _here()
        plgpu.copy_gmem_to_smem(factors.at[here], gates, barrier)
        plgpu.barrier_wait(barrier)
        lanes = _Lanes.make()

        def step(t, carry):
            running, *rows = carry
            own = lanes.token == t
            running = running.after(lanes.factors(gates, t), own)
            written[(*here, t)] = running.written
            both = zip((running.kept, running.carried), rows, strict=True)
            return running, *(jnp.where(own, x, row) for x, row in both)

        last, kept, carried = lax.fori_loop(0, TILE, step, (_Running.zero(), _zeros(), _zeros()))
        rows = kept, carried, last.written, last.pending, last.kept, last.carried, last.momentum
        for row, numbers in enumerate(rows):
            vectors[(*here, row)] = numbers

    return plan.launch(
        neural_memory_gates, factors, grid=_grid(factors),
        out_type=(_rows_like(factors, 7), _rows_like(factors, TILE)),
        scratch={"gates": _shared(len(_Factors._fields)), "barrier": plgpu.Barrier()},
    )  # fmt: skip


def _gates_forward(plan: Plan, factors: jax.Array):
    return _gates(plan, factors), factors


def _gates_backward(plan: Plan, factors: jax.Array, cotangents) -> tuple[jax.Array]:
    kept, carried, written, pending, *last = jnp.moveaxis(
        cotangents[0].reshape(*factors.shape[:3], 7, PAIR, TILE), 3, 0
    )
    at_end = jnp.arange(TILE) == TILE - 1
    d_kept, d_carried, momentum = (
        jnp.where(at_end, x.sum(axis=-1, keepdims=True), 0) for x in last
    )
    d_rows = jnp.stack([kept + d_kept, carried + d_carried, momentum, written, pending], axis=3)

    def neural_memory_gates_pull(
        factors, d_rows, d_written, d_factors, *, gates, rows, pending, written, d_tile, barrier
    ):
        here = _here()
        for source, target in ((factors, gates), (d_rows, rows), (d_written, d_tile)):
            plgpu.copy_gmem_to_smem(source.at[here], target, barrier)
        plgpu.barrier_wait(barrier)
        lanes = _Lanes.make()

        def forth(t, carry):
            """Keeps what was before each token: P and G of all columns, and b, f and m."""
            running, *befores = carry
            own = lanes.token == t
            pending[t] = running.pending
            written[t] = running.written
            befores = [jnp.where(own, x, xs) for x, xs in zip(running[2:], befores, strict=True)]
            return running.after(lanes.factors(gates, t), own), *befores

        zeros = _zeros()
        _, kept, carried, momentum = lax.fori_loop(
            0, TILE, forth, (_Running.zero(), zeros, zeros, zeros)
        )

        def back(i, carry):
            d, d_starts = carry
            t = TILE - 1 - i
            own, gate = lanes.token == t, lanes.factors(gates, t)
            d_written = d.written + _row(d_tile, t)
            d_pending = d.pending + gate.used * d_written
            d_kept, d_carried = d.kept + lanes.at(rows, 0, t), d.carried + lanes.at(rows, 1, t)
            d_momentum = d.momentum + lanes.at(rows, 2, t) + gate.used * d_carried
            # In a token's own lane P and G were 0: there is room for what all lanes share.
            x, y = d_written * _row(written, t), d_pending * _row(pending, t)
            written[t] = jnp.where(own, d_kept * kept + d_carried * carried, x)
            pending[t] = jnp.where(own, d_momentum * momentum, y)
            new = d_kept, d_momentum, d_pending
            d_starts = [jnp.where(own, x, xs) for x, xs in zip(new, d_starts, strict=True)]
            d = _Running(
                pending=gate.momentum * d_pending, written=gate.keep * d_written,
                kept=gate.keep * d_kept, carried=gate.keep * d_carried,
                momentum=gate.momentum * d_momentum,
            )  # fmt: skip
            return d, d_starts

        d_last = _Running.zero()._replace(written=_row(rows, 3), pending=_row(rows, 4))
        _, d_starts = lax.fori_loop(0, TILE, back, (d_last, [zeros, zeros, zeros]))
        for row, numbers in enumerate(d_starts, 2):
            d_factors[(*here, row)] = numbers
        plgpu.commit_smem()
        for row, tile in enumerate((written, pending)):
            for chunk in range(PAIR):
                columns = pl.ds(chunk * TILE, TILE)
                products = plgpu.load(tile.at[:, columns], layout=WGMMA, optimized=False)
                d_factors[(*here, row, columns)] = products.sum(axis=1)

    d_factors = plan.launch(
        neural_memory_gates_pull, factors, d_rows.reshape(*factors.shape[:3], -1, LANES),
        cotangents[1],
        grid=_grid(factors), out_type=_rows_like(factors, 5),
        scratch={
            "gates": _shared(len(_Factors._fields)), "rows": _shared(5), "pending": _shared(TILE),
            "written": _shared(TILE), "d_tile": _shared(TILE),
            "barrier": plgpu.Barrier(num_arrivals=3),
        },
    )  # fmt: skip
    return (jnp.pad(d_factors, [(0, 0)] * 3 + [(0, 1), (0, 0)]),)  # slots are used or not


_gates.defvjp(_gates_forward, _gates_backward)


class _Lanes(NamedTuple):
    """Which lane is whose.

    Attributes:
      token: of the chunk, whose column is the lane's.
      second: whether it is of the second chunk.
    """

    token: jax.Array
    second: jax.Array

    @classmethod
    def make(cls) -> "_Lanes":
        """Of all lanes."""
        index = plgpu.broadcasted_iota(jnp.int32, (LANES,), 0, layout=_BY_LANE)
        second = index >= TILE
        return cls(jnp.where(second, index - TILE, index), second)

    def at(self, rows, row: int, token) -> jax.Array:
        """What stands in a row of shared memory at a token of each chunk."""
        both = jnp.where(self.second, rows[row, TILE + token], rows[row, token])
        return plgpu.layout_cast(both, _BY_LANE)

    def factors(self, gates, token) -> _Factors:
        """Of a token of each chunk; learning rates of every lane's own."""
        return _Factors(
            *(
                _row(gates, row) if name == "learning_rate" else self.at(gates, row, token)
                for row, name in enumerate(_Factors._fields)
            )
        )


def _here() -> tuple[Any, ...]:
    """The pair that a CTA takes."""
    return tuple(lax.axis_index(axis) for axis in ("batch", "memory", "pair"))


def _grid(factors: jax.Array) -> dict[str, int]:
    return dict(zip(("batch", "memory", "pair"), factors.shape[:3], strict=True))


def _rows_like(factors: jax.Array, rows: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((*factors.shape[:3], rows, LANES), jnp.float32)


def _shared(rows: int):
    return plgpu.SMEM((rows, LANES), jnp.float32)


def _row(rows, row) -> jax.Array:
    return plgpu.load(rows.at[row], layout=_BY_LANE)


def _zeros() -> jax.Array:
    return plgpu.layout_cast(jnp.zeros((LANES,), jnp.float32), _BY_LANE)
