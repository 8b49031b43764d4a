"""Tiles in flight from global to shared memory, between a warpgroup that copies and some that read.

Step i of a walk uses slot i mod stages. The copier waits until all readers have released what a
slot held before, a reader until the copy has arrived:

    copier   fill 0  fill 1  (free 0) fill 2  (free 1) fill 3 ...
    reader           wait 0  release 0        wait 1  release 1 ...
"""

from typing import Any, NamedTuple

from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu


class Ring(NamedTuple):
    """Slots for the tiles of one array.

    Attributes:
      tiles: `[stages, ...]` in shared memory.
      ready: a barrier a slot, at which its copy arrives.
      free: a barrier a slot, at which its readers do.
    """

    tiles: Any
    ready: Any
    free: Any

    @classmethod
    def scratch(
        cls, shape: tuple[int, ...], dtype, *, stages: int, readers: int, copies: int = 1
    ) -> "Ring":
        """The scratch that becomes a ring inside a kernel; a tile comes in so many copies."""
        return cls(
            plgpu.SMEM((stages, *shape), dtype),
            plgpu.Barrier(num_barriers=stages, num_arrivals=copies),
            plgpu.Barrier(num_barriers=stages, num_arrivals=readers),
        )

    def fill(self, step: Any, source: Any) -> None:
        """Copies a step's tile, as soon as its slot is free."""
        self.clear(step)
        plgpu.copy_gmem_to_smem(source, self.tile(step), self.ready.at[self._slot(step)])

    def fill_part(self, step: Any, part: int, source: Any) -> None:
        """Copies one part of a step's tile, `[parts, ...]`, whose slot is clear."""
        target = self.tile(step).at[part]
        plgpu.copy_gmem_to_smem(source, target, self.ready.at[self._slot(step)])

    def clear(self, step: Any) -> None:
        """Waits until a step's slot is free."""

        @pl.when(step >= self.tiles.shape[0])
        def _():
            plgpu.barrier_wait(self.free.at[self._slot(step)])

    def wait(self, step: Any) -> None:
        """Waits for a step's tile. A reader does so once a step, in order."""
        plgpu.barrier_wait(self.ready.at[self._slot(step)])

    def tile(self, step: Any) -> Any:
        """A step's tile, which has arrived."""
        return self.tiles.at[self._slot(step)]

    def release(self, step: Any) -> None:
        """Says that this reader is done with a step's tile. Each does so once a step."""
        plgpu.barrier_arrive(self.free.at[self._slot(step)])

    def _slot(self, step: Any) -> Any:
        return lax.rem(step, self.tiles.shape[0])
