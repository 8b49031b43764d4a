"""Which learning algorithm a causal model agrees with, by the number of examples it has seen.

Metrics of Akyürek et al. 2022 (arXiv 2211.15661). A model reads the stream of
`lcattn.tasks.regression.Regression.stream` and predicts every label from its prefix.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from lcattn.probes.regression.learners import Learner
from lcattn.tasks.regression import Regression
from lcattn.typing import Array, Float

StreamPredictor = Callable[[Float[Array, "B T E"]], Float[Array, "B T"]]
"""At each token of a stream, the label that follows; only those of inputs count."""


def prefix_predictions(predict: StreamPredictor, batch: Regression) -> Float[Array, "m B"]:
    """What is predicted for input i from the i examples before it, for i = 0 .. n; m = n + 1."""
    return predict(batch.stream())[:, ::2].T


def learner_predictions(learner: Learner, batch: Regression) -> Float[Array, "m B"]:
    """What an algorithm says in the same places."""
    inputs = jnp.concatenate([batch.x, batch.query[:, None]], axis=1)

    def at(count: Array) -> Array:
        seen = batch.first(count)
        return (learner(seen.x, seen.y) * inputs[:, count]).sum(-1)

    return jax.lax.map(at, jnp.arange(inputs.shape[1]))


def prefix_targets(batch: Regression) -> Float[Array, "m B"]:
    """The labels that are to be predicted there."""
    return jnp.concatenate([batch.y.T, batch.target[None]])


def spd(a: Float[Array, "m B"], b: Float[Array, "m B"]) -> Float[Array, "m"]:
    """Squared prediction difference, by the number of examples."""
    return jnp.square(a - b).mean(axis=-1)


def implied_weights(
    predict: StreamPredictor, batch: Regression, probes: Float[Array, "P d"]
) -> Float[Array, "m B d"]:
    """The linear map that a model behaves like after i examples, for i = 0 .. n.

    Fitted by least squares to what it says of inputs that it is asked for in place of its own. What
    follows them in the stream does not matter, since the model is causal.
    """
    stream, n = batch.stream(), batch.x.shape[1]
    fit = jnp.linalg.pinv(probes)

    def at(count: Array) -> Array:
        def ask(probe: Array) -> Array:
            asked = stream.at[:, 2 * count, 1:].set(probe)
            return jnp.take(predict(asked), 2 * count, axis=1)

        return jnp.einsum("dp,pb->bd", fit, jax.vmap(ask)(probes))

    return jax.lax.map(at, jnp.arange(n + 1))


def learner_weights(learner: Learner, batch: Regression) -> Float[Array, "m B d"]:
    """The weights of an algorithm after i examples, for i = 0 .. n."""

    def at(count: Array) -> Array:
        seen = batch.first(count)
        return learner(seen.x, seen.y)

    return jax.lax.map(at, jnp.arange(batch.x.shape[1] + 1))


def ilwd(a: Float[Array, "m B d"], b: Float[Array, "m B d"]) -> Float[Array, "m"]:
    """Implicit linear weight difference, by the number of examples."""
    return jnp.square(a - b).sum(-1).mean(-1)


def linear_probe(
    states: Float[Array, "B D"], targets: Float[Array, "B m"], penalty: float = 1e-3
) -> Float[Array, ""]:
    """How much of `targets` a linear map reads from `states`, as R² on the rows it was not fit to.

    Fitted by ridge regression to the first half of the rows. (Published is a probe with a learned
    softmax over positions, trained by gradient descent; this one reads one position.)
    """
    half = len(states) // 2
    mean, std = states[:half].mean(0), states[:half].std(0) + 1e-8
    features = jnp.pad((states - mean) / std, ((0, 0), (0, 1)), constant_values=1.0)
    seen, rest = features[:half], features[half:]
    gram = seen.T @ seen + penalty * half * jnp.eye(features.shape[1])
    map_ = jnp.linalg.solve(gram, seen.T @ targets[:half])
    left = jnp.square(rest @ map_ - targets[half:]).sum()
    return 1 - left / jnp.square(targets[half:] - targets[:half].mean(0)).sum()
