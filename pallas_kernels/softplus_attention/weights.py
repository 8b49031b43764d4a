"""The arithmetic of weights, on register tiles of scores `t = c cosine / ln 2`.

A transcendental takes as long as 8 additions (16 a clock and multiprocessor), so softplus is
written with two, and its sum over a row with one and a sixteenth.
"""

from collections.abc import Callable
from typing import Protocol

import jax
import jax.numpy as jnp

from pallas_kernels.tiles import zeros


class Options(Protocol):
    """What a plan says of weights."""

    @property
    def power(self) -> int:
        """p."""
        ...

    @property
    def thresholded(self) -> bool:
        """Whether weights are compared with their mean (LSSAR) or taken as they are."""
        ...


def power_objection(power: float | None) -> str | None:
    """Why no kernel raises weights to a power, in words, or None."""
    if power is not None and not (float(power).is_integer() and 1 <= power <= 16):
        return f"take a whole power from 1 to 16, not {power}"
    return None


HIDDEN = -1e6
"""The score of a key that is not seen: its weight and its slope are exactly 0."""

PARTIAL = 8
"""Columns to which sums over a row are folded in a loop: what one thread holds without asking."""

# log(1 + x) is cheap but rounds small x away; x bounds it from above and is exact for those.
# Raised by 2^-21, more than the error of the logarithm, log is the smaller of both elsewhere.
_ONE = 1 + 2.0**-21


def log1p(x: jax.Array) -> jax.Array:
    """`log(1 + x)` for x >= 0, to 5e-4 of its value near x = 1e-3 and far better elsewhere."""
    return jnp.minimum(jnp.log(x + _ONE), x)


def softplus(t: jax.Array) -> jax.Array:
    """`log(1 + 2^t)`. Scores are bounded by the length scale, so that 2^t does not overflow."""
    return log1p(jnp.exp2(t))


def sigmoid(t: jax.Array, a: jax.Array) -> jax.Array:
    """The slope of softplus, `2^t / (1 + 2^t)`, given `a = softplus(t)`: no division."""
    return jnp.exp2(t - a * (1 / _LN2))


def softplus_sums(t: jax.Array) -> jax.Array:
    """`softplus(t)` summed over columns, to `[64, PARTIAL]`.

    By `softplus(t) = max(t, 0) + log(1 + 2^-|t|)`, whose second part is taken of products of 16
    terms 1 + x, each between 1 and 2. They are multiplied without their 1: x + y + x y.
    """
    linear = fold(jnp.maximum(t, 0.0), jnp.add)
    product = fold(jnp.exp2(-jnp.abs(t)), lambda x, y: x * y + (x + y))
    return linear * _LN2 + log1p(product)


def raised(r: jax.Array, power: int) -> jax.Array:
    """`r^power`, power at least 1, in few products: 5 for 15."""
    if power == 1:
        return r
    if power % 3 == 0:
        root = raised(r, power // 3)
        return root * root * root
    if power % 2 == 0:
        root = raised(r, power // 2)
        return root * root
    return r * raised(r, power - 1)


def weight_gradients(d: jax.Array, r: jax.Array, options: Options) -> jax.Array:
    """`d r^(p-1)`, the gradient of r but for a factor of the row; 0 of what was dropped."""
    if not options.thresholded:
        return d
    if options.power == 1:
        return jnp.where(r > 0, d, 0.0)
    return d * raised(r, options.power - 1)


def fold(x: jax.Array, combine: Callable[[jax.Array, jax.Array], jax.Array]) -> jax.Array:
    """Combines the columns of a tile, to `[64, PARTIAL]`: within threads, without shuffles."""
    while x.shape[1] > PARTIAL:
        half = x.shape[1] // 2
        x = combine(x[:, :half], x[:, half:])
    return x


def partial_zeros() -> jax.Array:
    """Folded sums of nothing."""
    return zeros(PARTIAL)


_LN2 = 0.6931471805599453
