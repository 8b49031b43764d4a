r"""Outputs, every chunk by itself.

    O = (Q e^G) S + A V        G: from the start of the chunk up to each token

with S the state that the chunk starts from (`states`) and A the scores with decays (`decay`).

Floor at F = H = 128, bfloat16, 32768 tokens x 16 heads: q, k, v, the log decays and the output
moved once are 671 MB, 0.156 ms at 4.3 TB/s; matrix work, 7.3 MFLOP a chunk where decays are mild,
is 0.075 ms at 800 TFLOP/s. Reached on an H200: 0.725 ms, 22 % of it. That is traffic: two sweeps
(0.33) read k, v and decays twice, the states of chunks are 268 MB written and read (`outputs`
takes 0.25), and XLA clamps decays and sums them up (0.14).
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gated_linear_attention.decay import Decay, over_levels, summed, up_to
from pallas_kernels.gated_linear_attention.plan import Chunk, Plan, fetch, shared
from pallas_kernels.products import Products
from pallas_kernels.tiles import TILE, WGMMA, zeros


def outputs(
    plan: Plan, q: jax.Array, k: jax.Array, v: jax.Array, decay: Decay, states: jax.Array
) -> jax.Array:
    """Outputs `[B,T,N,H]`.

    Args:
      plan: options.
      q: queries `[B,T,N,F]`.
      k: keys `[B,T,M,F]`.
      v: values `[B,T,M,H]`.
      decay: that of M heads.
      states: the state that each chunk starts from, `[B,M,chunks,F,H]`.
    """
    (_, _, N, F), H = q.shape, v.shape[3]

    def gated_linear_attention_outputs(
        q, k, v, decay, states, out, *, query, key, value, terms, state, keys, tile, barrier
    ):
        here = Chunk.here()
        fetch(
            [
                (here.of_tokens(q, N), query), (here.of_tokens(k, N), key),
                (here.of_tokens(v, N), value), (here.terms(decay, N), terms),
                (here.of_state(states, N), state),
            ],
            barrier,
        )  # fmt: skip
        products, tile = plan.products, keys if tile is None else tile
        levels = decay.levels[here.gate(decay, N)]
        scores = scores_of_chunk(products, query, key, keys, terms, levels)
        before = jnp.exp(summed(products, up_to, terms))
        total = products.product(times(query, before), state)
        total = products.accumulate(total, scores.astype(jnp.bfloat16), value)
        tile[...] = (plan.scale * total).astype(tile.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(tile, here.of_tokens(out, N))
        plgpu.wait_smem_to_gmem(0)

    return plan.launch(
        gated_linear_attention_outputs, q, k, v, decay, states, grid=Chunk.grid(q),
        out_type=jax.ShapeDtypeStruct((*q.shape[:3], H), q.dtype),
        scratch={
            "query": shared(TILE, F), "key": shared(TILE, F), "value": shared(TILE, H),
            "terms": shared(decay.rows, F), "state": shared(F, H), "keys": shared(TILE, F),
            # Where sizes agree the keys' scratch serves, and two CTAs fit a multiprocessor.
            "tile": None if F == H else shared(TILE, H), "barrier": plgpu.Barrier(num_arrivals=5),
        },
    )  # fmt: skip


def scores_of_chunk(products: Products, query, key, keys, terms, levels) -> jax.Array:
    """A, `[64,64]`, of what is in shared memory; `keys` is scratch like `key`."""

    def add(level, scores):
        keys[...] = times(key, level.keys)
        plgpu.commit_smem()
        part = products.product(times(query, level.queries), keys.transpose((1, 0)))
        return jnp.where(level.part, part, scores)

    return over_levels(add, zeros(TILE), products=products, terms=terms, count=levels)


def times(tile, factor: jax.Array) -> jax.Array:
    """A bfloat16 tile in shared memory, times a factor, as an operand."""
    numbers = plgpu.load(tile, layout=WGMMA).astype(jnp.float32)
    return (numbers * factor).astype(jnp.bfloat16)
