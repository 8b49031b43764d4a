"""What the TPU kernels share: options, the grid, which blocks see which, and masks.

A block of tokens stays, and blocks of the others stream past it. The grid has a step for every pair
of blocks. Those that see nothing of each other are skipped: they compute nothing, and move nothing
since their step names the blocks that are there already. Within a step what streams is taken a
strip of 128 tokens at a time, so that scores stay in registers.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.softplus_attention.packing import Packing
from pallas_kernels.softplus_attention.weights import HIDDEN
from pallas_kernels.tpu import LANES, column, launch


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a walk runs, as fixed while tracing.

    Attributes:
      power: p.
      thresholded: whether weights are compared with their mean (LSSAR) or taken as they are.
      flat_below: the largest excess over the threshold in a row that counts as flat.
      block: tokens of a block.
      interpret: whether to run in the TPU simulator.
    """

    power: int
    thresholded: bool
    flat_below: float
    block: int
    interpret: bool = False


class Tile:
    """A step of a walk: a block of keys and one of queries.

    Attributes:
      first, last: decorators of what is done before and after all steps of a block that stays.
    """

    def __init__(self, *, first, last, seen, mask, strips: int):
        self.first, self.last = pl.when(first), pl.when(last)
        self._seen, self._mask, self._strips = seen, mask, strips

    def strips(self, body: Callable[[Any], None]) -> None:
        """Calls `body(strip)` on every strip of what streams, if the blocks see each other."""

        @pl.when(self._seen)
        def _():
            @pl.loop(0, self._strips)
            def _(strip):
                body(pl.ds(pl.multiple_of(strip * LANES, LANES), LANES))

    def hide(self, t: jax.Array, strip: Any) -> jax.Array:
        """Scores `[keys, queries]` of a strip, those of keys that are not seen being `HIDDEN`."""
        return jnp.where(self._mask(t.shape, strip), t, HIDDEN)


def walk(
    plan: Plan,
    body: Any,
    resident: Sequence[jax.Array | None],
    streaming: Sequence[jax.Array],
    packing: Packing | None,
    *,
    stays: str,
    out_type: Sequence[jax.ShapeDtypeStruct],
    scratch: Sequence[tuple[int, int]] = (),
) -> Any:
    """Runs a kernel on every block that stays.

    Args:
      plan: options.
      body: the kernel: of a `Tile`, blocks of arrays, of outputs, and scratch in float32.
      resident: what stays, `[B,heads,size,T]`.
      streaming: what streams past it. Heads of queries may share one of keys.
      packing: documents, or None for one of all tokens.
      stays: "queries" or "keys".
      out_type: outputs, like what stays.
      scratch: shapes of scratch.
    """
    B, heads, _, T = out_type[0].shape
    block, blocks = plan.block, T // plan.block
    by_queries = stays == "queries"
    # Query heads that stream past a head of keys, one after the other.
    members = 1 if by_queries else streaming[0].shape[1] // heads
    share = heads // streaming[0].shape[1] if by_queries else 1
    # The range of blocks that a block sees: up to its own, or from its own on.
    other = jnp.full((B, blocks), 0 if by_queries else blocks - 1, jnp.int32)
    if packing is not None:
        other = packing.first_keys // block if by_queries else (packing.past_queries - 1) // block

    def bounds(others, b, i):
        return (others[b, i], i) if by_queries else (i, others[b, i])

    def stay(x):
        spec = (None, None, x.shape[2], block)
        return pl.BlockSpec(spec, lambda b, n, i, m, j, others: (b, n, 0, i))

    def stream(x):
        def place(b, n, i, m, j, others):
            first, last = bounds(others, b, i)
            head = lax.div(n, share) if by_queries else n * members + m
            return b, head, 0, jnp.clip(j, first, last)

        return pl.BlockSpec((None, None, x.shape[2], block), place)

    def of_tokens(resides):
        def place(b, n, i, m, j, others):
            return b, 0, i if resides else jnp.clip(j, *bounds(others, b, i))

        return pl.BlockSpec((None, 1, block), place)

    def kernel(others, positions, ends, *refs):
        b, i, m, j = (pl.program_id(axis) for axis in (0, 2, 3, 4))
        first, last = bounds(others, b, i)
        query, key = (i, j) if by_queries else (j, i)

        def mask(shape, strip):
            row, col = (lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))
            keys, queries = (strip, slice(None)) if by_queries else (slice(None), strip)
            row += key * block + (strip.start if by_queries else 0)
            if positions is None:
                return row <= col + query * block + (0 if by_queries else strip.start)
            position = positions[:, queries]
            return (row <= position) & (position < column(ends[:, keys]))

        tile = Tile(
            first=(m == 0) & (j == 0), last=(m == members - 1) & (j == blocks - 1),
            seen=(first <= j) & (j <= last), mask=mask, strips=block // LANES,
        )  # fmt: skip
        body(tile, *refs)

    kernel.__name__ = body.__name__  # for profiles
    arrays = [*resident, *streaming]
    specs = [stay(x) if x is not None else None for x in resident]
    specs += [stream(x) for x in streaming]
    tokens = [None, None]
    token_specs: list[Any] = [None, None]
    if packing is not None:
        tokens = [packing.positions[:, None], packing.ends[:, None]]
        token_specs = [of_tokens(by_queries), of_tokens(not by_queries)]
    return launch(
        kernel, *tokens, *arrays, grid=(B, heads, blocks, members, blocks), sequential=2,
        in_specs=[*token_specs, *specs], out_specs=[stay(x) for x in out_type], out_type=out_type,
        scratch=[pltpu.VMEM(shape, jnp.float32) for shape in scratch], interpret=plan.interpret,
        scalars=(other,),
    )  # fmt: skip
