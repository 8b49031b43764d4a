"""Recall against bytes of state: every mechanism at several state sizes, in the same small model.

    python -m experiments.recall --gin_file=recall/quick.gin

Interrupted, the same command continues where it stopped. The task is multi-query associative recall
(`lcattn.tasks.mqar`); the figure is that of BASED (Arora et al. 2024, arXiv 2402.18668, figure 2).
"""

import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments import cli, reporting
from experiments.figures import Figure, Panel, Series
from experiments.reporting import Report, Table, show_bytes
from experiments.sweep import train_each
from lcattn.errors import argument_error
from lcattn.models import LMConfig
from lcattn.nn import MixerConfig
from lcattn.tasks import MQARTaskConfig
from lcattn.training import TrainConfig

PLACE = "mixer"
"""The name in the model's pattern that the mechanisms take in turn."""


def recall(
    *,
    model: LMConfig,
    mechanisms: Mapping[str, tuple[MixerConfig, ...]],
    task: MQARTaskConfig,
    training: TrainConfig,
    learning_rates: tuple[float, ...] = (),
    run_dir: Path,
) -> None:
    """Trains a model for each mechanism and state size on associative recall, and compares them.

    Args:
      model: what all models share; its mixer named "mixer" is the one that is replaced.
      mechanisms: by name, configs that differ in what sets the size of the state.
      task: associative recall.
      training: the runs.
      learning_rates: each model is trained at each of these, and its best run is reported, as
        published. Empty: only at that of `training`.
      run_dir: receives a folder for each run, `results.json`, `report.md` and the figure.
    """
    start, environment = time.monotonic(), reporting.environment()
    rows, models = task.make(), fill(model, mechanisms)
    configs = {name: config for sizes in models.values() for name, config in sizes.items()}
    records: dict[str, list[dict[str, Any]]] = {name: [] for name in configs}
    for rate in learning_rates or (training.optimizer.learning_rate,):
        at_rate = training.replace(optimizer=training.optimizer.replace(learning_rate=rate))
        folder = run_dir / "models" / f"rate_{rate:g}"
        for name, _, record in train_each(configs, rows, at_rate, folder):
            records[name].append({**record, "learning_rate": rate})
    results = {
        "script": "recall",
        "environment": environment,
        "seconds": time.monotonic() - start,
        "mechanisms": {
            mechanism: {name: max(records[name], key=mean_accuracy) for name in sizes}
            for mechanism, sizes in models.items()
        },
    }
    reporting.publish(results, report, run_dir)


def fill(
    model: LMConfig, mechanisms: Mapping[str, Sequence[MixerConfig]]
) -> dict[str, dict[str, LMConfig]]:
    """The models of each mechanism, by names that say their sizes: `GLA, feature_dim=8`."""
    if PLACE not in model.pattern:
        raise argument_error("recall.model", f"{PLACE!r} in its pattern", model.pattern)
    models = {}
    for mechanism, mixers in mechanisms.items():
        names = [", ".join([mechanism, *size]) for size in _sizes(mixers)]
        if not names or len(set(names)) < len(names):
            expected = f"for {mechanism!r} configs that differ in some field"
            raise argument_error("recall.mechanisms", expected, names or "none")
        filled = (model.replace(mixers={**model.mixers, PLACE: mixer}) for mixer in mixers)
        models[mechanism] = dict(zip(names, filled, strict=True))
    return models


def _sizes(mixers: Sequence[MixerConfig]) -> list[list[str]]:
    """For each config, the fields in which it differs from another one."""
    fields = [vars(mixer) for mixer in mixers]
    names = dict.fromkeys(name for values in fields for name in values)
    differing = [name for name in names if len({values.get(name) for values in fields}) > 1]
    return [[f"{name}={values.get(name)}" for name in differing] for values in fields]


def report(results: Mapping[str, Any]) -> Report:
    """The report, from the recorded results alone."""
    mechanisms = results["mechanisms"]
    run = _any_run(mechanisms)
    slices = ", ".join(f"{s['num_pairs']} in {s['length']}" for s in run["slices"].values())
    return Report(
        title="Recall against bytes of state",
        blocks=[
            reporting.describe_environment(results["environment"]),
            f"Multi-query associative recall, pairs in tokens: {slices}. Every model is the same "
            "but for one layer; its state is all that a stream remembers after "
            f"{run['state_length']} tokens, in float32. A run ends once it holds its target, "
            f"after {run['num_steps']} steps at the latest; each model is one run of one seed. "
            "So a point below the target says what these steps taught, a lower bound of what the "
            "state can hold. "
            f"{reporting.took(results['seconds'])}",
            figure(mechanisms),
            table(mechanisms),
        ],
    )


def figure(mechanisms: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Mean accuracy against bytes, a line a mechanism."""
    lines = []
    for mechanism, runs in mechanisms.items():
        points = sorted((run["state_bytes"] / 1024, mean_accuracy(run)) for run in runs.values())
        sizes, accuracies = zip(*points, strict=True)
        lines.append(Series(label=mechanism, x=sizes, y=accuracies))
    panel = Panel(
        xlabel="state of one stream (KiB)",
        ylabel="recall accuracy, mean over test slices",
        series=lines,
        xscale="log2",
        ylim=(0, 1.05),
        direct_labels=True,
    )
    caption = "Recall accuracy against the bytes of state that a stream holds, a line a mechanism."
    return Figure(name="recall", caption=caption, panels=[panel])


def table(mechanisms: Mapping[str, Mapping[str, Any]]) -> Table:
    """Every model with its state and its accuracies."""
    run = _any_run(mechanisms)
    header = (
        "model", f"state at {run['state_length']} tokens",
        *(f"{s['num_pairs']} pairs, {s['length']} tokens" for s in run["slices"].values()),
        "mean", "learning rate", "steps", "parameters",
    )  # fmt: skip
    rows = [
        (
            name,
            show_bytes(run["state_bytes"]),
            *(run["metrics"][f"{s}/accuracy"] for s in run["slices"]),
            mean_accuracy(run),
            run["learning_rate"],
            run["steps"],
            run["num_parameters"],
        )
        for runs in mechanisms.values()
        for name, run in runs.items()
    ]
    return Table(title="Recall accuracy (MQAR)", header=header, rows=rows)


def mean_accuracy(run: Mapping[str, Any]) -> float:
    """Over the test slices, each counting the same."""
    return statistics.mean(run["metrics"][f"{name}/accuracy"] for name in run["slices"])


def _any_run(mechanisms: Mapping[str, Mapping[str, Any]]) -> Mapping[str, Any]:
    return next(iter(next(iter(mechanisms.values())).values()))


if __name__ == "__main__":
    sys.exit(cli.main(recall))
