"""Algorithmic tasks learned on short rows, judged on longer ones: position encodings and hints.

    python -m experiments.length_generalization --gin_file=length_generalization/quick.gin

Interrupted, the same command continues where it stopped. After Kazemnejad et al. 2023 (arXiv
2305.19466: position encodings), Awasthi and Gupta 2023 (2310.00726: hints to sorting) and Zhou et
al. 2023 (2310.16028: what has a short RASP-L program generalises).
"""

import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from experiments import cli, reporting
from experiments.estimates import Estimate, curve
from experiments.figures import Figure, Panel, Series
from experiments.reporting import Report, Table
from experiments.sweep import check_names, train_seeds_each
from lcattn.errors import argument_error
from lcattn.models import LMConfig
from lcattn.probes.length_generalization import AlgorithmicProblem
from lcattn.tasks.algorithmic import PROGRAMS, AlgorithmicConfig
from lcattn.training import SeedsConfig

PUBLISHED_LENGTH = 20
PUBLISHED = {
    ("copy", "NoPE"): {21: 0.79, 27: 0.59, 31: 0.05},
    ("copy", "ALiBi"): {21: 0.82, 27: 0.64, 31: 0.09},
    ("copy", "RoPE"): {21: 0.04, 27: 0.0, 31: 0.0},
    ("reverse", "NoPE"): {21: 0.99, 25: 0.54, 27: 0.08},
    ("reverse", "ALiBi"): {21: 1.0, 25: 0.04, 27: 0.0},
    ("reverse", "RoPE"): {21: 0.79, 25: 0.0, 27: 0.0},
}
"""Exact match by length after training on up to 20 (2305.19466, its result files; copy "cmc",
reverse "mc"; rotary on a quarter of the channels, scores without 1/sqrt(H)). Three seeds."""

PUBLISHED_HINTS = {None: 0.01, "successor": 0.926}
"""Exact match of sorting at length 100 after training on up to 20 (2310.00726); without a hint it
is said to be below 1 %."""
PUBLISHED_HINTS_FACTOR = 5

FACTORS_APART = 0.1
"""Shares by which a length of ours may miss a published one and still be compared with it."""


def length_generalization(
    *,
    tasks: Mapping[str, AlgorithmicConfig],
    models: Mapping[str, LMConfig],
    training: SeedsConfig,
    batch_size: int = 32,
    only: Mapping[str, tuple[str, ...]] | None = None,
    run_dir: Path,
) -> None:
    """Trains each model on each task, and judges it at every test length.

    Args:
      tasks: by name.
      models: by name. Those named as in the published tables stand beside them.
      training: the runs; each pair's seeds are trained at once.
      batch_size: rows in a batch.
      only: for some tasks, the models to train; the other tasks take all.
      run_dir: receives a folder for each run, `results.json`, `report.md` and the figures.
    """
    start, environment = time.monotonic(), reporting.environment()
    only = only or {}
    for name, names in only.items():
        if name not in tasks or not set(names) <= set(models):
            expected = f"names of tasks {list(tasks)} and models {list(models)}"
            raise argument_error("length_generalization.only", expected, {name: names})
    pairs = [(task, name) for task in tasks for name in only.get(task, models)]
    check_names([f"{task}_{name}" for task, name in pairs], "length_generalization.tasks")
    problems = {
        f"{task}_{name}": AlgorithmicProblem(
            model=models[name], data=tasks[task], batch_size=batch_size
        )
        for task, name in pairs
    }
    runs: dict[str, dict[str, Any]] = {name: {} for name in tasks}
    trained = train_seeds_each(problems, training, run_dir / "models")
    for (task, name), (_, result) in zip(pairs, trained, strict=True):
        runs[task][name] = {
            "steps": result.steps.tolist(),
            "losses": result.losses.tolist(),
            **{key: values.tolist() for key, values in result.metrics.items()},
        }
    results = {
        "script": "length_generalization",
        "environment": environment,
        "seconds": time.monotonic() - start,
        "batch_size": batch_size,
        "tasks": {
            name: {
                "task": data.task,
                "hint": data.hint,
                "train_length": data.train_length,
                "test_lengths": data.test_lengths,
                "models": runs[name],
            }
            for name, data in tasks.items()
        },
    }
    reporting.publish(results, report, run_dir)


def report(results: Mapping[str, Any]) -> Report:
    """The report, from the recorded results alone."""
    tasks = results["tasks"]
    run = _any_run(tasks)
    return Report(
        title="Length generalisation",
        blocks=[
            reporting.describe_environment(results["environment"]),
            f"Exact match: the share of answers without a mistake. {run['steps'][-1]:,} steps of "
            f"{results['batch_size']} rows; means over {len(run['losses'][0])} seeds with their "
            f"95 % intervals. {reporting.took(results['seconds'])}",
            "Where answers of training lengths have mistakes, the task was not learned in these "
            "steps, and what longer ones show is not a failure to generalise.",
            figure(tasks),
            exact_match_table(tasks),
            published_table(tasks),
            "Published figures are quoted from the result files of arXiv 2305.19466 (mean of three "
            "seeds; trained on up to 20 tokens, models of T5-base size, rotary on a quarter of the "
            "channels) and the text of arXiv 2310.00726 (sorting of lists of 100 after training on "
            "up to 20). Ours stand at the nearest length beyond, relative to that of training; off "
            f"by {FACTORS_APART:.0%} or more, a difference would say nothing.",
        ],
    )


def figure(tasks: Mapping[str, Any]) -> Figure:
    """Exact match against the test length, a panel a task, a line a model."""
    panels = [
        Panel(
            title=name,
            xlabel="length",
            ylabel="exact match",
            series=[
                *(
                    curve(model, task["test_lengths"], _exact(run), marker=True)
                    for model, run in task["models"].items()
                ),
                Series(
                    label="longest of training", x=[task["train_length"]] * 2, y=[0, 1],
                    line="--", marker=False,
                ),
            ],
            ylim=(-0.03, 1.03),
        )
        for name, task in tasks.items()
    ]  # fmt: skip
    caption = "Share of faultless answers by length, trained up to the dashed line."
    return Figure(name="lengths", caption=caption, panels=panels, max_columns=3)


def exact_match_table(tasks: Mapping[str, Any]) -> Table:
    """Every task and model, by length as a multiple of the training length."""
    lengths = next(iter(tasks.values()))["test_lengths"]
    rows = [
        (name, model, "yes" if _has_program(task) else "no", *map(Estimate.of, _exact(run).T))
        for name, task in tasks.items()
        for model, run in task["models"].items()
        if task["test_lengths"] == lengths
    ]
    header = ("task", "model", "RASP-L program", *(f"length {length}" for length in lengths))
    return Table(title="Exact match by length", header=header, rows=rows)


def _has_program(task: Mapping[str, Any]) -> bool:
    """Whether what is judged has a short program; hints to sorting are in training rows alone."""
    hint = None if task["task"] == "sort" else task["hint"]
    return (task["task"], hint) in PROGRAMS


def published_table(tasks: Mapping[str, Any]) -> Table:
    """The published figures beside ours, with the differences."""
    rows = [
        (name, model, f"{factor:.3g}×", published, f"{ours_factor:.3g}×", found,
         float(found.mean) - published if abs(ours_factor / factor - 1) < FACTORS_APART else None)
        for name, task in tasks.items()
        for model, run in task["models"].items()
        for factor, published in _published(task, model)
        for ours_factor, found in [_nearest(task, run, factor)]
    ]  # fmt: skip
    header = (
        "task", "model", "at the training length", "published", "ours at", "ours", "difference",
    )  # fmt: skip
    return Table(title="Published and ours", header=header, rows=rows)


def _published(task: Mapping[str, Any], model: str) -> Iterator[tuple[float, float]]:
    if task["task"] == "sort" and task["hint"] in PUBLISHED_HINTS and model == "NoPE":
        yield PUBLISHED_HINTS_FACTOR, PUBLISHED_HINTS[task["hint"]]
    if task["hint"] is None:
        for length, value in PUBLISHED.get((task["task"], model), {}).items():
            yield length / PUBLISHED_LENGTH, value


def _nearest(
    task: Mapping[str, Any], run: Mapping[str, Any], factor: float
) -> tuple[float, Estimate]:
    """Our exact match at the test length nearest to a multiple of the training length, beyond it.

    What was trained is no measure of what was not.
    """
    factors = np.asarray(task["test_lengths"]) / task["train_length"]
    place = int(np.where(factors > 1, abs(factors - factor), np.inf).argmin())
    return float(factors[place]), Estimate.of(_exact(run)[:, place])


def _exact(run: Mapping[str, Any]) -> np.ndarray:
    """`[seeds, lengths]` after training."""
    return np.asarray(run["exact_match"][-1])


def _any_run(tasks: Mapping[str, Any]) -> Mapping[str, Any]:
    return next(iter(next(iter(tasks.values()))["models"].values()))


if __name__ == "__main__":
    sys.exit(cli.main(length_generalization))
