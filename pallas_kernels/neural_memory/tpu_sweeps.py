r"""The sweeps of the TPU kernels: one memory at a time, chunk after chunk, all state in VMEM.

    outputs    walks the chunks in order, and leaves network and momentum as each STEP found them;
               a step is several chunks, so that this is little.
    gradients  walks the steps in reverse. Within one it first advances the memory through its
               chunks once more, keeping what each began with, and then pulls the gradients back
               through them, recomputing the rest.

Per token of a memory with sizes H -> F -> H and chunks of C, `outputs` takes 11 H F + 2 C (H + F) +
2 C² multiplications, `gradients` about three times that, from 8 H + 24 bytes of bfloat16 tokens and
gates, and 16 H F / (C · chunks) bytes of kept states each way.
"""

import dataclasses
import enum
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.neural_memory.config import VMEM_LIMIT
from pallas_kernels.neural_memory.tpu_chunk import Arithmetic, Chunk, Layers, Memory
from pallas_kernels.neural_memory.tpu_gates import Gates
from pallas_kernels.tpu import launch

WEIGHTS, MOMENTUM, ANCHOR = range(3)
"""Parts of a state."""


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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tokens:
    """The tokens of a call, in n chunks of C slots; L = n C.

    Attributes:
      kinds: `Kind` of each chunk `[B,n]`.
      q: queries `[B,MG,L,F]`.
      k: keys `[B,M,L,F]`.
      v: values `[B,M,L,H]`.
      gates: learning rate, momentum and decay `[B,M,n,3,C]`, float32.
      marks: whether a slot is used, and whether it is a first one, `[B,n,2,C]`, int32.
    """

    kinds: jax.Array
    q: jax.Array
    k: jax.Array
    v: jax.Array
    gates: jax.Array
    marks: jax.Array

    @property
    def blocked(self) -> tuple[jax.Array, ...]:
        """The arrays that kernels take in blocks."""
        return self.q, self.k, self.v, self.gates, self.marks


def outputs(
    plan: Plan, tokens: Tokens, start: Layers, fresh: Layers | None
) -> tuple[jax.Array, Layers, Layers]:
    """Answers to all queries.

    Args:
      plan: options.
      tokens: what is read.
      start: state before the first chunk, of each layer `[B,M,3,in,out]` in float32: network,
        momentum and anchor.
      fresh: the network of new documents, of each layer `[B,M,in,out]`. None: there are none.

    Returns:
      `[B,MG,L,H]`; network and momentum before each step, `[B,M,steps,2,in,out]`; the state after
      the last chunk.
    """

    def neural_memory_outputs(
        kinds, q, k, v, gates, marks, start, fresh, out, starts, final, state, done
    ):
        here, step = _place(), pl.program_id(2)

        @pl.when(step == 0)
        def _():
            _copy([ref.at[here] for ref in start], state, done)

        for ref, kept in zip(state, starts, strict=True):
            kept[...] = ref[:ANCHOR]

        @pl.loop(0, plan.chunks)
        def _(i):
            kind = kinds[here[0], step * plan.chunks + i]
            _begin(kind, state, [ref.at[ANCHOR] for ref in state], fresh, here, done)

            @pl.when(kind == Kind.SKIPPED)
            def _():
                out[:, plan.rows(i), :] = jnp.zeros((len(out), plan.chunk, out.shape[2]), out.dtype)

            @pl.when(kind != Kind.SKIPPED)
            def _():
                memory, answers = plan.arithmetic.advance(
                    _memory(state), tuple(ref[ANCHOR] for ref in state),
                    _chunk(plan, i, q, k, v, gates), *_marks(marks, i),
                )  # fmt: skip
                for head, answer in enumerate(answers):
                    out[head, plan.rows(i), :] = answer.astype(out.dtype)
                _store(state, memory)

        @pl.when(step == pl.num_programs(2) - 1)
        def _():
            _copy(state, [ref.at[here] for ref in final], done)

    blocks = _Blocks(plan, tokens)
    B, M = tokens.k.shape[:2]
    kept = tuple(
        jax.ShapeDtypeStruct((B, M, blocks.grid[2], 2, *x.shape[-2:]), jnp.float32) for x in start
    )
    out = jax.ShapeDtypeStruct((*tokens.q.shape[:3], tokens.v.shape[3]), tokens.q.dtype)
    return launch(
        neural_memory_outputs, *tokens.blocked, start, fresh,
        grid=blocks.grid, sequential=1, scalars=(tokens.kinds,),
        in_specs=(*blocks.inputs(), _in_hbm(start), _in_hbm(fresh)),
        out_specs=(blocks.outputs(), blocks.starts(start), _in_hbm(start)),
        out_type=(out, kept, _like(start)),
        scratch=(_networks(start, 3), pltpu.SemaphoreType.DMA(())),
        interpret=plan.interpret, vmem_bytes=VMEM_LIMIT,
    )  # fmt: skip


def gradients(
    plan: Plan,
    tokens: Tokens,
    start: Layers,
    fresh: Layers | None,
    starts: Layers,
    d_out: jax.Array,
    d_final: Layers,
) -> tuple[tuple[jax.Array, ...], Layers, Layers | None]:
    """Gradients of queries, keys, values and gates; of the start; of the network of new documents.

    Arguments are those of `outputs`, states it kept, and gradients of its answers and final state.
    """

    def neural_memory_gradients(
        kinds, q, k, v, gates, marks, starts, d_out, start, fresh, d_final,
        d_tokens, d_start, d_fresh, kept, anchor, d_state, d_new, done,
    ):  # fmt: skip
        here, step = _place(), pl.num_programs(2) - 1 - pl.program_id(2)
        d_q, d_k, d_v, d_gates = d_tokens

        @pl.when(pl.program_id(2) == 0)
        def _():
            _copy([ref.at[here] for ref in d_final], d_state, done)
            for ref in d_new or ():
                ref[...] = jnp.zeros(ref.shape, ref.dtype)

        for ref, first in zip(kept, starts, strict=True):
            ref[0] = first[...]

        def begin(i):
            """The kind of a chunk, whose memory and anchor are then ready."""
            kind, memory = kinds[here[0], step * plan.chunks + i], [ref.at[i] for ref in kept]

            # Only the first chunk of all can continue one.
            @pl.when(kind == Kind.CONTINUES)
            def _():
                _copy([ref.at[(*here, ANCHOR)] for ref in start], anchor, done)

            _begin(kind, memory, anchor, fresh, here, done)
            return kind, memory

        @pl.loop(0, plan.chunks - 1)
        def _(i):
            kind, memory = begin(i)
            following = [ref.at[i + 1] for ref in kept]

            @pl.when(kind == Kind.SKIPPED)
            def _():
                for ref, next_ref in zip(memory, following, strict=True):
                    next_ref[...] = ref[...]

            @pl.when(kind != Kind.SKIPPED)
            def _():
                chunk = _chunk(plan, i, q, k, v, gates)._replace(q=())
                after, _ = plan.arithmetic.advance(
                    _memory(memory), tuple(ref[...] for ref in anchor), chunk, *_marks(marks, i)
                )
                _store(following, after)

        @pl.loop(0, plan.chunks)
        def _(j):
            i = plan.chunks - 1 - j
            kind, memory = begin(i)

            @pl.when(kind == Kind.SKIPPED)
            def _():
                for ref in (d_q, d_k, d_v):
                    rows = ref.at[..., plan.rows(i), :]
                    rows[...] = jnp.zeros(rows.shape, rows.dtype)
                d_gates[i] = jnp.zeros((3, plan.chunk), jnp.float32)

            @pl.when(kind != Kind.SKIPPED)
            def _():
                used, first = _marks(marks, i)
                _, pull = jax.vjp(
                    lambda *x: plan.arithmetic.advance(*x, used, first),
                    _memory(memory), tuple(ref[...] for ref in anchor),
                    _chunk(plan, i, q, k, v, gates),
                )  # fmt: skip
                rows = plan.rows(i)
                d_answers = tuple(d_out[head, rows, :].astype(jnp.float32) for head in plan.heads)
                d_memory, d_anchor, d_chunk = pull((_memory(d_state), d_answers))
                for head in plan.heads:
                    d_q[head, rows, :] = d_chunk.q[head].astype(d_q.dtype)
                d_k[rows, :] = d_chunk.k.astype(d_k.dtype)
                d_v[rows, :] = d_chunk.v.astype(d_v.dtype)
                for row, d in enumerate(d_chunk.gates):
                    d_gates[i, row : row + 1, :] = d
                _store(d_state, d_memory)
                for ref, d in zip(d_state, d_anchor, strict=True):
                    ref[ANCHOR] += d

            @pl.when(kind >= Kind.STARTS)
            def _():
                for ref in d_state:
                    ref[WEIGHTS] += ref[ANCHOR]
                    ref[ANCHOR] = jnp.zeros_like(ref[ANCHOR])

            if d_new is not None:

                @pl.when(kind == Kind.RENEWS)
                def _():
                    for ref, new in zip(d_state, d_new, strict=True):
                        new[...] += ref[WEIGHTS]
                        ref[...] = jnp.zeros(ref.shape, ref.dtype)

        @pl.when(step == 0)
        def _():
            _copy(d_state, [ref.at[here] for ref in d_start], done)
            if d_new is not None:
                _copy(d_new, [ref.at[here] for ref in d_fresh], done)

    blocks = _Blocks(plan, tokens, reverse=True)
    return launch(
        neural_memory_gradients, *tokens.blocked, starts, d_out, start, fresh, d_final,
        grid=blocks.grid, sequential=1, scalars=(tokens.kinds,),
        in_specs=(
            *blocks.inputs(), blocks.starts(start), blocks.outputs(),
            _in_hbm(start), _in_hbm(fresh), _in_hbm(start),
        ),
        out_specs=(blocks.gradients(), _in_hbm(start), _in_hbm(fresh)),
        out_type=(_like(tokens.blocked[:4]), _like(start), _like(fresh)),
        scratch=(
            _networks(start, plan.chunks, 2), _networks(start), _networks(start, 3),
            None if fresh is None else _networks(start),
            pltpu.SemaphoreType.DMA(()),
        ),
        interpret=plan.interpret, vmem_bytes=VMEM_LIMIT,
    )  # fmt: skip


def _place() -> tuple[Any, Any]:
    """Which row of the batch, and which memory of it, a program walks."""
    return pl.program_id(0), pl.program_id(1)


def _begin(
    kind, memory: list[Any], anchor: list[Any], fresh: Any, here: tuple[Any, Any], done: Any
) -> None:
    """Replaces the network where a document begins, and the anchor where a chunk does."""
    if fresh is not None:

        @pl.when(kind == Kind.RENEWS)
        def _():
            _copy([ref.at[here] for ref in fresh], [ref.at[WEIGHTS] for ref in memory], done)
            for ref in memory:
                ref[MOMENTUM] = jnp.zeros_like(ref[MOMENTUM])

    @pl.when(kind >= Kind.STARTS)
    def _():
        for ref, weights in zip(anchor, memory, strict=True):
            ref[...] = weights[WEIGHTS]


def _chunk(plan: Plan, i, q, k, v, gates) -> Chunk:
    rows = plan.rows(i)
    queries = tuple(q[head, rows, :].astype(jnp.float32) for head in plan.heads)
    k, v = (x[rows, :].astype(jnp.float32) for x in (k, v))
    return Chunk(queries, k, v, Gates(*(gates[i, row : row + 1, :] for row in range(3))))


def _marks(marks, i) -> tuple[jax.Array, jax.Array]:
    return marks[i, 0:1, :] > 0, marks[i, 1:2, :] > 0


def _memory(state) -> Memory:
    return Memory(*(tuple(ref[part] for ref in state) for part in (WEIGHTS, MOMENTUM)))


def _store(state, memory: Memory) -> None:
    for ref, weights, momentum in zip(state, *memory, strict=True):
        ref[WEIGHTS] = weights
        ref[MOMENTUM] = momentum


def _copy(sources: list[Any], targets: list[Any], done: Any) -> None:
    """Copies between HBM and VMEM, and waits."""
    copies = [
        pltpu.make_async_copy(source, target, done)
        for source, target in zip(sources, targets, strict=True)
    ]
    for copy in copies:
        copy.start()
    for copy in copies:
        copy.wait()


def _networks(layers: Layers, *copies: int) -> tuple[Any, ...]:
    """Scratch for so many networks."""
    return tuple(pltpu.VMEM((*copies, *x.shape[-2:]), jnp.float32) for x in layers)


def _like(arrays):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arrays)


class _Blocks(NamedTuple):
    """The blocks of a step; states stay in HBM.

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
        (B, M), n = self.tokens.k.shape[:2], self.tokens.kinds.shape[1]
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


def _in_hbm(layers: Layers | None):
    return jax.tree.map(lambda _: pl.BlockSpec(memory_space=pl.ANY), layers)
