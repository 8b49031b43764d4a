"""Which mechanisms still make a step of gradient descent: each as the one layer that regresses.

    python -m experiments.icl_mixers --gin_file=icl_mixers/quick.gin

Interrupted, the same command continues where it stopped. The task and the metrics are those of
`experiments.icl_gd`; the layer stands between a linear embedding and a linear read-out
(`lcattn.probes.regression.MixerRegressorConfig` says why).
"""

import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments import cli, reporting
from experiments.estimates import Estimate
from experiments.figures import Bars, Figure
from experiments.regression import MechanismStudy
from experiments.reporting import Report, Table

ANCHORS = {"predict 0": 0.4167, "GD": 0.2062, "GD, 2 steps": 0.156, "GD++, 2 steps": 0.1093}
"""½ MSE at n = d = 10, inputs uniform on (-0.5, 0.5): in closed form, the last two by fitting."""


def icl_mixers(*, study: MechanismStudy, run_dir: Path) -> None:
    """Trains one layer of each mechanism on regression in context.

    Args:
      study: the task, the mechanisms and the runs.
      run_dir: receives a folder for each mechanism, `results.json`, `report.md` and the figure.
    """
    start, environment = time.monotonic(), reporting.environment()
    results: dict[str, Any] = {
        "script": "icl_mixers",
        "environment": environment,
        "study": study.run(run_dir),
    }
    results["seconds"] = time.monotonic() - start
    reporting.publish(results, report, run_dir)


def report(results: Mapping[str, Any]) -> Report:
    """The report, from the recorded results alone."""
    study = results["study"]
    return Report(
        title="Which mechanisms make a step of gradient descent",
        blocks=[
            reporting.describe_environment(results["environment"]),
            "One layer of each mechanism between a linear embedding and a linear read-out, "
            f"{study['num_steps']} steps each; mean over seeds with its 95 % interval. Wide "
            "intervals are seeds still on the plateau of the start, so what a mechanism lacks here "
            "it has not learned in these steps, which does not say that it cannot. The rows are "
            "one draw, on which a step of gradient descent has "
            f"{study['measured'][study['mechanisms'][0] + '/GD/loss'][0]:.3g}. "
            f"{reporting.took(results['seconds'])}",
            figure(study),
            table(study),
        ],
    )


def figure(study: Mapping[str, Any]) -> Figure:
    """Loss and cosine of each mechanism, the best one first."""
    names = ordered(study)
    loss, cosine = (
        [Estimate.of(study["measured"][f"{name}/{metric}"]) for name in names]
        for metric in ("loss", "GD/cos")
    )
    panels = [
        Bars(
            xlabel="½ MSE", names=names, values=[float(e.mean) for e in loss],
            margins=[float(e.margin) for e in loss], levels=ANCHORS, limits=(0, 0.5),
        ),
        Bars(
            xlabel="cosine to one step of gradient descent", names=names,
            values=[float(e.mean) for e in cosine], margins=[float(e.margin) for e in cosine],
            limits=(0, 1.05),
        ),
    ]  # fmt: skip
    return Figure(
        name="mechanisms",
        caption="One layer of each mechanism after training on linear regression in context. Left: "
        "its loss, and that of gradient descent over all rows (lines). Right: cosine of its "
        "sensitivity to the query with that of one step of gradient descent. Whiskers: 95 % "
        "interval over seeds.",
        panels=panels,
    )


def ordered(study: Mapping[str, Any]) -> list[str]:
    """The mechanisms by their loss."""
    losses = {n: Estimate.of(study["measured"][f"{n}/loss"]).mean for n in study["mechanisms"]}
    return sorted(losses, key=losses.__getitem__)


def table(study: Mapping[str, Any]) -> Table:
    """Loss, and nearness to each algorithm."""
    measured, references = study["measured"], study["references"]
    rows = [
        (
            name, str(Estimate.of(measured[f"{name}/loss"])), verdict(measured, name),
            *(str(Estimate.of(measured[f"{name}/{ref}/cos"])) for ref in references),
            str(Estimate.of(measured[f"{name}/GD/pred_diff"])),
        )
        for name in ordered(study)
    ]  # fmt: skip
    header = (
        "mechanism", "½ MSE", "reads as", *(f"cosine to {ref}" for ref in references),
        "prediction difference from GD",
    )  # fmt: skip
    return Table(title="One layer on linear regression in context", header=header, rows=rows)


def verdict(measured: Mapping[str, Any], name: str) -> str:
    """What the numbers amount to, by stated thresholds."""
    loss = float(Estimate.of(measured[f"{name}/loss"]).mean)
    cosine = float(Estimate.of(measured[f"{name}/GD/cos"]).mean)
    if cosine >= 0.99:
        return "a step of GD (cosine ≥ 0.99)"
    if loss < 0.95 * measured[f"{name}/GD/loss"][0]:
        return "better than a step of GD"
    if cosine >= 0.9:
        return "near a step of GD (cosine ≥ 0.9)"
    return "part of a step of GD" if cosine >= 0.1 else "nothing of it (cosine < 0.1)"


if __name__ == "__main__":
    sys.exit(cli.main(icl_mixers))
