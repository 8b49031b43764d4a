"""In-context learning as gradient descent: what layers of linear self-attention learn.

    python -m experiments.icl_gd --gin_file=icl_gd/quick.gin

Interrupted, the same command continues where it stopped. After von Oswald et al. 2022 (arXiv
2212.07677) and Mahankali et al. 2023 (arXiv 2307.03576); `lcattn.probes.regression` holds what is
measured.
"""

import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments import cli, reporting
from experiments.estimates import Estimate, curve
from experiments.figures import Figure, HeatMap, Panel, Series
from experiments.regression import DescentStudy, OptimumStudy, RepresentationStudy, Study
from experiments.regression.study import against_paper, identity_panel, level
from experiments.reporting import Report, Table
from experiments.sweep import folder
from lcattn.errors import argument_error

KINDS = (DescentStudy, OptimumStudy, RepresentationStudy)


def icl_gd(*, studies: Mapping[str, Study], run_dir: Path) -> None:
    """Trains layers of linear self-attention and sets them beside gradient descent.

    Args:
      studies: by name.
      run_dir: receives a folder for each study, `results.json`, `report.md` and the figures.
    """
    for name, study in studies.items():
        if not isinstance(study, KINDS):
            expected = f"one of {', '.join(kind.__name__ for kind in KINDS)}"
            raise argument_error(f"icl_gd.studies[{name!r}]", expected, type(study).__name__)
    start, environment = time.monotonic(), reporting.environment()
    results: dict[str, Any] = {
        "script": "icl_gd",
        "environment": environment,
        "studies": {name: study.run(run_dir / folder(name)) for name, study in studies.items()},
    }
    results["seconds"] = time.monotonic() - start
    reporting.publish(results, report, run_dir)


def report(results: Mapping[str, Any]) -> Report:
    """The report, from the recorded results alone."""
    studies = results["studies"]
    kinds = {
        kind: {name: study for name, study in studies.items() if study["kind"] == kind}
        for kind in ("descent", "optimum", "representation")
    }
    blocks: list[str | Table | Figure] = [
        reporting.describe_environment(results["environment"]),
        "Numbers are means over seeds with their 95 % interval; curves have it as a band. Losses "
        "are half the mean squared error, on one draw of rows that a model shares with what it is "
        "compared with: from 20,000 rows it is known to 2 or 3 %, so look at those of the same "
        f"study first. {reporting.took(results['seconds'])}",
    ]
    if any(study["published"] for study in studies.values()):
        blocks.append(against_paper(studies))
    if descent := kinds["descent"]:
        blocks += [learning(descent), descent_table(descent)]
        blocks += [weights(descent)] if any("weights" in s for s in descent.values()) else []
        for name, study in descent.items():
            if "shifts" in study:
                blocks += [shifts(name, study), laws_table(study), roll_out(name, study)]
    if optimal := kinds["optimum"]:
        blocks += [optimum_figure(optimal), optimum_table(optimal)]
    if represented := kinds["representation"]:
        blocks += [representation(represented), representation_table(represented)]
    return Report(title="In-context learning as gradient descent", blocks=blocks)


def learning(studies: Mapping[str, Any]) -> Figure:
    """Loss and cosine over training, a pair of panels a model."""
    losses, cosines = [], []
    for name, study in studies.items():
        steps, metrics = study["curves"]["steps"], study["curves"]["metrics"]
        lines = [curve("trained", steps, metrics["loss"])]
        for reference in study["steps"]:
            lines.append(level(reference, steps, metrics[f"{reference}/loss"][0][-1]))
        losses.append(Panel(title=name, xlabel="step", ylabel="½ MSE", series=lines, ylim=(0, 0.5)))
        near = [curve(ref, steps, metrics[f"{ref}/cos"]) for ref in study["steps"]]
        cosines.append(
            Panel(
                title=name,
                xlabel="step",
                ylabel="cosine of sensitivities",
                series=near,
                ylim=(0.0, 1.02),
            )
        )
    return Figure(
        name="learning",
        caption="Above: loss of the trained layers, and of gradient descent at its best (dashed). "
        "Below: cosine between the sensitivity of the trained layers to the query and that of the "
        "algorithm of that colour. Bands: 95 % interval over seeds, wide where some seeds sit on "
        "the plateau of the start.",
        panels=[*losses, *cosines],
        max_columns=len(losses),
    )


def descent_table(studies: Mapping[str, Any]) -> Table:
    """Every model with every algorithm it is compared with."""
    rows = []
    for name, study in studies.items():
        measured = study["measured"]
        for reference, steps in study["steps"].items():
            near = (f"{reference}/{metric}" for metric in ("cos", "pred_diff", "model_diff"))
            rows.append(
                (
                    name, str(Estimate.of(measured["loss"])), reference,
                    measured[f"{reference}/loss"][0],
                    *(str(Estimate.of(measured[metric])) for metric in near),
                    ", ".join(f"{rate:.3g}" for rate in steps["rates"]),
                    ", ".join(f"{gamma:.3g}" for gamma in steps["curvatures"]) or "–",
                )
            )  # fmt: skip
    header = (
        "model", "½ MSE", "compared with", "its ½ MSE", "cosine", "prediction difference",
        "model difference", "its rates η", "its curvatures γ",
    )  # fmt: skip
    return Table(title="Trained layers and gradient descent", header=header, rows=rows)


def weights(studies: Mapping[str, Any]) -> Figure:
    """The products of the weights of the first seed."""
    panels = []
    for name, study in studies.items():
        if "weights" not in study:
            continue
        for product, title in (("key_query", "scores W_KᵀW_Q"), ("out_value", "writes P W_V")):
            values = study["weights"][product][0]
            axis = [str(i) for i in range(1, len(values))] + ["y"]
            panels.append(
                HeatMap(
                    title=f"{name}\n{title}", xlabel="coordinate read", ylabel="coordinate",
                    columns=axis, rows=axis, values=values, limits=(-1.0, 1.0), written=False,
                    label="weight (beyond ±1: as ±1)",
                )
            )  # fmt: skip
    return Figure(
        name="weights",
        caption="Products of the weights of seed 0, scores scaled to a mean of 1 on the inputs. "
        "One step of gradient descent is the identity without its last entry, and one entry in the "
        "corner; GD++ also writes −γ on the diagonal.",
        panels=panels,
    )


def shifts(name: str, study: Mapping[str, Any]) -> Figure:
    """Losses on inputs, weights and labels unlike those of training."""
    labels = {
        "scale of inputs": "inputs × α",
        "scale of weights": "weights of the teacher × α",
        "labels replaced by noise": "labels replaced by N(0, 1)",
    }
    panels = []
    for shift, xlabel in labels.items():
        lines = study["shifts"][shift]
        panels.append(
            Panel(
                xlabel=xlabel, ylabel="½ MSE", yscale="log",
                series=[
                    curve("trained", lines["at"], lines["trained"], marker=True),
                    curve("interpolated weights", lines["at"], lines["interpolated"], marker=True),
                    Series(label="GD, 1 step", x=lines["at"], y=lines["GD, 1 step"], line="--"),
                ],
            )
        )  # fmt: skip
    caption = (
        f"{name}: loss on rows unlike those of training, on which GD, the trained layer and the "
        "layer halfway between them should agree. Bands: 95 % interval over seeds."
    )
    return Figure(name=f"shifts_{folder(name)}", caption=caption, panels=panels)


def laws_table(study: Mapping[str, Any]) -> Table:
    """Losses under other laws of the inputs."""
    lines = study["shifts"]["law of inputs"]
    trained, midway = (Estimate.of(lines[name]) for name in ("trained", "interpolated"))
    rows = [
        (law, lines["GD, 1 step"][i], *(
            str(Estimate(e.mean[i], e.margin[i])) for e in (trained, midway)
        ))
        for i, law in enumerate(lines["at"])
    ]  # fmt: skip
    header = ("law of inputs", "GD, 1 step", "trained", "interpolated weights")
    title = "½ MSE under other laws of inputs with the same second moment"
    return Table(title=title, header=header, rows=rows)


def roll_out(name: str, study: Mapping[str, Any]) -> Figure:
    """The layer applied again and again."""
    panels = []
    for damping, lines in study["roll_out"].items():
        steps = list(range(1, len(lines["GD"]) + 1))
        panels.append(
            Panel(
                title=f"damping {damping}", xlabel="times applied", ylabel="½ MSE", yscale="log",
                ylim=(0.02, 10),
                series=[
                    # Seeds diverge at different times, and a mean would show none of them.
                    *(
                        Series(label="trained, each seed", x=steps, y=seed, marker=False)
                        for seed in lines["trained"]
                    ),
                    Series(label="GD", x=steps, y=lines["GD"], line="--", marker=False),
                ],
            )
        )  # fmt: skip
    caption = (
        f"{name}: the layer applied up to {len(steps)} times, each update damped. What diverges "
        "are the few rows of largest curvature."
    )
    return Figure(name=f"roll_out_{folder(name)}", caption=caption, panels=panels)


def optimum_figure(studies: Mapping[str, Any]) -> Figure:
    """Entries of what was learned against those of the optimum."""
    panels = [
        identity_panel(
            name, [(study["best"], matrix) for matrix in study["matrices"]],
            ("entry of M* (closed form)", "entry of M (recovered)"),
        )
        for name, study in studies.items()
    ]  # fmt: skip
    caption = "Entries of the matrix that a trained layer applies, against those of the best one."
    return Figure(name="optimum", caption=caption, panels=panels)


def optimum_table(studies: Mapping[str, Any]) -> Table:
    """How near training comes to the optimum."""
    names = ("excess loss (%)", "cosine with M*", "|M - M*| / |M*|", "cosine with I")
    rows = [
        (
            name, study["optimal_loss"],
            *(str(Estimate.of(study["measured"][m])) for m in names),
            study["identity_cosine"],
        )
        for name, study in studies.items()
    ]  # fmt: skip
    header = ("task", "optimal ½ MSE", *names, "cosine of M* with I")
    return Table(title="The optimum of one layer", header=header, rows=rows)


def representation(studies: Mapping[str, Any]) -> Figure:
    """Losses over training of both networks."""
    panels = [
        Panel(
            title=name, xlabel="step", ylabel="½ MSE", yscale="log",
            ylim=(study["levels"]["predict 0"] / 50, 5 * study["levels"]["predict 0"]),
            series=[
                *(
                    curve(label, lines["steps"], lines["metrics"]["loss"])
                    for label, lines in study["curves"].items()
                ),
                *(
                    level(label, next(iter(study["curves"].values()))["steps"], value)
                    for label, value in study["levels"].items()
                ),
            ],
        )
        for name, study in studies.items()
    ]  # fmt: skip
    caption = (
        "An MLP before one layer of linear self-attention, trained freely, and with the attention "
        "fixed to a step of gradient descent. Bands: 95 % interval over seeds."
    )
    return Figure(name="representation", caption=caption, panels=panels)


def representation_table(studies: Mapping[str, Any]) -> Table:
    """Final losses, and those of what needs no training."""
    rows = []
    for name, study in studies.items():
        rows += [(name, label, str(Estimate.of(v))) for label, v in study["measured"].items()]
        rows += [(name, label, value) for label, value in study["levels"].items()]
    title = "Regression on a representation"
    return Table(title=title, header=("task", "model", "½ MSE"), rows=rows)


if __name__ == "__main__":
    sys.exit(cli.main(icl_gd))
