"""Each mechanism of the library as the one layer that regresses."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from experiments.regression.study import Study, curves
from experiments.sweep import folder, train_seeds_each
from lcattn.nn import MixerConfig
from lcattn.probes.regression import (
    DescentConfig,
    MixerRegressorConfig,
    RegressionProblem,
    best_rate,
)
from lcattn.tasks.regression import LinearRegressionConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class MechanismStudy(Study):
    """A layer of each mechanism is trained on the same rows and compared with gradient descent.

    Attributes:
      task: draws the rows.
      mechanisms: what takes the layer's place, by name.
      width: of the layer.
      descents: algorithms to compare with besides one step of gradient descent, by name.
      batch_size: rows in a batch.
      eval_size: rows of the evaluations.
    """

    task: LinearRegressionConfig
    mechanisms: Mapping[str, MixerConfig]
    width: int = 32
    descents: Mapping[str, DescentConfig] = dataclasses.field(default_factory=dict)
    batch_size: int = 256
    eval_size: int = 2000

    def validate(self) -> None:
        """Checks sizes, and that there are mechanisms whose runs do not share a folder."""
        self.require_positive("width", "batch_size", "eval_size")
        names = {folder(name) for name in self.mechanisms}
        if not names or len(names) < len(self.mechanisms):
            raise self.error("mechanisms", "some, whose names differ in letters or digits")

    def run(self, run_dir: Path) -> dict[str, Any]:
        """Trains the seeds of every mechanism and gives the record."""
        rate = best_rate(self.task, jax.random.key(1), 50_000)
        references = {"GD": DescentConfig(rates=(rate,)), **self.descents}
        problems = {
            name: RegressionProblem(
                model=MixerRegressorConfig(
                    token_size=self.task.token_size, mixer=mixer, width=self.width
                ),
                task=self.task,
                references=references,
                batch_size=self.batch_size,
                eval_size=self.eval_size,
            )
            for name, mixer in self.mechanisms.items()
        }
        measured, lines = {}, {}
        for name, result in train_seeds_each(problems, self.training, run_dir):
            measured |= {f"{name}/{m}": result.final(m) for m in result.metrics}
            lines[name] = curves(result)
        return self.record(
            measured, kind="mechanisms", mechanisms=list(self.mechanisms), curves=lines,
            references={name: list(d.rates) for name, d in references.items()},
        )  # fmt: skip
