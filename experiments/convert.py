"""A trained softmax model turned into other mechanisms: its loss before, at once, and after tuning.

    python -m experiments.convert --gin_file=convert/quick.gin

Interrupted, the same command continues where it stopped. The conversion is
`lcattn.models.convert`: trained parameters keep their values and places.
"""

import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from rich.console import Console

from experiments import cli, reporting
from experiments.figures import Figure, Panel
from experiments.reporting import Report, Table, show_bytes
from experiments.sweep import folder
from experiments.train import check_vocabulary, series, train_and_record
from lcattn.errors import argument_error
from lcattn.models import LM, LMConfig, converted_config
from lcattn.models import convert as convert_model
from lcattn.nn import HeadsConfig
from lcattn.tasks import TextTaskConfig
from lcattn.training import TrainConfig, evaluate, load_model

CONTROL = "softmax, trained on"
"""The model that is not converted: what the same further steps give without a conversion."""


def convert(
    *,
    task: TextTaskConfig,
    mixers: Mapping[str, HeadsConfig],
    fine_tuning: TrainConfig,
    layers: tuple[int, ...] | None = None,
    model: LMConfig | None = None,
    training: TrainConfig | None = None,
    checkpoint: str | None = None,
    run_dir: Path,
) -> None:
    """Turns layers of a trained softmax model into other mechanisms, then tunes each briefly.

    Args:
      task: the text.
      mixers: what the layers become, by name.
      fine_tuning: the runs after conversion; one without conversion is made beside them.
      layers: which layers are converted, counted from 0. None: all of softmax attention without a
        window.
      model: the softmax model, trained first.
      training: its run.
      checkpoint: in place of `model` and `training`, a run folder that holds a trained model.
      run_dir: receives a folder for each run, `results.json`, `report.md` and the figure.
    """
    start, environment = time.monotonic(), reporting.environment()
    if (checkpoint is None) == (model is None) or (model is None) != (training is None):
        got = f"checkpoint={checkpoint!r}, model and training {'given' if model else 'not both'}"
        raise argument_error("convert", "either a checkpoint, or a model and its training", got)
    if CONTROL in mixers or len({folder(name) for name in mixers}) < len(mixers):
        names = f"names that differ in letters or digits, none of them {CONTROL!r}"
        raise argument_error("convert.mixers", names, list(mixers))
    trained = None if checkpoint is None else _load(checkpoint)
    config = model if trained is None else trained.config
    assert config is not None
    text = task.make()
    check_vocabulary(config, text)
    for mixer in mixers.values():  # a mistake should not show after the training
        converted_config(config, mixer, layers)
    console, steps = Console(), None
    if trained is None:
        assert training is not None
        console.rule("softmax")
        trained, record = train_and_record(text, config, training, run_dir / "softmax")
        steps = record["steps"]
    mechanisms = {}
    for name, mixer in {CONTROL: None, **mixers}.items():
        console.rule(name)
        converted = trained
        if mixer is not None:
            converted = convert_model(trained, mixer, layers=layers, rngs=nnx.Rngs(0))
        at_conversion = evaluate(converted, text.evaluation(), text.metrics)
        _, run = train_and_record(
            text, converted.config, fine_tuning, run_dir / folder(name), initial=converted
        )
        mechanisms[name] = {"at_conversion": at_conversion, "run": run}
        jax.clear_caches()  # programs hold memory maps, of which a process has only so many
    results = {
        "script": "convert",
        "environment": environment,
        "seconds": time.monotonic() - start,
        "length": task.length,
        "layers": layers,
        "num_layers": config.num_layers,
        "steps": steps,
        "mechanisms": mechanisms,
    }
    reporting.publish(results, report, run_dir)


def _load(checkpoint: str) -> LM:
    model = load_model(checkpoint)
    if not isinstance(model, LM):
        raise argument_error("convert.checkpoint", "a language model", type(model).__name__)
    return model


def report(results: Mapping[str, Any]) -> Report:
    """The report, from the recorded results alone."""
    layers, steps = results["layers"], results["steps"]
    which = "its layers of softmax attention" if layers is None else f"its layers {layers}"
    source = f"trained for {steps} steps" if steps else "from a checkpoint"
    tuning = results["mechanisms"][CONTROL]["run"]["num_steps"]
    return Report(
        title="A softmax model converted",
        blocks=[
            reporting.describe_environment(results["environment"]),
            f"A softmax model of {results['num_layers']} layers, {source}, on rows of "
            f"{results['length']} tokens; {which} become another mechanism, which is then tuned "
            f"for {tuning} steps. Each is one run of one seed. "
            f"{reporting.took(results['seconds'])}",
            table(results),
            figure(results),
        ],
    )


def table(results: Mapping[str, Any]) -> Table:
    """Loss before, at conversion and after tuning."""
    mechanisms = results["mechanisms"]
    control = mechanisms[CONTROL]
    header = (
        "model", "before", "at conversion", "lost by it", "after tuning", "behind softmax then",
        "new parameters", f"state at {results['length']} tokens", "tokens/s in tuning",
    )  # fmt: skip
    before, trained_on = control["at_conversion"]["heldout/loss"], _after(control)
    rows = [
        (
            name,
            before,
            mechanism["at_conversion"]["heldout/loss"],
            mechanism["at_conversion"]["heldout/loss"] - before,
            _after(mechanism),
            _after(mechanism) - trained_on,
            mechanism["run"]["num_parameters"] - control["run"]["num_parameters"],
            show_bytes(mechanism["run"]["state_bytes"]),
            mechanism["run"]["tokens_per_second"],
        )
        for name, mechanism in mechanisms.items()
    ]
    return Table(title="Held-out loss (nats per byte)", header=header, rows=rows)


def _after(mechanism: Mapping[str, Any]) -> float:
    return mechanism["run"]["metrics"]["heldout/loss"]


def figure(results: Mapping[str, Any]) -> Figure:
    """Held-out loss from the conversion on."""
    lines = [
        series(
            name,
            [(0, m["at_conversion"]["heldout/loss"]), *m["run"]["curves"]["heldout/loss"]],
            marker=True,
        )
        for name, m in results["mechanisms"].items()
    ]
    panel = Panel(
        xlabel="steps of tuning",
        ylabel="held-out loss (nats per byte)",
        series=lines,
        direct_labels=True,
    )
    caption = (
        "Held-out loss from the conversion (step 0) on. The model that is not converted starts "
        "from the loss before."
    )
    return Figure(name="convert", caption=caption, panels=[panel])


if __name__ == "__main__":
    sys.exit(cli.main(convert))
