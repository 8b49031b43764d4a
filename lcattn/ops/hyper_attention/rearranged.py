"""Rows in another order, with gradients that are fetched rather than scattered.

Rows that are fetched lie head by head: those of one head come from so little memory that caches
hold it, while neighbours in time that are of different heads share nothing.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from lcattn.ops import dispatch
from lcattn.ops.checks import accumulation_dtype
from lcattn.typing import Array, Float, Int, Shaped


def take(
    x: Shaped[Array, "B _ _ *H"], index: Int[Array, "B n m"], axis: int = 2
) -> Shaped[Array, "B n m *H"]:
    """Rows of each head at its indices, along the axis of tokens; zeros past the end."""
    index = index.reshape(*index.shape, *(1,) * (x.ndim - 3))
    last = x.shape[axis] - 1
    rows = jnp.take_along_axis(x, jnp.minimum(index, last), axis=axis, mode="promise_in_bounds")
    return jnp.where(index <= last, rows, 0)


def _in_words(move: Callable[[Array], Array], x: Float[Array, "B _ _ H"]) -> Array:
    """`move(x)`, for what moves rows and computes nothing.

    Pairs of numbers of 16 bits are moved as one, which takes a GPU three quarters of the time. A
    TPU would have to move them to make pairs.
    """
    H = x.shape[-1]
    if x.dtype.itemsize != 2 or H % 2 or dispatch.default_platform() == "tpu":
        return move(x)
    words = lax.bitcast_convert_type(x.reshape(*x.shape[:-1], H // 2, 2), jnp.uint32)
    moved = move(words)
    return lax.bitcast_convert_type(moved, x.dtype).reshape(*moved.shape[:-1], H)


def _fetch(x: Float[Array, "B T N H"], index: Int[Array, "B N R"]) -> Float[Array, "B N R H"]:
    return _in_words(lambda x: take(jnp.swapaxes(x, 1, 2), index), x)


def fetch_back(x: Float[Array, "B N R H"], place: Int[Array, "B N T"]) -> Float[Array, "B T N H"]:
    """The row at the place of each token; zeros past the end."""
    by_token = jnp.swapaxes(place, 1, 2)
    return _in_words(lambda x: take(jnp.swapaxes(x, 1, 2), by_token, axis=1), x)


@jax.custom_vjp
def rearrange(
    x: Float[Array, "B T N H"], index: Int[Array, "B N R"], places: Int[Array, "B N L T"]
) -> Float[Array, "B N R H"]:
    """Rows at `index`, where row t went to `places[:, :, :, t]`; past the end for nowhere."""
    del places
    return _fetch(x, index)


def _forward(x, index, places):
    return rearrange(x, index, places), places


def _backward(places, gradient):
    if places.shape[2] == 1:
        return fetch_back(gradient, places[:, :, 0]), None, None
    parts = (
        take(gradient, places[:, :, level]).astype(accumulation_dtype(gradient.dtype))
        for level in range(places.shape[2])
    )
    total = functools.reduce(jnp.add, parts).astype(gradient.dtype)
    return jnp.swapaxes(total, 1, 2), None, None


rearrange.defvjp(_forward, _backward)


@jax.custom_vjp
def rearrange_and_sample(
    x: Float[Array, "B T N H"],
    index: Int[Array, "B N R"],
    places: Int[Array, "B N L T"],
    sampled: Int[Array, "B N m"],
) -> Float[Array, "B N rows H"]:
    """`rearrange`, and behind its rows those at places `sampled` again; past the end for none."""
    del places
    again = jnp.where(sampled < index.shape[2], take(index, sampled), x.shape[1])
    return _fetch(x, jnp.concatenate([index, again], axis=2))


def _forward_sampled(x, index, places, sampled):
    return rearrange_and_sample(x, index, places, sampled), (places, sampled)


def _backward_sampled(residuals, gradient):
    places, sampled = residuals
    size = gradient.shape[2]
    # Past the end of the rows that are in order means past the end of all.
    places, sampled = (jnp.where(x < size - sampled.shape[2], x, size) for x in (places, sampled))
    gradient = jax.vmap(jax.vmap(_fold_back))(gradient, sampled)
    return *_backward(places, gradient), None


def _fold_back(x: Float[Array, "rows H"], at: Int[Array, "m"]) -> Float[Array, "rows H"]:
    """Adds the last m rows to those that they are copies of, with one rounding.

    Copies of one row are summed where the first of them is, so that all of x is never widened.
    """
    nth, none = jnp.arange(len(at), dtype=jnp.int32), len(x)
    first = jnp.full(len(x), len(at), jnp.int32).at[at].min(nth, mode="drop")
    first = first.at[at].get(mode="fill", fill_value=len(at))
    dtype = accumulation_dtype(x.dtype)
    own = x.at[at].get(mode="fill", fill_value=0).astype(dtype)
    sums = own.at[first].add(x[-len(at) :].astype(dtype), mode="drop")
    return x.at[jnp.where(first == nth, at, none)].set(sums.astype(x.dtype), mode="drop")


rearrange_and_sample.defvjp(_forward_sampled, _backward_sampled)
