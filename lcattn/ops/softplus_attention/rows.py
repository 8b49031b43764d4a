"""What a row of weights depends on besides its scores."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax

from lcattn.ops.checks import accumulation_dtype
from lcattn.typing import Array, Float

# Rows whose largest excess over the threshold is below this keep the weights of the first stage.
FLAT = 1e-5


class Rows(NamedTuple):
    """Of each query: the factor c of its cosines, the number n of keys it sees, its threshold o.

    None of them is differentiated.
    """

    length_scale: Float[Array, "b T"]
    length: Float[Array, "b T"]
    offset: Float[Array, "b T"]


class Reweighting(NamedTuple):
    """The second stage of LSSAR, row by row."""

    power: float

    def excess(self, weights: Array, total: Array, rows: Rows) -> Array:
        """y = max(n a / S - o, 0), for weights `[..., t, s]` and row statistics `[..., t]`."""
        relative = (rows.length / total)[..., None] * weights
        return jnp.maximum(relative - rows.offset[..., None], 0)

    def is_flat(self, highest_excess: Array) -> Array:
        """Whether no key of a row stands out."""
        return highest_excess <= FLAT

    def raised(self, ratio: Array, *, derivative: bool = False) -> Array:
        """r^p, or p r^(p-1)."""
        power = self.power - derivative
        # Whole powers by squaring: r^15 is 6 products, exp(15 ln r) two transcendentals.
        if power.is_integer():
            result = lax.integer_pow(ratio, int(power))
        else:
            result = jnp.power(ratio, power)
        return self.power * result if derivative else result


def unit(x: Array) -> Array:
    """Vectors of length 1 in float32; vectors far below 1e-6 keep their direction only."""
    return x.astype(accumulation_dtype(x.dtype)) / jnp.sqrt(squared_norm(x))


def squared_norm(x: Array) -> Array:
    """Of each vector, as `unit` has it, `[..., 1]`."""
    wide = x.astype(accumulation_dtype(x.dtype))
    return jnp.sum(wide * wide, axis=-1, keepdims=True) + 1e-12
