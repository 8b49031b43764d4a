"""What the kernels share: options, launching, and where a chunk's arrays lie."""

import dataclasses
from typing import Any

import jax.numpy as jnp
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
      by_head: whether all features of a head share their decays.
      interpret: whether to run in the CPU simulator.
    """

    scale: float
    config: LaunchConfig
    by_head: bool = False
    interpret: bool = False

    @property
    def products(self) -> Products:
        """The matrix unit."""
        return Products(self.interpret)

    def launch(
        self,
        body,
        *arrays,
        grid: dict[str, int],
        out_type,
        scratch: dict[str, Any],
        warpgroups: int = 1,
        commits: bool = False,
    ):
        """Runs a kernel.

        Args:
          body: the kernel.
          *arrays: its inputs.
          grid: sizes of the grid's axes; the last runs fastest.
          out_type: shapes of its outputs.
          scratch: its scratch, by argument.
          warpgroups: of a CTA.
          commits: whether writes to shared memory are committed before anything there is
            overwritten. Those are barriers of the warpgroup, and the compiler need add none.
        """
        threads: dict[str, Any] = {}
        if warpgroups > 1:
            threads = {"num_threads": warpgroups, "thread_name": "warpgroup"}
        return plgpu.kernel(
            body, out_type=out_type, scratch_types=scratch, grid=tuple(grid.values()),
            grid_names=tuple(grid), **threads,
            compiler_params=plgpu.CompilerParams(
                approx_math=True, unsafe_no_auto_barriers=commits
            ),
            interpret=plgpu.InterpretGPUParams() if self.interpret else None,
        )(*arrays)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Chunk:
    """A chunk of a head of a grid with so many heads.

    Arrays and decays of fewer heads are shared by neighbouring ones.
    """

    batch: Any
    index: Any
    head: Any
    heads: int

    def of_tokens(self, array):
        """The part of `[B,T,its heads,size]`."""
        return self._rows(array, TILE)

    def terms(self, decay: Decay):
        """The chunk's terms of log decays, `[64 or 128,F]`."""
        return self._rows(decay.terms, decay.rows)

    def halves(self, decay: Decay):
        """What is left of a state after each half, `[2,F]`."""
        return decay.halves.at[self.batch, self.index, :, self._shared(decay.halves.shape[3])]

    def of_state(self, array):
        """The part of `[B,its heads,chunks,F,H]`."""
        return array.at[self.batch, self._shared(array.shape[1]), self.index]

    def _rows(self, array, rows: int):
        tokens = pl.ds(self.index * rows, rows)
        return array.at[self.batch, tokens, self._shared(array.shape[2])]

    def _shared(self, heads: int):
        return self.head // (self.heads // heads)


def shared(rows: int, columns: int):
    """Shared memory of a bfloat16 tile."""
    return plgpu.SMEM((rows, columns), jnp.bfloat16)


def store(numbers, target, tile) -> None:
    """Writes bfloat16 to global memory, through a tile in shared memory that nothing reads."""
    tile[...] = numbers.astype(tile.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(tile, target)
