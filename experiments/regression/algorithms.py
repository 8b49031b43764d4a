"""Which algorithm a decoder of some depth agrees with, with and without noise."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from experiments.regression.study import Study
from lcattn.probes.regression import StreamProblem, StreamRegressorConfig
from lcattn.tasks.regression import LinearRegressionConfig
from lcattn.training import train_seeds


@dataclasses.dataclass(frozen=True, kw_only=True)
class AlgorithmStudy(Study):
    """A decoder reads inputs and labels in turn and predicts each label.

    Measured, divided by the size d of an input: for each algorithm, its squared prediction
    difference from the model where examples are fewer than coordinates ("SPD below d, ols") and
    over all prefixes ("SPD, ols"), and the difference of implied weights with as many examples as
    there are ("ILWD, ols"); how much of Xᵀy and w a linear probe reads from the last layer.

    Attributes:
      task: draws the rows.
      model: the decoder.
      rate: of one step of gradient descent, `w = 2 rate Xᵀy`.
      penalties: of ridge regression.
      batch_size: rows in a batch.
      eval_size: rows of the evaluation.
    """

    task: LinearRegressionConfig
    model: StreamRegressorConfig
    rate: float = 0.02
    penalties: tuple[float, ...] = (0.1,)
    batch_size: int = 64
    eval_size: int = 1000

    def run(self, run_dir: Path) -> dict[str, Any]:
        """Trains the seeds and gives the record."""
        problem = StreamProblem(
            model=self.model, task=self.task, rate=self.rate, penalties=self.penalties,
            batch_size=self.batch_size, eval_size=self.eval_size,
        )  # fmt: skip
        result = train_seeds(problem, self.training, run_dir / "model")
        params, state, d = result.params, result.model_state, self.task.dim
        by_count = {name: result.final(name).tolist() for name in result.metrics}
        measured = {"MSE / d with all examples": result.final("error")[:, -1]}
        ilwd = problem.weight_differences(params, state)
        for name in problem.learners():
            spd = result.final(f"spd/{name}")
            measured[f"SPD below d, {name}"] = spd[:, 1:d].mean(axis=1)
            measured[f"SPD, {name}"] = spd[:, 1:].mean(axis=1)
            measured[f"ILWD, {name}"] = np.asarray(ilwd[name])[:, -1]
        decoded = {name: np.asarray(v) for name, v in problem.decoded(params, state).items()}
        return self.record(
            measured, kind="algorithms", dim=d, noise=self.task.label_noise,
            depth=self.model.num_layers, learners=list(problem.learners()), by_count=by_count,
            decoded={name: values.tolist() for name, values in decoded.items()},
        )  # fmt: skip
