"""In-context language learning: which mechanisms infer a random automaton from its strings?

    python -m experiments.languages --gin_file=languages/quick.gin

Interrupted, the same command continues where it stopped. After Akyürek et al. 2024 (arXiv
2401.12973): transformers do better than recurrent models, and n-gram heads help both.
"""

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import cli, reporting
from experiments.estimates import Estimate, curve
from experiments.figures import Figure, Panel, Series
from experiments.reporting import Report, Table
from experiments.sweep import check_names, train_seeds_each
from lcattn.models import LMConfig
from lcattn.probes.languages import LanguageProblem, language_scores
from lcattn.tasks.languages import LanguagesConfig, backoff_laws
from lcattn.training import SeedsConfig

BINS = 16
"""Points of the curve over positions."""

REFERENCE = {
    "softmax": (0.264, 0.880, 0.207, 0.906),
    "linear": (0.458, 0.727, 0.440, 0.738),
    "linear + n-gram": (0.222, 0.934, 0.145, 0.971),
    "2-gram": (0.337, 0.858, None, None),
    "3-gram": (0.312, 0.914, None, None),
    "4-gram": (0.323, 0.918, None, None),
}
"""TVD and accuracy, over all positions and over the second half, at the small protocol (width 64,
2,000 steps of 32 rows) by an independent implementation. The paper itself gives curves only."""

METRICS = ("tvd", "accuracy")


def languages(
    *,
    data: LanguagesConfig,
    models: Mapping[str, LMConfig],
    training: SeedsConfig,
    batch_size: int = 32,
    instances: tuple[int, ...] = (),
    orders: tuple[int, ...] = (2, 3, 4),
    run_dir: Path,
) -> None:
    """Trains models to infer random languages in context, and sets them beside n-gram counts.

    Args:
      data: the languages.
      models: what to compare, by name. Those named as in the reference figures stand beside them.
      training: the runs; each model's seeds are trained at once.
      batch_size: rows in a batch.
      instances: train on the first so many rows, one run of each model a number. Empty: all rows.
      orders: of the n-gram models to draw beside.
      run_dir: receives a folder for each run, `results.json`, `report.md` and the figures.
    """
    start, environment = time.monotonic(), reporting.environment()
    pairs = [(name, count) for name in models for count in instances or (data.num_train,)]
    check_names([f"{name}_{count}" for name, count in pairs], "languages.models")
    problems = {
        f"{name}_{count}": LanguageProblem(
            model=models[name], data=data, batch_size=batch_size, num_instances=count
        )
        for name, count in pairs
    }
    runs: dict[str, dict[str, Any]] = {name: {} for name in models}
    edges = bin_edges(data.make().test.weights)
    trained = train_seeds_each(problems, training, run_dir / "models")
    for (name, count), (_, result) in zip(pairs, trained, strict=True):
        runs[name][str(count)] = {
            "steps": result.steps.tolist(),
            "losses": result.losses.tolist(),
            "num_parameters": sum(p[0].size for p in jax.tree.leaves(result.params)),
            **summary(result.metrics, edges),
        }
    results = {
        "script": "languages",
        "environment": environment,
        "seconds": time.monotonic() - start,
        "data": data.to_dict(),
        "batch_size": batch_size,
        "models": runs,
        "edges": edges,
        "baselines": dict(count_models(data, orders, edges)),
    }
    reporting.publish(results, report, run_dir)


def bin_edges(weights: np.ndarray) -> list[int]:
    """Where the bins of positions begin and end, the longest row's end included."""
    end = np.flatnonzero(weights.any(axis=0))[-1] + 1
    return np.unique(np.linspace(0, end, BINS + 1).astype(int)).tolist()


def summary(metrics: Mapping[str, Any], edges: Sequence[int]) -> dict[str, Any]:
    """Of scores `[E, S, T]`: `tvd` and `accuracy` `[E, S]`, and `_at` bins of positions the sums of
    the last evaluation, `[S, bins]`.
    """
    sums = {key: np.asarray(values, np.float64) for key, values in metrics.items()}
    total = {key: values.sum(axis=-1) for key, values in sums.items()}
    means = {name: total[f"{name}_at"] / total["letters_at"] for name in METRICS}
    last = {key: np.add.reduceat(values[-1], edges[:-1], axis=-1) for key, values in sums.items()}
    return {key: values.tolist() for key, values in (means | last).items()}


def count_models(
    data: LanguagesConfig, orders: Sequence[int], edges: Sequence[int]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The scores of n-gram models on the test rows, by name, as those of one seed."""
    if not orders:
        return
    rows = data.make().test
    laws = np.stack([backoff_laws(data, row, max(orders)) for row in rows.tokens.tolist()], axis=1)
    for order in orders:
        arrays = (jnp.asarray(array) for array in (laws[order - 1], rows.law, rows.weights))
        scores = {key: value[None, None] for key, value in language_scores(*arrays).items()}
        yield f"{order}-gram", summary(scores, edges)


def report(results: Mapping[str, Any]) -> Report:
    """The report, from the recorded results alone."""
    models, data = results["models"], results["data"]
    run = _any_run(models)
    seeds = len(run["losses"][0])
    counts = [f"{int(count):,}" for count in next(iter(models.values()))]
    figures = [instances_figure(results)] if len(counts) > 1 else []
    return Report(
        title="In-context language learning",
        blocks=[
            reporting.describe_environment(results["environment"]),
            f"Every row of {data['length']} tokens holds strings of an automaton that no other row "
            f"has; a model must infer it. {' and '.join(counts)} rows to train on, "
            f"{run['steps'][-1]:,} steps of {results['batch_size']} rows; {data['num_test']} rows "
            f"to be judged by. Means over {seeds} seeds with their 95 % intervals; the n-gram "
            f"models only count. {reporting.took(results['seconds'])}",
            *figures,
            learning_figure(results),
            position_figure(results),
            model_table(results),
            reference_table(results),
            "The reference figures are those of an independent implementation at the small "
            "protocol: the same languages, but width 64 and 2,000 steps of 32 rows. The paper "
            "gives curves. What compares is the order: transformers before recurrent models, and "
            "n-gram heads before both.",
        ],
    )


def learning_figure(results: Mapping[str, Any]) -> Figure:
    """Both scores against the rows seen so far, a line a mechanism."""

    def series(metric: str) -> Iterator[Series]:
        for name, runs in results["models"].items():
            run = runs[_most(runs)]
            seen = [step * results["batch_size"] for step in run["steps"]]
            # Before training every model is as bad as the next.
            yield curve(name, seen[1:], np.asarray(run[metric]).T[:, 1:], marker=True)
        yield from _flat(results, metric, seen[1], seen[-1])

    caption = (
        "Next letters against the true automaton, by the rows a model has trained on; dashed: "
        "n-gram models, which only count."
    )
    return Figure(name="languages", caption=caption, panels=_panels(series, "rows seen"))


def instances_figure(results: Mapping[str, Any]) -> Figure:
    """Both scores of trained models against the number of training rows."""

    def series(metric: str) -> Iterator[Series]:
        for name, runs in results["models"].items():
            counts = sorted(runs, key=int)
            final = np.stack([runs[count][metric][-1] for count in counts], axis=1)
            numbers = [int(count) for count in counts]
            yield curve(name, numbers, final, marker=True)
        yield from _flat(results, metric, numbers[0], numbers[-1])

    caption = "Trained models by the number of different rows they were trained on."
    return Figure(name="instances", caption=caption, panels=_panels(series, "training rows"))


def _panels(series: Any, xlabel: str) -> list[Panel]:
    labels = {"accuracy": "accuracy: possible letters", "tvd": "total variation distance"}
    return [
        Panel(
            xlabel=xlabel, ylabel=labels[metric], series=list(series(metric)), xscale="log2",
            direct_labels=True,
        )
        for metric in ("accuracy", "tvd")
    ]  # fmt: skip


def _flat(results: Mapping[str, Any], metric: str, first: int, last: int) -> Iterator[Series]:
    for name, scores in results["baselines"].items():
        yield Series(label=name, x=[first, last], y=scores[metric][0] * 2, line="--", marker=False)


def position_figure(results: Mapping[str, Any]) -> Figure:
    """Accuracy against the position in the row."""
    edges = np.asarray(results["edges"])
    middles = ((edges[1:] + edges[:-1]) / 2).tolist()

    def binned(scores: Mapping[str, Any]) -> np.ndarray:
        return np.divide(scores["accuracy_at"], scores["letters_at"])

    series = [
        curve(name, middles, binned(runs[_most(runs)])) for name, runs in results["models"].items()
    ]
    series += [
        Series(label=name, x=middles, y=binned(scores)[0].tolist(), line="--", marker=False)
        for name, scores in results["baselines"].items()
    ]
    panel = Panel(
        xlabel="position in the row (tokens)", ylabel="accuracy: possible letters", series=series,
        direct_labels=True,
    )  # fmt: skip
    caption = "What the strings so far have taught: accuracy by position, after training."
    return Figure(name="positions", caption=caption, panels=[panel])


def model_table(results: Mapping[str, Any]) -> Table:
    """Every model, all positions and the second half of the row."""
    rows = [
        (name, int(count), *_scores(run), Estimate.of(run["losses"][-1]), run["num_parameters"])
        for name, runs in results["models"].items()
        for count, run in runs.items()
    ]
    rows += [
        (name, None, *_scores(scores), None, None) for name, scores in results["baselines"].items()
    ]
    header = (
        "model", "training rows", *_score_names(results), "training loss (nats)", "parameters",
    )  # fmt: skip
    return Table(title="Trained models and counting", header=header, rows=rows)


def reference_table(results: Mapping[str, Any]) -> Table:
    """The reference figures beside ours, with the differences."""
    ours = {name: _scores(runs[_most(runs)]) for name, runs in results["models"].items()}
    ours |= {name: _scores(scores) for name, scores in results["baselines"].items()}
    rows = [
        (name, what, quoted, found, float(found.mean) - quoted)
        for name, figures in REFERENCE.items()
        if name in ours
        for what, quoted, found in zip(_score_names(results), figures, ours[name], strict=True)
        if quoted is not None
    ]
    header = ("model", "", "reference", "ours", "difference")
    return Table(title="Reference and ours", header=header, rows=rows)


def _score_names(results: Mapping[str, Any]) -> list[str]:
    edges = results["edges"]
    return ["TVD", "accuracy", *(f"{s} from {edges[len(edges) // 2]}" for s in ("TVD", "accuracy"))]


def _scores(run: Mapping[str, Any]) -> list[Estimate]:
    """TVD and accuracy over all positions, then over the second half."""
    half = (len(run["letters_at"][0]) + 1) // 2
    letters = np.asarray(run["letters_at"])[:, half:].sum(axis=1)
    late = (np.asarray(run[f"{name}_at"])[:, half:].sum(axis=1) / letters for name in METRICS)
    return [Estimate.of(values) for values in (*(run[name][-1] for name in METRICS), *late)]


def _most(runs: Mapping[str, Any]) -> str:
    return max(runs, key=int)


def _any_run(models: Mapping[str, Any]) -> Mapping[str, Any]:
    return next(iter(next(iter(models.values())).values()))


if __name__ == "__main__":
    sys.exit(cli.main(languages))
