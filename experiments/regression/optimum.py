"""Whether training finds the optimum of one layer that is known in closed form."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.regression.study import Study, curves
from lcattn.probes.regression import (
    LSAConfig,
    RegressionProblem,
    evaluation_key,
    matrix_cosine,
    optimum,
    recover_matrix,
)
from lcattn.tasks.regression import LinearRegressionConfig
from lcattn.training import train_seeds


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimumStudy(Study):
    """One layer of linear self-attention is trained on normal inputs and weights.

    Measured are, on the same rows, by how much the loss exceeds that of the optimum; the cosine
    between the matrix that the layer applies and the best one, and with the identity; and their
    relative distance.

    Attributes:
      task: draws the rows.
      batch_size: rows in a batch.
      eval_size: rows of the evaluations during training.
      final_size: rows of the last one.
    """

    task: LinearRegressionConfig
    batch_size: int = 2048
    eval_size: int = 1000
    final_size: int = 20_000

    def validate(self) -> None:
        """Checks sizes, and that there is a closed form."""
        self.require_positive("batch_size", "eval_size", "final_size")
        optimum(self.task)

    def run(self, run_dir: Path) -> dict[str, Any]:
        """Trains the seeds and gives the record."""
        problem = RegressionProblem(
            model=LSAConfig(token_size=self.task.token_size), task=self.task,
            batch_size=self.batch_size, eval_size=self.eval_size,
        )  # fmt: skip
        result = train_seeds(problem, self.training, run_dir / "model")
        best, key = optimum(self.task), evaluation_key()
        batch = self.task.sample(key, self.final_size)
        losses = problem.losses(result.params, result.model_state, batch)
        b = jnp.einsum("bnd,bn->bd", batch.x, batch.y)
        said = jnp.einsum("bi,ij,bj->b", batch.query, jnp.asarray(best.matrix, jnp.float32), b)
        least = jnp.square(said - batch.target).mean() / 2

        def recover(params: Any, model_state: Any) -> jax.Array:
            predict = problem.predictor(params, model_state)
            return recover_matrix(predict, self.task, key, self.eval_size)

        matrices = np.asarray(jax.jit(jax.vmap(recover))(result.params, result.model_state))
        size = np.linalg.norm(best.matrix)
        measured = {
            "loss": losses,
            "excess loss (%)": 100 * (losses / least - 1),
            "cosine with M*": [matrix_cosine(m, best.matrix) for m in matrices],
            "cosine with I": [matrix_cosine(m, np.eye(self.task.dim)) for m in matrices],
            "|M - M*| / |M*|": [np.linalg.norm(m - best.matrix) / size for m in matrices],
        }
        return self.record(
            measured, kind="optimum", curves=curves(result), optimal_loss=best.risk / 2,
            best=best.matrix.tolist(), matrices=matrices.tolist(),
            identity_cosine=matrix_cosine(best.matrix, np.eye(self.task.dim)),
        )  # fmt: skip
