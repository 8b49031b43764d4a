"""Learning algorithms that a model may run in its forward pass, written down plainly.

Each takes the examples of B rows, `x [B,n,d]` and `y [B,n]`, and gives weights `w [B,d]`; examples
of zeros count for nothing (`Regression.first`). The one without weights, nearest neighbours, gives
predictions.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from lcattn.typing import Array, Float, Int

Inputs = Float[Array, "B n d"]
Labels = Float[Array, "B n"]
Weights = Float[Array, "B d"]
Learner = Callable[[Inputs, Labels], Weights]


def least_squares(x: Inputs, y: Labels) -> Weights:
    """OLS; of all solutions that of the least norm, where examples are fewer than coordinates."""
    return jnp.einsum("bdn,bn->bd", jnp.linalg.pinv(x), y)


def ridge(x: Inputs, y: Labels, penalty: float | Array) -> Weights:
    """The minimiser of `|Xw - y|² + penalty |w|²`."""
    gram = jnp.einsum("bni,bnj->bij", x, x) + penalty * jnp.eye(x.shape[-1])
    return jnp.linalg.solve(gram, correlation(x, y)[..., None])[..., 0]


def correlation(x: Inputs, y: Labels) -> Weights:
    """`Xᵀy`, the direction of the first gradient."""
    return jnp.einsum("bnd,bn->bd", x, y)


def gradient_descent(x: Inputs, y: Labels, rate: float | Array, num_steps: int = 1) -> Weights:
    """`num_steps` from zero on `½ |Xw - y|²`. One of them gives `rate Xᵀy`."""

    def step(_: Array | int, w: Array) -> Array:
        return w + rate * correlation(x, y - jnp.einsum("bnd,bd->bn", x, w))

    return jax.lax.fori_loop(0, num_steps, step, jnp.zeros_like(x[:, 0]))


def sgd(x: Inputs, y: Labels, rate: float | Array) -> Weights:
    """One pass over the examples, one at a time, on `½ (wᵀx - y)²`.

    The published code means this and, by a `min` for a `max`, takes the whole prefix each time.
    """

    def step(w: Array, example: tuple[Array, Array]) -> tuple[Array, None]:
        x, y = example
        return w + rate * (y - (w * x).sum(-1))[:, None] * x, None

    examples = x.swapaxes(0, 1), y.swapaxes(0, 1)
    return jax.lax.scan(step, jnp.zeros_like(x[:, 0]), examples)[0]


@functools.partial(jax.jit, static_argnames=("neighbours", "weighted"))
def nearest_neighbours(
    x: Inputs,
    y: Labels,
    query: Float[Array, "B d"],
    *,
    neighbours: int = 3,
    weighted: bool = False,
    count: int | Int[Array, ""] | None = None,
) -> Float[Array, "B"]:
    """The mean label of the nearest examples.

    Args:
      x: inputs.
      y: labels.
      query: the input asked for.
      neighbours: how many, at most as many as there are.
      weighted: weigh them by the inverse square of their distance.
      count: only the first so many examples are there. None: all.
    """
    n = x.shape[1]
    squares = jnp.square(x - query[:, None]).sum(-1)
    squares = jnp.where(jnp.arange(n) < (n if count is None else count), squares, jnp.inf)
    nearest = jnp.argsort(squares)[:, :neighbours]
    squares, labels = (jnp.take_along_axis(a, nearest, axis=1) for a in (squares, y))
    found = jnp.isfinite(squares)
    weights = jnp.where(found, 1 / (squares + 1e-8), 0) if weighted else found.astype(y.dtype)
    return (weights * labels).sum(-1) / jnp.maximum(weights.sum(-1), 1e-30)


def apply(w: Weights, query: Float[Array, "B d"]) -> Float[Array, "B"]:
    """What weights predict."""
    return (w * query).sum(-1)
