"""What weights depend on besides their cosines: a few float32 numbers a query.

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
    """The numbers of a query, where r = max(gain a - threshold, 0) and a = softplus(c cosine)."""

    LENGTH_SCALE = 0  # c / ln 2: scores are in powers of two
    GAIN = 1
    THRESHOLD = 2
    MEAN = 3  # dO·O, over the sum of r^p
    SLOPE = 4  # the gradient of a cosine is slope (d r^(p-1) - e) sigmoid(c cosine)
    SHARED = 5  # e; for the kernel that finds e, the factor of its sum


class Scales(NamedTuple):
    """Of each query, `[b,T]` in float32.

    Attributes:
      length_scale: c, the factor of its cosines.
      length: n, the number of keys that it sees.
      offset: o, its threshold relative to the mean weight.
    """

    length_scale: jax.Array
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


def score_numbers(q: jax.Array, scales: Scales) -> jax.Array:
    """The first number, all that scores depend on."""
    shape = (q.shape[0], q.shape[2], 1, q.shape[1])
    return jnp.broadcast_to(scales.length_scale[:, None, None] / LN2, shape)


def weight_numbers(q: jax.Array, scales: Scales, sums: Sums, flat_below: float) -> jax.Array:
    """The first three: gain and threshold make r = y / max y of y = n a / S - o."""
    gain, threshold, _ = _threshold(scales, sums, flat_below)
    more = jnp.stack([gain, threshold], axis=2)
    return jnp.concatenate([score_numbers(q, scales), more], axis=2)


def gradient_numbers(
    q: jax.Array,
    scales: Scales,
    sums: Sums | None,
    mean: jax.Array,
    *,
    power: int,
    flat_below: float,
) -> jax.Array:
    """All six, `mean` being given; without sums, as far as LSSA needs them."""
    c, _, offset = (x[:, None] for x in scales)
    if sums is None:
        gain, threshold, shared = (jnp.zeros_like(mean) for _ in range(3))
        slope = jnp.broadcast_to(c, mean.shape)
    else:
        gain, threshold, flat = _threshold(scales, sums, flat_below)
        slope = jnp.where(flat, 1, power) * gain * c
        shared = jnp.where(flat | (offset == 0), 0, 1 / jnp.maximum(sums.total, _TINY))
    more = jnp.stack([gain, threshold, mean, slope, shared], axis=2)
    return jnp.concatenate([score_numbers(q, scales), more], axis=2)


def reciprocal(total: jax.Array) -> jax.Array:
    """`1 / total`, finite for queries that see nothing."""
    return 1 / jnp.maximum(total, _TINY)


def _threshold(
    scales: Scales, sums: Sums, flat_below: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gain, threshold, and whether a row is flat.

    In a flat row all weights are alike, and so are their p-th powers: r = a / max a, without a
    threshold, gives the mean of the values to within p `flat_below`.
    """
    _, length, offset = (x[:, None] for x in scales)
    largest = jnp.maximum(jax.nn.softplus(LN2 * sums.highest), _TINY)
    relative = length * reciprocal(sums.total)
    excess = relative * largest - offset
    flat = excess <= flat_below
    safe = jnp.where(flat, 1, excess)
    gain = jnp.where(flat, 1 / largest, relative / safe)
    return gain, jnp.where(flat, 0, offset / safe), flat
