"""Rows in another order, with gradients that are fetched rather than scattered."""

import functools

import jax
import jax.numpy as jnp

from lcattn.ops.checks import accumulation_dtype
from lcattn.typing import Array, Float, Int


def take(x: Float[Array, "B T N H"], index: Int[Array, "B N R"]) -> Float[Array, "B R N H"]:
    """Rows of each head at its indices; zeros past the end."""
    at = jnp.swapaxes(index, 1, 2)[..., None]
    return jnp.take_along_axis(x, at, axis=1, mode="fill", fill_value=0)


@jax.custom_vjp
def rearrange(
    x: Float[Array, "B T N H"], index: Int[Array, "B N R"], places: Int[Array, "B N L T"]
) -> Float[Array, "B R N H"]:
    """`take(x, index)`, where row t went to `places[:, :, :, t]`; past the end for nowhere."""
    del places
    return take(x, index)


def _forward(x, index, places):
    return rearrange(x, index, places), places


def _backward(places, gradient):
    parts = (
        take(gradient, places[:, :, level]).astype(accumulation_dtype(gradient.dtype))
        for level in range(places.shape[2])
    )
    return functools.reduce(jnp.add, parts).astype(gradient.dtype), None, None


rearrange.defvjp(_forward, _backward)
