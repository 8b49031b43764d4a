r"""What gates leave of every write at every later token of a chunk, computed on the chip.

With a_t = 1 - decay_t and A_ti = a_{i+1}...a_t, P_tj = momentum_{j+1}...momentum_t (1 on the
diagonal, 0 above it), network W_t and momentum S_t after a token are

    S_t = m_t S_0 - sum_{j<=t} P_tj theta_j g_j            m_t = momentum_1...momentum_t
    W_t = b_t W_0 + f_t S_0 - sum_{j<=t} G_tj g_j          b_t = a_1...a_t
    f = A m,   G = A P diag(theta)

Products are formed as products: exact for gates of 0 and 1, and with gradients there. A chunk may
hold several documents, each of which starts from W_0 and S_0, and slots without a token, which
change nothing. Rows of a matrix, and columns `[C,1]`, are tokens that read; columns, and rows
`[1,C]`, are tokens that wrote.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.tpu_products import product


class Gates(NamedTuple):
    """Of each token of a chunk, `[1,C]` in float32."""

    learning_rate: jax.Array
    momentum: jax.Array
    decay: jax.Array


class Coefficients(NamedTuple):
    """What each token of a chunk sees, and what the chunk leaves behind.

    Attributes:
      kept: b, share of the incoming network at each token, `[C,1]`.
      carried: f, share of the incoming momentum that is in the network by then, `[C,1]`.
      written: G, what the network at each token holds of each gradient, `[C,C]`.
      last_kept, last_carried: b and f of the last token, `[1,1]`.
      last_written: G of the last token, `[C,1]`.
      momentum: m of the last token, `[1,1]`.
      pending: P diag(theta) of the last token, what momentum holds of each gradient, `[C,1]`.
    """

    kept: jax.Array
    carried: jax.Array
    written: jax.Array
    last_kept: jax.Array
    last_carried: jax.Array
    last_written: jax.Array
    momentum: jax.Array
    pending: jax.Array


def coefficients(gates: Gates, used: jax.Array, first: jax.Array, dtype) -> Coefficients:
    """The coefficients of a chunk; differentiable in the gates.

    Those of the last token, which make the next state, are sums of float32 products, and need none
    of the matrix products that make the others.

    Args:
      gates: learning rate, momentum and decay.
      used: whether a slot holds a token, `[1,C]`.
      first: whether a slot is the first of the chunk or of a document, `[1,C]`.
      dtype: of the operands of matrix products.
    """
    rate = jnp.where(used, gates.learning_rate, 0.0)
    momentum = jnp.where(used, gates.momentum, 1.0)
    keep = jnp.where(used, 1 - gates.decay, 1.0)
    a, p = (_between(jnp.where(first, 0.0, gate), dtype) for gate in (keep, momentum))
    keep, momentum = (jnp.where(first, gate, 0.0) for gate in (keep, momentum))
    # What a slot without a token would add to the network, it does not.
    entered = product(jnp.where(used, a, 0.0), p, (1, 0), dtype)
    last_a, last_p = _last(a), _last(p)
    last_entered = jnp.sum(_column(jnp.where(used, last_a, 0.0)) * p, axis=0, keepdims=True)
    return Coefficients(
        kept=_sum_rows(a * keep),
        carried=_sum_rows(entered * momentum),
        written=entered * rate,
        last_kept=_sum_rows(last_a * keep),
        last_carried=_sum_rows(last_entered * momentum),
        last_written=_column(last_entered * rate),
        momentum=_sum_rows(last_p * momentum),
        pending=_column(last_p * rate),
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _between(gate: jax.Array, dtype) -> jax.Array:
    """Products of gates `[1,C]` after each token (column), up to each later one (row)."""
    size = gate.shape[1]
    row, token = _indices(size)
    running = jnp.where(row > token, _column(gate), 1.0)
    shift = 1
    while shift < size:  # running products over ever more rows
        above = pltpu.roll(running, shift, 0)
        running = running * jnp.where(row >= shift, above, 1.0)
        shift *= 2
    return jnp.where(row >= token, running, 0.0)


def _between_forward(gate, dtype):
    products = _between(gate, dtype)
    return products, products


def _between_backward(dtype, products, d_products):
    """Gate s is a factor of row t, column i where i < s <= t: of A_ts A_(s-1)i."""
    row, token = _indices(products.shape[0])
    before = jnp.where(row >= 1, pltpu.roll(products, 1, 0), 0.0)
    d_products = jnp.where(row >= token, d_products, 0.0)
    sums = product(d_products, before, (1, 1), dtype)
    return (jnp.sum(products * sums, axis=0, keepdims=True),)


_between.defvjp(_between_forward, _between_backward)


def _indices(size: int) -> list[jax.Array]:
    """Index of the row and of the column of each element."""
    return [lax.broadcasted_iota(jnp.int32, (size, size), axis) for axis in (0, 1)]


def _sum_rows(x: jax.Array) -> jax.Array:
    """`[rows,C] -> [rows,1]`."""
    return jnp.sum(x, axis=1, keepdims=True)


def _column(row: jax.Array) -> jax.Array:
    """`[1,C] -> [C,1]`."""
    i, j = _indices(row.shape[1])
    return jnp.sum(jnp.where(i == j, row, 0.0), axis=1, keepdims=True)


def _last(x: jax.Array) -> jax.Array:
    """The last row, `[C,size] -> [1,size]`."""
    row = lax.broadcasted_iota(jnp.int32, x.shape, 0)
    return jnp.sum(jnp.where(row == x.shape[0] - 1, x, 0.0), axis=0, keepdims=True)
