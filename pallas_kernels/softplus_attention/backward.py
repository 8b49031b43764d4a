r"""Gradients, in two walks: queries stay for `d q`, keys stay for `d k` and `d v`.

With g = dO / R, R = sum r^p, and d_s = g·v_s - dO·O / R, the gradient of the score of key s is

    slope (d_s r_s^(p-1) - e) sigmoid(t_s)          e = o / n sum_s d_s r_s^(p-1)

where slope = p gain ln 2, and e is what all keys pay since they raise the mean that each is
compared with. It is known only after all keys. But d q is linear in it:

    d q = slope (sum_s d_s r_s^(p-1) sigmoid(t_s) k_s  -  e sum_s sigmoid(t_s) k_s)

so `query_gradients` keeps both sums and finds e beside them, in one walk; `key_gradients` then
knows it. That is a product more than if e were known, and two fewer than a walk to find it.

Floor for a score of H = 128: 1024 FLOP and 3 transcendentals in each walk (LSSA: 768 FLOP in the
first). With 32768 tokens and 16 heads, 8.6e9 scores, that is 11 ms at 800 TFLOP/s in each;
transcendentals alone, 4.2e12 a second, 6.2 ms. So 22 ms for both, if everything overlapped.
Reached on an H200: 19.9 and 22.0 ms. Two sums of 64 x 128 fill half of a thread's registers, so
that tiles are 64 wide (the second walk spills 200 bytes), and products wait for weights.
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.softplus_attention.packing import Packing
from pallas_kernels.softplus_attention.plan import Plan
from pallas_kernels.softplus_attention.rows import Row
from pallas_kernels.softplus_attention.weights import (
    fold,
    partial_zeros,
    raised,
    sigmoid,
    softplus,
    weight_gradients,
)
from pallas_kernels.tiles import ALONG_COLUMNS, over_columns, over_rows, zeros


def query_gradients(
    plan: Plan,
    q: jax.Array,
    g: jax.Array,
    k: jax.Array,
    v: jax.Array,
    rows: jax.Array,
    packing: Packing | None,
) -> tuple[jax.Array, jax.Array | None]:
    """`d q` `[B,T,N,H]`, and e of every query, `[B,N,T]` in float32, if thresholded.

    Args:
      plan: options.
      q: queries `[B,T,N,H]`.
      g: the output's gradient over R, `[B,T,N,H]`.
      k: keys `[B,T,K,H]`.
      v: values `[B,T,K,H]`.
      rows: all numbers, `[B,N,5,T]`; the last is o / n, or 0 where e is.
      packing: documents, or None for one of all tokens.
    """
    B, T, N, H = q.shape
    width = plan.config.gradient_width

    def softplus_attention_query_gradients(
        q, g, k, v, rows, packing, dq, shared, *, tiles, barriers, turns
    ):
        here = plan.here(T // plan.block, reverse=True)

        def compute(loop):
            query, grad = here.fetch([q, g], tiles, barriers)
            hide = plan.hide_keys(here, packing)
            mean = over_columns(here.read(rows, Row.MEAN), width)
            if plan.thresholded:
                gain = over_columns(here.read(rows, Row.GAIN), width)
                threshold = over_columns(here.read(rows, Row.THRESHOLD), width)

            def step(token, key, value, *ends_and_state):
                *ends, state = ends_and_state
                t, pull = plan.products.products(
                    (query, key.transpose((1, 0))), (grad, value.transpose((1, 0)))
                )
                t = hide(t, token, *ends)
                a, d = softplus(t), pull - mean
                slope = sigmoid(t, a)
                if not plan.thresholded:
                    d = (d * slope).astype(key.dtype)
                    return (plan.products.accumulate(state[0], d, key),)
                own, common, sums = state
                d = weight_gradients(d, jnp.maximum(gain * a - threshold, 0.0), plan)
                sums += fold(d, jnp.add)
                own, common = plan.products.accumulate_both(
                    (own, (d * slope).astype(key.dtype), key),
                    (common, slope.astype(key.dtype), key),
                )
                return own, common, sums

            start = (zeros(H),)
            if plan.thresholded:
                start = (zeros(H), zeros(H), partial_zeros())
            own, *others = loop(step, start)
            if plan.thresholded:
                common, sums = others
                e = here.read(rows, Row.SHARED) * sums.sum(axis=1)
                here.write(shared, e)
                own -= over_columns(e, H) * common
            own *= over_columns(here.read(rows, Row.SLOPE), H)
            here.store([own], [query], [dq])

        first, count = plan.key_tiles(here, packing, width)
        plan.walk(
            compute, here, [k, v] if packing is None else [k, v, packing.ends], turns, heads=N,
            first=first, count=count, width=width, stages=plan.config.gradient_stages,
        )  # fmt: skip

    e_type = jax.ShapeDtypeStruct((B, N, T), jnp.float32) if plan.thresholded else None
    return plan.launch(
        softplus_attention_query_gradients, q, g, k, v, rows, packing, heads=N, residents=2,
        out_type=(jax.ShapeDtypeStruct(q.shape, q.dtype), e_type),
    )  # fmt: skip


def key_gradients(
    plan: Plan,
    q: jax.Array,
    g: jax.Array,
    k: jax.Array,
    v: jax.Array,
    rows: jax.Array,
    packing: Packing | None,
) -> tuple[jax.Array, jax.Array]:
    """`d k` `[B,T,K,H]` and `d v` `[B,T,K,H]`; arguments as above, the last number being e."""
    _, T, K, H = k.shape
    width = plan.config.gradient_width

    def softplus_attention_key_gradients(
        k, v, q, g, rows, packing, dk, dv, *, tiles, barriers, turns
    ):
        here = plan.here(T // plan.block, reverse=False)

        def compute(loop):
            key, value = here.fetch([k, v], tiles, barriers)
            hide = plan.hide_queries(here, packing)

            def step(token, query, grad, rows, *positions_and_state):
                *positions, (dk, dv) = positions_and_state

                def row(number):
                    return over_rows(plgpu.load(rows.at[int(number)], layout=ALONG_COLUMNS))

                t, pull = plan.products.products(
                    (key, query.transpose((1, 0))), (value, grad.transpose((1, 0)))
                )
                t = hide(t, token, *positions)
                r = a = softplus(t)
                if plan.thresholded:
                    r = jnp.maximum(row(Row.GAIN) * a - row(Row.THRESHOLD), 0.0)
                d = weight_gradients(pull - row(Row.MEAN), r, plan)
                if plan.thresholded:
                    d -= row(Row.SHARED)
                d *= row(Row.SLOPE) * sigmoid(t, a)
                weights = raised(r, plan.power)
                return plan.products.accumulate_both(
                    (dk, d.astype(query.dtype), query), (dv, weights.astype(grad.dtype), grad)
                )

            here.store(loop(step, (zeros(H), zeros(H))), [key, value], [dk, dv])

        first, count = plan.query_tiles(here, packing, T, width)
        plan.walk(
            compute, here, [q, g, rows] if packing is None else [q, g, rows, packing.positions],
            turns, heads=K, first=first, count=count, width=width,
            stages=plan.config.gradient_stages,
        )  # fmt: skip

    return plan.launch(
        softplus_attention_key_gradients, k, v, q, g, rows, packing, heads=K, residents=2,
        out_type=(jax.ShapeDtypeStruct(k.shape, k.dtype), jax.ShapeDtypeStruct(v.shape, v.dtype)),
    )  # fmt: skip
