"""Trains a language model on a task, or continues the run it finds in its folder.

python -m experiments.train --gin_file=lm/tiny.gin --gin.NUM_STEPS=100 --run_dir=runs/x
"""

import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from experiments import cli, reporting
from experiments.figures import Figure, Panel, Series
from experiments.reporting import Report, Table, show_bytes
from lcattn.errors import argument_error
from lcattn.models import LM, LMConfig
from lcattn.tasks import MQARTaskConfig, NeedleTaskConfig, Task, TextTaskConfig
from lcattn.training import TrainConfig, read_jsonl
from lcattn.training import train as run_training

_MAX_POINTS = 500


def train(
    *,
    task: MQARTaskConfig | NeedleTaskConfig | TextTaskConfig,
    model: LMConfig,
    training: TrainConfig,
    run_dir: Path,
) -> None:
    """Trains a language model on a task, or continues the run it finds in its folder.

    Args:
      task: what to train on and to be judged by.
      model: the language model; its `vocab_size` must hold the task's tokens.
      training: the run.
      run_dir: receives checkpoints, metrics, `results.json`, `report.md` and figures.
    """
    _, record = train_and_record(task.make(), model, training, run_dir)
    results = {"script": "train", "environment": reporting.environment(), "run": record}
    reporting.publish(results, report, run_dir)


def train_and_record(
    task: Task,
    model: LMConfig,
    training: TrainConfig,
    run_dir: Path,
    initial: LM | None = None,
) -> tuple[LM, dict[str, Any]]:
    """Trains, and gives the model and what a report says of the run, ready for JSON."""
    check_vocabulary(model, task)
    result = run_training(task, model, training, run_dir, initial=initial)
    assert isinstance(result.model, LM)  # what LMConfig makes
    length = max(numbers["length"] for numbers in task.slices.values())
    speeds = [line["tokens_per_second"] for line in read_jsonl(run_dir / "timing.jsonl")]
    parameters = jax.tree.leaves(nnx.state(result.model, nnx.Param))
    return result.model, {
        "num_parameters": sum(p.size for p in parameters),
        "state_length": length,
        "state_bytes": result.model.state_bytes(length),
        "steps": result.steps,
        "num_steps": training.num_steps,
        "tokens_per_second": speeds[-1] if speeds else None,
        "metrics": {name: _finite(value) for name, value in result.metrics.items()},
        "slices": task.slices,
        "measured": task.metrics,
        "curves": curves(read_jsonl(result.metrics_path)),
    }


def check_vocabulary(model: LMConfig, task: Task) -> None:
    """Raises unless the model knows all tokens of the task."""
    if model.vocab_size < task.vocab_size:
        raise argument_error(
            "LMConfig.vocab_size", f"at least the task's {task.vocab_size}", model.vocab_size
        )


def curves(lines: Sequence[Mapping[str, float]]) -> dict[str, list[tuple[int, float | None]]]:
    """Step and value of every metric, thinned to what a figure can show."""
    points: dict[str, list[tuple[int, float | None]]] = {}
    for line in lines:
        for name, value in line.items():
            if name != "step":
                points.setdefault(name, []).append((int(line["step"]), _finite(value)))
    return {name: xy[:: math.ceil(len(xy) / _MAX_POINTS)] for name, xy in points.items()}


def _finite(value: float) -> float | None:
    # JSON knows no NaN; a table shows a dash, a curve leaves a gap.
    return value if math.isfinite(value) else None


def report(results: Mapping[str, Any]) -> Report:
    """The report of a training run, from its recorded results alone."""
    run = results["run"]
    summary = Table(
        title="Run",
        header=("parameters", "steps", "tokens/s", f"state at {run['state_length']} tokens"),
        rows=[
            (
                run["num_parameters"],
                f"{run['steps']} of {run['num_steps']}",
                run["tokens_per_second"],
                show_bytes(run["state_bytes"]),
            )
        ],
    )
    measured = run["measured"]
    metrics = Table(
        title="Held-out data",
        header=("slice", *measured),
        rows=[
            (name, *(run["metrics"].get(f"{name}/{metric}") for metric in measured))
            for name in run["slices"]
        ],
    )
    names = ["train", *run["slices"]]
    panels = [
        Panel(
            xlabel="step",
            ylabel=label,
            series=[
                series(name, run["curves"][f"{name}/{metric}"], marker=name != "train")
                for name in names
                if f"{name}/{metric}" in run["curves"]
            ],
        )
        for metric, label in (("loss", "loss (nats per token)"), ("accuracy", "accuracy"))
    ]
    figure = Figure(name="curves", caption="Loss and accuracy over the run.", panels=panels)
    environment = reporting.describe_environment(results["environment"])
    return Report(title="Training run", blocks=[environment, summary, metrics, figure])


def series(label: str, points: Sequence[Sequence[float]], *, marker: bool = False) -> Series:
    """One curve of a figure from recorded points."""
    steps, values = zip(*points, strict=True)
    return Series(label=label, x=steps, y=values, marker=marker)


if __name__ == "__main__":
    sys.exit(cli.main(train))
