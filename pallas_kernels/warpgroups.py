"""What the flash kernels for Hopper share: a warpgroup's block of tokens, and turns between two."""

import dataclasses
from typing import Any, NamedTuple

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.tiles import ALONG_ROWS, TILE


class Here(NamedTuple):
    """The block of one warpgroup."""

    batch: Any
    head: Any
    index: Any  # of the CTA's block
    warpgroup: Any
    token: Any  # the warpgroup's first

    @property
    def tokens(self):
        """The slice of the sequence."""
        return pl.ds(self.token, TILE)

    def fetch(self, arrays, tiles, barriers) -> list:
        """Copies what stays, `[B,T,heads,size]`, to shared memory, and gives its tiles."""
        own = [tile.at[self.warpgroup] for tile in tiles]
        for array, tile in zip(arrays, own, strict=True):
            source = array.at[self.batch, self.tokens, self.head]
            plgpu.copy_gmem_to_smem(source, tile, barriers.at[self.warpgroup])
        plgpu.barrier_wait(barriers.at[self.warpgroup])
        return own

    def own(self, tiles) -> list:
        """The tiles of this warpgroup, found anew.

        Inside a loop: descriptors of tiles that are found before it stay in a dozen registers.
        """
        warpgroup = lax.optimization_barrier(self.warpgroup)
        return [tile.at[warpgroup] for tile in tiles]

    def store(self, values, tiles, targets) -> None:
        """Writes tiles to `[B,T,heads,size]`, through shared memory that is no longer read."""
        for value, tile in zip(values, tiles, strict=True):
            tile[...] = value.astype(tile.dtype)
        plgpu.commit_smem()
        for tile, target in zip(tiles, targets, strict=True):
            plgpu.copy_smem_to_gmem(tile, target.at[self.batch, self.tokens, self.head])
        plgpu.wait_smem_to_gmem(0)

    def read(self, rows, row: int) -> jax.Array:
        """A number of each of the block's queries, of `[B,N,numbers,T]`."""
        source = rows.at[self.batch, self.head, int(row), self.tokens]
        return plgpu.load(source, layout=ALONG_ROWS, optimized=False)

    def write(self, target, numbers: jax.Array) -> None:
        """Writes a number of each of the block's queries, to `[B,N,T]`."""
        target[self.batch, self.head, self.tokens] = numbers

    def token_numbers(self, array) -> jax.Array:
        """The block's part of `[B,T]`."""
        return plgpu.load(array.at[self.batch, self.tokens], layout=ALONG_ROWS, optimized=False)


@dataclasses.dataclass(frozen=True)
class Turns:
    """How two warpgroups keep apart.

    One's products are in flight while the other computes weights. Left alone, they fall into step,
    and the matrix unit waits for both. A step swaps when its scores are in flight and when its
    weights are ready. That took a tenth off softplus attention's forward kernel; those of its
    gradients it made slower.

    Attributes:
      barrier: at which both arrive, or None where there is nothing to swap.
    """

    barrier: Any

    def swap(self) -> None:
        """Waits for the other's swap."""
        if self.barrier is not None:
            plgpu.barrier_arrive(self.barrier)
            plgpu.barrier_wait(self.barrier)

    def skip(self) -> None:
        """Both swaps of a step, by those that have none to take."""
        self.swap()
        self.swap()

    def begin(self, warpgroup: Any) -> None:
        """Lets the first warpgroup go ahead."""
        if self.barrier is not None:
            pl.when(warpgroup == 1)(self.swap)

    def end(self, warpgroup: Any) -> None:
        """Answers the second one's last swap."""
        if self.barrier is not None:
            pl.when(warpgroup == 0)(self.swap)
