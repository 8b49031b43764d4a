"""What the Hopper kernels share: launching, the steps of a walk, and the rule.

A CTA keeps a block of 64 tokens a computing warpgroup in shared memory, queries or keys, and its
list says which others stream past it (`phases`), copied by a warpgroup of its own (`ring`). Where
lists are short it goes on to further blocks, which are copied while the one before is at work. The
longest lists come first; CTAs of one head are neighbours in time and read the same tokens from L2.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.block_sparse_attention.config import LaunchConfig
from pallas_kernels.block_sparse_attention.phases import Phases
from pallas_kernels.block_sparse_attention.ring import Ring
from pallas_kernels.products import Products
from pallas_kernels.tiles import ALONG_COLUMNS, ALONG_ROWS, TILE
from pallas_kernels.warpgroups import Here, Turns

LOG2_E = 1.4426950408889634

# Of a thread that copies, and of one that computes where so many warpgroups do: no more than a CTA
# of all of them starts with.
_FEW_REGISTERS = 24
_REGISTERS = {2: 240, 3: 160, 4: 112}


class Rule(NamedTuple):
    """A query at position p reads a key only if `p - begin < span`, in int32 that wraps around.

    Attributes:
      positions: of queries, `[b,h,T]` in int32.
      begins, spans: of keys, `[b,h,S]` in int32, as of `items.spans`.
    """

    positions: jax.Array
    begins: jax.Array
    spans: jax.Array


@dataclasses.dataclass(frozen=True)
class Plan:
    """How kernels run, as fixed while tracing.

    Attributes:
      scale: factor of scores, positive.
      heads: query heads.
      query_block, key_block: sizes of the blocks of lists.
      config: launch parameters.
      is_part: what gradients of log-sum-exps are, as of `mosaic_gpu.block_sparse_attention`.
      interpret: whether to run in the CPU simulator.
    """

    scale: float
    heads: int
    query_block: int
    key_block: int
    config: LaunchConfig
    is_part: bool = False
    interpret: bool = False

    @property
    def products(self) -> Products:
        """The matrix unit."""
        return Products(self.interpret)

    @property
    def factor(self) -> float:
        """Of products, to have scores in powers of two."""
        return self.scale * LOG2_E

    def launch(
        self,
        body: Callable[..., tuple[Callable[[Any], Any], Callable[[Any, list], Any]]],
        arrays: Any,
        *,
        resident: Sequence[int],
        tiles: Sequence[tuple[tuple[int, ...], Any]],
        block: int,
        blocks: int,
        stages: int,
        out_type: Any,
        members: int = 1,
        takes_turns: bool = False,
    ) -> Any:
        """Runs a kernel on every block of every head of what stays.

        Args:
          body: the kernel, named as profiles shall show it. Of `arrays`, outputs, `rings` for what
            streams, `turns`, and `here`, where it is, it gives `copy(first)`, what the copying
            warpgroup does there, and `compute(first, tiles)`, what a computing one does with its
            tiles of what stays. Of the steps that were taken before, both give those after it.
          arrays: its inputs.
          resident: which of them stay, `[B,T,heads,H]`.
          tiles: shapes and dtypes of the tiles that stream.
          block: tokens of a block of its list.
          blocks: that a CTA works through, one after another.
          stages: tiles in flight.
          out_type: shapes of its outputs.
          members: query heads to a head of what stays.
          takes_turns: whether computing warpgroups do.
        """
        B, T, heads, H = arrays[resident[0]].shape
        # All of them read the same list.
        readers = next(n for n in range(self.config.warpgroups, 0, -1) if block % (n * TILE) == 0)
        num_blocks = T // (readers * TILE)
        ctas, parts = -(-num_blocks // blocks), block // (readers * TILE)
        grid = {"batch": B, "head": heads, "block": ctas}
        if blocks > 1:  # short lists share little, but each head may have a few long ones
            grid = {"batch": B, "block": ctas, "head": heads}
            if heads == 1:  # so may each row
                grid = {"block": ctas, "batch": B, "head": heads}
        scratch: dict[str, Any] = {}
        if takes_turns and readers == 2:
            scratch = {"turn": plgpu.Barrier(num_arrivals=readers)}

        def kernel(arrays, *outs, residents, rings, turn=None):
            cta, batch, head = (lax.axis_index(name) for name in ("block", "batch", "head"))
            *_, phases, _ = arrays
            at = self.of(phases.order, batch, head * members)
            warpgroup = lax.axis_index("warpgroup")
            turns = Turns(turn)

            def here(i, warpgroup):
                place = cta + i * ctas
                index = phases.order[*at, lax.div(place, parts)]
                part = index * parts + lax.rem(place, parts)
                return Here(batch, head, index, warpgroup, (part * readers + warpgroup) * TILE)

            def over_blocks(run):
                """Runs `run(i, first) -> first` on every block of the CTA."""
                if blocks == 1:
                    run(0, jnp.int32(0))
                else:
                    count = lax.div(num_blocks - cta + ctas - 1, ctas)
                    lax.fori_loop(0, count, run, jnp.int32(0))

            def copying() -> None:
                if readers > 1:
                    plgpu.set_max_registers(_FEW_REGISTERS, action="decrease")

                def run(i, first):
                    own = [here(i, reader) for reader in range(readers)]
                    for ring, array in zip(residents, (arrays[j] for j in resident), strict=True):
                        ring.clear(i)
                        for reader, at in enumerate(own):
                            ring.fill_part(i, reader, array.at[batch, at.tokens, head])
                    copy, _ = body(arrays, outs, here=own[0], rings=rings, turns=turns)
                    return copy(first)

                over_blocks(run)

            def computing() -> None:
                # One alone has as many as a thread may have, and what is copied needs few.
                if readers > 1:
                    plgpu.set_max_registers(_REGISTERS[readers], action="increase")

                def run(i, first):
                    own = here(i, warpgroup)
                    _, compute = body(arrays, outs, here=own, rings=rings, turns=turns)
                    for ring in residents:
                        ring.wait(i)
                    first = compute(first, [ring.tile(i) for ring in residents])
                    for ring in residents:
                        ring.release(i)
                    return first

                turns.begin(warpgroup)
                over_blocks(run)
                turns.end(warpgroup)

            lax.cond(warpgroup == readers, copying, computing)

        kernel.__name__ = body.__name__  # for profiles
        run = plgpu.kernel(
            kernel, out_type=out_type, grid=tuple(grid.values()), grid_names=tuple(grid),
            num_threads=readers + 1, thread_name="warpgroup",
            scratch_types={
                "residents": tuple(
                    Ring.scratch(
                        (readers, TILE, H), arrays[j].dtype, stages=min(2, blocks),
                        readers=readers, copies=readers,
                    )
                    for j in resident
                ),
                "rings": tuple(
                    Ring.scratch(shape, dtype, stages=stages, readers=readers)
                    for shape, dtype in tiles
                ),
                **scratch,
            },
            compiler_params=plgpu.CompilerParams(approx_math=True),
            interpret=plgpu.InterpretGPUParams(detect_races=True) if self.interpret else None,
        )  # fmt: skip
        return run(arrays)

    def of(self, array: Any, batch: Any, head: Any) -> tuple[Any, Any]:
        """Where in `[b,h,...]` a query head's part is."""
        b, h = array.shape[:2]
        return (batch if b > 1 else 0), (lax.div(head, self.heads // h) if h > 1 else 0)

    def steps(self, phases: Phases, here: Here, head: Any, block: int, width: int) -> "Steps":
        """The walk of a query head's list past a block.

        Args:
          phases: lists, in global memory.
          here: the block.
          head: the query head.
          block: size of the blocks that stream.
          width: tokens a step.
        """
        at = self.of(phases.edges, here.batch, head)
        edges = [phases.edges[*at, here.index, i] for i in range(3)]
        return Steps(phases, at, *edges, block=block, width=width)

    def hiding(
        self,
        rule: Rule,
        here: Here,
        head: Any,
        steps: "Steps",
        step: Any,
        *,
        rows: str,
        is_partial: bool,
    ) -> Callable[[jax.Array], jax.Array]:
        """A function of a step's scores that gives -inf where the rule hides a pair.

        What it needs is loaded here: best before the product that it waits for.

        Args:
          rule: the rule, in global memory.
          here: the block that stays.
          head: the query head.
          steps: its walk.
          step: which of them.
          rows: what stays, "queries" or "keys".
          is_partial: whether it hides any.
        """
        if not is_partial:
            return lambda t: t
        token, width = steps.token(step), steps.width

        def numbers(array, stays):
            at = self.of(array, here.batch, head)
            tokens = here.tokens if stays else pl.ds(token, width)
            layout, axis = (ALONG_ROWS, 0) if stays else (ALONG_COLUMNS, 1)
            x = plgpu.load(array.at[*at, tokens], layout=layout, optimized=False)
            return lax.broadcast_in_dim(x, (TILE, width), [axis])

        position = numbers(rule.positions, rows == "queries")
        begin, span = (numbers(x, rows == "keys") for x in (rule.begins, rule.spans))
        return lambda t: jnp.where(position - begin < span, t, -jnp.inf)


@dataclasses.dataclass(frozen=True)
class Steps:
    """The walk of one list past one block, `width` tokens a step.

    Attributes:
      phases: lists, in global memory.
      at: where in them the row and the head are.
      begin, middle, end: entries: those from `middle` on are partial.
      block: tokens of an entry.
      width: tokens of a step.
    """

    phases: Phases
    at: tuple[Any, Any]
    begin: Any
    middle: Any
    end: Any
    block: int
    width: int

    @property
    def count(self) -> Any:
        """How many steps there are."""
        return (self.end - self.begin) * (self.block // self.width)

    @property
    def whole(self) -> Any:
        """How many of them, the first ones, need no test."""
        return (self.middle - self.begin) * (self.block // self.width)

    def token(self, step: Any) -> Any:
        """The first token of a step."""
        parts = self.block // self.width
        block = self.phases.blocks[*self.at, self.begin + lax.div(step, parts)]
        return block * self.block + lax.rem(step, parts) * self.width

    def weight(self, step: Any) -> Any:
        """What is added to the scores of a step, in powers of two; None for nothing."""
        if self.phases.log_weight is None:
            return None
        entry = self.begin + lax.div(step, self.block // self.width)
        return self.phases.log_weight[*self.at, entry]

    def copy(self, fill: Callable[[Any, Any], None], first: Any) -> Any:
        """Calls `fill(slot, token)` for every step; gives the slot after the last."""

        @pl.loop(0, self.count)
        def _(step):
            fill(first + step, self.token(step))

        return first + self.count

    def walk(self, body: Callable[..., Any], state: Any, first: Any = 0) -> Any:
        """The state after `body(step, slot, state, is_partial) -> state` for every step.

        `slot` is the step's number in the rings, whose first steps other walks may have taken.
        """

        def run(is_partial):
            return lambda step, state: body(step, first + step, state, is_partial=is_partial)

        state = lax.fori_loop(0, self.whole, run(False), state)
        return lax.fori_loop(self.whole, self.count, run(True), state)
