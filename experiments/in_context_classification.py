"""Labels read off the context or learned by heart, and why the change is abrupt.

    python -m experiments.in_context_classification \
        --gin_file=in_context_classification/quick.gin

Interrupted, the same command continues where it stopped. The task is `lcattn.tasks.item_label`,
networks and progress measures are in `lcattn.probes.classification`. Source: Reddy (2024), "The
mechanistic basis of data dependence and abrupt learning in an in-context classification task",
arXiv 2312.03002.
"""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

from experiments import cli, reporting
from experiments.estimates import Estimate, Quoted, comparison_table, curve
from experiments.figures import Figure, Panel, Series
from experiments.reporting import Report, Table
from lcattn.errors import argument_error
from lcattn.probes.classification import EVALUATIONS, ItemLabelProblem, three_logit
from lcattn.training import SeedsConfig, SeedsResult, train_seeds

MEASURES = {
    "context_label": "answers with a label of the context (CLA)",
    "first_to_item": "labels look at their items, layer 1 (ILA1)",
    "second_to_labels": "target looks at labels, layer 2 (TLA2)",
    "second_to_right_labels": "target looks at right labels (TILA2)",
}
ACCURACIES = {
    "ic/accuracy": "in context: fresh classes",
    "ic2/accuracy": "in context: labels moved by one",
    "iw/accuracy": "in weights: classes drawn alone",
}

_RUN = "reference run, seed 0"
_MODEL = "reconstruction"


def _small(name: str) -> Callable[[Mapping[str, Any]], Any]:
    """The last of a metric for 256 classes, at whose setting the reference was run."""
    return lambda results: results["sweeps"]["num_classes"]["256"][name]


def _two(name: str) -> Callable[[Mapping[str, Any]], Any]:
    return lambda results: results["two_parameter"]["metrics"][name][-1]


def _loss(labels: int, step: int) -> Callable[[Mapping[str, Any]], Any]:
    def find(results: Mapping[str, Any]) -> list[float]:
        run = results["three_logit"][str(labels)]
        return [run["loss"][run["steps"].index(step)]]

    return find


QUOTED = (
    Quoted("256 classes", "in context", 0.66, _RUN, _small("ic/accuracy")),
    Quoted("256 classes", "in weights", 0.17, _RUN, _small("iw/accuracy")),
    Quoted("256 classes", "CLA", 0.92, _RUN, _small("context_label")),
    Quoted("256 classes", "ILA1", 0.64, _RUN, _small("first_to_item")),
    Quoted("256 classes", "TILA2", 0.52, _RUN, _small("second_to_right_labels")),
    Quoted("two parameters", "beta1", 4.2, _RUN, _two("beta1")),
    Quoted("two parameters", "beta2", 4.5, _RUN, _two("beta2")),
    Quoted("two parameters", "in context", 1.0, _RUN, _two("ic/accuracy")),
    Quoted("three logits, L = 32", "loss at step 100", 3.05, _MODEL, _loss(32, 100)),
    Quoted("three logits, L = 32", "loss at step 300", 0.009, _MODEL, _loss(32, 300)),
    Quoted("three logits, L = 9", "loss at step 300", 2.13, _MODEL, _loss(9, 300)),
    Quoted("three logits, L = 9", "loss at step 1000", 0.003, _MODEL, _loss(9, 1000)),
    Quoted("three logits, L = N = 8", "loss at step 1000", 2.079, _MODEL, _loss(8, 1000)),
)


def in_context_classification(
    *,
    problem: ItemLabelProblem,
    training: SeedsConfig,
    two_parameter: ItemLabelProblem,
    two_parameter_training: SeedsConfig,
    sweep: ItemLabelProblem,
    sweep_training: SeedsConfig,
    sweeps: Mapping[str, tuple[float | int, ...]],
    three_logit_labels: tuple[int, ...] = (32, 9, 8),
    run_dir: Path,
) -> None:
    """Trains networks to label items, and follows what they do over training.

    Args:
      problem, training: the run that is followed closely.
      two_parameter, two_parameter_training: the same for the two-parameter network.
      sweep, sweep_training: the run whose data is varied.
      sweeps: by field of its data, the values that it takes in turn.
      three_logit_labels: numbers of labels for the model of three numbers.
      run_dir: receives a folder for each run, `results.json`, `report.md` and the figures.
    """
    start, environment = time.monotonic(), reporting.environment()
    points = {key: point for key, _, _, point in _points(sweep, sweeps)}  # checked before training
    runs = {
        "full": (problem, training),
        "two_parameter": (two_parameter, two_parameter_training),
    }
    followed = {name: _record(_train(*run, run_dir / name)) for name, run in runs.items()}
    ends = {
        key: _ends(_train(point, sweep_training, run_dir / "sweeps" / key))
        for key, point in points.items()
    }
    results = {
        "script": "in_context_classification",
        "environment": environment,
        "seconds": time.monotonic() - start,
        "num_seeds": training.num_seeds,
        "problem": problem.to_dict(),
        "sweep": sweep.to_dict(),
        "sweep_steps": sweep_training.num_steps,
        **followed,
        "three_logit": {str(labels): _three_logit(labels) for labels in three_logit_labels},
        "sweeps": {
            field: {
                f"{value:g}": ends[key] for key, f, value, _ in _points(sweep, sweeps) if f == field
            }
            for field in sweeps
        },
    }
    reporting.publish(results, report, run_dir)


def _points(
    sweep: ItemLabelProblem, sweeps: Mapping[str, tuple[float | int, ...]]
) -> Iterator[tuple[str, str, float, ItemLabelProblem]]:
    """A key, the field, its value and the problem; values that change nothing share a key."""
    for field, values in sweeps.items():
        if not hasattr(sweep.data, field) or not values:
            raise argument_error("sweeps", "fields of ItemLabelConfig and their values", field)
        for value in values:
            point = sweep.replace(data=sweep.data.replace(**{field: value}))
            yield "as it is" if point == sweep else f"{field}={value:g}", field, value, point


def _train(problem: ItemLabelProblem, training: SeedsConfig, run_dir: Path) -> SeedsResult:
    Console().rule(run_dir.name)
    result = train_seeds(problem, training, run_dir)
    jax.clear_caches()  # Programs hold memory maps, of which a process has only so many.
    return result


def _record(result: SeedsResult) -> dict[str, Any]:
    return {
        "steps": result.steps.tolist(),
        "metrics": {name: values.tolist() for name, values in result.metrics.items()},
    }


def _ends(result: SeedsResult) -> dict[str, list[float]]:
    return {name: result.final(name).tolist() for name in result.metrics}


def _three_logit(labels: int, every: int = 5) -> dict[str, Any]:
    run = jax.device_get(three_logit(labels))
    steps = np.arange(0, len(run.loss), every)
    names = ("loss", "first", "second", "context_label", "right_label")
    return {
        "steps": steps.tolist(),
        "steepest": int(np.diff(run.loss).argmin()),
        **{name: getattr(run, name)[steps].tolist() for name in names},
    }


def report(results: Mapping[str, Any]) -> Report:
    """The report, from the recorded results alone."""
    data = results["problem"]["data"]
    described = "\n".join(f"- *{name}*: {what};" for name, what in EVALUATIONS.items()).rstrip(";")
    return Report(
        title="In-context classification",
        blocks=[
            reporting.describe_environment(results["environment"]),
            f"{data['num_items']} items with labels, {data['num_classes']} classes, "
            f"{data['num_labels']} labels; chance is 1/{data['num_labels']}, any label of the "
            f"context is right in 1 of {data['num_items']} cases. {results['num_seeds']} seeds, "
            "each with classes of its own, as one program; means with 95 % intervals (Student's "
            f"t). {reporting.took(results['seconds'])}\n\nJudged on\n\n{described}.",
            followed(results["full"]),
            order(results["full"]),
            comparison(results),
            "The reference run is an independent implementation at 1000 steps (600 for the two "
            "parameters), one seed. Formulas of the progress measures, of the two-parameter "
            "network and of the three logits are reconstructions from the paper's description.",
            data_dependence(results),
            ends_table(results),
            two_parameters(results["two_parameter"]),
            three_logits(results["three_logit"]),
        ],
    )


def followed(run: Mapping[str, Any]) -> Figure:
    """Loss, accuracies and progress measures over training."""
    steps = run["steps"]

    def panel(ylabel: str, names: Mapping[str, str]) -> Panel:
        series = [curve(label, steps, _seeds_first(run, name)) for name, label in names.items()]
        return Panel(xlabel="steps", ylabel=ylabel, series=series)

    caption = (
        "Before they can tell which label of the context is right, networks learn to answer with "
        "any of them (CLA): a slow phase at an accuracy of 1/N. Then the attention of labels to "
        "their items (ILA1), that of the target to the right labels (TILA2) and the accuracy in "
        "context rise together. Bands: 95 % intervals over seeds."
    )
    return Figure(
        name="training",
        caption=caption,
        panels=[
            panel("training loss (nats)", {"train/loss": "loss"}),
            panel("accuracy", ACCURACIES),
            panel("share", MEASURES),
        ],
    )


def order(run: Mapping[str, Any]) -> Table:
    """When each measure is halfway between its start and its end."""
    names = {**MEASURES, "ic/accuracy": ACCURACIES["ic/accuracy"]}
    rows = []
    for name, label in names.items():
        halfway = [halfway_step(run["steps"], values) for values in _seeds_first(run, name)]
        first, last = (Estimate.of(_seeds_first(run, name)[:, at]) for at in (0, -1))
        rows.append((label, str(first), str(last), str(Estimate.of(halfway))))
    header = ("measure", "start", "end", "halfway at step")
    return Table(title="What comes when", header=header, rows=rows)


def halfway_step(steps: list[int], values: np.ndarray) -> float:
    """The first step at which a curve is halfway from its start to its end, interpolated."""
    middle = (values[0] + values[-1]) / 2
    past = (values - middle) * np.sign(values[-1] - values[0]) >= 0
    at = int(past.argmax())
    if at == 0:
        return float(steps[0])
    share = (middle - values[at - 1]) / (values[at] - values[at - 1])
    return float(steps[at - 1] + share * (steps[at] - steps[at - 1]))


def comparison(results: Mapping[str, Any]) -> Table:
    """The quoted figures of the settings that were run."""
    found = []
    for quoted in QUOTED:
        with contextlib.suppress(KeyError, ValueError):  # of a setting that was not run
            found.append(quoted.beside(results))
    return comparison_table(found)


def data_dependence(results: Mapping[str, Any]) -> Figure:
    """Accuracies after training against what is varied in the data."""
    panels = []
    for field, ends in results["sweeps"].items():
        x = [float(value) for value in ends]
        series = [
            curve(label, x, np.transpose([end[name] for end in ends.values()]), marker=True)
            for name, label in ACCURACIES.items()
        ]
        panels.append(
            Panel(
                xlabel=field.replace("_", " "), ylabel="accuracy", series=series,
                xscale="log2" if min(x) >= 1 else "linear", ylim=(-0.05, 1.05),
            )
        )  # fmt: skip
    caption = (
        f"Accuracies after {results['sweep_steps']} steps, as one property of the data is varied "
        f"around {results['sweep']['data']['num_classes']} classes. Wide bands: some seeds found "
        "the solution in context, others that by heart."
    )
    return Figure(name="data_dependence", caption=caption, panels=panels)


def ends_table(results: Mapping[str, Any]) -> Table:
    """The numbers of the sweeps."""
    rows = [
        (f"{field} = {value}", *(str(Estimate.of(end[name])) for name in ACCURACIES),
         ", ".join(f"{x:.2f}" for x in end["ic/accuracy"]))
        for field, ends in results["sweeps"].items()
        for value, end in ends.items()
    ]  # fmt: skip
    header = ("data", *ACCURACIES.values(), "in context, by seed")
    return Table(title="Data dependence", header=header, rows=rows)


def two_parameters(run: Mapping[str, Any]) -> Figure:
    """The two-parameter network over training."""

    def panel(ylabel: str, names: Mapping[str, str]) -> Panel:
        # Seeds leave the plateau at times so different that their mean shows nothing abrupt.
        series = [
            Series(label=label, x=run["steps"], y=values.tolist(), marker=False)
            for name, label in names.items()
            for values in _seeds_first(run, name)
        ]
        return Panel(xlabel="steps", ylabel=ylabel, series=series)

    caption = (
        "An induction head with two parameters and an MLP, on fresh classes, a line for each seed. "
        "beta1 looks back from a label to its item, beta2 from the target to its likes."
    )
    shares = {name: ACCURACIES.get(name) or MEASURES[name] for name in (
        "context_label", "ic/accuracy",
    )}  # fmt: skip
    betas = {"beta1": "beta1", "beta2": "beta2"}
    return Figure(
        name="two_parameters",
        caption=caption,
        panels=[panel("share", shares), panel("parameter", betas)],
    )


def three_logits(runs: Mapping[str, Any]) -> Figure:
    """The model of three numbers."""
    names = {
        "context_label": "probability of all labels of the context",
        "right_label": "probability of the right one",
        "first": "attention of a label to its item (a1)",
        "second": "attention to the right label (a2)",
    }
    panels = [
        Panel(
            title=f"L = {labels}",
            xlabel="steps of gradient descent",
            ylabel="share",
            series=[
                Series(label=label, x=run["steps"], y=run[name], marker=False)
                for name, label in names.items()
            ],
            ylim=(-0.02, 1.02),
        )
        for labels, run in runs.items()
    ]
    caption = (
        "Three numbers under gradient descent, 8 items in the context. With more labels than items "
        "it pays to answer with any label of the context, and from there the rest is learned; with "
        "as many labels as items it pays nothing, and nothing is ever learned."
    )
    return Figure(name="three_logits", caption=caption, panels=panels)


def _seeds_first(run: Mapping[str, Any], name: str) -> np.ndarray:
    return np.transpose(run["metrics"][name])


if __name__ == "__main__":
    sys.exit(cli.main(in_context_classification))
