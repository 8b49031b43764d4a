"""How near two predictors are: in what they say, and in what they are sensitive to.

Metrics of von Oswald et al. 2022. They need predictions and input gradients alone, so they apply to
any mechanism.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from lcattn.probes.regression.attention import LSAWeights
from lcattn.typing import Array, Float

Tokens = Float[Array, "B T E"]
Predictor = Callable[[Tokens], Float[Array, "B"]]


def sensitivity(
    predict: Predictor, tokens: Tokens
) -> tuple[Float[Array, "B"], Float[Array, "B d"]]:
    """The predictions, and their gradients with respect to the query."""

    def total(query: Array) -> tuple[Array, Array]:
        y = predict(tokens.at[:, -1, :-1].set(query))
        return y.sum(), y

    gradient, predictions = jax.grad(total, has_aux=True)(tokens[:, -1, :-1])
    return predictions, gradient


def alignment(
    ours: tuple[Float[Array, "B"], Float[Array, "B d"]],
    theirs: tuple[Float[Array, "B"], Float[Array, "B d"]],
) -> dict[str, Float[Array, ""]]:
    """Distances of two predictors, each by its `sensitivity` on the same rows.

    Returns:
      `pred_diff`, the mean absolute difference of predictions; `model_diff`, the mean distance of
      sensitivities; `cos`, their mean cosine (rows without any count 0).
    """
    (y_a, g_a), (y_b, g_b) = ours, theirs
    norms = jnp.linalg.norm(g_a, axis=-1) * jnp.linalg.norm(g_b, axis=-1)
    return {
        "pred_diff": jnp.abs(y_a - y_b).mean(),
        "model_diff": jnp.linalg.norm(g_a - g_b, axis=-1).mean(),
        "cos": ((g_a * g_b).sum(-1) / jnp.maximum(norms, 1e-8)).mean(),
    }


def half_mse(predictions: Float[Array, "B"], target: Float[Array, "B"]) -> Float[Array, ""]:
    """Half the mean squared error, the loss of all figures."""
    return jnp.square(predictions - target).mean() / 2


def interpolate(a: LSAWeights, b: LSAWeights, dim: int) -> LSAWeights:
    """The layer halfway between two layers of one head.

    Only the products of the weights can be compared, and these only up to a factor that moves
    between them, so each layer is first scaled to a mean of 1 on the diagonal of its scores of
    inputs.

    Args:
      a, b: the layers.
      dim: size d of an input.
    """
    (scores_a, writes_a), (scores_b, writes_b) = (normalized_products(x, dim) for x in (a, b))
    return LSAWeights.of_products((scores_a + scores_b) / 2, (writes_a + writes_b) / 2)


def normalized_products(
    weights: LSAWeights, dim: int
) -> tuple[Float[Array, "N E E"], Float[Array, "N E E"]]:
    """`W_Kᵀ W_Q` and `P W_V` of each head, the first scaled to a mean of 1 on the inputs."""
    scores, writes = weights.key_query, weights.out_value
    beta = jnp.diagonal(scores, axis1=1, axis2=2)[:, :dim].mean(axis=1)[:, None, None]
    return scores / beta, writes * beta
