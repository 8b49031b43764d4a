r"""Gradients, in two walks: queries stay for `d q`, keys stay for `d k` and `d v`.

    d t = p (g·v - mean),    p = 2^(t - l),    mean = g·O - d l

    d q = sum d t k,    d k = sum d t q,    d v = sum p g

with g the gradient of O and d l that of the log-sum-exp.

Floor for a score of H = 128: 768 FLOP in the first walk, 1024 in the second. With 32768 tokens, 16
heads and a causal plan, 8.6e9 scores, that is 8.2 and 11.0 ms at 800 TFLOP/s. One walk that adds up
d q in memory would take 1280 FLOP in all, but the order of its sums would be left to chance. On an
H200 they take 8.9 and 15.5 ms, and with the forward kernel 31.8 ms, where cuDNN takes 28.1. Two
sums of 64 x 128 fill half of the registers of the second.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.block_sparse_attention.phases import Phases
from pallas_kernels.block_sparse_attention.plan import Plan, Rule
from pallas_kernels.tiles import ALONG_COLUMNS, over_columns, over_rows, zeros

LSE, MEAN = 0, 1
"""The numbers of a query: its log-sum-exp in powers of two, +inf if it sees nothing; and mean."""


def query_gradients(
    plan: Plan,
    q: jax.Array,
    g: jax.Array,
    numbers: jax.Array,
    k: jax.Array,
    v: jax.Array,
    phases: Phases,
    rule: Rule,
) -> jax.Array:
    """`d q` `[B,T,N,H]`.

    Args:
      plan: options.
      q: queries `[B,T,N,H]`.
      g: the output's gradient `[B,T,N,H]`.
      numbers: of each query, `[B,N,2,T]` in float32.
      k: keys `[B,S,K,H]`.
      v: values `[B,S,K,H]`.
      phases: lists of blocks of queries.
      rule: which pairs of partial entries count.
    """
    N, H = q.shape[2:]
    width, group = plan.config.query_gradient_width, N // k.shape[2]

    def block_sparse_attention_query_gradients(arrays, outs, *, here, rings, turns):
        _, _, numbers, k, v, phases, rule = arrays
        keys, values = rings
        steps = plan.steps(phases, here, here.head, plan.key_block, width)

        def copy(first):
            def fill(slot, token):
                source = here.batch, pl.ds(token, width), lax.div(here.head, group)
                keys.fill(slot, k.at[source])
                values.fill(slot, v.at[source])

            return steps.copy(fill, first)

        def compute(first, tiles):
            lse, mean = (here.read(numbers, i) for i in (LSE, MEAN))

            def body(step, slot, total, *, is_partial):
                weight = steps.weight(step)
                hide = plan.hiding(
                    rule, here, here.head, steps, step, rows="queries", is_partial=is_partial
                )
                keys.wait(slot)
                values.wait(slot)
                key, value = keys.tile(slot), values.tile(slot)
                query, grad = here.own(tiles)

                def probabilities(t):
                    base = lse if weight is None else lse - weight
                    return jnp.exp2(hide(t) * plan.factor - over_columns(base, width))

                p, pull = plan.products.products(
                    (query, key.transpose((1, 0))), (grad, value.transpose((1, 0))), probabilities
                )
                values.release(slot)
                d = p * (pull - over_columns(mean, width))
                total = plan.products.accumulate(total, d.astype(k.dtype), key)
                keys.release(slot)
                return total

            total = steps.walk(body, zeros(H), first)
            here.store([total * plan.scale], here.own(tiles[:1]), outs)
            return first + steps.count

        return copy, compute

    return plan.launch(
        block_sparse_attention_query_gradients, (q, g, numbers, k, v, phases, rule),
        resident=[0, 1], tiles=[((width, H), x.dtype) for x in (k, v)], block=plan.query_block,
        blocks=plan.config.blocks, stages=plan.config.query_gradient_stages,
        out_type=jax.ShapeDtypeStruct(q.shape, q.dtype),
    )  # fmt: skip


def key_gradients(
    plan: Plan,
    q: jax.Array,
    g: jax.Array,
    numbers: jax.Array,
    k: jax.Array,
    v: jax.Array,
    phases: Phases,
    rule: Rule,
) -> tuple[jax.Array, jax.Array]:
    """`d k` and `d v` `[B,S,K,H]`; arguments as above, but lists are those of blocks of keys."""
    K, H = k.shape[2:]
    width, group = plan.config.key_gradient_width, q.shape[2] // K

    def block_sparse_attention_key_gradients(arrays, outs, *, here, rings, turns):
        q, g, numbers, _, _, phases, rule = arrays
        queries, grads, rows = rings

        def walks(run, first, state):
            """Every query head that shares the keys: `run(steps, head, first, state)`."""

            def member(i, first_and_state):
                first, state = first_and_state
                head = here.head * group + i
                steps = plan.steps(phases, here, head, plan.query_block, width)
                return first + steps.count, run(steps, head, first, state)

            return lax.fori_loop(0, group, member, (first, state))

        def copy(first):
            def run(steps, head, first, state):
                def fill(slot, token):
                    tokens = pl.ds(token, width)
                    queries.fill(slot, q.at[here.batch, tokens, head])
                    rows.fill(slot, numbers.at[here.batch, head, :, tokens])
                    grads.fill(slot, g.at[here.batch, tokens, head])

                steps.copy(fill, first)
                return state

            return walks(run, first, ())[0]

        def compute(first, tiles):
            def run(steps, head, first, state):
                def body(step, slot, state, *, is_partial):
                    dk, dv = state
                    weight = steps.weight(step)
                    hide = plan.hiding(
                        rule, here, head, steps, step, rows="keys", is_partial=is_partial
                    )
                    for ring in rings:
                        ring.wait(slot)
                    query, grad = queries.tile(slot), grads.tile(slot)
                    key, value = here.own(tiles)

                    def row(i):
                        return plgpu.load(rows.tile(slot).at[i], layout=ALONG_COLUMNS)

                    def probabilities(t):
                        base = row(LSE) if weight is None else row(LSE) - weight
                        return jnp.exp2(hide(t) * plan.factor - over_rows(base))

                    p, pull = plan.products.products(
                        (key, query.transpose((1, 0))), (value, grad.transpose((1, 0))),
                        probabilities,
                    )  # fmt: skip
                    d = p * (pull - over_rows(row(MEAN)))
                    dk, dv = plan.products.accumulate_both(
                        (dk, d.astype(q.dtype), query), (dv, p.astype(g.dtype), grad),
                        # Numbers were loaded before a copy overwrites them.
                        meanwhile=plgpu.commit_smem,
                    )  # fmt: skip
                    for ring in rings:
                        ring.release(slot)
                    return dk, dv

                return steps.walk(body, state, first)

            first, (dk, dv) = walks(run, first, (zeros(H), zeros(H)))
            here.store([dk * plan.scale, dv], here.own(tiles), outs)
            return first

        return copy, compute

    return plan.launch(
        block_sparse_attention_key_gradients, (q, g, numbers, k, v, phases, rule),
        resident=[3, 4], members=group, block=plan.key_block,
        blocks=plan.config.key_blocks, stages=plan.config.key_gradient_stages,
        tiles=[((width, H), q.dtype), ((width, H), g.dtype), ((2, width), jnp.float32)],
        out_type=tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (k, v)),
    )  # fmt: skip
