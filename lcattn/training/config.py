"""What a run is: `TrainConfig`, what it trains on: `Task`, and what it leaves: `TrainResult`."""

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from flax import nnx

from lcattn.config import Config
from lcattn.training.mesh import MeshConfig
from lcattn.training.optimizer import OptimizerConfig

_LOWER_IS_BETTER = ("loss", "bits_per_byte")
_HIGHER_IS_BETTER = ("accuracy",)


@runtime_checkable
class BatchIterator(Protocol):
    """Batches without end, resumable.

    With several processes, each yields its own rows, and the state is the same on all.
    """

    def __iter__(self) -> "BatchIterator": ...

    def __next__(self) -> Mapping[str, Any]:
        """A dictionary of `tokens`, `targets`, `weights` [B, T], maybe `segment_ids`, ..."""
        ...

    def get_state(self) -> dict[str, Any]:
        """JSON from which `set_state` continues after the last batch that was taken."""
        ...

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues where `get_state` was called."""
        ...


@runtime_checkable
class Task(Protocol):
    """What a model is trained and evaluated on. A task's `config`, if any, is stored too."""

    def train(self) -> BatchIterator:
        """The training batches, from the beginning."""
        ...

    def evaluation(self) -> Mapping[str, Iterable[Mapping[str, Any]]]:
        """Held-out batches by the name of their slice; each can be iterated again and again."""
        ...


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
        `{"pairs_8/accuracy": 0.99}`. Reached from below for an accuracy, from above for a loss.
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

    def validate(self) -> None:
        self.require_positive(
            "num_steps", "num_microbatches", "log_every", "eval_every", "checkpoint_every", "keep"
        )
        if self.z_loss < 0:
            raise self.error("z_loss", "a value of at least 0")
        for name in self.stop_when:
            if name.rpartition("/")[2] not in _LOWER_IS_BETTER + _HIGHER_IS_BETTER:
                raise self.error("stop_when", "keys that end in /accuracy, /loss, /bits_per_byte")

    def trajectory(self) -> dict[str, Any]:
        """The fields that decide what is computed and recorded; the others may change on resume."""
        may_change = ("mesh", "keep", "checkpoint_every", "tensorboard")
        return {k: v for k, v in self.to_dict().items() if k not in may_change}

    def is_reached(self, metrics: Mapping[str, float]) -> bool:
        """Whether an evaluation ends the run by `stop_when`."""
        return bool(self.stop_when) and all(
            metrics[name] >= threshold
            if name.endswith(_HIGHER_IS_BETTER)
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
