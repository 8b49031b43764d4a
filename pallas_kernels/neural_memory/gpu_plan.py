"""What the kernels for Hopper share: options, launching, and sums over a cluster."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import utils as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.neural_memory.gpu_activations import ACTIVATIONS, Derivatives
from pallas_kernels.products import Products
from pallas_kernels.tiles import TILE, WGMMA, zeros

PART = "part"
"""An axis of a cluster: 64 numbers of keys and values a CTA."""

SLICE = "slice"
"""The other axis: 64 hidden units a CTA."""

LAYER = "layer"
"""The axis of a CTA's warpgroups: one for each layer."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """How kernels run, as fixed while tracing.

    Attributes:
      activation: σ by its name.
      interpret: whether to run in the CPU simulator.
      stages: slices in flight where a CTA takes one after the other.
    """

    activation: str
    interpret: bool = False
    stages: int = 2

    @property
    def activate(self) -> Callable[[jax.Array], Derivatives]:
        """σ with its derivatives."""
        return ACTIVATIONS[self.activation]

    @property
    def products(self) -> Products:
        """The matrix unit."""
        return Products(self.interpret)

    def launch(
        self, body, *arrays, grid: dict[str, int], out_type, scratch: dict[str, Any],
        cluster: dict[str, int] | None = None, course: "Course | None" = None,
    ):  # fmt: skip
        """Runs a kernel.

        Args:
          body: the kernel.
          *arrays: its inputs.
          grid: sizes of the grid's axes; the last runs fastest.
          out_type: shapes of its outputs.
          scratch: its scratch, by argument.
          cluster: axes of the clusters of a walk, whose CTAs have a warpgroup a layer. None: no
            walk.
          course: of a kernel of chunks by themselves, which leaves out those that no row walks.
        """
        if course is not None:
            body, arrays = _where_walked(body), (course.counts, *arrays)
        walk: dict[str, Any] = {}
        if cluster is not None:
            walk = {
                "cluster": tuple(cluster.values()), "cluster_names": tuple(cluster),
                "num_threads": 2, "thread_name": LAYER,
            }  # fmt: skip
        return plgpu.kernel(
            body, out_type=out_type, scratch_types=scratch, grid=tuple(grid.values()),
            grid_names=tuple(grid), **walk,
            compiler_params=plgpu.CompilerParams(approx_math=True),
            interpret=plgpu.InterpretGPUParams() if self.interpret else None,
        )(*arrays)  # fmt: skip


def _where_walked(body):
    @functools.wraps(body)
    def run(counts, *refs, **scratch):
        batch, chunk = (lax.axis_index(axis) for axis in ("batch", "chunk"))
        pl.when(chunk < counts[batch])(lambda: body(*refs, **scratch))

    return run


class Course(NamedTuple):
    """Where rows differ in what they walk; arrays, or refs inside a kernel.

    Attributes:
      counts: chunks of a row `[B]`, at least 1; what is said of later ones is of no use.
      renews: whether a document begins right after a chunk `[B,n]`. Shares of such a chunk are 0.
      fresh: of each layer the network of a new document, `[B,M,in,out]`.
    """

    counts: Any
    renews: Any
    fresh: Any


def follow(course: Course | None, batch, chunks: int) -> tuple[Any, Callable]:
    """How many chunks a row walks, and what makes the state before a chunk of that after the last.

    Args:
      course: refs, or None where all rows walk all chunks, of one document.
      batch: the row.
      chunks: of arrays.
    """
    if course is None:
        return chunks, lambda chunk, layer, place, state: state

    def renew(chunk, layer, place, state):
        """`place` is where the layer's tile lies in a network."""

        def begin():
            return load_float32(course.fresh[layer].at[place]), zeros(TILE)

        return lax.cond(course.renews[batch, chunk] > 0, begin, lambda: state)

    return course.counts[batch], renew


def pull_course(course: Course | None, d_after: tuple[jax.Array, ...]) -> Course | None:
    """Gradients of fresh networks, from those of each layer's after every chunk, `[B,M,n,...]`."""
    if course is None:
        return None
    renews = course.renews[:, None, :, None, None] > 0
    d_fresh = tuple(jnp.where(renews, x, 0).sum(axis=2, dtype=jnp.float32) for x in d_after)
    return Course(None, None, d_fresh)


def shared(rows: int = TILE, columns: int = TILE):
    """Shared memory of a bfloat16 tile, which `anew` makes a tile."""
    return plgpu.SMEM((1, rows, columns), jnp.bfloat16)


def anew(tiles, index):
    """Tiles, found anew.

    Descriptors of tiles that are found before a loop stay in registers through it, a dozen a tile.

    Args:
      tiles: a tree of scratch made by `shared`.
      index: of the loop.
    """
    zero = lax.optimization_barrier(index - index)
    return jax.tree.map(lambda tile: tile.at[zero], tiles)


def load_float32(tile) -> jax.Array:
    """A float32 tile of global memory."""
    return plgpu.load(tile, layout=WGMMA, optimized=False)


def load(tile) -> jax.Array:
    """A tile of shared memory, in float32."""
    return plgpu.load(tile, layout=WGMMA).astype(jnp.float32)


def finish_loads() -> None:
    """Waits until registers hold what was loaded, before a copy overwrites the tile it came from.

    A barrier orders loads before stores that come after it, but not before copies, which go another
    way and can overtake loads that have begun: seen on an H200 where a walk starts and many copies
    arrive at once. Up to one call of ten of `gpu_pull` got a few rows of the chunk to come, and
    none of 3500 with this.
    """
    plgpu.commit_smem()


@dataclasses.dataclass(frozen=True)
class Exchange:
    """Sums of a tile over an axis of a cluster, each of whose CTAs gets all of the sum.

    Parts go through global memory, which stays in L2, in two sets by turns: who writes to a set has
    heard from all since they last read it. Of float32 tiles between four CTAs, that took 1.3 us on
    an H200; stores of registers to the shared memory of the others took 3.8.

    Barriers of a cluster order memory within a CTA only, and a copy that has been waited for is
    known to its own thread. Hence fences before and after: without them, the last rows of a part
    were old ones now and then: on an H200 with other programs beside, 228 of 299 runs of 2 x 8 CTAs
    differed from the first, and none with fences. They take 0.6 us a chunk of a walk.

    Attributes:
      axis: of the cluster.
      size: CTAs along it.
      dtype: in which parts are sent.
      slots: tiles of others that shared memory holds at once.
      interpret: whether the kernel runs in the CPU simulator, which has no fences.
    """

    axis: str
    size: int
    dtype: Any
    slots: int = 3
    interpret: bool = False

    @property
    def others(self) -> int:
        """CTAs that one hears from."""
        return self.size - 1

    def scratch(self) -> Any:
        """Shared memory and barriers, to be passed to `sum`."""
        if not self.others:
            return None
        slots = min(self.slots, self.others)
        return Mailbox(
            sent=plgpu.SMEM((TILE, TILE), self.dtype),
            received=plgpu.SMEM((slots, TILE, TILE), self.dtype),
            all_sent=plgpu.ClusterBarrier(collective_axes=(self.axis,)),
            arrived=plgpu.Barrier(num_barriers=slots),
        )

    def through(self, *grid: int):
        """Global memory, to be passed to `sum`: an output."""
        if not self.others:
            return None
        return jax.ShapeDtypeStruct((*grid, 2, self.size, TILE, TILE), self.dtype)

    def sum(self, part: jax.Array, turn, mailbox: "Mailbox", through, place) -> jax.Array:
        """The sum of all parts.

        Args:
          part: this CTA's, `[64,64]`.
          turn: 0 and 1 by turns.
          mailbox: scratch.
          through: global memory.
          place: of those that share the sum, in the grid.
        """
        if not self.others:
            return part
        own, through = lax.axis_index(self.axis), through.at[(*place, turn)]
        slots = min(self.slots, self.others)

        def receive(i):
            other = lax.rem(own + 1 + i, self.size)
            slot = i % slots
            source, target = through.at[other], mailbox.received.at[slot]
            plgpu.copy_gmem_to_smem(source, target, mailbox.arrived.at[slot])

        mailbox.sent[...] = part.astype(self.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(mailbox.sent, through.at[own])
        plgpu.wait_smem_to_gmem(0)
        self._fence()
        plgpu.commit_smem()  # all threads' fences are behind all their arrivals
        plgpu.barrier_arrive(mailbox.all_sent)
        plgpu.barrier_wait(mailbox.all_sent)
        self._fence()
        for i in range(slots):
            receive(i)
        for i in range(self.others):
            slot = i % slots
            plgpu.barrier_wait(mailbox.arrived.at[slot])
            part += load(mailbox.received.at[slot])
            if i + slots < self.others:
                finish_loads()
                receive(i + slots)
        return part

    def _fence(self) -> None:
        """Orders this thread's copies and barriers for all CTAs."""
        if not self.interpret:
            _fence_copies()


@plgpu.inline_mgpu()
def _fence_copies(_):
    for fence in ("fence.acq_rel.cluster;", "fence.proxy.async.global;"):
        mgpu.inline_ptx(fence, has_side_effects=True)


class Mailbox(NamedTuple):
    """A CTA's side of an exchange.

    Attributes:
      sent: its part.
      received: those of the others, or of some.
      all_sent: where all CTAs arrive.
      arrived: where copies of the others' parts do.
    """

    sent: Any
    received: Any
    all_sent: Any
    arrived: Any
