"""Terms of the objective that layers contribute themselves."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lcattn.typing import Array, Float


class AuxiliaryLoss(nnx.Variable):
    """A weighted term that a layer wants added to the objective, of its last call in training.

    It is written under the trace of that call, so the objective differentiates through it.
    """


def auxiliary_loss(model: Any) -> Float[Array, ""]:
    """The sum of what the layers of a model contributed; 0 if none does."""
    terms = jax.tree.leaves(nnx.state(model, AuxiliaryLoss))
    return sum(terms, start=jnp.zeros((), jnp.float32))
