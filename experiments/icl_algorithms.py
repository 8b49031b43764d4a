"""Which learning algorithm a decoder agrees with, by its depth and by the noise of the labels.

    python -m experiments.icl_algorithms --gin_file=icl_algorithms/quick.gin

Interrupted, the same command continues where it stopped. After Akyürek et al. 2022 (arXiv
2211.15661); `lcattn.probes.regression.agreement` holds the metrics.
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
from experiments.regression import AlgorithmStudy, against_paper
from experiments.reporting import Report, Table
from experiments.sweep import folder


def icl_algorithms(*, studies: Mapping[str, AlgorithmStudy], run_dir: Path) -> None:
    """Trains decoders on regression and finds the algorithm that each agrees with.

    Args:
      studies: by name; they may differ in depth and in noise.
      run_dir: receives a folder for each study, `results.json`, `report.md` and the figures.
    """
    start, environment = time.monotonic(), reporting.environment()
    results: dict[str, Any] = {
        "script": "icl_algorithms",
        "environment": environment,
        "studies": {name: study.run(run_dir / folder(name)) for name, study in studies.items()},
    }
    results["seconds"] = time.monotonic() - start
    reporting.publish(results, report, run_dir)


def report(results: Mapping[str, Any]) -> Report:
    """The report, from the recorded results alone."""
    studies = results["studies"]
    blocks: list[str | Table | Figure] = [
        reporting.describe_environment(results["environment"]),
        "Squared prediction differences (SPD) and implicit weight differences (ILWD) are divided "
        "by the size of an input. Means over seeds with their 95 % interval. "
        f"{reporting.took(results['seconds'])}",
    ]
    if any(study["published"] for study in studies.values()):
        blocks.append(against_paper(studies))
    blocks += [figure(studies), table(studies)]
    noisy = {name: s for name, s in studies.items() if s["noise"]}
    blocks += [noise_figure(noisy)] if noisy else []
    blocks.append(decoded_table(studies))
    return Report(title="Which algorithm a decoder agrees with", blocks=blocks)


def figure(studies: Mapping[str, Any]) -> Figure:
    """SPD from each algorithm by the number of examples, a panel a model."""
    panels = []
    for name, study in studies.items():
        counts = list(range(1, len(study["by_count"]["error"][0])))
        lines = [
            curve(learner, counts, _from_one(study["by_count"][f"spd/{learner}"]), marker=True)
            for learner in study["learners"]
        ]
        panels.append(
            Panel(
                title=name, xlabel=f"examples (d = {study['dim']})",
                ylabel="squared prediction difference / d", series=lines, yscale="log",
            )
        )  # fmt: skip
    caption = (
        "Squared difference between what a decoder predicts and what each algorithm would, by the "
        "number of examples seen. Bands: 95 % interval over seeds."
    )
    return Figure(name="algorithms", caption=caption, panels=panels)


def _from_one(values: list[list[float]]) -> list[list[float]]:
    """Without the prediction from no example, which is 0 for all algorithms."""
    return [line[1:] for line in values]


def table(studies: Mapping[str, Any]) -> Table:
    """The distance to each algorithm below d examples and on the whole."""
    rows: list[tuple[Any, ...]] = []
    for name, study in studies.items():
        measured = study["measured"]
        for learner in study["learners"]:
            numbers = (measured[f"{what}, {learner}"] for what in ("SPD below d", "SPD", "ILWD"))
            error = study["by_count"][f"error/{learner}"][0]
            rows.append((name, learner, *(str(Estimate.of(n)) for n in numbers), error[-1]))
        rows.append((name, "(labels)", None, None, None,
                     str(Estimate.of(measured["MSE / d with all examples"]))))  # fmt: skip
    header = (
        "model", "algorithm", "SPD / d below d examples", "SPD / d", "ILWD / d, all examples",
        "its MSE / d, all examples",
    )  # fmt: skip
    return Table(title="Nearness to learning algorithms", header=header, rows=rows)


def noise_figure(studies: Mapping[str, Any]) -> Figure:
    """The penalty of the ridge regression that each noise level is nearest to."""
    some = next(iter(studies.values()))
    ridges = [name for name in some["learners"] if name.startswith("ridge_")]
    penalties = [float(name.removeprefix("ridge_")) for name in ridges]
    panel = Panel(
        xlabel="penalty of ridge regression", ylabel="squared prediction difference / d",
        xscale="log", yscale="log",
        series=[
            curve(
                name, penalties,
                np.stack([study["measured"][f"SPD, {ridge}"] for ridge in ridges], axis=1),
                marker=True,
            )
            for name, study in studies.items()
        ],
    )  # fmt: skip
    caption = (
        "Squared prediction difference from ridge regression by its penalty; the best one for "
        "labels of noise σ is σ². Bands: 95 % interval over seeds."
    )
    return Figure(name="noise", caption=caption, panels=[panel])


def decoded_table(studies: Mapping[str, Any]) -> Table:
    """What a linear probe reads from the residual stream of the query, by layer."""
    rows = []
    for name, study in studies.items():
        for what, values in study["decoded"].items():
            for layer, seeds in enumerate(np.asarray(values).T):
                where = f"block {layer}" if layer else "embedding"
                rows.append((name, what, where, str(Estimate.of(seeds))))
    header = ("model", "read", "after", "R²")
    return Table(title="Linear probes at the query", header=header, rows=rows)


if __name__ == "__main__":
    sys.exit(cli.main(icl_algorithms))
