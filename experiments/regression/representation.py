"""Regression on a representation: an MLP before linear self-attention, on curved functions."""

import dataclasses
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from experiments.regression.study import Study, curves
from lcattn.probes.regression import (
    EmbeddedLSAConfig,
    RegressionProblem,
    evaluation_key,
    half_mse,
    learners,
)
from lcattn.tasks.regression import NetworkRegressionConfig, Regression, RegressionTask
from lcattn.training import train_seeds


@dataclasses.dataclass(frozen=True, kw_only=True)
class RepresentationStudy(Study):
    """A trained layer behind an MLP, beside gradient descent on a representation learned for it.

    Measured are the loss of the model ("trained"), of the same network whose attention is the
    construction of a gradient step ("GD on a learned representation"), and of ridge regression on
    the inputs as they are and, where the task is linear in a known representation, on that.

    Attributes:
      task: draws the rows.
      width, hidden: of the model, see `EmbeddedLSAConfig`.
      batch_size: rows in a batch.
      eval_size: rows of the evaluations.
      penalty: of ridge regression.
    """

    task: RegressionTask
    width: int = 40
    hidden: int = 160
    batch_size: int = 2048
    eval_size: int = 2000
    penalty: float = 0.01

    def validate(self) -> None:
        """Checks sizes."""
        self.require_positive("width", "hidden", "batch_size", "eval_size", "penalty")

    def run(self, run_dir: Path) -> dict[str, Any]:
        """Trains the seeds of both models and gives the record."""
        measured, lines = {}, {}
        for name, frozen in (("trained", False), ("GD on a learned representation", True)):
            model = EmbeddedLSAConfig(
                token_size=self.task.token_size, width=self.width, hidden=self.hidden, frozen=frozen
            )
            problem = RegressionProblem(
                model=model, task=self.task, batch_size=self.batch_size, eval_size=self.eval_size
            )
            result = train_seeds(
                problem, self.training, run_dir / ("frozen" if frozen else "model")
            )
            measured[name] = result.final("loss")
            lines[name] = curves(result)
        return self.record(measured, kind="representation", curves=lines, levels=self._levels())

    def _levels(self) -> dict[str, float]:
        """What needs no training."""
        batch = self.task.sample(evaluation_key(), self.eval_size)
        levels = {
            "predict 0": half_mse(jnp.zeros_like(batch.target), batch.target),
            "ridge on inputs": self._ridge(batch.x, batch.query, batch),
        }
        if isinstance(self.task, NetworkRegressionConfig):
            represented = self.task.represent(batch.x), self.task.represent(batch.query)
            levels["ridge on the representation"] = self._ridge(*represented, batch)
        return {name: float(value) for name, value in levels.items()}

    def _ridge(self, x: Any, query: Any, batch: Regression) -> Any:
        w = learners.ridge(x, batch.y, self.penalty)
        return half_mse(learners.apply(w, query), batch.target)
