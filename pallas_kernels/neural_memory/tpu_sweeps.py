r"""The sweeps of the TPU kernels: one memory at a time, chunk after chunk, all state in VMEM.

    outputs    walks the chunks in order, and leaves network and momentum as each STEP found them;
               a step is several chunks, so that this is little.
    gradients  walks the steps in reverse. Within one it first advances the memory through its
               chunks once more, keeping what each began with, and then pulls the gradients back
               through them, recomputing the rest.

Per token of a memory with sizes H -> F -> H and chunks of C, `outputs` takes 11 H F + 2 C (H + F) +
2 C² multiplications, `gradients` about three times that, from 8 H + 24 bytes of bfloat16 tokens and
gates, and 16 H F / (C · chunks) bytes of kept states each way. Nothing was timed on a TPU: for
H = 64, F = 256 and C = 64 the compiler's schedule for a v5e is of 990 instructions a chunk in
`outputs` and 2970 in `gradients`, while its matrix units would need some 220 cycles forward.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.neural_memory.config import VMEM_LIMIT
from pallas_kernels.neural_memory.tpu_chunk import Chunk, Layers
from pallas_kernels.neural_memory.tpu_gates import Gates
from pallas_kernels.neural_memory.tpu_plan import Blocks, Kind, Layout, Plan, Tokens
from pallas_kernels.neural_memory.tpu_state import (
    ANCHOR,
    WEIGHTS,
    begin,
    copy,
    load,
    scratch,
    store,
)
from pallas_kernels.tpu import launch


def outputs(
    plan: Plan, tokens: Tokens, layout: Layout, start: Layers, fresh: Layers | None
) -> tuple[jax.Array, Layers, Layers]:
    """Answers to all queries.

    Args:
      plan: options.
      tokens: what is read.
      layout: which slots hold it.
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
            copy([ref.at[here] for ref in start], state, done)

        for ref, kept in zip(state, starts, strict=True):
            kept[...] = ref[:ANCHOR]

        @pl.loop(0, plan.chunks)
        def _(i):
            kind = kinds[here[0], step * plan.chunks + i]
            begin(kind, state, [ref.at[ANCHOR] for ref in state], fresh, here, done)

            @pl.when(kind == Kind.SKIPPED)
            def _():
                out[:, plan.rows(i), :] = jnp.zeros((len(out), plan.chunk, out.shape[2]), out.dtype)

            @pl.when(kind != Kind.SKIPPED)
            def _():
                memory, answers = plan.arithmetic.advance(
                    load(state), tuple(ref[ANCHOR] for ref in state),
                    _chunk(plan, i, q, k, v, gates), *_marks(marks, i),
                )  # fmt: skip
                for head, answer in enumerate(answers):
                    out[head, plan.rows(i), :] = answer.astype(out.dtype)
                store(state, memory)

        @pl.when(step == pl.num_programs(2) - 1)
        def _():
            copy(state, [ref.at[here] for ref in final], done)

    blocks = Blocks(plan, tokens)
    B, M = tokens.k.shape[:2]
    kept = tuple(
        jax.ShapeDtypeStruct((B, M, blocks.grid[2], 2, *x.shape[-2:]), jnp.float32) for x in start
    )
    out = jax.ShapeDtypeStruct((*tokens.q.shape[:3], tokens.v.shape[3]), tokens.q.dtype)
    return launch(
        neural_memory_outputs, *tokens, layout.marks, start, fresh,
        grid=blocks.grid, sequential=1, scalars=(layout.kinds,),
        in_specs=(*blocks.inputs(), _in_hbm(start), _in_hbm(fresh)),
        out_specs=(blocks.outputs(), blocks.starts(start), _in_hbm(start)),
        out_type=(out, kept, _like(start)),
        scratch=(scratch(start, 3), pltpu.SemaphoreType.DMA(())),
        interpret=plan.interpret, vmem_bytes=VMEM_LIMIT,
    )  # fmt: skip


def gradients(
    plan: Plan,
    tokens: Tokens,
    layout: Layout,
    start: Layers,
    fresh: Layers | None,
    starts: Layers,
    d_out: jax.Array,
    d_final: Layers,
) -> tuple[Tokens, Layers, Layers | None]:
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
            copy([ref.at[here] for ref in d_final], d_state, done)
            for ref in d_new or ():
                ref[...] = jnp.zeros(ref.shape, ref.dtype)

        for ref, first in zip(kept, starts, strict=True):
            ref[0] = first[...]

        def prepare(i):
            """The kind of a chunk, whose memory and anchor are then ready."""
            kind, memory = kinds[here[0], step * plan.chunks + i], [ref.at[i] for ref in kept]

            # Only the first chunk of all can continue one.
            @pl.when(kind == Kind.CONTINUES)
            def _():
                copy([ref.at[(*here, ANCHOR)] for ref in start], anchor, done)

            begin(kind, memory, anchor, fresh, here, done)
            return kind, memory

        @pl.loop(0, plan.chunks - 1)
        def _(i):
            kind, memory = prepare(i)
            following = [ref.at[i + 1] for ref in kept]

            @pl.when(kind == Kind.SKIPPED)
            def _():
                for ref, next_ref in zip(memory, following, strict=True):
                    next_ref[...] = ref[...]

            @pl.when(kind != Kind.SKIPPED)
            def _():
                chunk = _chunk(plan, i, q, k, v, gates)._replace(q=())
                after, _ = plan.arithmetic.advance(
                    load(memory), tuple(ref[...] for ref in anchor), chunk, *_marks(marks, i)
                )
                store(following, after)

        @pl.loop(0, plan.chunks)
        def _(j):
            i = plan.chunks - 1 - j
            kind, memory = prepare(i)

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
                    lambda *x: plan.arithmetic.advance(*x, used=used, first=first),
                    load(memory), tuple(ref[...] for ref in anchor),
                    _chunk(plan, i, q, k, v, gates),
                )  # fmt: skip
                rows = plan.rows(i)
                d_answers = tuple(d_out[head, rows, :].astype(jnp.float32) for head in plan.heads)
                d_memory, d_anchor, d_chunk = pull((load(d_state), d_answers))
                for head in plan.heads:
                    d_q[head, rows, :] = d_chunk.q[head].astype(d_q.dtype)
                d_k[rows, :] = d_chunk.k.astype(d_k.dtype)
                d_v[rows, :] = d_chunk.v.astype(d_v.dtype)
                for row, d in enumerate(d_chunk.gates):
                    d_gates[i, row : row + 1, :] = d
                store(d_state, d_memory)
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
            copy(d_state, [ref.at[here] for ref in d_start], done)
            if d_new is not None:
                copy(d_new, [ref.at[here] for ref in d_fresh], done)

    blocks = Blocks(plan, tokens, reverse=True)
    d_tokens, d_start, d_fresh = launch(
        neural_memory_gradients, *tokens, layout.marks, starts, d_out, start, fresh, d_final,
        grid=blocks.grid, sequential=1, scalars=(layout.kinds,),
        in_specs=(
            *blocks.inputs(), blocks.starts(start), blocks.outputs(),
            _in_hbm(start), _in_hbm(fresh), _in_hbm(start),
        ),
        out_specs=(blocks.gradients(), _in_hbm(start), _in_hbm(fresh)),
        out_type=(tuple(_like(tokens)), _like(start), _like(fresh)),
        scratch=(
            scratch(start, plan.chunks, 2), scratch(start), scratch(start, 3),
            None if fresh is None else scratch(start),
            pltpu.SemaphoreType.DMA(()),
        ),
        interpret=plan.interpret, vmem_bytes=VMEM_LIMIT,
    )  # fmt: skip
    return Tokens(*d_tokens), d_start, d_fresh


def _place() -> tuple[Any, Any]:
    """Which row of the batch, and which memory of it, a program walks."""
    return pl.program_id(0), pl.program_id(1)


def _chunk(plan: Plan, i, q, k, v, gates) -> Chunk:
    rows = plan.rows(i)
    queries = tuple(q[head, rows, :].astype(jnp.float32) for head in plan.heads)
    k, v = (x[rows, :].astype(jnp.float32) for x in (k, v))
    return Chunk(queries, k, v, Gates(*(gates[i, row : row + 1, :] for row in range(3))))


def _marks(marks, i) -> tuple[jax.Array, jax.Array]:
    return marks[i, 0:1, :] > 0, marks[i, 1:2, :] > 0


def _like(arrays):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arrays)


def _in_hbm(layers: Layers | None):
    return jax.tree.map(lambda _: pl.BlockSpec(memory_space=pl.ANY), layers)
