r"""The sweeps of the TPU kernels: one head of keys at a time, chunk after chunk, a state in VMEM.

In a chunk of C tokens, with tiles q `[F,C]`, k `[F,C]` and w `[W,C]` (values, and a row of ones if
outputs are normalised), state S `[D,W]`, g the gradient of the sums, and p' the slope of p:

    outputs           P = tril(p(k, q))       sums = w P + Sᵀ phi(q)       S += phi(k) wᵀ
    query_gradients   X = p' tril(wᵀ g)       d q = k X + J(q)(S g)        S as above
    key_gradients     X as above              d k = q Xᵀ + J(k)(dS w)      from the last chunk on:
                                              d w = g Pᵀ + dSᵀ phi(k)      dS += phi(q) gᵀ

where P and X are `[keys, queries]`, and J(x) is the chain rule of phi. States are recomputed rather
than stored. `key_gradients` needs none, since outputs are linear in them: it carries dS. The query
heads that share a head of keys share its state, and sum their parts of d k and d w on the chip.

Floor of a chunk of C = 256 for Taylor, F = 16, H = 64 (D = 176, W = 80) and one head: `outputs`
27 MFLOP and 89 KiB, `query_gradients` 29 MFLOP and 104 KiB, `key_gradients` 47 MFLOP and 144 KiB.
At 32768 tokens x 16 heads, 2048 chunks. A matrix unit of 128 rows is mostly empty where products
contract F = 16, so that those cost eight times their FLOPs. Nothing was timed on a TPU.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.linear_attention.tpu_plan import Marks, Plan
from pallas_kernels.tpu import dot, head_block, launch, token_block


def outputs(
    plan: Plan,
    q: jax.Array,
    k: jax.Array,
    w: jax.Array,
    marks: jax.Array | None,
    start: jax.Array,
) -> tuple[jax.Array, jax.Array | None, jax.Array]:
    """Outputs, sums of weights, and the final state.

    Args:
      plan: options.
      q: queries `[B,K,G,F,T]`.
      k: keys `[B,K,F,T]`.
      w: values, perhaps with ones, `[B,K,W,T]`.
      marks: see `Marks`; None for one document.
      start: the initial state `[B,K,D,W]` in float32.

    Returns:
      `[B,K,G,H,T]`, `[B,K,G,1,T]` in float32 (None if not normalised), and `[B,K,D,W]`.
    """
    H, phi = plan.H, plan.feature_map

    def linear_attention_outputs(q, k, w, marks, start, out, totals, final, state):
        @pl.when(pl.program_id(2) == 0)
        def _():
            state[...] = start[...]

        marks = Marks.of(marks)
        seen, past = marks.seen(plan.chunk), state[...].astype(w.dtype)

        @pl.loop(0, plan.groups)
        def _(g):
            weights = jnp.where(seen, phi.score(dot(k[...], q[g], (0, 0))), 0.0)
            sums = dot(w[...], weights.astype(w.dtype))
            rows = marks.reading(phi.queries(q[g]))
            sums += dot(past, rows.astype(w.dtype), (0, 0))
            if totals is not None:
                total = sums[H : H + 1]
                totals[g] = total
                sums = jnp.where(total == 0, 0.0, sums[:H] / jnp.where(total == 0, 1.0, total))
            out[g] = sums.astype(out.dtype)

        rows = marks.writing(phi.keys(k[...]))
        state[...] = marks.kept(state[...]) + dot(rows.astype(w.dtype), w[...], (1, 1))

        @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
        def _():
            final[...] = state[...]

    B, K, G, _, T = q.shape
    totals_type = jax.ShapeDtypeStruct((B, K, G, 1, T), jnp.float32)
    return _sweep(
        plan, linear_attention_outputs, q, k, w, marks, start,
        out_type=(
            jax.ShapeDtypeStruct((B, K, G, H, T), q.dtype),
            totals_type if plan.normalize else None,
            jax.ShapeDtypeStruct(start.shape, jnp.float32),
        ),
    )  # fmt: skip


def query_gradients(
    plan: Plan,
    q: jax.Array,
    g: jax.Array,
    k: jax.Array,
    w: jax.Array,
    marks: jax.Array | None,
    start: jax.Array,
) -> jax.Array:
    """`d q`; arguments as above, g being the gradient of the sums, `[B,K,G,W,T]`."""
    phi = plan.feature_map

    def linear_attention_query_gradients(q, g, k, w, marks, start, dq, state):
        @pl.when(pl.program_id(2) == 0)
        def _():
            state[...] = start[...]

        marks = Marks.of(marks)
        seen, past = marks.seen(plan.chunk), state[...].astype(w.dtype)

        @pl.loop(0, plan.groups)
        def _(head):
            slope = phi.slope(dot(k[...], q[head], (0, 0)))
            d_dot = jnp.where(seen, dot(w[...], g[head], (0, 0)) * slope, 0.0)
            d_rows = marks.reading(dot(past, g[head]))
            grad = dot(k[...], d_dot.astype(k.dtype)) + phi.pull_queries(q[head], d_rows)
            dq[head] = grad.astype(dq.dtype)

        rows = marks.writing(phi.keys(k[...]))
        state[...] = marks.kept(state[...]) + dot(rows.astype(w.dtype), w[...], (1, 1))

    return _sweep(
        plan, linear_attention_query_gradients, q, g, k, w, marks, start,
        out_type=(jax.ShapeDtypeStruct(q.shape, q.dtype),),
    )[0]  # fmt: skip


def key_gradients(
    plan: Plan,
    q: jax.Array,
    g: jax.Array,
    k: jax.Array,
    w: jax.Array,
    marks: jax.Array | None,
    d_final: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`d k` `[B,K,F,T]`, `d w` `[B,K,W,T]`, and the initial state's gradient `[B,K,D,W]`."""
    phi = plan.feature_map

    def linear_attention_key_gradients(q, g, k, w, marks, end, dk, dw, d_start, state, sums):
        @pl.when(pl.program_id(2) == 0)
        def _():
            state[...] = end[...]

        marks = Marks.of(marks)
        seen, future = marks.seen(plan.chunk), state[...].astype(w.dtype)
        d_rows = marks.writing(dot(future, w[...]))
        rows = marks.writing(phi.keys(k[...])).astype(w.dtype)
        sum_dk, sum_dw = sums
        sum_dk[...] = phi.pull_keys(k[...], d_rows)
        sum_dw[...] = dot(future, rows, (0, 0))
        state[...] = marks.kept(state[...])

        @pl.loop(0, plan.groups)
        def _(head):
            inner = dot(k[...], q[head], (0, 0))
            d_weights = dot(w[...], g[head], (0, 0))
            d_dot = jnp.where(seen, d_weights * phi.slope(inner), 0.0)
            weights = jnp.where(seen, phi.score(inner), 0.0)
            sum_dk[...] += dot(q[head], d_dot.astype(q.dtype), (1, 1))
            sum_dw[...] += dot(g[head], weights.astype(g.dtype), (1, 1))
            rows = marks.reading(phi.queries(q[head]))
            state[...] += dot(rows.astype(g.dtype), g[head], (1, 1))

        dk[...] = sum_dk[...].astype(dk.dtype)
        dw[...] = sum_dw[...].astype(dw.dtype)

        @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
        def _():
            d_start[...] = state[...]

    sums = tuple(pltpu.VMEM((x.shape[2], plan.chunk), jnp.float32) for x in (k, w))
    return _sweep(
        plan, linear_attention_key_gradients, q, g, k, w, marks, d_final, reverse=True,
        out_type=(
            jax.ShapeDtypeStruct(k.shape, k.dtype), jax.ShapeDtypeStruct(w.shape, w.dtype),
            jax.ShapeDtypeStruct(d_final.shape, jnp.float32),
        ),
        scratch=(sums,),
    )  # fmt: skip


def _sweep(plan: Plan, body, *arrays, out_type, scratch=(), reverse: bool = False):
    """Runs a kernel over all chunks, its last input a state, with scratch for one.

    Args:
      plan: options.
      body: the kernel.
      *arrays: inputs: per query head `[B,K,G,size,T]`, per key head `[B,K,size,T]`, marks, and a
        state `[B,K,D,W]`.
      out_type: outputs of the same kinds.
      scratch: scratch besides the state's.
      reverse: whether to start with the last chunk.
    """
    *_, marks, state = arrays
    B, K, _, T = arrays[-3].shape
    chunks = T // plan.chunk

    def chunk(i):
        return chunks - 1 - i if reverse else i

    def spec(x):
        if x is None:
            return None
        if x is marks:
            return pl.BlockSpec(
                (None, *x.shape[1:-1], plan.chunk), lambda b, n, i: (b, 0, chunk(i))
            )
        return head_block(x) if x.shape == state.shape else token_block(x, plan.chunk, chunk)

    return launch(
        body, *arrays, grid=(B, K, chunks), sequential=1,
        in_specs=[spec(x) for x in arrays], out_specs=[spec(x) for x in out_type],
        out_type=out_type, scratch=(pltpu.VMEM(state.shape[2:], jnp.float32), *scratch),
        interpret=plan.interpret,
    )  # fmt: skip
