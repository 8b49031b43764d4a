"""Runs that differ in one thing, one after another, each in a folder of its own."""

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from rich.console import Console

from experiments.train import check_vocabulary, train_and_record
from lcattn.errors import argument_error
from lcattn.models import LM, LMConfig
from lcattn.tasks import Task
from lcattn.training import Problem, SeedsConfig, SeedsResult, TrainConfig, train_seeds


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
    check_names(models)
    for config in models.values():
        check_vocabulary(config, task)
        nnx.eval_shape(lambda config=config: config.make(nnx.Rngs(0)))
    console = Console()
    for number, (name, config) in enumerate(models.items(), start=1):
        console.rule(f"{name} ({number} of {len(models)})")
        model, record = train_and_record(task, config, training, run_dir / folder(name))
        yield name, model, record
        jax.clear_caches()  # Programs hold memory maps, of which a process has only so many.


def train_seeds_each(
    problems: Mapping[str, Problem], training: SeedsConfig, run_dir: Path
) -> Iterator[tuple[str, SeedsResult]]:
    """Trains the seeds of each problem; those finished in their folder are read back instead.

    Args:
      problems: by name; the name, spelled for a file system, is the folder.
      training: the runs, the same for all.
      run_dir: receives the folders.

    Yields:
      Name, and the runs of all seeds.

    Raises:
      ValueError: if there is no problem, or two names share a folder.
    """
    check_names(problems)
    console = Console()
    for number, (name, problem) in enumerate(problems.items(), start=1):
        console.rule(f"{name} ({number} of {len(problems)})")
        yield name, train_seeds(problem, training, run_dir / folder(name))
        jax.clear_caches()  # Programs hold memory maps, of which a process has only so many.


def check_names(names: Iterable[str], argument: str = "models") -> None:
    """Checks that there are runs, and that no two share a folder."""
    names = list(names)
    if not names:
        raise argument_error(argument, "at least one", "none")
    if len({folder(name) for name in names}) < len(names):
        raise argument_error(argument, "names that differ in letters or digits", names)


def folder(name: str) -> str:
    """A name as that of a folder."""
    return re.sub(r"[^\w.=+-]+", "_", name)
