"""Retrieval by depth and length: what is found where in a haystack longer than those of training.

    python -m experiments.needle --gin_file=needle/quick.gin

Interrupted, the same command continues where it stopped. The tasks are needles in haystacks of
tokens (`lcattn.tasks.needle`) and passkeys in text (`lcattn.tasks.passkey`).
"""

import itertools
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments import cli, reporting
from experiments.figures import Figure, HeatMap
from experiments.reporting import Report, Table, show_bytes
from experiments.sweep import folder, train_each
from experiments.train import check_vocabulary
from lcattn.models import LMConfig
from lcattn.tasks import NeedleTaskConfig
from lcattn.training import TrainConfig

THRESHOLD = 0.856
"""Mean score up to which a length counts as mastered: that of Llama 2 7B at 4k tokens in RULER."""


def needle(
    *,
    models: Mapping[str, LMConfig],
    tasks: Mapping[str, NeedleTaskConfig],
    training: TrainConfig,
    run_dir: Path,
) -> None:
    """Trains each model to find needles in short rows, and maps what it finds in longer ones.

    Args:
      models: what to compare, by name.
      tasks: what to look for, by name; each model is trained anew for each.
      training: the runs.
      run_dir: receives a folder for each run, `results.json`, `report.md` and a figure a task.
    """
    start, environment = time.monotonic(), reporting.environment()
    made = {name: task.make() for name, task in tasks.items()}
    for task, config in itertools.product(made.values(), models.values()):
        check_vocabulary(config, task)  # of the last task too, before the first run
    records = {}
    for name, task in tasks.items():
        runs = train_each(models, made[name], training, run_dir / folder(name))
        records[name] = {
            "train_lengths": sorted({config.length for config in task.train}),
            "lengths": task.lengths,
            "depths": task.depths,
            "eval_examples": task.eval_examples,
            "models": {model: record for model, _, record in runs},
        }
    results = {
        "script": "needle",
        "environment": environment,
        "seconds": time.monotonic() - start,
        "tasks": records,
    }
    reporting.publish(results, report, run_dir)


def report(results: Mapping[str, Any]) -> Report:
    """The report, from the recorded results alone."""
    blocks: list[str | Table | Figure] = [
        reporting.describe_environment(results["environment"]),
        "A row counts if every token of the answer is the most likely one. Each model is one run "
        f"of one seed. {reporting.took(results['seconds'])}",
    ]
    for name, task in results["tasks"].items():
        trained = " and ".join(str(length) for length in task["train_lengths"])
        blocks += [
            f"## {name}\n\nTrained on rows of {trained} tokens with the needle anywhere; "
            f"{task['eval_examples']} test rows a cell; those of one length differ in the depth "
            "alone.",
            table(name, task),
            figure(name, task),
        ]
    return Report(title="Needles by depth and length", blocks=blocks)


def table(name: str, task: Mapping[str, Any]) -> Table:
    """The mean over depths at each length, and the longest length that is mastered."""
    longest = max(task["lengths"])
    header = (
        "model",
        *(f"{length} tokens" for length in task["lengths"]),
        f"length up to which {THRESHOLD:.3f}",
        f"state at {longest} tokens", "parameters", "tokens/s",
    )  # fmt: skip
    rows = []
    for model, run in task["models"].items():
        means = [statistics.mean(column) for column in zip(*scores(task, run), strict=True)]
        rows.append(
            (
                model, *means, mastered(task["lengths"], means),
                show_bytes(run["state_bytes"]), run["num_parameters"], run["tokens_per_second"],
            )
        )  # fmt: skip
    return Table(title=f"{name}: rows answered, mean over depths", header=header, rows=rows)


def mastered(lengths: Sequence[int], means: Sequence[float]) -> int | None:
    """The largest length up to which every mean reaches the threshold."""
    longest = None
    for length, mean in sorted(zip(lengths, means, strict=True)):
        if mean < THRESHOLD:
            break
        longest = length
    return longest


def figure(name: str, task: Mapping[str, Any]) -> Figure:
    """A heat map a model."""
    panels = [
        HeatMap(
            title=model,
            xlabel="length (tokens)",
            ylabel="depth (%)",
            label="share of rows answered",
            columns=[str(length) for length in task["lengths"]],
            rows=[str(depth) for depth in task["depths"]],
            values=scores(task, run),
        )
        for model, run in task["models"].items()
    ]
    caption = f"{name}: share of rows answered, by the length of the row and the needle's depth."
    return Figure(name=f"needle_{folder(name)}", caption=caption, panels=panels, max_columns=3)


def scores(task: Mapping[str, Any], run: Mapping[str, Any]) -> list[list[float]]:
    """The share of rows answered, `[depth][length]`."""
    cells = {(s["depth"], s["length"]): name for name, s in run["slices"].items()}
    return [
        [run["metrics"][f"{cells[depth, length]}/exact_match"] for length in task["lengths"]]
        for depth in task["depths"]
    ]


if __name__ == "__main__":
    sys.exit(cli.main(needle))
