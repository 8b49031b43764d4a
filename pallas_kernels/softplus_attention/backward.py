r"""Gradients, in two walks: queries stay for `d q`, keys stay for `d k` and `d v`.

With g = dO / R, R = sum r^p, and d_s = g·v_s - dO·O / R, the gradient of the cosine of key s is

    slope (d_s r_s^(p-1) - e) sigmoid(t_s)          e = sum_s d_s r_s^(p-1) a_s / S

where slope = p gain c, and e is what all keys pay since they raise the mean that each is compared
with; e = 0 without a threshold. It is known only after all keys. But d q is linear in it:

    d q = slope (sum_s d_s r_s^(p-1) sigmoid(t_s) k_s  -  e sum_s sigmoid(t_s) k_s)

so `query_gradients` keeps both sums and forms e beside them, in one walk; `key_gradients` then
knows it. That is a product more than if e were known, and two fewer than a walk to find it.

Floor for a score and H = 128: 1024 FLOP in each kernel (768 without a threshold in the first),
3 transcendentals and about 25 other instructions. With 32768 tokens and 16 heads, 8.6e9 scores: 11
ms on the matrix unit in each (transcendentals 7.0, instructions 7.2), 22 ms for both.
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.softplus_attention.plan import (
    Packing,
    Plan,
    hide_blind_queries,
    hide_earlier_queries,
    hide_later_keys,
    hide_unseen_keys,
)
from pallas_kernels.softplus_attention.rows import Row
from pallas_kernels.softplus_attention.weights import (
    fold,
    partial_zeros,
    raised,
    sigmoid,
    softplus,
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
      q: unit vectors `[B,T,N,H]`.
      g: the output's gradient over R, `[B,T,N,H]`.
      k: unit vectors `[B,T,K,H]`.
      v: values `[B,T,K,H]`.
      rows: all numbers, `[B,N,6,T]`; the last is 1 / S, or 0 where e is.
      packing: documents, or None for one of all tokens.
    """
    B, T, N, H = q.shape
    width = plan.config.gradient_width

    def softplus_attention_query_gradients(
        q, g, k, v, rows, packing, dq, shared, *, tiles, barriers
    ):
        here = plan.here(T // plan.block, reverse=True)
        first, count = plan.key_tiles(here, packing, width)

        def compute(loop):
            query, grad = here.fetch([q, g], tiles, barriers)
            scale = over_columns(here.row(rows, Row.LENGTH_SCALE), width)
            mean = over_columns(here.row(rows, Row.MEAN), width)
            if plan.thresholded:
                gain = over_columns(here.row(rows, Row.GAIN), width)
                threshold = over_columns(here.row(rows, Row.THRESHOLD), width)
            positions = packing and here.token_row(packing.positions)

            def step(token, key, value, *ends_and_state):
                *ends, state = ends_and_state
                t, pull = plan.products.products(
                    (query, key.transpose((1, 0))), (grad, value.transpose((1, 0)))
                )
                t = scale * t
                if packing:
                    t = hide_unseen_keys(t, token, positions, *ends)
                else:
                    t = hide_later_keys(t, here, token)
                a, x = softplus(t)
                slope, d = sigmoid(x), pull - mean
                if not plan.thresholded:
                    return (
                        plan.products.accumulate(state[0], (d * slope).astype(key.dtype), key),
                    )
                r = jnp.maximum(gain * a - threshold, 0.0)
                d = weight_gradients(plan, d, r)
                own, common = plan.products.accumulate_both(
                    (state[0], (d * slope).astype(key.dtype), key),
                    (state[1], slope.astype(key.dtype), key),
                )
                return own, common, state[2] + fold(d * a, jnp.add)

            start = (zeros(H),)
            if plan.thresholded:
                start = (zeros(H), zeros(H), partial_zeros())
            own, *others = loop(step, start)
            if plan.thresholded:
                common, sums = others
                e = here.row(rows, Row.SHARED) * sums.sum(axis=1)
                shared[here.batch, here.head, here.tokens] = e
                own -= over_columns(e, H) * common
            own *= over_columns(here.row(rows, Row.SLOPE), H)
            here.store([own], [query], [dq])

        arrays = [k, v] if packing is None else [k, v, packing.ends]
        plan.walk(
            compute, here, arrays, heads=N, first=first, count=count, width=width,
            stages=plan.config.gradient_stages,
        )  # fmt: skip

    e_type = jax.ShapeDtypeStruct((B, N, T), jnp.float32) if plan.thresholded else None
    return plan.launch(
        softplus_attention_query_gradients, q, g, k, v, rows, packing, heads=N,
        out_type=(jax.ShapeDtypeStruct(q.shape, q.dtype), e_type), residents=2,
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

    def softplus_attention_key_gradients(k, v, q, g, rows, packing, dk, dv, *, tiles, barriers):
        here = plan.here(T // plan.block, reverse=False)
        first, count = plan.query_tiles(here, packing, T, width)

        def compute(loop):
            key, value = here.fetch([k, v], tiles, barriers)
            ends = packing and here.token_row(packing.ends)

            def step(token, query, grad, rows, *positions_and_state):
                *positions, (dk, dv) = positions_and_state

                def row(number):
                    return over_rows(plgpu.load(rows.at[int(number)], layout=ALONG_COLUMNS))

                t, pull = plan.products.products(
                    (key, query.transpose((1, 0))), (value, grad.transpose((1, 0)))
                )
                t = row(Row.LENGTH_SCALE) * t
                if packing:
                    t = hide_blind_queries(t, here, *positions, ends)
                else:
                    t = hide_earlier_queries(t, here, token)
                r, x = softplus(t)
                if plan.thresholded:
                    r = jnp.maximum(row(Row.GAIN) * r - row(Row.THRESHOLD), 0.0)
                weights = raised(r, plan.power)
                d = weight_gradients(plan, pull - row(Row.MEAN), r)
                if plan.thresholded:
                    d -= row(Row.SHARED)
                d *= row(Row.SLOPE) * sigmoid(x)
                return plan.products.accumulate_both(
                    (dk, d.astype(query.dtype), query), (dv, weights.astype(grad.dtype), grad)
                )

            here.store(loop(step, (zeros(H), zeros(H))), [key, value], [dk, dv])

        arrays = [q, g, rows] if packing is None else [q, g, rows, packing.positions]
        plan.walk(
            compute, here, arrays, heads=K, first=first, count=count, width=width,
            stages=plan.config.gradient_stages,
        )  # fmt: skip

    return plan.launch(
        softplus_attention_key_gradients, k, v, q, g, rows, packing, heads=K,
        out_type=(jax.ShapeDtypeStruct(k.shape, k.dtype), jax.ShapeDtypeStruct(v.shape, v.dtype)),
        residents=2,
    )  # fmt: skip


def weight_gradients(plan: Plan, d: jax.Array, r: jax.Array) -> jax.Array:
    """`d r^(p-1)`, the gradient of r but for a factor of the row; 0 of what was dropped."""
    if not plan.thresholded:
        return d
    if plan.power == 1:
        return jnp.where(r > 0, d, 0.0)
    return d * raised(r, plan.power - 1)
