r"""What the kernels share: launching, walking the tokens that stream past a block, and masks.

A warpgroup keeps a block of 64 tokens in shared memory, queries or keys, and walks the others:

    queries stay    for key tiles    from the first that any of them sees, to their own
    keys stay       for query tiles  from their own, to the last that sees any of them

Walks differ in length, so that long ones are launched first. All blocks of a head are neighbours in
time and read the same keys from L2.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.products import Products
from pallas_kernels.softplus_attention.config import LaunchConfig
from pallas_kernels.softplus_attention.packing import Packing
from pallas_kernels.softplus_attention.weights import HIDDEN
from pallas_kernels.tiles import ALONG_COLUMNS, TILE, iota, over_columns, over_rows
from pallas_kernels.warpgroups import Here, Turns


@dataclasses.dataclass(frozen=True)
class Plan:
    """How kernels run, as fixed while tracing.

    Attributes:
      power: p.
      thresholded: whether weights are compared with their mean (LSSAR) or taken as they are.
      flat_below: the largest excess over the threshold in a row that counts as flat.
      config: launch parameters.
      interpret: whether to run in the CPU simulator.
    """

    power: int
    thresholded: bool
    flat_below: float
    config: LaunchConfig
    interpret: bool = False

    @property
    def block(self) -> int:
        """Tokens of a CTA's block."""
        return TILE * self.config.warpgroups

    @property
    def alignment(self) -> int:
        """What the number of tokens is padded to a multiple of."""
        return math.lcm(self.block, self.config.width, self.config.gradient_width)

    @property
    def specialized(self) -> bool:
        """Whether a warpgroup of its own copies."""
        return self.config.warpgroups > 1

    @property
    def products(self) -> Products:
        """The matrix unit."""
        return Products(self.interpret)

    def launch(
        self, body, *arrays, heads: int, out_type, residents: int, takes_turns: bool = False
    ):
        """Runs a kernel on every block of every head.

        Args:
          body: the kernel; gets `tiles` and `barriers` for what stays, and `turns`.
          *arrays: its inputs; the first is `[B,T,heads,H]`.
          heads: heads of what stays.
          out_type: shapes of its outputs.
          residents: number of tiles `[64,H]` that stay.
          takes_turns: whether warpgroups do.
        """
        B, T, _, H = arrays[0].shape
        count = self.config.warpgroups
        threads: dict[str, Any] = {}
        scratch: dict[str, Any] = {}
        if self.specialized:
            threads = {"num_threads": count + 1, "thread_name": "warpgroup"}
        if self.specialized and takes_turns:
            scratch = {"barrier": plgpu.Barrier(num_arrivals=count)}

        def kernel(*refs, barrier=None, **scratch):
            body(*refs, turns=Turns(barrier), **scratch)

        kernel.__name__ = body.__name__  # for profiles
        return plgpu.kernel(
            kernel, out_type=out_type, grid=(B, heads, T // self.block),
            grid_names=("batch", "head", "block"), **threads,
            scratch_types={
                "tiles": (plgpu.SMEM((count, TILE, H), arrays[0].dtype),) * residents,
                "barriers": plgpu.Barrier(num_arrivals=residents, num_barriers=count),
                **scratch,
            },
            compiler_params=plgpu.CompilerParams(approx_math=True),
            interpret=plgpu.InterpretGPUParams() if self.interpret else None,
        )(*arrays)  # fmt: skip

    def key_tiles(self, here: Here, packing: Packing | None, width: int) -> tuple[Any, Any]:
        """First and number of the key tiles that a block of queries walks."""
        stop = lax.div((here.index + 1) * self.block + (width - 1), width)
        if packing is None:
            return 0, stop
        first = lax.div(packing.first_keys[here.batch, here.index], width)
        return first, stop - first

    def query_tiles(
        self, here: Here, packing: Packing | None, length: int, width: int
    ) -> tuple[Any, Any]:
        """First and number of the query tiles that a block of keys walks."""
        first = lax.div(here.index * self.block, width)
        stop = length
        if packing is not None:
            stop = packing.past_queries[here.batch, here.index]
        return first, lax.div(stop + (width - 1), width) - first

    def hide_keys(self, here: Here, packing: Packing | None) -> Callable:
        """A function that hides what is not seen.

        It takes scores `[queries, keys]` of a block of queries, the first of the keys and, if
        packed, their ends in shared memory.
        """
        if packing is None:
            return lambda t, key: _hide_after(t, here.token, key)
        positions = here.token_numbers(packing.positions)

        def hide(t, key, ends):
            width = t.shape[1]
            position = over_columns(positions, width)
            end = over_rows(plgpu.load(ends, layout=ALONG_COLUMNS))
            return jnp.where((iota(1, width) + key <= position) & (position < end), t, HIDDEN)

        return hide

    def hide_queries(self, here: Here, packing: Packing | None) -> Callable:
        """The same of scores `[keys, queries]`, of a block of keys; `positions` of the queries."""
        if packing is None:
            return lambda t, query: _hide_before(t, here.token, query)
        own_ends = here.token_numbers(packing.ends)

        def hide(t, query, positions):
            del query
            width = t.shape[1]
            position = over_rows(plgpu.load(positions, layout=ALONG_COLUMNS))
            end = over_columns(own_ends, width)
            seen = (iota(0, width) + here.token <= position) & (position < end)
            return jnp.where(seen, t, HIDDEN)

        return hide

    def here(self, blocks: int, *, reverse: bool) -> Here:
        """Where in the grid a kernel runs; `reverse` if later blocks have longer walks."""
        index = lax.axis_index("block")
        index = blocks - 1 - index if reverse else index
        warpgroup = lax.axis_index("warpgroup") if self.specialized else 0
        return Here(
            lax.axis_index("batch"), lax.axis_index("head"), index, warpgroup,
            index * self.block + warpgroup * TILE,
        )  # fmt: skip

    def walk(
        self,
        compute: Callable[[Callable], None],
        here: Here,
        arrays: list[Any],
        turns: Turns,
        *,
        heads: int,
        first: Any,
        count: Any,
        width: int,
        stages: int,
    ) -> None:
        """Streams tiles past a block.

        Args:
          compute: what a computing warpgroup does. It calls its argument, `loop(step, state)`,
            once; that gives the state after `step(token, *tiles, state) -> state` on every tile,
            `token` being a tile's first.
          here: the block.
          arrays: what streams: `[B,T,heads,size]`, `[B,heads,numbers,T]` in float32, or `[B,T]`.
          turns: those of the warpgroups.
          heads: heads of what stays.
          first: first tile.
          count: number of tiles, for each streaming head that shares the block's head.
          width: tokens of a tile.
          stages: tiles in flight.
        """
        streaming = max(x.shape[1 if x.dtype == jnp.float32 else 2] for x in arrays if x.ndim == 4)

        def place(i):
            if streaming <= heads:
                return here.head // (heads // streaming), first + i
            member, i = lax.div(i, count), lax.rem(i, count)
            return here.head * (streaming // heads) + member, first + i

        def spec(array):
            if array.ndim == 2:
                return plgpu.BlockSpec((None, width), lambda i: (here.batch, place(i)[1]))
            if array.dtype == jnp.float32:
                numbers = array.shape[2]
                return plgpu.BlockSpec(
                    (None, None, numbers, width),
                    lambda i: (here.batch, place(i)[0], 0, place(i)[1]),
                )
            return plgpu.BlockSpec(
                (None, width, None, array.shape[3]),
                lambda i: (here.batch, place(i)[1], place(i)[0], 0),
            )

        step: Callable | None = None

        def body(index, *tiles_and_state):
            assert step is not None
            return step(place(index[0])[1] * width, *tiles_and_state)

        options = {
            "grid": (count * max(1, streaming // heads),), "max_concurrent_steps": stages,
            "in_specs": [spec(x) for x in arrays],
        }  # fmt: skip

        def context(pipeline):
            def loop(body, state):
                nonlocal step
                step = body
                turns.begin(here.warpgroup)
                state = pipeline(state)
                turns.end(here.warpgroup)
                return state

            compute(loop)

        if self.specialized:
            plgpu.emit_pipeline_warp_specialized(
                body, **options, num_compute_wgs=self.config.warpgroups, memory_registers=24,
                wg_axis="warpgroup", compute_context=context,
            )(*arrays)  # fmt: skip
        else:
            context(lambda state: plgpu.emit_pipeline(body, **options, init_carry=state)(*arrays))


def _hide_after(t: jax.Array, query: Any, key: Any) -> jax.Array:
    """Scores `[queries, keys]` with the keys after each query hidden."""
    width = t.shape[1]

    def hide(t):
        return jnp.where(iota(0, width) - iota(1, width) >= key - query, t, HIDDEN)

    return lax.cond(key + width - 1 > query, hide, lambda t: t, t)


def _hide_before(t: jax.Array, key: Any, query: Any) -> jax.Array:
    """Scores `[keys, queries]` with the queries before each key hidden."""
    width = t.shape[1]

    def hide(t):
        return jnp.where(iota(0, width) - iota(1, width) <= query - key, t, HIDDEN)

    return lax.cond(query < key + TILE - 1, hide, lambda t: t, t)
