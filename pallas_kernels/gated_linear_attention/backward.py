r"""Gradients, every chunk by itself, from the state S at its start and its gradient dS at its end.

    dV = A^T dO + (K e^{G_C - G}) dS
    dQ = e^G dO S^T       + sum over levels of e^.. (dA (K e^..))         dA = dO V^T, causal
    dK = e^{G_C-G} V dS^T + sum over levels of e^.. (dA^T (Q e^..))

The log decay of token t stands in every exponent from a token before it to one not before it:

    dg_t = sum_{s >= t} Q dQ  -  sum_{s >= t} K dK within the chunk
           + sum_{s < t} K dK past the chunk  +  e^{G_C} sum_h S dS

Pairs within the chunk that t does not part are in both of the first sums and have to cancel: both
are formed of the same rounded operands, and then they do. All else only adds up.

Floor of forward and backward at the shape in `forward`: 2 GB moved, 0.47 ms. Reached on an H200:
2.56 ms, of it 1.14 here, 1.0 in six sweeps over states, 0.25 for outputs, the rest in XLA.

One kernel finds dV. A second finds the rest, 64 features a CTA: factors e^.. take the registers of
a tile each.
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
    over_levels,
    summed,
    up_to,
)
from pallas_kernels.gated_linear_attention.forward import scores_of_chunk, times
from pallas_kernels.gated_linear_attention.plan import Chunk, Plan, fetch, shared
from pallas_kernels.tiles import ALONG_COLUMNS, TILE, WGMMA, iota, over_rows


def value_gradients(
    plan: Plan, q: jax.Array, k: jax.Array, d_out: jax.Array, decay: Decay, d_states: jax.Array
) -> jax.Array:
    """Gradients of the values, of each query head: `[B,T,N,H]`; arguments as below."""
    N, F, H = *q.shape[2:], d_out.shape[3]

    def gated_linear_attention_value_gradients(
        q, k, d_out, decay, d_states, dv, *, query, key, grad, terms, d_state, keys, tile, barrier
    ):
        here = Chunk.here()
        fetch(
            [
                (here.of_tokens(q, N), query), (here.of_tokens(k, N), key),
                (here.of_tokens(d_out, N), grad), (here.terms(decay, N), terms),
                (here.of_state(d_states, N), d_state),
            ],
            barrier,
        )  # fmt: skip
        products, tile = plan.products, keys if tile is None else tile
        levels = decay.levels[here.gate(decay, N)]
        scores = scores_of_chunk(products, query, key, keys, terms, levels)
        weights = query.at[:, pl.ds(0, TILE)]  # queries have been read
        weights[...] = scores.astype(weights.dtype)
        plgpu.commit_smem()
        total = products.product(weights.transpose((1, 0)), grad)
        past = jnp.exp(summed(products, after, terms))
        total = products.accumulate(total, times(key, past), d_state)
        _store(here.of_tokens(dv, N), plan.scale * total, tile)
        plgpu.wait_smem_to_gmem(0)

    return plan.launch(
        gated_linear_attention_value_gradients, q, k, d_out, decay, d_states, grid=Chunk.grid(q),
        out_type=jax.ShapeDtypeStruct(d_out.shape, _summable(q, k)),
        scratch={
            "query": shared(TILE, F), "key": shared(TILE, F), "grad": shared(TILE, H),
            "terms": shared(decay.rows, F), "d_state": shared(F, H), "keys": shared(TILE, F),
            "tile": None if F == H else shared(TILE, H), "barrier": plgpu.Barrier(num_arrivals=5),
        },
    )  # fmt: skip


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

    Args:
      plan: options.
      q, k, v: `[B,T,N,F]`, `[B,T,M,F]` and `[B,T,M,H]`.
      d_out: gradient of the output, `[B,T,N,H]`.
      decay: that of M heads.
      states: the state that each chunk starts from, `[B,M,chunks,F,H]`.
      d_states: gradient of the state at the end of each chunk, of the query head's output alone,
        `[B,N,chunks,F,H]`, but for the factor `plan.scale`.
    """
    (B, T, N, F), H = q.shape, v.shape[3]
    products = plan.products

    def gated_linear_attention_feature_gradients(
        q, k, v, d_out, decay, states, d_states, dq, dk, dg,
        *, query, key, value, grad, terms, state, d_state, square, through, barrier,
    ):  # fmt: skip
        here = Chunk.here()
        features = pl.ds(lax.axis_index("slice") * TILE, TILE)
        fetch(
            [
                *(
                    (here.of_tokens(array, N).at[:, features], tile)
                    for array, tile in ((q, query), (k, key))
                ),
                (here.terms(decay, N).at[:, features], terms),
                (here.of_tokens(v, N), value), (here.of_tokens(d_out, N), grad),
                (here.of_state(states, N).at[features], state),
                (here.of_state(d_states, N).at[features], d_state),
            ],
            barrier,
        )  # fmt: skip

        # What passes the chunk's borders.
        d_q = products.product(grad, state.transpose((1, 0)))
        d_q *= jnp.exp(summed(products, up_to, terms))
        change = _load(query) * d_q
        d_k = products.product(value, d_state.transpose((1, 0)))
        d_k *= jnp.exp(summed(products, after, terms))
        past = (_load(key) * d_k).astype(jnp.bfloat16)
        through[...] = (_load(state) * _load(d_state)).sum(axis=1)
        d_scores = products.product(grad, value.transpose((1, 0))).astype(jnp.bfloat16)

        # Pairs within the chunk. States have been read, and their memory serves as scratch.
        queries, keys = (x.at[:, pl.ds(0, TILE)] for x in (state, d_state))

        def add(level, sums):
            d_q, d_k, change = sums
            part = jnp.where(level.part, d_scores, jnp.zeros_like(d_scores))
            queries[...] = times(query, level.queries)
            keys[...] = times(key, level.keys)
            square[...] = part
            plgpu.commit_smem()
            x = products.product(part, keys)
            change += _load(queries) * x
            d_q += level.queries * x
            x = products.product(square.transpose((1, 0)), queries)
            change -= _load(keys) * x
            return d_q, d_k + level.keys * x, change

        d_q, d_k, change = over_levels(
            add, (d_q, d_k, change), products=products, terms=terms,
            count=decay.levels[here.gate(decay, N)],
        )  # fmt: skip
        _store(here.of_tokens(dq, N).at[:, features], plan.scale * d_q, query)
        _store(here.of_tokens(dk, N).at[:, features], plan.scale * d_k, key)

        # The log decays.
        high = change.astype(jnp.bfloat16)
        queries[...] = high
        keys[...] = (change - high.astype(jnp.float32)).astype(jnp.bfloat16)
        square[...] = past
        plgpu.commit_smem()
        # Not `accumulate`: of two products of one matrix in registers the second came out wrong.
        total = products.product(_matrix(iota(1) >= iota(0)), queries)
        total += products.product(_matrix(iota(1) >= iota(0)), keys)
        total += products.product(_matrix(iota(1) < iota(0)), square)
        factor = decay.factor.at[here.gate(decay, N)].at[features]
        last = plgpu.load(factor, layout=ALONG_COLUMNS, optimized=False)
        last *= plgpu.load(through, layout=ALONG_COLUMNS)
        total = plan.scale * (total + over_rows(last))
        forgets = _load(terms.at[pl.ds(0, TILE)]) < LOWEST
        target = here.of_tokens(dg, N).at[:, features]
        _store(target, jnp.where(forgets, 0.0, total), square)
        plgpu.wait_smem_to_gmem(0)

    return plan.launch(
        gated_linear_attention_feature_gradients, q, k, v, d_out, decay, states, d_states,
        grid={"batch": B, "chunk": T // TILE, "slice": F // TILE, "head": N},
        out_type=tuple(
            jax.ShapeDtypeStruct(q.shape, dtype)
            for dtype in (
                q.dtype, _summable(q, k), _summable(q, k) if decay.rows == TILE else jnp.float32
            )
        ),
        scratch={
            "query": shared(TILE, TILE), "key": shared(TILE, TILE), "value": shared(TILE, H),
            "grad": shared(TILE, H), "terms": shared(decay.rows, TILE),
            "state": shared(TILE, H), "d_state": shared(TILE, H), "square": shared(TILE, TILE),
            "through": plgpu.SMEM((TILE,), jnp.float32), "barrier": plgpu.Barrier(num_arrivals=7),
        },
    )  # fmt: skip


def _summable(q: jax.Array, k: jax.Array):
    """The dtype of gradients that are summed over query heads later."""
    return q.dtype if k.shape[2] == q.shape[2] else jnp.float32


def _load(tile) -> jax.Array:
    return plgpu.load(tile, layout=WGMMA).astype(jnp.float32)


def _matrix(mask: jax.Array) -> jax.Array:
    return jnp.where(mask, 1.0, 0.0).astype(jnp.bfloat16)


def _store(target, numbers: jax.Array, tile) -> None:
    """Writes to global memory, bfloat16 through a tile in shared memory."""
    if target.dtype == jnp.float32:
        target[...] = numbers
        return
    tile[...] = numbers.astype(tile.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(tile, target)
