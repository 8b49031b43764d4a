"""What the kernels share: options and launching."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gated_linear_attention.config import LaunchConfig
from pallas_kernels.gated_linear_attention.decay import Decay
from pallas_kernels.products import Products
from pallas_kernels.tiles import TILE


@dataclasses.dataclass(frozen=True)
class Plan:
    """How kernels run, as fixed while tracing.

    Attributes:
      scale: factor of the output.
      config: launch parameters.
      interpret: whether to run in the CPU simulator.
    """

    scale: float
    config: LaunchConfig
    interpret: bool = False

    @property
    def products(self) -> Products:
        """The matrix unit."""
        return Products(self.interpret)

    def launch(self, body, *arrays, grid: dict[str, int], out_type, scratch: dict[str, Any]):
        """Runs a kernel.

        Args:
          body: the kernel.
          *arrays: its inputs.
          grid: sizes of the grid's axes; the last runs fastest.
          out_type: shapes of its outputs.
          scratch: its scratch, by argument.
        """
        return plgpu.kernel(
            body, out_type=out_type, scratch_types=scratch, grid=tuple(grid.values()),
            grid_names=tuple(grid), compiler_params=plgpu.CompilerParams(approx_math=True),
            interpret=plgpu.InterpretGPUParams() if self.interpret else None,
        )(*arrays)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Chunk:
    """The chunk and query head that a CTA of a kernel without a sweep works on."""

    batch: Any
    index: Any
    head: Any

    @classmethod
    def here(cls) -> "Chunk":
        """From the grid."""
        return cls(*(lax.axis_index(axis) for axis in ("batch", "chunk", "head")))

    @classmethod
    def grid(cls, x: jax.Array) -> dict[str, int]:
        """Of `[B,T,heads,size]`. Heads run fastest: neighbours lie side by side in memory."""
        return {"batch": x.shape[0], "chunk": x.shape[1] // TILE, "head": x.shape[2]}

    def of_tokens(self, array, heads: int):
        """The part of `[B,T,its heads,size]`."""
        return self._rows(array, heads, TILE)

    def terms(self, decay: Decay, heads: int):
        """The chunk's terms of log decays."""
        return self._rows(decay.terms, heads, decay.rows)

    def _rows(self, array, heads: int, rows: int):
        own = self.head // (heads // array.shape[2])
        return array.at[self.batch, pl.ds(self.index * rows, rows), own]

    def of_state(self, array, heads: int):
        """The part of `[B,its heads,chunks,F,H]`."""
        return array.at[self.batch, self.head // (heads // array.shape[1]), self.index]

    def gate(self, decay: Decay, heads: int) -> tuple:
        """Where the chunk's factor and number of levels are."""
        return self.batch, self.index, self.head // (heads // decay.levels.shape[2])


def shared(rows: int, columns: int):
    """Shared memory of a bfloat16 tile."""
    return plgpu.SMEM((rows, columns), jnp.bfloat16)


def fetch(copies: list[tuple[Any, Any]], barrier) -> None:
    """Copies from global to shared memory; the barrier expects as many arrivals."""
    for source, target in copies:
        plgpu.copy_gmem_to_smem(source, target, barrier)
    plgpu.barrier_wait(barrier)
