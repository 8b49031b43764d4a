"""What the kernels share: options, the grid, block specs and scratch.

Every kernel is a SWEEP: a CTA of one warpgroup walks the chunks of one (batch, group of chunks,
block of 64 values, head), with a state in registers. Tokens x read the state, tokens y write it:

    out_t = sum over s of p(x_t, y_s) w_s        state += phi(y_s) w_sᵀ

Forward, queries read what earlier keys wrote. Transposed, keys read what later queries wrote, so
the walk is from the end. Heads are the fastest grid axis: neighbours read the same lines of
`[B, T, N, F]`. An array with fewer heads than the grid is shared by neighbouring heads.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.linear_attention.documents import Chunk, Documents, PackedChunk
from pallas_kernels.linear_attention.features import FeatureMap
from pallas_kernels.linear_attention.state import Copy, State, load_state, zero_state
from pallas_kernels.products import Products
from pallas_kernels.tiles import TILE

States = tuple[jax.Array, jax.Array | None]
"""States of every head and group, float32: sums `[B,heads,groups,D,H]` and, where outputs are
normalised, totals `[B,heads,groups,D]`; D in whole slices of 64."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a sweep runs, as fixed while tracing.

    Attributes:
      feature_map: phi.
      normalize: whether the state holds totals, the sums of phi(y).
      groups: parts into which a sequence is split, each walked by a CTA of its own.
      stages, gradient_stages: chunks in flight from global memory, as in `LaunchConfig`.
      transposed: whether keys read what later queries wrote.
      interpret: whether to run in the CPU simulator.
    """

    feature_map: FeatureMap
    normalize: bool
    groups: int
    stages: int
    gradient_stages: int
    transposed: bool = False
    interpret: bool = False

    def replace(self, **changes) -> "Plan":
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    @property
    def slices(self) -> int:
        """Slices of 64 features."""
        return self.feature_map.num_slices

    @property
    def products(self) -> Products:
        """The matrix unit."""
        return Products(self.interpret)

    def launch(self, body, *arrays, grid: dict[str, int], out_type, scratch, commits: bool = True):
        """Runs a kernel; its scratch gains the feature map's matrices and a barrier.

        Args:
          body: the kernel.
          *arrays: its inputs, after the feature map's matrices.
          grid: sizes of the grid's axes. Slices of the state are divided among the axis "slice".
          out_type: shapes of its outputs.
          scratch: its scratch, by argument.
          commits: whether every step commits its writes to shared memory before anything there is
            overwritten. Those are barriers of the warpgroup, and the compiler need add none.
        """
        constants = tuple(jnp.asarray(c) for c in self.feature_map.constants())
        parts = grid.get("slice", 1)
        own = {
            "constants": tuple(
                plgpu.SMEM((c.shape[0] // parts, c.shape[1]), c.dtype) for c in constants
            ),
            "barrier": plgpu.Barrier(),
        }
        kernel = plgpu.kernel(
            body, out_type=out_type, scratch_types={**own, **scratch},
            grid=tuple(grid.values()), grid_names=tuple(grid),
            compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=commits),
            interpret=plgpu.InterpretGPUParams() if self.interpret else None,
        )  # fmt: skip
        return kernel(constants, *arrays)

    def grid(self, heads: int, w: jax.Array) -> dict[str, int]:
        """The sizes of the axes that a CTA finds its work by."""
        return {
            "batch": w.shape[0], "group": self.groups, "block": w.shape[3] // TILE, "head": heads,
        }  # fmt: skip

    def bind(self, sources, constants, barrier, first: int | jax.Array = 0) -> tuple[Any, Any]:
        """The feature maps of readers and writers, of the slices from `first` on.

        Copies their matrices from global memory to the scratch made by `launch`.
        """
        for source, target in zip(sources, constants, strict=True):
            per_slice = source.shape[0] // self.slices
            rows = source.at[pl.ds(first * per_slice, target.shape[0])]
            plgpu.copy_gmem_to_smem(rows, target, barrier)
            plgpu.barrier_wait(barrier)
        queries, keys = self.feature_map.bind(constants, self.products, first)
        return (keys, queries) if self.transposed else (queries, keys)

    def walk(self, step, arrays, documents, *, heads: int, stages: int, state):
        """Calls `step(chunk, *tiles, state) -> state` on every chunk of a CTA, in order.

        Args:
          step: its `chunk` is a `Chunk`.
          arrays: `(array, kind)`, the kind of tile being "whole" for `[64, F]` of `[B,T,heads,F]`,
            "block" for the CTA's 64 columns of it, "token" for `[64]` of `[B,heads,T]`. Instead of
            arrays that are None, `step` is given None.
          documents: `Documents` or None.
          heads: heads of the grid.
          stages: chunks in flight.
          state: the state to start from.
        """
        chunks = arrays[0][0].shape[1] // (TILE * self.groups)
        batch, head = lax.axis_index("batch"), lax.axis_index("head")
        group, block = lax.axis_index("group"), lax.axis_index("block")

        def chunk(i):
            return group * chunks + (chunks - 1 - i if self.transposed else i)

        def spec(array, kind):
            if kind == "token":
                return plgpu.BlockSpec((None, None, TILE), lambda i: (batch, head, chunk(i)))
            own = head // (heads // array.shape[2])
            width, column = (TILE, block) if kind == "block" else (array.shape[3], 0)
            return plgpu.BlockSpec(
                (None, TILE, None, width), lambda i: (batch, chunk(i), own, column)
            )

        given = [pair for pair in arrays if pair[0] is not None]
        specs, inputs = [spec(*pair) for pair in given], [array for array, _ in given]
        if documents is not None:
            row = plgpu.BlockSpec((None, TILE), lambda i: (batch, chunk(i)))
            numbers = documents.owners.shape[2]
            owners = plgpu.BlockSpec((None, None, numbers), lambda i: (batch, chunk(i), 0))
            specs, inputs = [*specs, row, row, owners], [*inputs, *documents]
        for tile, array in zip(specs, inputs, strict=True):
            _check_copied(tile, array.dtype)

        def body(index, *tiles_and_state):
            *refs, state = tiles_and_state
            tiles = iter(refs)
            of_step = [None if array is None else next(tiles) for array, _ in arrays]
            place = pl.ds(chunk(index[0]) * TILE, TILE), self.transposed
            here = Chunk(*place) if documents is None else PackedChunk(*place, Documents(*tiles))
            return step(here, *of_step, state)

        return plgpu.emit_pipeline(
            body, grid=(chunks,), in_specs=specs, max_concurrent_steps=stages, init_carry=state
        )(*inputs)

    def states_type(self, batch: int, heads: int, values: int):
        """The shapes of `States`."""
        shape = (batch, heads, self.groups, self.slices * TILE)
        return (
            jax.ShapeDtypeStruct((*shape, values), jnp.float32),
            jax.ShapeDtypeStruct(shape, jnp.float32) if self.normalize else None,
        )

    def of_cta(self, states, heads: int):
        """The CTA's part of `States`: sums `[D, 64]` and totals `[D]` or None."""
        sums, totals = states
        head = lax.axis_index("head") // (heads // sums.shape[1])
        at = lax.axis_index("batch"), head, lax.axis_index("group")
        values = pl.ds(lax.axis_index("block") * TILE, TILE)
        return sums.at[(*at, slice(None), values)], None if totals is None else totals.at[at]

    def start(self, states, heads: int) -> State:
        """The state that the CTA starts from: zeros if there are no `States`."""
        if states is None:
            return zero_state(self.slices, self.normalize)
        return load_state(*self.of_cta(states, heads), self.slices)

    def copy_scratch(self) -> Copy:
        """Scratch of a state's copy."""
        return Copy(
            (plgpu.SMEM((TILE, TILE), jnp.bfloat16),) * self.slices,
            (plgpu.SMEM((TILE,), jnp.float32),) * (self.slices if self.normalize else 0),
        )


def _check_copied(tile, dtype) -> None:
    """TMA copies to multiples of 128 bytes; chunks in flight lie one behind the other.

    The simulator does not know: a tile of 16 bytes passed there, and at one chunk a group on a GPU.
    """
    size = math.prod(n for n in tile.block_shape if n is not None) * jnp.dtype(dtype).itemsize
    if size % 128:
        raise ValueError(
            f"a tile {tile.block_shape} of {dtype} has {size} bytes, no multiple of 128"
        )
