"""Models trained on short rows of text, judged on rows up to 16 times as long.

    python -m experiments.length_extrapolation --gin_file=length_extrapolation/quick.gin

Interrupted, the same command continues where it stopped. The question is that of Gao and Spratling
(2025, arXiv 2501.13428): does softplus attention with re-weighting hold where softmax breaks?
"""

import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments import cli, reporting
from experiments.figures import Figure, Panel, Series
from experiments.reporting import Report, Table
from experiments.sweep import train_each
from lcattn.models import LMConfig
from lcattn.tasks import ExtrapolationTaskConfig
from lcattn.training import TrainConfig

PUBLISHED_FACTORS = (1, 2, 4, 8)
PUBLISHED = {
    "softmax + RoPE": (3.19, 4.17, 5.45, 6.28),
    "LSSA": (3.19, 4.13, 5.30, 5.94),
    "LSSAR, p = 3": (3.18, 4.24, 5.41, 6.30),
    "LSSAR, p = 15": (3.19, 3.19, 3.23, 3.32),
}
"""Validation loss of GPT-2 small with RoPE on FineWeb (10B tokens), trained on 1,024 tokens."""


def length_extrapolation(
    *,
    models: Mapping[str, LMConfig],
    task: ExtrapolationTaskConfig,
    training: TrainConfig,
    run_dir: Path,
) -> None:
    """Trains models on short rows of text and judges them on longer ones.

    Args:
      models: what to compare, by name. Those named as in the published table share its colours.
      task: text, the training length and the factors to judge at.
      training: the runs.
      run_dir: receives a folder for each run, `results.json`, `report.md` and the figure.
    """
    start, environment = time.monotonic(), reporting.environment()
    text = task.make()
    runs = train_each(models, text, training, run_dir / "models")
    records = {name: record for name, _, record in runs}
    results = {
        "script": "length_extrapolation",
        "environment": environment,
        "seconds": time.monotonic() - start,
        "models": records,
        "length": task.length,
        "judged_bytes": int(text.judged_documents.data.size),
        "judged_documents": len(text.judged_documents),
    }
    reporting.publish(results, report, run_dir)


def report(results: Mapping[str, Any]) -> Report:
    """The report, from the recorded results alone."""
    models, length = results["models"], results["length"]
    return Report(
        title=f"Trained on {length:,} bytes, judged on more",
        blocks=[
            reporting.describe_environment(results["environment"]),
            f"Every length is judged by the same bytes, the beginnings of "
            f"{results['judged_documents']} held-out files, {results['judged_bytes']:,} bytes in "
            "all: a model that holds gains from the longer context, and its loss falls. Each model "
            f"is one run of one seed. {reporting.took(results['seconds'])}",
            figure(models, length),
            table(models),
            rise_table(models),
            published_table(),
            "The published losses are quoted from arXiv 2501.13428 (v5, by way of summaries of "
            "it), not measured here: another model, text and tokenizer, so what compares is the "
            "rise with the length.",
        ],
    )


def figure(models: Mapping[str, Any], length: int) -> Figure:
    """Loss against length over the training length: ours, and as published."""
    ours = []
    for name, run in models.items():
        factors = [numbers["factor"] for numbers in run["slices"].values()]
        ours.append(Series(label=name, x=factors, y=_losses(run)))
    published = [
        Series(label=name, x=PUBLISHED_FACTORS, y=losses) for name, losses in PUBLISHED.items()
    ]
    titles = (f"measured: bytes, trained on {length:,}", "published: GPT-2 small, 1,024 tokens")
    panels = [
        Panel(
            title=title,
            xlabel="length / training length",
            ylabel="loss (nats per token)",
            series=series,
            xscale="log2",
            direct_labels=True,
        )
        for title, series in zip(titles, (ours, published), strict=True)
    ]
    caption = "Held-out loss by length; left measured here, right quoted from arXiv 2501.13428."
    return Figure(name="length", caption=caption, panels=panels)


def table(models: Mapping[str, Any]) -> Table:
    """Loss by length."""
    run = next(iter(models.values()))
    lengths = (f"{numbers['length']:,} bytes" for numbers in run["slices"].values())
    header = ("model", *lengths, "steps", "parameters", "tokens/s")
    rows = [
        (name, *_losses(run), run["steps"], run["num_parameters"], run["tokens_per_second"])
        for name, run in models.items()
    ]
    return Table(title="Measured: loss (nats per byte)", header=header, rows=rows)


def rise_table(models: Mapping[str, Any]) -> Table:
    """Loss by length, less the loss at the first length, ours beside the published."""
    run = next(iter(models.values()))
    factors = [numbers["factor"] for numbers in run["slices"].values()]
    rows = []
    for name, run in models.items():
        published = dict(zip(PUBLISHED_FACTORS, _rises(PUBLISHED.get(name, ())), strict=False))
        rows.append((name, *_rises(_losses(run))[1:], *map(published.get, PUBLISHED_FACTORS[1:])))
    header = (
        "model",
        *(f"{factor}×" for factor in factors[1:]),
        *(f"published {factor}×" for factor in PUBLISHED_FACTORS[1:]),
    )
    return Table(title="Rise of the loss over that at the first length", header=header, rows=rows)


def published_table() -> Table:
    """The published losses."""
    header = ("attention", *(f"{1024 * factor:,} tokens" for factor in PUBLISHED_FACTORS))
    rows = [(name, *losses) for name, losses in PUBLISHED.items()]
    return Table(title="Published: loss (nats per token)", header=header, rows=rows)


def _losses(run: Mapping[str, Any]) -> list[float | None]:
    return [run["metrics"][f"{name}/loss"] for name in run["slices"]]


def _rises(losses: Sequence[float | None]) -> list[float | None]:
    return [None if loss is None or losses[0] is None else loss - losses[0] for loss in losses]


if __name__ == "__main__":
    sys.exit(cli.main(length_extrapolation))
