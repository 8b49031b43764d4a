"""Induction heads: when models learn to repeat, which heads do it, and who is read for an answer.

    python -m experiments.induction_heads --gin_file=induction_heads/quick.gin

Interrupted, the same command continues where it stopped. Models learn rows that can only be
predicted from themselves (`lcattn.tasks.repeated`); what is measured is described in
`lcattn.probes`. Source: Olsson et al. (2022), arXiv 2209.11895.
"""

import itertools
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from experiments import cli, reporting
from experiments.estimates import Estimate, Quoted, comparison_table, curve
from experiments.figures import Figure, HeatMap, Panel, Series
from experiments.reporting import Report, Table, show_bytes
from experiments.sweep import folder, train_seeds_each
from lcattn import probes
from lcattn.models import LMConfig
from lcattn.probes import InductionProblem
from lcattn.training import SeedsConfig, SeedsResult

_SHARES = (-0.02, 1.02)
CURVES = ("loss", "in_context_score", "first_loss", "repeat_loss", "repeat_accuracy", "copied")
HEADS = ("prefix_matching", "previous_token", "duplicate_token", "copying")


def _final(name: str) -> Any:
    return lambda run: run["curves"][name][-1]


def _strongest(name: str) -> Any:
    return lambda run: np.max([np.max(v[-1], -1) for v in run["heads"][name].values()], axis=0)


def _role(map_: str, role: str) -> Any:
    return lambda run: run["roles"][map_][role]


_RUN = "reference run, seed 0"
QUOTED = (
    Quoted("2 layers", "repeat accuracy", 0.98, _RUN, _final("repeat_accuracy")),
    Quoted("2 layers", "repeat loss (nats)", 0.30, _RUN, _final("repeat_loss")),
    Quoted(
        "2 layers", "prefix matching, strongest head", 0.76, _RUN, _strongest("prefix_matching")
    ),
    Quoted("2 layers", "previous token, strongest head", 0.20, _RUN, _strongest("previous_token")),
    Quoted("2 layers", "counterfactual copy", 0.877, _RUN, _final("copied")),
    Quoted("2 layers", "occlusion of the source (nats)", 7.5, _RUN, _role("occlusion", "source")),
    Quoted("2 layers", "occlusion of the match (nats)", 3.9, _RUN, _role("occlusion", "match")),
    Quoted("2 layers", "occlusion of the query (nats)", 4.6, _RUN, _role("occlusion", "query")),
    Quoted("2 layers", "occlusion of others (nats)", 0.03, _RUN, _role("occlusion", "other")),
    Quoted(
        "2 layers", "gradient x input, source", 0.17, _RUN, _role("gradient x input", "source")
    ),
    Quoted("2 layers", "gradient norm, source", 0.15, _RUN, _role("gradient norm", "source")),
    Quoted(
        "1 layer", "prefix matching, strongest head", 0.06, _RUN, _strongest("prefix_matching")
    ),
    Quoted("1 layer", "repeat loss (nats)", 3.39, _RUN, _final("repeat_loss")),
    Quoted("1 layer, smeared keys", "repeat accuracy", 0.98, _RUN, _final("repeat_accuracy")),
)  # fmt: skip


def induction_heads(
    *,
    models: Mapping[str, LMConfig],
    problem: InductionProblem,
    training: SeedsConfig,
    run_dir: Path,
) -> None:
    """Trains each model to repeat, from several seeds, and measures its heads and behaviour.

    Args:
      models: what to compare, by name.
      problem: the data and the evaluation; each of `models` takes the place of its model.
      training: the runs.
      run_dir: receives a folder for each model, `results.json`, `report.md` and the figures.
    """
    start, environment = time.monotonic(), reporting.environment()
    problems = {name: problem.replace(model=model) for name, model in models.items()}
    records, token_losses, begun = {}, {}, start
    for name, result in train_seeds_each(problems, training, run_dir):
        found, now = record(problems[name], result), time.monotonic()
        records[name] = {**found, "seconds": now - begun}
        token_losses[name], begun = result.metrics["token_losses"], now
    results = {
        "script": "induction_heads",
        "environment": environment,
        "seconds": time.monotonic() - start,
        "num_seeds": training.num_seeds,
        "num_steps": training.num_steps,
        "problem": problem.to_dict(),
        "positions": problem.positions,
        "models": records,
        "paths": paths(token_losses),
    }
    reporting.publish(results, report, run_dir)


def record(problem: InductionProblem, result: SeedsResult) -> dict[str, Any]:
    """What is kept of a model's runs; arrays are `[evaluation][seed]`."""
    model = nnx.eval_shape(lambda: problem.model.make(nnx.Rngs(0)))
    found = probes.attributions(problem, result.params, result.model_state)
    scores = result.metrics["in_context_score"]
    windows = [probes.phase_change(result.steps.tolist(), s) for s in scores.T.tolist()]
    heads: dict[str, dict[str, Any]] = {name: {} for name in HEADS}
    for key, values in result.metrics.items():
        name, _, layer = key.partition("/")
        if name in heads:
            heads[name][layer] = _short(values)
    return {
        "steps": result.steps.tolist(),
        "training_loss": _short(result.losses),
        "curves": {name: _short(result.metrics[name]) for name in CURVES},
        "heads": heads,
        "windows": windows,
        "loss_by_position": _short(result.metrics["loss_by_position"].mean(axis=1)),
        "roles": {
            name: {role: _short(values) for role, values in roles._asdict().items()}
            for name, roles in found.roles.items()
        },
        "offsets": {str(layer): _short(values) for layer, values in found.offsets.items()},
        "occlusion": _short(found.occlusion.mean(axis=0)),
        "state_bytes": model.state_bytes(problem.data.length),
        "num_parameters": sum(p.size for p in jax.tree.leaves(nnx.state(model, nnx.Param))),
    }


def paths(token_losses: Mapping[str, np.ndarray]) -> dict[str, list[Any]]:
    """Where the losses of one set of tokens go in training, by model, in axes common to all.

    Args:
      token_losses: `[E, S, tokens]` by model; the mean over seeds is taken.

    Returns:
      `[E][2]` by model.
    """
    means = {name: values.mean(axis=1) for name, values in token_losses.items()}
    path = probes.trajectory(np.concatenate(list(means.values())).astype(np.float64))
    ends = np.cumsum([len(values) for values in means.values()])[:-1]
    return {name: _short(part) for name, part in zip(means, np.split(path, ends), strict=True)}


def report(results: Mapping[str, Any]) -> Report:
    """The report, from the recorded results alone."""
    models = results["models"]
    period = results["problem"]["period"]
    blocks: list[str | Table | Figure] = [
        reporting.describe_environment(results["environment"]),
        f"{results['num_seeds']} seeds of each model, trained for {results['num_steps']} steps as "
        "one program; numbers are means over seeds with a 95 % interval (Student's t). "
        f"{reporting.took(results['seconds'])}",
        learning(models),
        table(models),
        "A *copied* answer is one that changes with nothing but its source "
        "(`counterfactual_copy`): 1 for a copier, 0 for whoever knows answers by heart. Prefix "
        "matching and the previous token are those of the strongest head over all layers; a dash: "
        "no layer has an attention map. The window is where the in-context score falls fastest (at "
        "half of the largest rate or more), median over seeds.",
    ]
    if any(quoted.of in models for quoted in QUOTED):
        blocks += [
            comparison(models),
            "The reference run is an independent implementation with learned positions, Adam at "
            "1e-3 and one seed; the paper's own models are language models of up to 13 billion "
            "parameters. It says of them: the in-context score changes by 0.15 to 0.4 nats in one "
            "short window, together with prefix matching; models of one layer never do it, unless "
            "keys are smeared. A prefix-matching head is one way to copy: the table of seeds shows "
            "those that found another.",
        ]
    if any(heads(run) for run in models.values()):
        blocks += [*phase_changes(models), copiers(models)]
    return Report(
        title="Induction heads",
        blocks=[
            *blocks,
            seeds_table(models),
            roles_table(models),
            occlusion_maps(models, period),
            slopes(models),
            turns(results["paths"]),
        ],
    )


def learning(models: Mapping[str, Any]) -> Figure:
    """What all models are compared by, over training."""
    shown = {
        "repeat_accuracy": "accuracy in later copies",
        "copied": "probability of a changed source",
        "in_context_score": "in-context score (nats)",
    }
    panels = [
        Panel(
            xlabel="steps",
            ylabel=ylabel,
            series=[
                curve(model, run["steps"], _seeds_first(run["curves"][name]))
                for model, run in models.items()
            ],
            ylim=None if name == "in_context_score" else _SHARES,
        )
        for name, ylabel in shown.items()
    ]
    best = {model: strongest(run, "prefix_matching") for model, run in models.items()}
    series = [
        curve(model, models[model]["steps"], value)
        for model, value in best.items()
        if value is not None
    ]
    if series:
        panels.append(
            Panel(
                xlabel="steps",
                ylabel="prefix matching, strongest head",
                series=series,
                ylim=_SHARES,
            )
        )
    caption = (
        "Learning to repeat: accuracy after the first copy of a block, the share of answers that "
        "follow a changed source, the in-context score (loss late in a row minus loss early), and "
        "the prefix matching of the strongest head. Bands: 95 % intervals over seeds."
    )
    return Figure(name="learning", caption=caption, panels=panels, max_columns=2)


def phase_changes(models: Mapping[str, Any]) -> list[Figure]:
    """For each model with heads: loss, in-context score and heads, with the window shaded."""
    return [_phase_change(name, run) for name, run in models.items() if heads(run)]


def _phase_change(model: str, run: Mapping[str, Any]) -> Figure:
    window = median_window(run)
    steps = run["steps"]

    def panel(ylabel: str, series: Sequence[Series], ylim: Any = None) -> Panel:
        return Panel(xlabel="steps", ylabel=ylabel, series=series, shade=window, ylim=ylim)

    def by_layer(score: str) -> list[Series]:
        return [
            curve(f"layer {layer}, strongest head", steps, _seeds_first(np.max(values, axis=-1)))
            for layer, values in run["heads"][score].items()
        ]

    losses = [
        curve("all tokens", steps, _seeds_first(run["curves"]["loss"])),
        curve("later copies", steps, _seeds_first(run["curves"]["repeat_loss"])),
    ]
    score = [curve("in-context score", steps, _seeds_first(run["curves"]["in_context_score"]))]
    panels = [
        panel("loss (nats)", losses),
        panel("in-context score (nats)", score),
        panel("prefix matching", by_layer("prefix_matching"), _SHARES),
        panel("previous token", by_layer("previous_token"), _SHARES),
    ]
    caption = (
        f"{model}: losses, the in-context score and the strongest heads over training. Shaded: "
        "where the in-context score changes fastest, median over seeds."
    )
    return Figure(name=f"phase_{folder(model)}", caption=caption, panels=panels, max_columns=2)


def copiers(models: Mapping[str, Any]) -> Figure:
    """Prefix matching against copying and the previous token, a point for each head and seed."""

    def panel(name: str, ylim: tuple[float, float]) -> Panel:
        series = [
            Series(
                label=f"{model}: layer {layer}",
                x=np.ravel(matching[-1]).tolist(),
                y=np.ravel(run["heads"][name][layer][-1]).tolist(),
                line="",
            )
            for model, run in models.items()
            for layer, matching in run["heads"]["prefix_matching"].items()
            if layer in run["heads"][name]
        ]
        ylabel = name.replace("_", " ")
        return Panel(xlabel="prefix matching", ylabel=ylabel, series=series, ylim=ylim)

    caption = (
        "After training, a point for each head of each seed. Copying: how far a head raises the "
        "logits of tokens it attends to above those of others in the row, from -1 to 1, -0.92 by "
        "chance. Induction heads match and copy; a head of an earlier layer brings them the token "
        "before."
    )
    panels = [panel("copying", (-1.05, 1.05)), panel("previous_token", _SHARES)]
    return Figure(name="copying", caption=caption, panels=panels)


def occlusion_maps(models: Mapping[str, Any], period: int) -> Figure:
    """Who is missed for which answer, a map a model."""
    highest = max(np.max(run["occlusion"]) for run in models.values())
    panels = [
        HeatMap(
            title=model,
            xlabel="token replaced",
            ylabel="answer of token",
            columns=[str(j) for j in range(len(run["occlusion"][0]))],
            rows=[str(i) for i in range(len(run["occlusion"]))],
            values=run["occlusion"],
            limits=(0.0, float(highest)),
            label="log probability lost (nats)",
            written=False,
        )
        for model, run in models.items()
    ]
    caption = (
        f"What the log probability of each answer loses when one token is replaced, in rows of two "
        f"copies of {period} tokens. In the second copy, copiers miss the source of the answer (a "
        f"stripe {period - 1} to the left of the query's) and what it is found by."
    )
    return Figure(name="occlusion", caption=caption, panels=panels, max_columns=4)


def slopes(models: Mapping[str, Any]) -> Figure:
    """By how much the loss falls with the log of the position, over training."""
    panels = []
    for model, run in models.items():
        bands, values = _slopes(np.asarray(run["loss_by_position"], np.float64))
        panels.append(
            HeatMap(
                title=model,
                xlabel="steps",
                ylabel="position",
                columns=[str(step) for step in run["steps"]],
                rows=[str(position) for position in bands],
                values=values.T.tolist(),
                limits=(-4.0, 4.0),
                label="d loss / d log position (nats)",
                written=False,
            )
        )
    caption = (
        "The slope of the loss against the log of the position, over bands of positions that grow "
        "with these, mean over seeds. Negative where more context helps: from the second copy on."
    )
    return Figure(name="slopes", caption=caption, panels=panels)


def _slopes(by_position: np.ndarray, bands: int = 12) -> tuple[list[int], np.ndarray]:
    """Where bands of positions end, and the slope from each to the next, `[E, bands]`.

    Single positions are too noisy for differences: their rows are few.
    """
    length = by_position.shape[1]
    edges = np.unique(np.geomspace(1, length, bands + 2).astype(int))
    pairs = list(itertools.pairwise(edges))
    losses = np.stack([by_position[:, a - 1 : b - 1].mean(axis=1) for a, b in pairs], axis=1)
    centers = np.array([np.log(np.arange(a, b)).mean() for a, b in pairs])
    return [int(b) for _, b in pairs[:-1]], np.diff(losses, axis=1) / np.diff(centers)


def turns(paths: Mapping[str, Any]) -> Figure:
    """The paths of per-token losses."""
    series = [
        Series(label=model, x=[p[0] for p in path], y=[p[1] for p in path])
        for model, path in paths.items()
    ]
    panel = Panel(xlabel="first component (nats)", ylabel="second component (nats)", series=series)
    caption = (
        "The losses of one fixed set of tokens over training, in the first two principal "
        "components of all models together; a point an evaluation. Models that learn to repeat "
        "turn off; the others stay on the first stretch."
    )
    return Figure(name="paths", caption=caption, panels=[panel])


def table(models: Mapping[str, Any]) -> Table:
    """All models after training."""
    header = (
        "model", "repeat accuracy", "repeat loss", "copied", "in-context score",
        "prefix matching", "previous token", "window (steps)", "state", "parameters",
    )  # fmt: skip
    rows = []
    for model, run in models.items():
        window = median_window(run)
        final = (Estimate.of(run["curves"][name][-1]) for name in (
            "repeat_accuracy", "repeat_loss", "copied", "in_context_score",
        ))  # fmt: skip
        best = (strongest(run, name) for name in ("prefix_matching", "previous_token"))
        rows.append(
            (
                model,
                *map(str, final),
                *(None if v is None else str(Estimate.of(v[:, -1])) for v in best),
                None if window is None else f"{window[0]:.0f}–{window[1]:.0f}",
                show_bytes(run["state_bytes"]),
                run["num_parameters"],
            )
        )
    return Table(title="Models after training", header=header, rows=rows)


def seeds_table(models: Mapping[str, Any]) -> Table:
    """What each seed does, and the head that looks most at one place after the match."""
    rows = []
    for model, run in models.items():
        for seed in range(len(run["curves"]["copied"][-1])):
            found = [
                (score, int(layer), offset)
                for layer, values in run["offsets"].items()
                for head in values[seed]
                for offset, score in enumerate(head)
            ]
            score, layer, offset = max(found) if found else (None, None, None)
            window = run["windows"][seed]
            rows.append(
                (
                    model, seed, run["curves"]["repeat_accuracy"][-1][seed],
                    run["curves"]["copied"][-1][seed],
                    None if window is None else f"{window[0]}–{window[1]}",
                    score, layer, offset,
                )
            )  # fmt: skip
    header = (
        "model", "seed", "repeat accuracy", "copied", "window (steps)", "strongest head",
        "its layer", "its offset",
    )  # fmt: skip
    title = "Each seed, and the head that looks most at one of the places 0 to 4 after the match"
    return Table(title=title, header=header, rows=rows)


def roles_table(models: Mapping[str, Any]) -> Table:
    """The behavioural probes."""
    rows = [
        (model, name, *(str(Estimate.of(values)) for values in roles.values()))
        for model, run in models.items()
        for name, roles in run["roles"].items()
    ]
    header = ("model", "probe", "source", "match", "query", "other")
    return Table(
        title="Who is read for an answer: nats lost, or share of the gradient", header=header,
        rows=rows,
    )  # fmt: skip


def comparison(models: Mapping[str, Any]) -> Table:
    """The quoted figures of the models that were trained."""
    return comparison_table(
        quoted.beside(models[quoted.of]) for quoted in QUOTED if quoted.of in models
    )


def heads(run: Mapping[str, Any]) -> bool:
    """Whether any layer has an attention map."""
    return bool(run["heads"]["prefix_matching"])


def strongest(run: Mapping[str, Any], score: str) -> np.ndarray | None:
    """The score of the strongest head over all layers, `[seed, evaluation]`."""
    layers = [np.max(values, axis=-1) for values in run["heads"][score].values()]
    return np.max(layers, axis=0).T if layers else None


def median_window(run: Mapping[str, Any]) -> tuple[float, float] | None:
    """The window of the phase change, median over the seeds that have one."""
    windows = [window for window in run["windows"] if window is not None]
    if not windows:
        return None
    first, last = np.median(windows, axis=0)
    return float(first), float(last)


def _seeds_first(values: Any) -> np.ndarray:
    return np.swapaxes(np.asarray(values), 0, 1)


def _short(values: Any) -> Any:
    """Numbers with five significant digits, which is all that their seeds leave of them."""
    return np.vectorize(lambda x: float(f"{x:.5g}"))(np.asarray(values, np.float64)).tolist()


if __name__ == "__main__":
    sys.exit(cli.main(induction_heads))
