"""Three small models of one size, on text and on recall: the trade-off this field is about.

    python -m experiments.demo --gin_file=demo.gin

Interrupted, the same command continues where it stopped.
"""

import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console

from experiments import cli, reporting
from experiments.figures import Figure, Panel, Series
from experiments.reporting import Report, Table, show_bytes
from experiments.sweep import train_each
from experiments.train import series
from lcattn.errors import argument_error
from lcattn.models import LM, LMConfig, generate
from lcattn.tasks import ByteTokenizer, MQARTaskConfig, NGramModel, TextTask, TextTaskConfig
from lcattn.training import TrainConfig

_BASELINES = {"bigram counts": 2, "trigram counts": 3}


def demo(
    *,
    text_models: Mapping[str, LMConfig],
    recall_models: Mapping[str, LMConfig],
    text: TextTaskConfig,
    text_training: TrainConfig,
    recall: MQARTaskConfig,
    recall_training: TrainConfig,
    prompt: str = "def ",
    sample_bytes: int = 300,
    run_dir: Path,
) -> None:
    """Trains small models on text and on recall, and compares them.

    Args:
      text_models: what to compare on text, by name; the last one writes the sample.
      recall_models: what to compare on recall, by the same names.
      text: the text; count models are fitted on the same.
      text_training: the runs on text.
      recall: associative recall.
      recall_training: the runs on recall.
      prompt: what the sample continues.
      sample_bytes: length of the sample.
      run_dir: receives a folder for each run, `results.json`, `report.md` and figures.
    """
    if list(text_models) != list(recall_models):
        raise argument_error(
            "demo.recall_models", f"the names {list(text_models)}", f"{list(recall_models)}"
        )
    start, environment = time.monotonic(), reporting.environment()
    text_task, recall_task = text.make(), recall.make()
    records: dict[str, dict[str, Any]] = {name: {} for name in text_models}
    sample = ""
    runs = train_each(recall_models, recall_task, recall_training, run_dir / "recall")
    for name, _, record in runs:
        records[name]["recall"] = record
    for name, model, record in train_each(text_models, text_task, text_training, run_dir / "text"):
        records[name]["text"] = record
        if name == list(text_models)[-1]:
            sample = continue_text(model, prompt, sample_bytes)
    results = {
        "script": "demo",
        "environment": environment,
        "seconds": time.monotonic() - start,
        "models": records,
        "baselines": count_models(text_task),
        "text": {
            "train_bytes": int(text_task.train_documents.data.size),
            "heldout_bytes": int(text_task.heldout_documents.data.size),
        },
        "sample": {"model": list(text_models)[-1], "prompt": prompt, "text": sample},
    }
    console = Console()
    console.rule(f"a sample of {results['sample']['model']}, streamed")
    console.print(sample, markup=False, highlight=False)
    reporting.publish(results, report, run_dir)


def count_models(task: TextTask) -> dict[str, float]:
    """Held-out bits per byte of count models fitted on the training text."""
    return {
        name: NGramModel(task.train_documents, order).bits_per_byte(task.heldout_documents)
        for name, order in _BASELINES.items()
    }


def continue_text(model: LM, prompt: str, num_bytes: int) -> str:
    """The prompt and a sampled continuation, read and written through the model's state."""
    tokens = jnp.asarray(ByteTokenizer().encode(prompt))[None]
    out = generate(model, tokens, num_bytes, rng=jax.random.key(0), temperature=0.7, top_p=0.95)
    return ByteTokenizer().decode(out[0].tolist())


def report(results: Mapping[str, Any]) -> Report:
    """The report of the demo, from its recorded results alone."""
    models, sample = results["models"], results["sample"]
    text = results["text"]
    return Report(
        title="Three models of one size: text, and recall from a state",
        blocks=[
            reporting.describe_environment(results["environment"]),
            f"Text: the standard library's sources, {text['train_bytes']:,} bytes to train on, "
            f"{text['heldout_bytes']:,} in held-out files. {reporting.took(results['seconds'])}",
            text_table(models, results["baselines"]),
            recall_table(models),
            _loss_figure(models),
            _recall_figure(models),
            f"A sample of the {sample['model']} model, streamed from the prompt "
            f"`{sample['prompt']}`:\n\n```\n{sample['text']}\n```",
        ],
    )


def text_table(models: Mapping[str, Any], baselines: Mapping[str, float]) -> Table:
    """Bits per byte of the models and of the count models."""
    any_run = next(iter(models.values()))["text"]
    rows = [
        (
            name,
            run["metrics"]["heldout/bits_per_byte"],
            run["num_parameters"],
            show_bytes(run["state_bytes"]),
            run["steps"],
            run["tokens_per_second"],
        )
        for name, run in ((name, runs["text"]) for name, runs in models.items())
    ]
    rows += [(name, bits, None, None, None, None) for name, bits in baselines.items()]
    state = f"state at {any_run['state_length']:,} tokens"
    header = ("model", "held-out bits per byte", "parameters", state, "steps", "tokens/s")
    return Table(title="Text", header=header, rows=rows)


def recall_table(models: Mapping[str, Any]) -> Table:
    """Recall accuracy by number of pairs."""
    any_run = next(iter(models.values()))["recall"]
    slices = any_run["slices"]
    header = (
        "model",
        *(f"{s['num_pairs']} pairs, {s['length']} tokens" for s in slices.values()),
        f"state at {any_run['state_length']:,} tokens", "steps", "tokens/s",
    )  # fmt: skip
    rows = [
        (
            name,
            *(run["metrics"][f"{s}/accuracy"] for s in slices),
            show_bytes(run["state_bytes"]), run["steps"], run["tokens_per_second"],
        )
        for name, run in ((name, runs["recall"]) for name, runs in models.items())
    ]  # fmt: skip
    return Table(title="Recall accuracy (MQAR)", header=header, rows=rows)


def _loss_figure(models: Mapping[str, Any]) -> Figure:
    return Figure(
        name="loss",
        caption="Training loss over the runs; a run on recall ends once it holds its target.",
        panels=[
            Panel(
                title=title,
                xlabel="step",
                ylabel="loss (nats per token)",
                series=[
                    series(name, runs[kind]["curves"]["train/loss"])
                    for name, runs in models.items()
                ],
            )
            for kind, title in (("text", "text"), ("recall", "recall"))
        ],
    )


def _recall_figure(models: Mapping[str, Any]) -> Figure:
    return Figure(
        name="recall",
        caption="Recall accuracy against the bytes of state that a stream holds.",
        panels=list(_recall_panels(models)),
    )


def _recall_panels(models: Mapping[str, Any]) -> Iterator[Panel]:
    slices = next(iter(models.values()))["recall"]["slices"]
    for name, numbers in slices.items():
        points = [
            Series(
                label=model,
                x=[runs["recall"]["state_bytes"] / 1024],
                y=[runs["recall"]["metrics"][f"{name}/accuracy"]],
                line="",
            )
            for model, runs in models.items()
        ]
        yield Panel(
            title=f"{numbers['num_pairs']} pairs in {numbers['length']} tokens",
            xlabel="state of one stream (KiB)",
            ylabel="recall accuracy",
            series=points,
            xscale="log2",
            ylim=(0, 1.05),
        )


if __name__ == "__main__":
    sys.exit(cli.main(demo))
