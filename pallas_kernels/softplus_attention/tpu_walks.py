r"""The walks of the TPU kernels: a block of tokens stays, blocks of the others stream past it.

As `forward` and `backward` on GPUs, with scores `t` as tiles `[keys, queries]` (see
`pallas_kernels.tpu`), so that a query's numbers are rows and sums over its keys are sums over rows:

    row_sums         queries stay    S = sum a,  the largest t       a = softplus(t)
    mix              queries stay    O = v r^p / R,  R = sum r^p     r = max(gain a - threshold, 0)
    query_gradients  queries stay    d q, and e
    key_gradients    keys stay       d k, d v

Floor of a score of H = 128: 256 FLOP of the matrix unit in `row_sums`, 512 in `mix`, 1024 in each
of the gradients' walks (LSSA: 768 in the first), and 2, 2, 3 and 3 transcendentals. At 32768 tokens
and 16 heads that is 8.6e9 scores: 2.2, 4.4, 8.8 and 8.8 TFLOP. Nothing was timed on a TPU.
"""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.softplus_attention.packing import Packing
from pallas_kernels.softplus_attention.rows import LN2, Row, Sums
from pallas_kernels.softplus_attention.tpu_plan import Plan, walk
from pallas_kernels.softplus_attention.weights import HIDDEN, raised, sigmoid, weight_gradients
from pallas_kernels.tpu import dot


def row_sums(plan: Plan, q: jax.Array, k: jax.Array, packing: Packing | None) -> Sums:
    """S and the largest score of every query.

    Args:
      plan: options.
      q: queries `[B,N,F,T]`.
      k: keys `[B,K,F,T]`.
      packing: documents, or None for one of all tokens.
    """

    def softplus_attention_row_sums(tile, q, k, total, highest):
        @tile.first
        def _():
            total[...] = jnp.zeros_like(total)
            highest[...] = jnp.full_like(highest, HIDDEN)

        @tile.strips
        def _(keys):
            t = tile.hide(dot(k[:, keys], q[...], (0, 0)), keys)
            total[...] += _softplus(t).sum(axis=0, keepdims=True)
            highest[...] = jnp.maximum(highest[...], t.max(axis=0, keepdims=True))

    B, N, _, T = q.shape
    row = jax.ShapeDtypeStruct((B, N, 1, T), jnp.float32)
    sums = walk(
        plan, softplus_attention_row_sums, [q], [k], packing, out_type=(row, row), stays="queries"
    )
    return Sums(*(x[:, :, 0] for x in sums))


def mix(
    plan: Plan,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    rows: jax.Array | None,
    packing: Packing | None,
) -> tuple[jax.Array, jax.Array]:
    """The output `[B,N,H,T]`, and the sum of r^p of every query, `[B,N,T]` in float32.

    Args:
      plan: options.
      q: queries `[B,N,F,T]`.
      k: keys `[B,K,F,T]`.
      v: values `[B,K,H,T]`.
      rows: gain and threshold `[B,N,2,T]`, or None for LSSA.
      packing: documents, or None for one of all tokens.
    """

    def softplus_attention_mix(tile, q, rows, k, v, out, total, mixed):
        @tile.first
        def _():
            mixed[...] = jnp.zeros_like(mixed)
            total[...] = jnp.zeros_like(total)

        @tile.strips
        def _(keys):
            a = _softplus(tile.hide(dot(k[:, keys], q[...], (0, 0)), keys))
            weights = raised(_excess(plan, a, rows), plan.power)
            total[...] += weights.sum(axis=0, keepdims=True)
            mixed[...] += dot(v[:, keys], weights.astype(v.dtype))

        @tile.last
        def _():
            out[...] = (mixed[...] / jnp.maximum(total[...], 1e-30)).astype(out.dtype)

    (B, N, _, T), H = q.shape, v.shape[2]
    out, total = walk(
        plan, softplus_attention_mix, [q, rows], [k, v], packing, stays="queries",
        out_type=(
            jax.ShapeDtypeStruct((B, N, H, T), q.dtype),
            jax.ShapeDtypeStruct((B, N, 1, T), jnp.float32),
        ),
        scratch=[(H, plan.block)],
    )  # fmt: skip
    return out, total[:, :, 0]


def query_gradients(
    plan: Plan,
    q: jax.Array,
    g: jax.Array,
    k: jax.Array,
    v: jax.Array,
    rows: jax.Array,
    packing: Packing | None,
) -> tuple[jax.Array, jax.Array]:
    """`d q` `[B,N,F,T]`, and e of every query, `[B,N,T]` in float32 (0 for LSSA).

    Args:
      plan: options.
      q: queries `[B,N,F,T]`.
      g: the output's gradient over R, `[B,N,H,T]`.
      k: keys `[B,K,F,T]`.
      v: values `[B,K,H,T]`.
      rows: all numbers, `[B,N,5,T]`; the last is o / n, or 0 where e is.
      packing: documents, or None for one of all tokens.
    """

    def softplus_attention_query_gradients(tile, q, g, rows, k, v, dq, e, own, common):
        @tile.first
        def _():
            own[...] = jnp.zeros_like(own)
            common[...] = jnp.zeros_like(common)
            e[...] = jnp.zeros_like(e)

        @tile.strips
        def _(keys):
            t = tile.hide(dot(k[:, keys], q[...], (0, 0)), keys)
            a = _softplus(t)
            slope = sigmoid(t, a)
            d = dot(v[:, keys], g[...], (0, 0)) - _row(rows, Row.MEAN)
            d = weight_gradients(d, _excess(plan, a, rows), plan)
            own[...] += dot(k[:, keys], (d * slope).astype(k.dtype))
            if plan.thresholded:
                common[...] += dot(k[:, keys], slope.astype(k.dtype))
                e[...] += d.sum(axis=0, keepdims=True)

        @tile.last
        def _():
            e[...] *= _row(rows, Row.SHARED)
            grad = _row(rows, Row.SLOPE) * (own[...] - e[...] * common[...])
            dq[...] = grad.astype(dq.dtype)

    B, N, F, T = q.shape
    dq, e = walk(
        plan, softplus_attention_query_gradients, [q, g, rows], [k, v], packing, stays="queries",
        out_type=(
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((B, N, 1, T), jnp.float32),
        ),
        scratch=[(F, plan.block)] * 2,
    )  # fmt: skip
    return dq, e[:, :, 0]


def key_gradients(
    plan: Plan,
    q: jax.Array,
    g: jax.Array,
    k: jax.Array,
    v: jax.Array,
    rows: jax.Array,
    packing: Packing | None,
) -> tuple[jax.Array, jax.Array]:
    """`d k` `[B,K,F,T]` and `d v` `[B,K,H,T]`; arguments as above, the last number being e."""

    def softplus_attention_key_gradients(tile, k, v, q, g, rows, dk, dv, sum_dk, sum_dv):
        @tile.first
        def _():
            sum_dk[...] = jnp.zeros_like(sum_dk)
            sum_dv[...] = jnp.zeros_like(sum_dv)

        @tile.strips
        def _(queries):
            query, grad, numbers = q[:, queries], g[:, queries], rows[:, queries]
            t = tile.hide(dot(k[...], query, (0, 0)), queries)
            a = _softplus(t)
            r = _excess(plan, a, numbers)
            d = dot(v[...], grad, (0, 0)) - _row(numbers, Row.MEAN)
            d = weight_gradients(d, r, plan) - _row(numbers, Row.SHARED)
            d *= _row(numbers, Row.SLOPE) * sigmoid(t, a)
            sum_dk[...] += dot(query, d.astype(query.dtype), (1, 1))
            sum_dv[...] += dot(grad, raised(r, plan.power).astype(grad.dtype), (1, 1))

        @tile.last
        def _():
            dk[...] = sum_dk[...].astype(dk.dtype)
            dv[...] = sum_dv[...].astype(dv.dtype)

    return walk(
        plan, softplus_attention_key_gradients, [k, v], [q, g, rows], packing, stays="keys",
        out_type=(jax.ShapeDtypeStruct(k.shape, k.dtype), jax.ShapeDtypeStruct(v.shape, v.dtype)),
        scratch=[(x.shape[2], plan.block) for x in (k, v)],
    )  # fmt: skip


def _softplus(t: jax.Array) -> jax.Array:
    """`log(1 + 2^t)`, as exact as float32."""
    return LN2 * jnp.maximum(t, 0.0) + jnp.log1p(jnp.exp2(-jnp.abs(t)))


def _row(rows: Any, number: Row) -> jax.Array:
    """A number of each query of a block, `[1,block]`."""
    return rows[int(number) : int(number) + 1, :]


def _excess(plan: Plan, a: jax.Array, rows: Any) -> jax.Array:
    """`r`, of the first stage's weights a."""
    if not plan.thresholded:
        return a
    return jnp.maximum(_row(rows, Row.GAIN) * a - _row(rows, Row.THRESHOLD), 0.0)
