"""Reading roles off the sentence, or remembering them: vanilla training, and forgetting embeddings.

    python -m experiments.forgetting --gin_file=forgetting/quick.gin

Interrupted, the same command continues where it stopped. After Anand et al. 2024 (arXiv
2406.00053): what a model does in context fades as it learns the words by heart, unless it is made
to forget them.
"""

import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from experiments import cli, reporting
from experiments.estimates import Estimate, curve
from experiments.figures import Figure, Panel
from experiments.reporting import Report, Table
from experiments.sweep import check_names, train_seeds_each
from lcattn.models import LMConfig
from lcattn.probes.forgetting import ResetConfig, RolesProblem
from lcattn.tasks.roles import RolesConfig
from lcattn.training import SeedsConfig

SETS = {
    "validation": "validation",
    "switch": "classes exchanged",
    "tail": "rarest tenth",
    "tail_switch": "rarest tenth, exchanged",
    "held_out": "held-out words",
}

PUBLISHED = {
    "vanilla": ("held_out", "rises, then falls to chance"),
    "active": ("held_out", "stays high"),
    "temporary": ("held_out", "stays high, with in-weights answers kept"),
}
"""What the paper's curves say; it gives no numbers to set beside ours."""


def forgetting(
    *,
    model: LMConfig,
    data: RolesConfig,
    schedules: Mapping[str, ResetConfig],
    training: SeedsConfig,
    batch_size: int = 128,
    run_dir: Path,
) -> None:
    """Trains a model with each schedule of forgetting, and follows what it knows and what it reads.

    Args:
      model: the model. The masks come last, so a causal one reads all that the paper's
        bidirectional one does.
      data: the words.
      schedules: by name. Those named "vanilla", "active" and "temporary" stand beside the paper's.
      training: the runs; each schedule's seeds are trained at once.
      batch_size: rows in a batch.
      run_dir: receives a folder for each run, `results.json`, `report.md` and the figure.
    """
    start, environment = time.monotonic(), reporting.environment()
    check_names(schedules, "forgetting.schedules")
    problems = {
        name: RolesProblem(model=model, data=data, reset=reset, batch_size=batch_size)
        for name, reset in schedules.items()
    }
    runs = {}
    for name, result in train_seeds_each(problems, training, run_dir / "models"):
        runs[name] = {
            "every": schedules[name].every,
            "until": schedules[name].until,
            "steps": result.steps.tolist(),
            "losses": result.losses.tolist(),
            **{key: values.tolist() for key, values in result.metrics.items()},
        }
    results = {
        "script": "forgetting",
        "environment": environment,
        "seconds": time.monotonic() - start,
        "data": data.to_dict(),
        "batch_size": batch_size,
        "schedules": runs,
    }
    reporting.publish(results, report, run_dir)


def report(results: Mapping[str, Any]) -> Report:
    """The report, from the recorded results alone."""
    runs, data = results["schedules"], results["data"]
    run = next(iter(runs.values()))
    return Report(
        title="Weight forgetting",
        blocks=[
            reporting.describe_environment(results["environment"]),
            f"{data['num_words']} words, frequency falling as rank^-{data['zipf']:g}; "
            f"{run['steps'][-1]:,} steps of {results['batch_size']} rows; means over "
            f"{len(run['losses'][0])} seeds with their 95 % intervals. A row counts where its "
            f"three answers are right. {reporting.took(results['seconds'])}",
            figure(runs),
            table(runs),
            published_table(runs),
            "The words of the held-out set have the embeddings of a new model at each evaluation, "
            "which comes before the reset of its step, if there is one. 'By heart' is the share of "
            "rows with exchanged classes that are answered by the classes of the words. Embeddings "
            "are also the output layer here, so a new word competes with trained ones.",
        ],
    )


def figure(runs: Mapping[str, Any]) -> Figure:
    """Right answers against steps, a panel a set, a line a schedule."""
    panels = [
        Panel(
            title=title,
            xlabel="step",
            ylabel="rows answered right",
            series=[
                curve(name, run["steps"], np.asarray(run[key]).T) for name, run in runs.items()
            ],
            ylim=(-0.03, 1.03),
        )
        for key, title in SETS.items()
    ]
    caption = (
        "Rows answered right over training: what is known of frequent words, and what is read off "
        "the sentence, which alone helps with exchanged classes and held-out words."
    )
    return Figure(name="forgetting", caption=caption, panels=panels, max_columns=3)


def table(runs: Mapping[str, Any]) -> Table:
    """Every schedule at the end of training."""
    rows = [
        (
            name,
            run["every"],
            run["until"] if run["until"] or not run["every"] else "the end",
            *(Estimate.of(run[key][-1]) for key in SETS),
            Estimate.of(run["memory"][-1]),
        )
        for name, run in runs.items()
    ]
    header = ("training", "reset every", "until", *SETS.values(), "exchanged: by heart")
    return Table(title="Rows answered right after training", header=header, rows=rows)


def published_table(runs: Mapping[str, Any]) -> Table:
    """What the paper says of each schedule, and the best and the last of ours."""
    rows = []
    for name, (key, words) in PUBLISHED.items():
        if name in runs:
            values = np.asarray(runs[name][key])  # [evaluations, seeds]
            best = int(values.mean(axis=1).argmax())
            top, last = Estimate.of(values[best]), Estimate.of(values[-1])
            fall = Estimate.of(values[-1] - values[best])
            rows.append((name, SETS[key], words, top, runs[name]["steps"][best], last, fall))
    header = (
        "training",
        "set",
        "paper",
        "ours at best",
        "at step",
        "ours at the end",
        "difference",
    )
    return Table(title="Paper and ours", header=header, rows=rows)


if __name__ == "__main__":
    sys.exit(cli.main(forgetting))
