r"""Gradient descent and GD++ as predictors to set beside a model, and their best rates.

They are computed by formulas of their own rather than by the attention that embodies them
(`constructions`), so that one checks the other.
"""

import dataclasses
from typing import override

import jax
import jax.numpy as jnp
import numpy as np

from lcattn.config import Config
from lcattn.tasks.regression import RegressionTask
from lcattn.typing import Array, Float, PRNGKeyArray


@dataclasses.dataclass(frozen=True, kw_only=True)
class DescentConfig(Config):
    r"""Steps of gradient descent from zero on the mean squared error of the context.

    Step k takes :math:`y_j \leftarrow y_j - \frac{\eta_k}{n} \sum_i y_i\, x_i^\top x_j` and, as
    GD++, :math:`x_j \leftarrow x_j - \gamma_k \sum_i x_i\, x_i^\top x_j`, both from the old values.

    Attributes:
      rates: η of each step.
      curvatures: γ of each step. Empty: plain gradient descent.
    """

    rates: tuple[float, ...]
    curvatures: tuple[float, ...] = ()

    @override
    def validate(self) -> None:
        if not self.rates:
            raise self.error("rates", "at least one")
        if self.curvatures and len(self.curvatures) != len(self.rates):
            raise self.error("curvatures", f"as many as rates ({len(self.rates)}), or none")

    def __call__(self, tokens: Float[Array, "B T E"]) -> Float[Array, "B"]:
        """The predictions for `[B,n+1,d+1]` tokens, the last of which is the query."""
        return descend(tokens, self.rates, self.curvatures or (0.0,) * len(self.rates))


def descend(tokens: Float[Array, "B T E"], rates, curvatures) -> Float[Array, "B"]:
    """As `DescentConfig` says, with rates and curvatures that may be traced."""
    x, y, n = tokens[..., :-1], tokens[..., -1], tokens.shape[1] - 1
    for k in range(len(rates)):
        inner = jnp.einsum("bid,bjd->bij", x[:, :n], x)
        moved = jnp.einsum("bid,bij->bjd", x[:, :n], inner)
        y = y - rates[k] / n * jnp.einsum("bi,bij->bj", y[:, :n], inner)
        x = x - curvatures[k] * moved
    return -y[:, -1]


def best_rate(task: RegressionTask, key: PRNGKeyArray, count: int = 10_000) -> float:
    """The rate of the one step that fits `count` rows best, in closed form: the fit is linear."""
    batch = task.sample(key, count)
    step = DescentConfig(rates=(1.0,))(batch.tokens())
    return float(jnp.vdot(step, batch.target) / jnp.vdot(step, step))


@dataclasses.dataclass(frozen=True, kw_only=True)
class DescentProblem(Config):
    """Rates and curvatures as what is trained: the best gradient descent of some depth.

    Attributes:
      task: draws the regressions.
      num_steps: of gradient descent.
      tied: the same rate and curvature in every step.
      curved: GD++ rather than plain gradient descent.
      batch_size: rows in a batch.
      eval_size: rows of the evaluation.
      initial_rate: where the rates start.
    """

    task: RegressionTask
    num_steps: int = 2
    tied: bool = True
    curved: bool = True
    batch_size: int = 512
    eval_size: int = 10_000
    initial_rate: float = 6.0

    @override
    def validate(self) -> None:
        self.require_positive("num_steps", "batch_size", "eval_size", "initial_rate")

    def init(self, key: PRNGKeyArray):
        """Parameters in units in which all are near 1."""
        del key
        ones = jnp.ones(1 if self.tied else self.num_steps)
        return {"rates": ones, "curvatures": jnp.zeros_like(ones)}, {}

    def loss(self, params, model_state, key: PRNGKeyArray):
        """Half the mean squared error on rows that `key` draws."""
        return self._loss(params, key, self.batch_size), model_state

    def evaluate(self, params, model_state):
        """The same on rows that are always the same."""
        del model_state
        return {"loss": self._loss(params, evaluation_key(), self.eval_size)}

    def _loss(self, params, key: PRNGKeyArray, count: int) -> Array:
        batch = self.task.sample(key, count)
        rates, curvatures = self._steps(params)
        return jnp.square(descend(batch.tokens(), rates, curvatures) - batch.target).mean() / 2

    def _steps(self, params) -> tuple[Array, Array]:
        rates, curvatures = self.initial_rate * params["rates"], params["curvatures"]
        if not self.curved:
            curvatures = jnp.zeros_like(curvatures)
        repeat = self.num_steps if self.tied else 1
        return jnp.tile(rates, repeat), jnp.tile(curvatures, repeat)

    def best(self, params) -> DescentConfig:
        """The descent that trained parameters stand for; of several seeds, their mean."""
        mean = jax.tree.map(lambda p: np.asarray(p, np.float64).mean(axis=0), params)
        rates, curvatures = (tuple(a.tolist()) for a in self._steps(mean))
        return DescentConfig(rates=rates, curvatures=curvatures)


def evaluation_key() -> PRNGKeyArray:
    """Of the rows that everything is judged by; no seed of a run draws them."""
    return jax.random.key(0x1C1)
