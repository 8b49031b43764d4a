"""What a call of the TPU kernels consists of: options, tokens in chunks, and blocks of them."""

import dataclasses
import enum
from typing import NamedTuple

import jax
from jax.experimental import pallas as pl

from pallas_kernels.neural_memory.tpu_chunk import Arithmetic, Layers


class Kind(enum.IntEnum):
    """What happens where a chunk begins; the later ones include those before, but for SKIPPED.

    Attributes:
      SKIPPED: the chunk has no tokens.
      CONTINUES: the chunk began in a call before, and so did its anchor.
      STARTS: the network becomes the anchor.
      RENEWS: a document begins, with a new network.
    """

    SKIPPED = 0
    CONTINUES = 1
    STARTS = 2
    RENEWS = 3


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a sweep runs, as fixed while tracing.

    Attributes:
      arithmetic: of a chunk.
      groups: query heads that read one memory, G.
      chunk: slots of a chunk, C.
      chunks: chunks of a step.
      interpret: whether to run in the TPU simulator.
    """

    arithmetic: Arithmetic
    groups: int
    chunk: int
    chunks: int
    interpret: bool = False

    @property
    def heads(self) -> range:
        """The query heads of a memory."""
        return range(self.groups)

    def rows(self, i) -> pl.Slice:
        """Rows of the i-th chunk of a step."""
        return pl.ds(pl.multiple_of(i * self.chunk, self.chunk), self.chunk)


class Tokens(NamedTuple):
    """The tokens of a call, in n chunks of C slots; L = n C.

    Attributes:
      q: queries `[B,MG,L,F]`.
      k: keys `[B,M,L,F]`.
      v: values `[B,M,L,H]`.
      gates: learning rate, momentum and decay `[B,M,n,3,C]`, float32.
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array
    gates: jax.Array


class Layout(NamedTuple):
    """Which slots hold tokens, in int32.

    Attributes:
      kinds: `Kind` of each chunk `[B,n]`.
      marks: whether a slot is used, and whether it is a first one, `[B,n,2,C]`.
    """

    kinds: jax.Array
    marks: jax.Array


class Blocks(NamedTuple):
    """The blocks of each step; whole states stay in HBM.

    Attributes:
      plan: options.
      tokens: of the call.
      reverse: whether to start with the last.
    """

    plan: Plan
    tokens: Tokens
    reverse: bool = False

    @property
    def grid(self) -> tuple[int, int, int]:
        """Rows, memories and steps."""
        (B, M), n = self.tokens.k.shape[:2], self.tokens.gates.shape[2]
        return B, M, n // self.plan.chunks

    def inputs(self) -> tuple[pl.BlockSpec, ...]:
        """Of q, k, v, gates and marks."""
        plan = self.plan
        marks = self._spec((None, plan.chunks, 2, plan.chunk), "bs00")
        return *self.gradients(), marks

    def gradients(self) -> tuple[pl.BlockSpec, ...]:
        """Of q, k, v and gates."""
        plan = self.plan
        F, H = self.tokens.k.shape[3], self.tokens.v.shape[3]
        gates = self._spec((None, None, plan.chunks, 3, plan.chunk), "bms00")
        return self._tokens(F, plan.groups), self._tokens(F), self._tokens(H), gates

    def outputs(self) -> pl.BlockSpec:
        """Of answers."""
        return self._tokens(self.tokens.v.shape[3], self.plan.groups)

    def starts(self, layers: Layers) -> tuple[pl.BlockSpec, ...]:
        """Of the memory before a step."""
        return tuple(self._spec((None, None, None, 2, *x.shape[-2:]), "bms000") for x in layers)

    def _tokens(self, size: int, heads: int | None = None) -> pl.BlockSpec:
        plan = self.plan
        return self._spec((None, heads, plan.chunks * plan.chunk, size), "bms0")

    def _spec(self, block: tuple[int | None, ...], places: str) -> pl.BlockSpec:
        """A block, and whose place each of its axes has: the row's, the memory's, the step's."""

        def index(b, m, i, _):
            where = {"b": b, "m": m, "s": self.grid[2] - 1 - i if self.reverse else i, "0": 0}
            return tuple(where[place] for place in places)

        return pl.BlockSpec(block, index)
