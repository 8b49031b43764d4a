r"""Scores with decays on a TPU: `[F,C]` tiles of C = 128 tokens, log decays `[F,C]` or `[1,C]`.

    A_st = sum_c k_sc q_tc e^{g_{s+1,c} + ... + g_tc},   s <= t   (rows are keys, columns queries)

Every exponent is a sum of its own terms, formed as a product with a matrix of 0 and 1: nothing
cancels. One decay a head needs one such product for all pairs, and A is that of q and k times its
exponentials. Where channels decay by themselves, the factor is split between q and k at a border:
of blocks of 128, 64 ... 2 tokens, the right half refers to the border in its middle and so does the
left, which makes a part of A for each size, and what is left is the diagonal:

    q_t e^{sum from the border to t}  ·  k_s e^{sum from after s to the border}

No exponent is positive, however strong the decay. Blocks of a size at which no channel can lose
more than e^-30 in half of one need not be cut on: both sides refer to the middle, the exponents of
tokens on the wrong side of it are at most 30, and factors of any s <= t still multiply to 1 or
less. Gates of trained models seldom need more than one part.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.tpu import LANES, column, dot
from pallas_kernels.tpu_products import product

_NO_STATE_LEFT = -1e30  # stands for -inf, of which products with 0 would make NaN
_MILD = 30.0


def finite(log_decay: jax.Array) -> jax.Array:
    """Log decays in float32, of which sums can be formed by products."""
    return jnp.maximum(log_decay.astype(jnp.float32), _NO_STATE_LEFT)


def before(log_decay: jax.Array, dtype) -> jax.Array:
    """Sums from the start of the chunk up to each token, itself included."""
    token, last = _pairs()
    return _summed(log_decay, token <= last, dtype)


def after(log_decay: jax.Array, dtype) -> jax.Array:
    """Sums from after each token to the end of the chunk."""
    token, first = _pairs()
    return _summed(log_decay, token > first, dtype)


def total(log_decay: jax.Array) -> jax.Array:
    """Sums over the chunk, `[F,1]` or `[1,1]`."""
    return jnp.sum(log_decay, axis=1, keepdims=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def decayed(x: jax.Array, exponent: jax.Array, dtype) -> jax.Array:
    """`x e^exponent`, rounded to `dtype`: what a product takes."""
    return (x * jnp.exp(exponent)).astype(dtype).astype(jnp.float32)


def _decayed_forward(x, exponent, dtype):
    rounded = decayed(x, exponent, dtype)
    return rounded, (rounded, jnp.exp(exponent))


def _decayed_backward(dtype, residuals, grad):
    # Gradients of exponents of queries and of keys contain each other's pairs, and have to cancel:
    # formed of the rounded numbers that were multiplied, they do.
    del dtype
    rounded, factor = residuals
    d_exponent = rounded * grad
    if factor.shape != grad.shape:
        d_exponent = jnp.sum(d_exponent, axis=0, keepdims=True)
    return factor * grad, d_exponent


decayed.defvjp(_decayed_forward, _decayed_backward)


def scores(q: jax.Array, k: jax.Array, log_decay: jax.Array, dtype) -> jax.Array:
    """Decayed inner products `[keys, queries]`, 0 where the key is the later one.

    Args:
      q: queries `[F,C]` in float32.
      k: keys `[F,C]` in float32.
      log_decay: `[F,C]` or `[1,C]`, finite.
      dtype: of the operands of products.
    """
    key, query = _pairs()
    if log_decay.shape[0] == 1:
        between = _summed(jnp.where(query > key, log_decay, 0.0), key <= query, dtype)
        inner = product(k, q, (0, 0), dtype)
        return jnp.where(key <= query, jnp.exp(between) * inner, 0.0)
    # Where all channels forget at once, as where a document begins, a mask spares the other parts.
    resets = jnp.max(log_decay, axis=0, keepdims=True) <= _NO_STATE_LEFT
    document = _summed(jnp.where(resets, 1.0, 0.0), key <= query, dtype)
    parts = _parts(q, k, jnp.where(resets, 0.0, log_decay), dtype)
    return jnp.where(column(document) == document, parts, 0.0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _parts(q, k, log_decay, dtype):
    """The sum of all parts."""
    return _parts_forward(q, k, log_decay, dtype)[0]


def _parts_forward(q, k, log_decay, dtype):
    count = _count(log_decay)
    part = functools.partial(_part, q, k, log_decay, count=count, dtype=dtype)

    def add(i, scores):
        return scores + part(i=i)

    # The first part, mostly the only one, stands before the loop, among what it can overlap with.
    return lax.fori_loop(1, count, add, part(i=0)), (q, k, log_decay, count)


def _parts_backward(dtype, residuals, d_scores):
    *arrays, count = residuals

    def pulled(i):
        part = functools.partial(_part, i=i, count=count, dtype=dtype)
        return jax.vjp(part, *arrays)[1](d_scores)

    def add(i, sums):
        return tuple(a + b for a, b in zip(sums, pulled(i), strict=True))

    return lax.fori_loop(1, count, add, pulled(0))


_parts.defvjp(_parts_forward, _parts_backward)


def _count(log_decay: jax.Array) -> jax.Array:
    """How many parts it takes: blocks of 128 alone, or those and ever smaller ones."""
    strongest = -jnp.min(log_decay)
    count, half = jnp.int32(1), LANES // 2
    while half:
        count += jnp.where(strongest * half > _MILD, 1, 0)
        half //= 2
    return count


def _part(q, k, log_decay, *, i, count, dtype):
    """The i-th part: of pairs that blocks of 128 / 2^i hold and no half of one does.

    The last part is of all that are left.
    """
    key, query = _pairs()
    block = lax.shift_right_logical(jnp.int32(LANES), i)
    half = lax.shift_right_logical(block, 1)
    is_last = i == count - 1
    # What token t (column) sums: right of the border those up to t, left of it those after t, of
    # which the difference is negative and its complement is not.
    token, t = key, query
    is_right = (t[:1] & half) > 0
    is_between = ((t - token) ^ jnp.where(is_right, 0, -1)) >= 0
    sums = _summed(log_decay, ((token ^ t) < half) & is_between, dtype)
    wrong_side = jnp.where(is_last, -1.0, 1.0)
    queries = decayed(q, jnp.where(is_right, 1.0, wrong_side) * sums, dtype)
    keys = decayed(k, jnp.where(is_right, wrong_side, 1.0) * sums, dtype)
    apart = key ^ query
    is_own = (key <= query) & (apart < block) & (apart >= jnp.where(is_last, 0, half))
    return jnp.where(is_own, product(keys, queries, (0, 0), dtype), 0.0)


def _pairs() -> tuple[jax.Array, jax.Array]:
    """The token of each row and of each column of a matrix."""
    row, col = (lax.broadcasted_iota(jnp.int32, (LANES, LANES), axis) for axis in (0, 1))
    return row, col


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _summed(terms: jax.Array, taken: jax.Array, dtype) -> jax.Array:
    """Sums of terms `[...,C]`, in each column those of the tokens (rows) that are taken."""
    return _product(terms, taken, (1, 0), dtype)


def _summed_forward(terms, taken, dtype):
    return _summed(terms, taken, dtype), taken


def _summed_backward(dtype, taken, grad):
    return _product(grad, taken, (1, 1), dtype), None


_summed.defvjp(_summed_forward, _summed_backward)


def _product(x: jax.Array, taken: jax.Array, contract: tuple[int, int], dtype) -> jax.Array:
    """A product with 0 and 1, of x cut into numbers that the matrix unit multiplies exactly."""
    matrix = jnp.where(taken, 1.0, 0.0).astype(jnp.bfloat16)

    def term(x):
        return dot(x.astype(jnp.bfloat16), matrix, contract)

    high = _truncated(x)
    rest = x - high
    if dtype != jnp.float32:
        # What is left out is 2^-16 of an exponent, nothing beside the rounding of bfloat16.
        return term(high) + term(rest)
    middle = _truncated(rest)
    return term(high) + term(middle) + term(rest - middle)


def _truncated(x: jax.Array) -> jax.Array:
    """The upper half of each number's bits, a bfloat16."""
    bits = lax.bitcast_convert_type(x, jnp.int32) & -(2**16)
    return lax.bitcast_convert_type(bits, jnp.float32)
