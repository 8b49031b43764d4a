"""The memory itself: a network without biases, an activation between its layers."""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import jax

from lcattn.errors import argument_error
from lcattn.ops.chunks import einsum
from lcattn.typing import Array, Float

Activation = Literal["gelu", "relu", "silu", "tanh"] | Callable[[Array], Array]
"""By name (gelu in its tanh form), or any differentiable element-wise function."""

Weights = tuple[Array, ...]
"""One matrix a layer, `[B,M,in,out]`."""

_ACTIVATIONS = {
    "gelu": jax.nn.gelu,
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "tanh": jax.numpy.tanh,
}


class Surprise(NamedTuple):
    """What keys and values do to the memory, without a weight matrix a token.

    The gradient of a token's loss with respect to the weights of a layer is the outer product of
    the layer's input and the gradient with respect to its output (`error`).

    Attributes:
      inputs: of each layer, `[B,M,C,in]`.
      errors: of each layer, `[B,M,C,out]`.
    """

    inputs: tuple[Array, ...]
    errors: tuple[Array, ...]


def resolve_activation(activation: Activation) -> Callable[[Array], Array]:
    """The function of that name, or the function itself."""
    if callable(activation):
        return activation
    if activation not in _ACTIVATIONS:
        expected = f"a function, or one of {sorted(_ACTIVATIONS)}"
        raise argument_error("activation", expected, repr(activation))
    return _ACTIVATIONS[activation]


def name_of(activate: Callable[[Array], Array]) -> str:
    """The name of an activation that has one."""
    return next(name for name, function in _ACTIVATIONS.items() if function is activate)


def recall(
    q: Float[Array, "*B T F"],
    weights: Sequence[Float[Array, "*B _ _"]],
    activation: Activation = "gelu",
) -> Float[Array, "*B T H"]:
    """Reads a memory without writing to it: the network's output for each query.

    Args:
      q: queries, tokens on the axis before the last.
      weights: one matrix a layer, `[...,in,out]`.
      activation: between the layers, as in `neural_memory`.

    Returns:
      float32, or float64 for float64 queries.
    """
    activate, x = resolve_activation(activation), q
    for layer in weights[:-1]:
        x = activate(einsum("...tf,...fh->...th", x, layer, like=q))
    return einsum("...tf,...fh->...th", x, weights[-1], like=q)


def surprise(k: Array, v: Array, weights: Weights, activate: Callable[[Array], Array]) -> Surprise:
    """Gradients of |M(k) - v|² for each token, as factors; all at the same weights."""
    x, inputs, pull_backs = k, [k], []
    for layer in weights[:-1]:
        x, pull_back = jax.vjp(activate, einsum("...tf,...fh->...th", x, layer, like=k))
        inputs.append(x)
        pull_backs.append(pull_back)
    error = 2 * (einsum("...tf,...fh->...th", x, weights[-1], like=k) - v)
    errors = [error]
    for layer, pull_back in zip(reversed(weights[1:]), reversed(pull_backs), strict=True):
        (error,) = pull_back(einsum("...th,...fh->...tf", error, layer, like=k))
        errors.append(error)
    return Surprise(tuple(inputs), tuple(reversed(errors)))
