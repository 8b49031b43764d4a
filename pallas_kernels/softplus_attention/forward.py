r"""The two passes of the forward direction, a block of 64 queries a warpgroup.

    row_sums   S = sum softplus(t),  max t              t = c q·k
    mix        O = sum r^p v / sum r^p                  r = max(gain softplus(t) - threshold, 0)

The second needs S and the maximum of whole rows, hence two passes; LSSA, whose r is softplus(t)
itself, needs the second alone. Neither rescales: nothing overflows.

Floor for a score and H = 128: the first pass takes 256 FLOP of the matrix unit, 1.06
transcendentals and 8 other instructions; the second 512 FLOP, 2 transcendentals and 15. With 32768
tokens and 16 heads, 8.6e9 scores, at 800 TFLOP/s, 3.7e12 transcendentals/s and 3.0e13
instructions/s that is 2.8 ms (matrix unit; transcendentals 2.5, instructions 2.4) and 5.5 ms (4.7,
4.9): 8.3 ms if all of them overlap. Traffic is 0.54 GB, 0.13 ms.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.softplus_attention.plan import (
    Packing,
    Plan,
    hide_later_keys,
    hide_unseen_keys,
)
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


def row_sums(
    plan: Plan, q: jax.Array, k: jax.Array, rows: jax.Array, packing: Packing | None
) -> Sums:
    """S and max t of every query, `[B,N,T]` in float32.

    Args:
      plan: options.
      q: unit vectors `[B,T,N,H]`.
      k: unit vectors `[B,T,K,H]`.
      rows: `[B,N,numbers,T]`, of which the length scale is read.
      packing: documents, or None for one of all tokens.
    """
    B, T, N, _ = q.shape
    width = plan.config.width

    def softplus_attention_row_sums(q, k, rows, packing, total, highest, *, tiles, barriers):
        here = plan.here(T // plan.block, reverse=True)
        first, count = plan.key_tiles(here, packing, width)

        def compute(loop):
            (query,) = here.fetch([q], tiles, barriers)
            scale = over_columns(here.row(rows, Row.LENGTH_SCALE), width)
            positions = packing and here.token_row(packing.positions)

            def step(token, key, *ends_and_state):
                *ends, (total, highest) = ends_and_state
                t = scale * plan.products.product(query, key.transpose((1, 0)))
                if packing:
                    t = hide_unseen_keys(t, token, positions, *ends)
                else:
                    t = hide_later_keys(t, here, token)
                return total + softplus_sums(t), jnp.maximum(highest, fold(t, jnp.maximum))

            sums, maxima = loop(step, (partial_zeros(), partial_zeros() + HIDDEN))
            total[here.batch, here.head, here.tokens] = sums.sum(axis=1)
            highest[here.batch, here.head, here.tokens] = maxima.max(axis=1)

        arrays = [k] if packing is None else [k, packing.ends]
        plan.walk(
            compute, here, arrays, heads=N, first=first, count=count, width=width,
            stages=plan.config.stages,
        )  # fmt: skip

    per_row = jax.ShapeDtypeStruct((B, N, T), jnp.float32)
    return Sums(*plan.launch(
        softplus_attention_row_sums, q, k, rows, packing, heads=N, out_type=(per_row, per_row),
        residents=1,
    ))  # fmt: skip


def mix(
    plan: Plan,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    rows: jax.Array,
    packing: Packing | None,
) -> tuple[jax.Array, jax.Array]:
    """The output `[B,T,N,H]`, and the sum of r^p of every query, `[B,N,T]` in float32.

    Args:
      plan: options.
      q: unit vectors `[B,T,N,H]`.
      k: unit vectors `[B,T,K,H]`.
      v: values `[B,T,K,H]`.
      rows: `[B,N,numbers,T]`: length scale and, if thresholded, gain and threshold.
      packing: documents, or None for one of all tokens.
    """
    B, T, N, H = q.shape
    width = plan.config.width

    def softplus_attention_mix(q, k, v, rows, packing, out, total, *, tiles, barriers):
        here = plan.here(T // plan.block, reverse=True)
        first, count = plan.key_tiles(here, packing, width)

        def compute(loop):
            (query,) = here.fetch([q], tiles, barriers)
            scale = over_columns(here.row(rows, Row.LENGTH_SCALE), width)
            if plan.thresholded:
                gain = over_columns(here.row(rows, Row.GAIN), width)
                threshold = over_columns(here.row(rows, Row.THRESHOLD), width)
            positions = packing and here.token_row(packing.positions)

            def step(token, key, value, *ends_and_state):
                *ends, (mixed, total) = ends_and_state
                t = scale * plan.products.product(query, key.transpose((1, 0)))
                if packing:
                    t = hide_unseen_keys(t, token, positions, *ends)
                else:
                    t = hide_later_keys(t, here, token)
                r, _ = softplus(t)
                if plan.thresholded:
                    r = jnp.maximum(gain * r - threshold, 0.0)
                weights = raised(r, plan.power)
                mixed = plan.products.accumulate(mixed, weights.astype(value.dtype), value)
                return mixed, total + fold(weights, jnp.add)

            mixed, sums = loop(step, (zeros(H), partial_zeros()))
            sums = sums.sum(axis=1)
            total[here.batch, here.head, here.tokens] = sums
            share = 1 / jnp.maximum(sums, 1e-30)  # of queries that see nothing
            here.store([mixed * over_columns(share, H)], [query], [out])

        arrays = [k, v] if packing is None else [k, v, packing.ends]
        plan.walk(
            compute, here, arrays, heads=N, first=first, count=count, width=width,
            stages=plan.config.stages,
        )  # fmt: skip

    return plan.launch(
        softplus_attention_mix, q, k, v, rows, packing, heads=N,
        out_type=(
            jax.ShapeDtypeStruct((B, T, N, H), q.dtype),
            jax.ShapeDtypeStruct((B, N, T), jnp.float32),
        ),
        residents=1,
    )  # fmt: skip
