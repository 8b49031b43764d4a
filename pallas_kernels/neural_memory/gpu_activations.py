"""Activations with two derivatives, written out: kernels for GPUs cannot be differentiated."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

Derivatives = tuple[jax.Array, jax.Array, jax.Array]
"""Of a function at each element: value, slope and curvature."""


def gelu(x: jax.Array) -> Derivatives:
    """In its tanh form."""
    root, cubic = math.sqrt(2 / math.pi), 0.044715
    square = x * x
    t = jnp.tanh(root * x * (1 + cubic * square))
    d_t, rate = 1 - t * t, root * (1 + 3 * cubic * square)
    half = 0.5 * x
    return (
        half + half * t,
        0.5 + 0.5 * t + half * d_t * rate,
        d_t * (rate + 3 * root * cubic * square - x * t * rate * rate),
    )


def relu(x: jax.Array) -> Derivatives:
    """With slope 0 at 0."""
    return jnp.maximum(x, 0), jnp.where(x > 0, 1.0, 0.0), jnp.where(x > 0, 0.0, 0.0)


def silu(x: jax.Array) -> Derivatives:
    """x times its logistic function."""
    s = 0.5 + 0.5 * jnp.tanh(0.5 * x)
    d_s = s * (1 - s)
    return x * s, s + x * d_s, d_s * (2 + x * (1 - 2 * s))


def tanh(x: jax.Array) -> Derivatives:
    """The hyperbolic tangent."""
    t = jnp.tanh(x)
    d_t = 1 - t * t
    return t, d_t, -2 * t * d_t


ACTIVATIONS: dict[str, Callable[[jax.Array], Derivatives]] = {
    "gelu": gelu, "relu": relu, "silu": silu, "tanh": tanh,
}  # fmt: skip
