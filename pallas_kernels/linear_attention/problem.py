"""What the kernels share: sizes and options, the grid, block specs and scratch.

A CTA is one warpgroup that walks the chunks of one (batch, group of chunks, block of 64 values,
head). Heads are the fastest grid axis: neighbours read the same lines of `[B, T, N, F]`.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.linear_attention.features import FeatureMap, Side
from pallas_kernels.linear_attention.products import Products
from pallas_kernels.linear_attention.tiles import TILE

_AXES = ("batch", "group", "block", "head")


@dataclasses.dataclass(frozen=True)
class Problem:
    """One call, as fixed while tracing.

    Attributes:
      B, T, N, K, F, H: sizes; T is padded to whole chunks in whole groups, K divides N.
      feature_map: phi.
      normalize: whether outputs are divided by the sum of weights.
      groups: parts into which a sequence is split, each walked by a CTA of its own.
      stages: chunks in flight from global memory.
      interpret: whether to run in the CPU simulator.
    """

    B: int
    T: int
    N: int
    K: int
    F: int
    H: int
    feature_map: FeatureMap
    normalize: bool
    groups: int
    stages: int
    interpret: bool = False

    @property
    def chunks(self) -> int:
        """Chunks a group."""
        return self.T // (TILE * self.groups)

    @property
    def blocks(self) -> int:
        """Blocks of 64 values."""
        return self.H // TILE

    @property
    def slices(self) -> int:
        """Slices of 64 features."""
        return self.feature_map.num_slices

    @property
    def queries_per_key(self) -> int:
        """Query heads that share a key head."""
        return self.N // self.K

    @property
    def products(self) -> Products:
        """The matrix unit."""
        return Products(self.interpret)

    def launch(self, body, *arrays, out_type, scratch, heads: int, slices: int | None = None):
        """Runs a kernel over (batch, group, block, head) and, if given, slices of the state.

        Scratch gains what every kernel needs: the feature map's matrices and a barrier.
        """
        grid, names = (self.B, self.groups, self.blocks, heads), _AXES
        if slices is not None:
            grid, names = (*grid, slices), (*names, "slice")
        constants = tuple(jnp.asarray(c) for c in self.feature_map.constants())
        own = {
            "constants": tuple(plgpu.SMEM(c.shape, c.dtype) for c in constants),
            "barrier": plgpu.Barrier(),
        }
        kernel = plgpu.kernel(
            body, out_type=out_type, scratch_types={**own, **scratch},
            grid=grid, grid_names=names,
            interpret=plgpu.InterpretGPUParams() if self.interpret else None,
        )  # fmt: skip
        return kernel(constants, *arrays)

    def bind(self, sources, constants, barrier) -> tuple[Side, Side]:
        """The feature maps of queries and keys, their matrices now in shared memory."""
        for source, target in zip(sources, constants, strict=True):
            plgpu.copy_gmem_to_smem(source, target, barrier)
            plgpu.barrier_wait(barrier)
        return self.feature_map.bind(constants, self.products)

    def state_type(self, heads: int):
        """States of all groups in global memory: sums and, or None, totals."""
        shape = (self.B, heads, self.groups, self.slices * TILE)
        return (
            jax.ShapeDtypeStruct((*shape, self.H), jnp.float32),
            jax.ShapeDtypeStruct(shape, jnp.float32) if self.normalize else None,
        )

    def state_scratch(self):
        """Scratch of a `state.Copy`."""
        tiles = (plgpu.SMEM((TILE, TILE), jnp.bfloat16),) * self.slices
        totals = (plgpu.SMEM((TILE,), jnp.float32),) * self.slices
        return tiles, totals if self.normalize else ()


    def chunk(self, step, *, reverse: bool = False):
        """The chunk of the sequence that a CTA meets at a step."""
        step = self.chunks - 1 - step if reverse else step
        return lax.axis_index("group") * self.chunks + step

    def narrow(self, *, per: int = 1, reverse: bool = False) -> plgpu.BlockSpec:
        """Chunks of `[B, T, heads, F]`; `per` heads of the grid share one."""
        b, n = lax.axis_index("batch"), lax.axis_index("head") // per
        return plgpu.BlockSpec(
            (None, TILE, None, self.F), lambda i: (b, self.chunk(i, reverse=reverse), n, 0)
        )

    def wide(self, *, per: int = 1, reverse: bool = False) -> plgpu.BlockSpec:
        """Chunks of `[B, T, heads, H]`: the 64 values of the CTA's block."""
        b, n, h = lax.axis_index("batch"), lax.axis_index("head") // per, lax.axis_index("block")
        return plgpu.BlockSpec(
            (None, TILE, None, TILE), lambda i: (b, self.chunk(i, reverse=reverse), n, h)
        )

    def per_token(self, *, reverse: bool = False) -> plgpu.BlockSpec:
        """Chunks of `[B, N, T]`."""
        b, n = lax.axis_index("batch"), lax.axis_index("head")
        return plgpu.BlockSpec(
            (None, None, TILE), lambda i: (b, n, self.chunk(i, reverse=reverse))
        )

    def state_of_cta(self, states, *, per: int = 1):
        """The CTA's part of states `[B, heads, groups, D, H]` and `[B, heads, groups, D]`."""
        sums, totals = states
        at = lax.axis_index("batch"), lax.axis_index("head") // per, lax.axis_index("group")
        values = pl.ds(lax.axis_index("block") * TILE, TILE)
        return sums.at[(*at, slice(None), values)], None if totals is None else totals.at[at]
