"""What a stream of neural memory remembers: the network, its momentum, and its place in a chunk."""

import dataclasses
from collections.abc import Sequence
from typing import no_type_check

import jax
import jax.numpy as jnp

from lcattn.errors import argument_error
from lcattn.ops import checks
from lcattn.ops.neural_memory.network import Weights
from lcattn.typing import Array, Bool, Float, Int


@no_type_check  # JAX also fills it with shapes and specs
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NeuralMemoryState:
    """Three copies of the network a stream and head, in float32, whatever the length.

    Attributes:
      weights: of each layer `[B,M,in,out]`, after the last token.
      momentum: the running surprise S of each layer, of the same shapes.
      anchor: weights at the start of the chunk under way, where its gradients are taken; equal to
        `weights` between chunks.
      position: tokens of the chunk under way, `[B]` int32, below the chunk size.
    """

    weights: Weights
    momentum: Weights
    anchor: Weights
    position: Int[Array, "B"]


def neural_memory_state(
    weights: Sequence[Float[Array, "M _ _"]], batch_size: int
) -> NeuralMemoryState:
    """The state before the first token.

    Args:
      weights: the initial network, one `[M,in,out]` a layer, as given to `neural_memory`.
      batch_size: B.
    """
    start = tuple(
        jnp.broadcast_to(x, (batch_size, *x.shape)).astype(checks.accumulation_dtype(x.dtype))
        for x in weights
    )
    return NeuralMemoryState(
        weights=start,
        momentum=tuple(jnp.zeros_like(x) for x in start),
        anchor=start,
        position=jnp.zeros((batch_size,), jnp.int32),
    )


def check_state(state: NeuralMemoryState, expected: NeuralMemoryState) -> None:
    """Checks every array of a state against those of an empty one."""
    for field in ("weights", "momentum", "anchor"):
        arrays, shapes = getattr(state, field), [x.shape for x in getattr(expected, field)]
        name = f"initial_state.{field}"
        if len(arrays) != len(shapes):
            raise argument_error(name, f"{len(shapes)} layers, as weights", len(arrays))
        for layer, (array, shape) in enumerate(zip(arrays, shapes, strict=True)):
            checks.check_shape(f"{name}[{layer}]", array, shape, "[B,M,in,out]")
    checks.check_shape("initial_state.position", state.position, expected.position.shape, "[B]")


def select[Tree](condition: Bool[Array, "B"], yes: Tree, no: Tree) -> Tree:
    """`where` for trees of arrays `[B,...]`."""
    return jax.tree.map(lambda a, b: jnp.where(spread(condition, b), a, b), yes, no)


def spread(x: Array, like: Array) -> Array:
    """`x` with trailing axes, to broadcast against `like`."""
    return x.reshape(*x.shape, *(1,) * (like.ndim - x.ndim))
