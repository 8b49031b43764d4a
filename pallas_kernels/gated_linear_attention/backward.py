r"""Gradients of queries, keys and log decays, every chunk by itself.

From the state S at a chunk's start and its gradient dS at its end:

    dQ = e^G dO S^T       + sum over levels of e^.. (dA (K e^..))         dA = dO V^T, causal
    dK = e^{G_C-G} V dS^T + sum over levels of e^.. (dA^T (Q e^..))

The log decay of token t stands in every exponent from a token before it to one not before it:

    dg_t = sum_{s >= t} Q dQ  -  sum_{s >= t} K dK within the chunk
           + sum_{s < t} K dK past the chunk  +  e^{G_C} sum_h S dS

Pairs within the chunk that t does not part are in both of the first sums and have to cancel: both
are formed of the same rounded operands, and then they do. All else only adds up.

A CTA takes 64 features, whose factors e^.. already take the registers of a tile each. Mild and
strong chunks go separate ways from the start to the end: where the two paths joined again, the
compiler serialised products for want of registers (C7511).

Floor of forward and backward at the shape in `forward`: 2 GB moved, 0.47 ms. Reached on an H200:
1.60 ms, most of it traffic: 0.47 here (1.6 GB, states of chunks and their gradients among them),
0.49 in two walks, 0.41 in three sweeps over states, 0.22 in XLA.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gated_linear_attention.decay import (
    LOWEST,
    Decay,
    after,
    from_middle,
    is_strong,
    make_finite,
    matrix,
    mild_level,
    over_strong_levels,
    passed,
    summed,
    times,
    up_to,
)
from pallas_kernels.gated_linear_attention.plan import Chunk, Plan, shared, store
from pallas_kernels.tiles import ALONG_COLUMNS, TILE, WGMMA, over_rows, zeros


def feature_gradients(
    plan: Plan,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    d_out: jax.Array,
    decay: Decay,
    states: jax.Array,
    d_states: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of queries, keys and log decays, of each query head: `[B,T,N,F]`.

    Where all features share their decays, gradients of those are sums over 64 features each, in
    float32: `[B,N,F/64,T]`.

    Args:
      plan: options.
      q, k, v: `[B,T,N,F]`, `[B,T,M,F]` and `[B,T,M,H]`.
      d_out: gradient of the output, `[B,T,N,H]`.
      decay: that of M heads.
      states: the state that each chunk reads, `[B,M,chunks,F,H]`.
      d_states: its gradient as each chunk reads that from its end, of the query head's output
        alone, `[B,N,chunks,F,H]`, but for the factor `plan.scale`.
    """
    (B, T, N, F), H = q.shape, v.shape[3]
    products = plan.products

    def gated_linear_attention_feature_gradients(
        q, k, v, d_out, decay, states, d_states, dq, dk, dg,
        *, query, key, value, grad, terms, halves, state, d_state, square, through, barrier,
    ):  # fmt: skip
        batch, chunk, head = (lax.axis_index(axis) for axis in ("batch", "chunk", "head"))
        here, slice_ = Chunk(batch, chunk, head, N), lax.axis_index("slice")
        features = pl.ds(slice_ * TILE, TILE)
        for source, target in (
            (here.of_tokens(v), value), (here.of_tokens(d_out), grad),
            (here.of_state(states).at[features], state),
            (here.of_state(d_states).at[features], d_state),
            (here.of_tokens(q).at[:, features], query), (here.of_tokens(k).at[:, features], key),
            (here.terms(decay).at[:, features], terms), (here.halves(decay), halves),
        ):  # fmt: skip
            plgpu.copy_gmem_to_smem(source, target, barrier)
        plgpu.barrier_wait(barrier)
        blocks = [pl.ds(i, TILE) for i in range(0, H, TILE)]
        through[...] = sum(
            (_load(state.at[:, block]) * _load(d_state.at[:, block])).sum(axis=1)
            for block in blocks
        )

        def read_all():
            d_scores = products.product(grad, value.transpose((1, 0))).astype(jnp.bfloat16)
            outer = products.products(
                (grad, state.transpose((1, 0))), (value, d_state.transpose((1, 0)))
            )
            return d_scores, *outer

        # All but queries and keys have been read, and their memory serves as scratch.
        queries, keys, past, all_scores = (
            x.at[:, pl.ds(0, TILE)] for x in (state, d_state, value, grad)
        )

        def begin(level, scores):
            queries[...] = times(query, level.queries)
            keys[...] = times(key, level.keys)
            square[...] = jnp.where(level.part, scores, jnp.zeros_like(scores))
            plgpu.commit_smem()

        def mild():
            d_scores, outer_q, outer_k = read_all()
            square[...] = matrix(from_middle)
            plgpu.commit_smem()
            sums = summed(products, square, terms)
            begin(mild_level(sums), d_scores)
            d_q, inner_k = products.accumulate_both(
                (outer_q, square, keys), (zeros(TILE), square.transpose((1, 0)), queries)
            )
            past[...] = (_load(keys) * outer_k).astype(past.dtype)
            level = mild_level(lax.optimization_barrier(sums))  # found anew, to save registers
            change = _load(queries) * d_q - _load(keys) * inner_k
            d_q = (plan.scale * level.queries * d_q).astype(dq.dtype)
            d_k = (plan.scale * level.keys * (outer_k + inner_k)).astype(dk.dtype)
            return d_q, d_k, change

        def strongly():
            make_finite(terms)
            d_scores, outer_q, outer_k = read_all()
            all_scores[...] = d_scores
            from_start, to_end = (
                jnp.exp(summed(products, weights, terms)) for weights in (up_to, after)
            )
            d_q, d_k = from_start * outer_q, to_end * outer_k
            past[...] = (_load(key) * d_k).astype(past.dtype)

            def add(level, sums):
                d_q, d_k, change = sums
                begin(level, plgpu.load(all_scores, layout=WGMMA))
                inner = products.product(square, keys)
                d_q += level.queries * inner
                change += _load(queries) * inner
                inner = products.product(square.transpose((1, 0)), queries)
                return d_q, d_k + level.keys * inner, change - _load(keys) * inner

            sums = d_q, d_k, _load(query) * d_q
            d_q, d_k, change = over_strong_levels(add, sums, products=products, terms=terms)
            return (plan.scale * d_q).astype(dq.dtype), (plan.scale * d_k).astype(dk.dtype), change

        def run(strong):
            d_q, d_k, change = strongly() if strong else mild()
            store(d_q, here.of_tokens(dq).at[:, features], query)
            store(d_k, here.of_tokens(dk).at[:, features], key)

            # The log decays.
            high = change.astype(jnp.bfloat16)
            queries[...] = high
            keys[...] = (change - high.astype(jnp.float32)).astype(jnp.bfloat16)
            from_here, earlier = square, all_scores
            from_here[...] = matrix(from_t_on)
            earlier[...] = matrix(before)
            plgpu.commit_smem()
            total, low = products.products((from_here, queries), (from_here, keys))
            total = products.accumulate(total + low, earlier, past)
            last = plgpu.load(through, layout=ALONG_COLUMNS)
            if strong:  # states that are read in mild chunks have decayed up to the middle
                first, second = passed(halves.at[:, features], ALONG_COLUMNS)
                last *= first * second
            total = plan.scale * (total + over_rows(last))
            if strong:
                total = jnp.where(_load(terms.at[pl.ds(0, TILE)]) < LOWEST, 0.0, total)
            if plan.by_head:
                dg[batch, head, slice_, pl.ds(chunk * TILE, TILE)] = total.sum(axis=1)
            else:
                store(total, here.of_tokens(dg).at[:, features], square)
            plgpu.wait_smem_to_gmem(0)

        lax.cond(is_strong(halves) > 0, lambda: run(strong=True), lambda: run(strong=False))

    of_features = jax.ShapeDtypeStruct(q.shape, q.dtype)
    of_head = jax.ShapeDtypeStruct((B, N, F // TILE, T), jnp.float32)
    return plan.launch(
        gated_linear_attention_feature_gradients, q, k, v, d_out, decay, states, d_states,
        grid={"batch": B, "chunk": T // TILE, "slice": F // TILE, "head": N},
        out_type=(of_features, of_features, of_head if plan.by_head else of_features),
        scratch={
            "query": shared(TILE, TILE), "key": shared(TILE, TILE), "value": shared(TILE, H),
            "grad": shared(TILE, H), "terms": shared(decay.rows, TILE),
            "halves": plgpu.SMEM((2, F), jnp.float32), "state": shared(TILE, H),
            "d_state": shared(TILE, H), "square": shared(TILE, TILE),
            "through": plgpu.SMEM((TILE,), jnp.float32), "barrier": plgpu.Barrier(num_arrivals=8),
        },
    )  # fmt: skip


def from_t_on(t: jax.Array, s: jax.Array) -> jax.Array:
    """The sum over tokens from t on."""
    return jnp.where(s >= t, 1, 0)


def before(t: jax.Array, s: jax.Array) -> jax.Array:
    """The sum over tokens before t."""
    return jnp.where(s < t, 1, 0)


def _load(tile) -> jax.Array:
    return plgpu.load(tile, layout=WGMMA).astype(jnp.float32)
