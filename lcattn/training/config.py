"""What a run is, `TrainConfig`, and what it leaves, `TrainResult`."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, override

from flax import nnx

from lcattn.config import Config
from lcattn.training.mesh import MeshConfig
from lcattn.training.optimizer import OptimizerConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig(Config):
    """A run of training.

    Attributes:
      num_steps: updates of the parameters; also the length of the learning-rate schedule.
      optimizer: the optimiser.
      mesh: how devices are used.
      seed: of the model's initialisation and its random streams.
      num_microbatches: each batch is taken in this many parts one after another (gradient
        accumulation), to save memory. It changes rounding only.
      z_loss: weight of the mean of `log(Z)**2` in the objective; keeps logits from drifting.
      log_every: steps between lines of metrics.
      eval_every: steps between evaluations. None: at the end only.
      checkpoint_every: steps between checkpoints. None: at the end only (and when interrupted).
      keep: how many checkpoints are kept.
      stop_when: ends the run early once an evaluation meets all of these thresholds, e.g.
        `{"pairs_8/accuracy": 0.99}`. Reached from below for shares, from above for losses.
      tensorboard: writes TensorBoard events beside `metrics.jsonl`.
    """

    num_steps: int
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    seed: int = 0
    num_microbatches: int = 1
    z_loss: float = 0.0
    log_every: int = 10
    eval_every: int | None = None
    checkpoint_every: int | None = None
    keep: int = 2
    stop_when: Mapping[str, float] = dataclasses.field(default_factory=dict)
    tensorboard: bool = True

    @override
    def validate(self) -> None:
        self.require_positive(
            "num_steps", "num_microbatches", "log_every", "eval_every", "checkpoint_every", "keep"
        )
        if self.z_loss < 0:
            raise self.error("z_loss", "a value of at least 0")

    def trajectory(self) -> dict[str, Any]:
        """The fields that decide what is computed and recorded; the others may change on resume."""
        may_change = ("mesh", "keep", "checkpoint_every", "tensorboard")
        return {k: v for k, v in self.to_dict().items() if k not in may_change}

    def is_reached(self, metrics: Mapping[str, float]) -> bool:
        """Whether an evaluation ends the run by `stop_when`."""
        return bool(self.stop_when) and all(
            metrics[name] >= threshold
            if name.endswith(("/accuracy", "/exact_match"))
            else metrics[name] <= threshold
            for name, threshold in self.stop_when.items()
        )


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """What a finished run leaves.

    Attributes:
      model: the trained model.
      steps: updates made; fewer than `num_steps` where `stop_when` ended the run.
      metrics: the latest value of each metric (`train/loss`, `<slice>/accuracy`, ...).
      metrics_path: all recorded values, a JSON object a line. Bit-identical for equal runs.
      tokens_per_second: mean of the process that finished the run, without compilation, evaluation
        and checkpoints; 0 where it made fewer than two steps.
    """

    model: nnx.Module
    steps: int
    metrics: dict[str, float]
    metrics_path: Path
    tokens_per_second: float
