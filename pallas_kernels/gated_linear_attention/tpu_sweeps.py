r"""The sweeps of the TPU kernels: one state at a time, chunk after chunk, in VMEM.

    outputs    walks the chunks in order, and leaves the state as each STEP found it; a step is
               several chunks of 128 tokens, so that this is little.
    gradients  walks the steps in reverse. Within one it first advances the state through its chunks
               once more, keeping what each began with, and then pulls the gradients back.

The query heads that share a state are taken one after another, and sum their parts of the gradients
of what they share on the chip.

Of a chunk with F = H = 128, decays by channel and one query head, `outputs` moves 208 KiB and makes
ten products of 128 x 128 x 128, six of them sums of log decays, some 320 cycles of a v5e's matrix
units. Nothing was timed on a TPU: the compiler's schedule for a v5e is of 820 instructions a chunk,
and 260 for each part of the scores after the first (`tpu_decay`); of `gradients`, 1860 and 700.
With decays by head it is 450, and 1010 of `gradients`.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.gated_linear_attention.tpu_chunk import Chunk, read, write
from pallas_kernels.tpu import LANES, head_block, launch, token_block


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a sweep runs, as fixed while tracing.

    Attributes:
      chunks: chunks of a step.
      interpret: whether to run in the TPU simulator.
    """

    chunks: int
    interpret: bool = False

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.chunks * LANES

    def columns(self, i) -> pl.Slice:
        """Columns of the i-th chunk of a step."""
        return pl.ds(pl.multiple_of(i * LANES, LANES), LANES)


def outputs(
    plan: Plan,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_decay: jax.Array,
    start: jax.Array,
    *,
    keep: bool,
) -> tuple[jax.Array, jax.Array | None, jax.Array]:
    """Outputs of all queries.

    Args:
      plan: options.
      q: queries `[B,M,G,F,T]`.
      k: keys `[B,M,F,T]`.
      v: values `[B,M,H,T]`.
      log_decay: `[B,M,F,T]` or `[B,M,1,T]`.
      start: the initial state `[B,M,F,H]` in float32.
      keep: whether to keep states for `gradients`.

    Returns:
      `[B,M,G,H,T]`; the state before each step `[B,M,steps,F,H]`, or None; the final state.
    """
    dtype = q.dtype

    def gated_linear_attention_outputs(q, k, v, log_decay, start, out, starts, final, state):
        @pl.when(pl.program_id(2) == 0)
        def _():
            state[...] = start[...]

        if starts is not None:
            starts[...] = state[...]

        @pl.loop(0, plan.chunks)
        def _(i):
            columns = plan.columns(i)
            chunk = Chunk.of(k, v, log_decay, columns)
            following = write(state[...], chunk, dtype=dtype)

            @pl.loop(0, len(q))
            def _(head):
                queries = q[head, :, columns].astype(jnp.float32)
                out[head, :, columns] = read(queries, state[...], chunk, dtype=dtype).astype(dtype)

            state[...] = following

        @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
        def _():
            final[...] = state[...]

    (B, M, G, F, T), H = q.shape, v.shape[2]
    steps = T // plan.tokens
    out = jax.ShapeDtypeStruct((B, M, G, H, T), dtype)
    final = jax.ShapeDtypeStruct((B, M, F, H), jnp.float32)
    starts = jax.ShapeDtypeStruct((B, M, steps, F, H), jnp.float32) if keep else None
    tokens = q, k, v, log_decay
    return launch(
        gated_linear_attention_outputs, *tokens, start, grid=(B, M, steps), sequential=1,
        in_specs=(*(token_block(x, plan.tokens) for x in tokens), head_block(start)),
        out_specs=(
            token_block(out, plan.tokens), _step_block(F, H) if keep else None, head_block(final)
        ),
        out_type=(out, starts, final),
        scratch=(pltpu.VMEM((F, H), jnp.float32),), interpret=plan.interpret,
    )  # fmt: skip


def gradients(
    plan: Plan,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_decay: jax.Array,
    starts: jax.Array,
    d_out: jax.Array,
    d_final: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]:
    """Gradients of q, k, v, log decays and the initial state.

    Arguments are those of `outputs`, states it kept, and gradients of its outputs.
    """
    dtype = q.dtype

    def gated_linear_attention_gradients(
        q, k, v, log_decay, starts, d_out, d_final, dq, dk, dv, dg, d_start,
        states, d_state, d_chunk,
    ):  # fmt: skip
        @pl.when(pl.program_id(2) == 0)
        def _():
            d_state[...] = d_final[...]

        states[0] = starts[...]

        @pl.loop(0, plan.chunks - 1)
        def _(i):
            chunk = Chunk.of(k, v, log_decay, plan.columns(i))
            states[i + 1] = write(states[i], chunk, dtype=dtype)

        @pl.loop(0, plan.chunks)
        def _(j):
            i = plan.chunks - 1 - j
            columns = plan.columns(i)
            chunk = Chunk.of(k, v, log_decay, columns)
            _, pull = jax.vjp(functools.partial(write, dtype=dtype), states[i], chunk)
            d_state[...], d_written = pull(d_state[...])
            for ref, x in zip(d_chunk, d_written, strict=True):
                ref[...] = x

            @pl.loop(0, len(q))
            def _(head):
                queries = q[head, :, columns].astype(jnp.float32)
                _, pull = jax.vjp(functools.partial(read, dtype=dtype), queries, states[i], chunk)
                d_queries, d_past, d_read = pull(d_out[head, :, columns].astype(jnp.float32))
                dq[head, :, columns] = d_queries.astype(dtype)
                d_state[...] += d_past
                for ref, x in zip(d_chunk, d_read, strict=True):
                    ref[...] += x

            for ref, total in zip((dk, dv, dg), d_chunk, strict=True):
                ref[:, columns] = total[...].astype(ref.dtype)

        @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
        def _():
            d_start[...] = d_state[...]

    B, M, steps, F, H = starts.shape

    def last_first(i):
        return steps - 1 - i

    def blocks(*arrays):
        return tuple(token_block(x, plan.tokens, last_first) for x in arrays)

    shared = k, v, log_decay
    return launch(
        gated_linear_attention_gradients, q, *shared, starts, d_out, d_final,
        grid=(B, M, steps), sequential=1,
        in_specs=(
            *blocks(q, *shared), _step_block(F, H, last_first), *blocks(d_out),
            head_block(d_final),
        ),
        out_specs=(*blocks(q, *shared), head_block(d_final)),
        out_type=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, *shared, d_final)],
        scratch=(
            pltpu.VMEM((plan.chunks, F, H), jnp.float32), pltpu.VMEM((F, H), jnp.float32),
            tuple(pltpu.VMEM((x.shape[2], LANES), jnp.float32) for x in shared),
        ),
        interpret=plan.interpret,
    )  # fmt: skip


def _step_block(F: int, H: int, step=lambda i: i) -> pl.BlockSpec:
    """The state before a step."""
    return pl.BlockSpec((None, None, None, F, H), lambda b, m, i: (b, m, step(i), 0, 0))
