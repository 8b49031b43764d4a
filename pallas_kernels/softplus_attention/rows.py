"""What weights depend on besides their scores: a few float32 numbers a query.

Kernels read them as one array `[B,N,numbers,T]`, numbered by `Row`.
"""

import enum
from typing import NamedTuple

import jax
import jax.numpy as jnp

LN2 = 0.6931471805599453

# Far below any sum of weights; queries that see nothing have a sum of 0.
_TINY = 1e-30


class Row(enum.IntEnum):
    """The numbers of a query, where r = max(gain a - threshold, 0) and a = softplus(score)."""

    GAIN = 0
    THRESHOLD = 1
    MEAN = 2  # dO·O, over the sum of r^p
    SLOPE = 3  # the gradient of a score is slope (d r^(p-1) - e) sigmoid(score)
    SHARED = 4  # e; for the kernel that finds e, the factor of its sum


class Scales(NamedTuple):
    """Of each query, `[b,T]` in float32; b is B, or 1 where all rows are alike.

    Attributes:
      length: n, the number of keys that it sees.
      offset: o, its threshold relative to the mean weight.
    """

    length: jax.Array
    offset: jax.Array


class Sums(NamedTuple):
    """Over the keys of each query, `[B,N,T]` in float32.

    Attributes:
      total: S, the sum of a.
      highest: the largest score.
    """

    total: jax.Array
    highest: jax.Array


def weight_numbers(scales: Scales, sums: Sums, flat_below: float) -> jax.Array:
    """Gain and threshold: with them r = y / max y of y = max(n a / S - o, 0)."""
    gain, threshold, _ = _threshold(scales, sums, flat_below)
    return jnp.stack([gain, threshold], axis=2)


def gradient_numbers(
    scales: Scales, sums: Sums | None, mean: jax.Array, *, power: int, flat_below: float
) -> jax.Array:
    """All numbers, `mean` being given; without sums, as far as LSSA needs them.

    In e = sum_s d_s r_s^(p-1) a_s / S, a = (r + threshold) / gain wherever r > 0, and the sum of
    d_s r_s^p is 0. What is left is o / n times the sum of d_s r_s^(p-1).
    """
    if sums is None:
        zero = jnp.zeros_like(mean)
        return jnp.stack([zero, zero, mean, zero + LN2, zero], axis=2)
    gain, threshold, flat = _threshold(scales, sums, flat_below)
    slope = jnp.where(flat, LN2, LN2 * power) * gain
    shared = jnp.where(flat, 0, (scales.offset / scales.length)[:, None])
    return jnp.stack([gain, threshold, mean, slope, shared], axis=2)


def reciprocal(total: jax.Array) -> jax.Array:
    """`1 / total`, 0 for queries that see nothing."""
    return jnp.where(total > 0, 1 / jnp.maximum(total, _TINY), 0)


def _threshold(
    scales: Scales, sums: Sums, flat_below: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gain, threshold, and whether a row is flat.

    In a flat row all weights are alike, and so are their p-th powers: r = a / max a, without a
    threshold, gives the mean of the values to within p `flat_below`.
    """
    length, offset = (x[:, None] for x in scales)
    largest = jnp.maximum(jax.nn.softplus(LN2 * sums.highest), _TINY)
    relative = length * reciprocal(sums.total)
    excess = relative * largest - offset
    flat = excess <= flat_below
    safe = jnp.where(flat, 1, excess)
    gain = jnp.where(flat, 1 / largest, relative / safe)
    return gain, jnp.where(flat, 0, offset / safe), flat
