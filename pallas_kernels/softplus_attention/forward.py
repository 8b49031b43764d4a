r"""The two walks of the forward direction, a block of 64 queries a warpgroup.

    row_sums   S = sum a,  the largest t                a = softplus(t), t = q·k
    mix        O = sum r^p v / sum r^p                  r = max(gain a - threshold, 0)

The second needs S and the maximum of whole rows, hence two; LSSA, whose r is a itself, needs the
second alone. Neither rescales: nothing overflows.

Floor for a score of H = 128: the first walk takes 256 FLOP of the matrix unit and 1.06
transcendentals, the second 512 FLOP and 2. With 32768 tokens and 16 heads, 8.6e9 scores, that is
2.7 ms and 5.5 ms at 800 TFLOP/s; transcendentals alone, 4.2e12 a second, 2.2 ms and 4.1 ms. So 8.2
ms if everything overlapped; traffic, 0.54 GB, is 0.13 ms. Reached on an H200: 5.4 and 9.1 ms. In
`mix` the two add up: the compiler puts all transcendentals of a tile before the rest of its
arithmetic, a warpgroup alone then needs longer for weights than for products, and holding the
other one back meanwhile (a real ping-pong) took 9.7 ms.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.softplus_attention.packing import Packing
from pallas_kernels.softplus_attention.plan import Plan
from pallas_kernels.softplus_attention.rows import Row, Sums
from pallas_kernels.softplus_attention.weights import (
    HIDDEN,
    fold,
    partial_zeros,
    raised,
    softplus,
    softplus_sums,
)
from pallas_kernels.tiles import over_columns, zeros


def row_sums(plan: Plan, q: jax.Array, k: jax.Array, packing: Packing | None) -> Sums:
    """S and the largest score of every query.

    Args:
      plan: options.
      q: queries `[B,T,N,H]`.
      k: keys `[B,T,K,H]`.
      packing: documents, or None for one of all tokens.
    """
    B, T, N, _ = q.shape
    width = plan.config.width

    def softplus_attention_row_sums(q, k, packing, total, highest, *, tiles, barriers, turns):
        here = plan.here(T // plan.block, reverse=True)

        def compute(loop):
            (query,) = here.fetch([q], tiles, barriers)
            hide = plan.hide_keys(here, packing)

            def step(token, key, *ends_and_state):
                *ends, (total, highest) = ends_and_state
                t = plan.products.product(query, key.transpose((1, 0)), turns.swap)
                t = hide(t, token, *ends)
                total += softplus_sums(t)
                highest = jnp.maximum(highest, fold(t, jnp.maximum))
                turns.swap()
                return total, highest

            sums, maxima = loop(step, (partial_zeros(), partial_zeros() + HIDDEN))
            here.write(total, sums.sum(axis=1))
            here.write(highest, maxima.max(axis=1))

        first, count = plan.key_tiles(here, packing, width)
        plan.walk(
            compute, here, [k] if packing is None else [k, packing.ends], turns, heads=N,
            first=first, count=count, width=width, stages=plan.config.stages,
        )  # fmt: skip

    per_row = jax.ShapeDtypeStruct((B, N, T), jnp.float32)
    sums = plan.launch(
        softplus_attention_row_sums, q, k, packing, heads=N, out_type=(per_row, per_row),
        residents=1, takes_turns=True,
    )  # fmt: skip
    return Sums(*sums)


def mix(
    plan: Plan,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    rows: jax.Array | None,
    packing: Packing | None,
) -> tuple[jax.Array, jax.Array]:
    """The output `[B,T,N,H]`, and the sum of r^p of every query, `[B,N,T]` in float32.

    Args:
      plan: options.
      q: queries `[B,T,N,H]`.
      k: keys `[B,T,K,H]`.
      v: values `[B,T,K,H]`.
      rows: gain and threshold `[B,N,2,T]`, or None for LSSA.
      packing: documents, or None for one of all tokens.
    """
    B, T, N, H = q.shape
    width = plan.config.width

    def softplus_attention_mix(q, k, v, rows, packing, out, total, *, tiles, barriers, turns):
        here = plan.here(T // plan.block, reverse=True)

        def compute(loop):
            (query,) = here.fetch([q], tiles, barriers)
            hide = plan.hide_keys(here, packing)
            if plan.thresholded:
                gain = over_columns(here.read(rows, Row.GAIN), width)
                threshold = over_columns(here.read(rows, Row.THRESHOLD), width)

            def step(token, key, value, *ends_and_state):
                *ends, (mixed, total) = ends_and_state
                t = plan.products.product(query, key.transpose((1, 0)), turns.swap)
                r = softplus(hide(t, token, *ends))
                if plan.thresholded:
                    r = jnp.maximum(gain * r - threshold, 0.0)
                weights = raised(r, plan.power)
                total += fold(weights, jnp.add)
                turns.swap()
                return plan.products.accumulate(mixed, weights.astype(value.dtype), value), total

            mixed, sums = loop(step, (zeros(H), partial_zeros()))
            sums = sums.sum(axis=1)
            here.write(total, sums)
            share = 1 / jnp.maximum(sums, 1e-30)  # 0 where nothing is seen
            here.store([mixed * over_columns(share, H)], [query], [out])

        first, count = plan.key_tiles(here, packing, width)
        plan.walk(
            compute, here, [k, v] if packing is None else [k, v, packing.ends], turns, heads=N,
            first=first, count=count, width=width, stages=plan.config.stages,
        )  # fmt: skip

    return plan.launch(
        softplus_attention_mix, q, k, v, rows, packing, heads=N, residents=1, takes_turns=True,
        out_type=(
            jax.ShapeDtypeStruct((B, T, N, H), q.dtype),
            jax.ShapeDtypeStruct((B, N, T), jnp.float32),
        ),
    )  # fmt: skip
