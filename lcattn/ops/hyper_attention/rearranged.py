"""Rows in another order, with gradients that are fetched rather than scattered.

Rows that are fetched lie head by head: those of one head come from so little memory that caches
hold it, while neighbours in time that are of different heads share nothing.
"""

import functools

import jax
import jax.numpy as jnp

from lcattn.ops.checks import accumulation_dtype
from lcattn.typing import Array, Float, Int


def take(x: Float[Array, "B N T *H"], index: Int[Array, "B N R"]) -> Float[Array, "B N R *H"]:
    """Rows of each head at its indices; zeros past the end."""
    index = index.reshape(*index.shape, *(1,) * (x.ndim - 3))
    last = x.shape[2] - 1
    rows = jnp.take_along_axis(x, jnp.minimum(index, last), axis=2, mode="promise_in_bounds")
    return jnp.where(index <= last, rows, 0)


@jax.custom_vjp
def rearrange(
    x: Float[Array, "B T N H"], index: Int[Array, "B N R"], places: Int[Array, "B N L T"]
) -> Float[Array, "B N R H"]:
    """Rows at `index`, where row t went to `places[:, :, :, t]`; past the end for nowhere."""
    del places
    return take(jnp.swapaxes(x, 1, 2), index)


def _forward(x, index, places):
    return rearrange(x, index, places), places


def _backward(places, gradient):
    parts = (
        take(gradient, places[:, :, level]).astype(accumulation_dtype(gradient.dtype))
        for level in range(places.shape[2])
    )
    total = functools.reduce(jnp.add, parts).astype(gradient.dtype)
    return jnp.swapaxes(total, 1, 2), None, None


rearrange.defvjp(_forward, _backward)
