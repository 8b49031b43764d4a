"""Three numbers that learn what the network learns: a model of how abrupt learning comes about.

A reconstruction of the phenomenological model of Reddy (2024), arXiv 2312.03002, section 5.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lcattn.errors import argument_error
from lcattn.typing import Array, Float


class ThreeLogitRun(NamedTuple):
    """Gradient descent from `start`; entry t is after t steps.

    Attributes:
      loss: `[steps + 1]`.
      parameters: `[steps + 1, 3]`: beta1, beta2, xi.
      first, second: `[steps + 1]`: attention of a label to its item, and of the target to the right
        label among the N.
      context_label: probability of all labels of the context together.
      right_label: that of the right one.
    """

    loss: Float[Array, "t"]
    parameters: Float[Array, "t 3"]
    first: Float[Array, "t"]
    second: Float[Array, "t"]
    context_label: Float[Array, "t"]
    right_label: Float[Array, "t"]


def three_logit(
    num_labels: int,
    *,
    num_items: int = 8,
    learning_rate: float = 0.5,
    num_steps: int = 1000,
    start: tuple[float, float, float] = (0.0, 0.0, 0.0),
) -> ThreeLogitRun:
    r"""Trains beta1, beta2 and xi by gradient descent.

    .. math::
        a_1 = \frac{e^{\beta_1}}{e^{\beta_1} + 2N}, \qquad
        a_2 = \frac{e^{\beta_2 a_1}}{e^{\beta_2 a_1} + N - 1}

    The right label has the logit ξ·a₂, each of the N - 1 others in the context ξ(1 - a₂)/(N - 1),
    each of the L - N absent ones 0; the loss is the cross entropy of the right one. At the origin
    only ξ has a gradient, proportional to 1 - N/L: it learns to answer with *some* label of the
    context, then β₂ can grow, then β₁. With L = N there is nothing to gain from that first step:
    the origin is a saddle, and nothing is ever learned.

    Args:
      num_labels: L, at least N.
      num_items: N, at least 2.
      learning_rate: of gradient descent.
      num_steps: of it.
      start: beta1, beta2, xi.
    """
    if num_items < 2:
        raise argument_error("num_items", "at least 2", num_items)
    if num_labels < num_items:
        raise argument_error("num_labels", f"at least num_items={num_items}", num_labels)
    return _run(num_labels, num_items, num_steps, learning_rate, jnp.asarray(start, jnp.float32))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _run(L: int, N: int, num_steps: int, rate: Array, start: Float[Array, "3"]) -> ThreeLogitRun:
    def model(parameters: Float[Array, "3"]) -> tuple[Array, tuple[Array, ...]]:
        # Plain ratios of exponentials: at the origin with L = N gradients are then exactly 0, where
        # the rounding of logarithms would push the model off the saddle.
        beta1, beta2, xi = parameters
        first = jnp.exp(beta1) / (jnp.exp(beta1) + 2 * N)
        second = jnp.exp(beta2 * first) / (jnp.exp(beta2 * first) + N - 1)
        right = jnp.exp(xi * second)
        others = (N - 1) * jnp.exp(xi * (1 - second) / (N - 1))
        total = right + others + (L - N)
        answer = right / total
        return -jnp.log(answer), (first, second, (right + others) / total, answer)

    def step(parameters: Array, _: None):
        (loss, seen), gradient = jax.value_and_grad(model, has_aux=True)(parameters)
        return parameters - rate * gradient, (loss, parameters, *seen)

    _, trace = jax.lax.scan(step, start, length=num_steps + 1)
    return ThreeLogitRun(*trace)
