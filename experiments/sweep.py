"""Models that differ in one thing, trained one after another, each in a folder of its own."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from rich.console import Console

from experiments.train import check_vocabulary, train_and_record
from lcattn.errors import argument_error
from lcattn.models import LM, LMConfig
from lcattn.tasks import Task
from lcattn.training import TrainConfig


def train_each(
    models: Mapping[str, LMConfig], task: Task, training: TrainConfig, run_dir: Path
) -> Iterator[tuple[str, LM, dict[str, Any]]]:
    """Trains each model; one that is finished in its folder is read back instead.

    All models are checked before the first is trained: a mistake in the last one should not show
    after an hour.

    Args:
      models: by name; the name, spelled for a file system, is the folder.
      task: what to train on and to be judged by.
      training: the run, the same for all.
      run_dir: receives the folders.

    Yields:
      Name, trained model, and its record (see `experiments.train.train_and_record`).

    Raises:
      ValueError: if there is no model, two names share a folder, or a model cannot be built or does
        not fit the task.
    """
    if not models:
        raise argument_error("models", "at least one", "none")
    if len({folder(name) for name in models}) < len(models):
        raise argument_error("models", "names that differ in letters or digits", list(models))
    for config in models.values():
        check_vocabulary(config, task)
        nnx.eval_shape(lambda config=config: config.make(nnx.Rngs(0)))
    console = Console()
    for number, (name, config) in enumerate(models.items(), start=1):
        console.rule(f"{name} ({number} of {len(models)})")
        model, record = train_and_record(task, config, training, run_dir / folder(name))
        yield name, model, record
        # Programs hold memory maps, of which a process has only so many.
        jax.clear_caches()


def folder(name: str) -> str:
    """A name as that of a folder."""
    return re.sub(r"[^\w.=+-]+", "_", name)
