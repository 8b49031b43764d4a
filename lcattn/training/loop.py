"""The loop: takes batches, makes steps, records, evaluates, saves, and continues where it was."""

import collections
import contextlib
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from lcattn.config import Config
from lcattn.errors import argument_error
from lcattn.tasks import Task
from lcattn.training.checkpoint import Checkpointer, fingerprint
from lcattn.training.config import TrainConfig, TrainResult
from lcattn.training.errors import NonFiniteLossError, TrainingInterrupted
from lcattn.training.evaluation import Evaluator, device_batch
from lcattn.training.metrics import JsonlWriter, MetricWriter, TensorBoardWriter
from lcattn.training.progress import Progress, Stopwatch
from lcattn.training.run_dir import Interrupt, lock
from lcattn.training.state import abstract_model, abstract_state, init_state, place_model
from lcattn.training.step import jit_train_step, make_train_step


def train(
    task: Task,
    model_config: Config,
    config: TrainConfig,
    run_dir: str | Path,
    *,
    initial: nnx.Module | None = None,
    writers: Sequence[MetricWriter] = (),
) -> TrainResult:
    """Trains a model, or continues where an earlier call with the same run folder stopped.

    The folder receives `metrics.jsonl` (values that depend on the run alone), `timing.jsonl`
    (tokens/s), `tensorboard/` and `checkpoints/`. However the process was stopped, the same call
    ends with the weights and the `metrics.jsonl` of an unbroken run, bit for bit on the same
    machine. On a run that is finished it returns the result and trains nothing.

    Args:
      task: gives the batches.
      model_config: builds the model: `model_config.make(rngs)`.
      config: the run.
      run_dir: the run's folder, made where missing.
      initial: a model of this config to start from, for fine-tuning. It is left as it is. None: a
        new one.
      writers: where to send metrics besides. They are closed at the end.

    Raises:
      NonFiniteLossError: if the loss or its gradient is NaN or infinite.
      TrainingInterrupted: on Ctrl-C or SIGTERM, after a checkpoint was saved. A second signal ends
        the process at once.
      ConfigMismatchError: if the folder holds a run of another config.
      CheckpointError: if a checkpoint cannot be written, or none can be read.
      RunLockedError: if another process trains in this folder.
      ValueError: if the batches do not fit the mesh or the microbatches, or `initial` is a model of
        another config.
    """
    run_dir = Path(run_dir)
    mesh = config.mesh.make()
    with lock(run_dir), jax.set_mesh(mesh), Interrupt() as interrupt:
        run = _Run(task, model_config, config, run_dir, mesh, initial, writers)
        try:
            while not run.finished:
                run.update()
                run.act_on_schedule(interrupt)
            result = run.result()
        except BaseException:
            # Files that cannot be closed (on a full disk, say) must not hide what ended the run.
            with contextlib.suppress(Exception):
                run.close()
            raise
        run.close()
        return result


@dataclasses.dataclass(frozen=True)
class _Update:
    """A step that was handed to the device and may still be running there."""

    step: int
    metrics: dict[str, jax.Array]
    example_ids: np.ndarray | None
    tokens: int


class _Run:
    """The mutable side of `train`."""

    def __init__(
        self,
        task: Task,
        model_config: Config,
        config: TrainConfig,
        run_dir: Path,
        mesh: Mesh,
        initial: nnx.Module | None,
        writers: Sequence[MetricWriter],
    ):
        self.config, self.mesh = config, mesh
        self.slices = task.evaluation()
        _check_stop_when(config, self.slices, task.metrics)
        optimizer, schedule = config.optimizer.make(config.num_steps)
        model_def, params, model_state = abstract_model(model_config, mesh)
        target = abstract_state(params, model_state, optimizer, mesh)
        self.model_def = model_def
        self.evaluator = Evaluator(model_def, mesh, task.metrics)
        train_step = make_train_step(
            model_def,
            optimizer,
            schedule,
            num_microbatches=config.num_microbatches,
            z_loss=config.z_loss,
        )
        self.train_step = jit_train_step(train_step, target)

        configs: dict[str, Any] = {"model": model_config.to_dict(), "train": config.trajectory()}
        given = None if initial is None else place_model(initial, target)
        if given is not None:
            configs["initial"] = fingerprint(given)
        self.checkpointer = Checkpointer(run_dir, configs, config.keep)
        self.data = task.train()
        self.step, self.finished, self.latest = 0, False, {}
        if restored := self.checkpointer.restore(target):
            self.step, self.state = restored.step, restored.state
            self.finished, self.latest = restored.meta["finished"], restored.meta["latest"]
            self.data.set_state(restored.meta["data"])
        else:
            self.state = init_state(model_config, optimizer, config.seed, target, given)

        self.metrics_path = run_dir / "metrics.jsonl"
        self.stopwatch = Stopwatch()
        self.pending: collections.deque[_Update] = collections.deque()
        self._open_outputs(run_dir, writers)

    def _open_outputs(self, run_dir: Path, writers: Sequence[MetricWriter]) -> None:
        self.progress, self.writers, self.timing = None, [], None
        if jax.process_index() != 0:
            return
        self.writers += writers
        if self.finished:
            return
        self.writers.append(JsonlWriter(self.metrics_path, self.step))
        self.timing = JsonlWriter(run_dir / "timing.jsonl", self.step)
        if self.config.tensorboard:
            self.writers.append(TensorBoardWriter(run_dir / "tensorboard", self.step))
        self.progress = Progress(self.config.num_steps, self.step)

    def update(self) -> None:
        """Hands the next step to the device, and looks at the one before it.

        So the device always has work while the host reads metrics and prepares the next batch.
        """
        batch = self._next_batch()
        on_device = device_batch(batch, self.mesh)
        self.state, metrics = self.train_step(self.state, on_device)
        self.step += 1
        tokens = on_device["tokens"].size
        self.pending.append(_Update(self.step, metrics, batch.get("example_ids"), tokens))
        self._settle(all_but=1)

    def act_on_schedule(self, interrupt: Interrupt) -> None:
        """Evaluates, saves or stops where this step asks for it."""
        config, last = self.config, self.step == self.config.num_steps
        evaluates = last or _is_due(self.step, config.eval_every)
        saves = last or _is_due(self.step, config.checkpoint_every)
        if not (evaluates or saves or interrupt.signum):
            return
        self._settle()
        self.finished = last
        if evaluates:
            metrics = self.evaluator(self.state.params, self.state.model_state, self.slices)
            self._record(self.step, metrics)
            self.finished = last or config.is_reached(metrics)
        if saves or self.finished or interrupt.signum:
            self._save()
        if interrupt.signum and not self.finished:
            self.checkpointer.wait()
            path = self.checkpointer.path(self.step)
            stop = TrainingInterrupted(interrupt.signum, self.step, path)
            self._print(str(stop))
            raise stop
        self.stopwatch.skip()

    def result(self) -> TrainResult:
        """The result of a finished run."""
        self.checkpointer.wait()
        return TrainResult(
            model=self.model_def.merge(self.state.params, self.state.model_state),
            steps=self.step,
            metrics=self.latest,
            metrics_path=self.metrics_path,
            tokens_per_second=self.stopwatch.tokens_per_second,
        )

    def close(self) -> None:
        """Lets go of files and threads: of all, also if one of them raises."""
        with contextlib.ExitStack() as stack:
            stack.callback(self.checkpointer.close)
            stack.callback(self.data.close)
            for output in (self.progress, self.timing, *self.writers):
                if output is not None:
                    stack.callback(output.close)

    def _next_batch(self) -> Mapping[str, Any]:
        try:
            batch = next(self.data)
        except StopIteration:
            raise argument_error(
                "task.train()", f"batches for {self.config.num_steps} steps", f"{self.step}"
            ) from None
        parts = self.config.num_microbatches * self.mesh.local_mesh.size
        if len(batch["tokens"]) % parts:
            raise argument_error(
                "batch",
                f"a multiple of {parts} rows (microbatches x devices)",
                len(batch["tokens"]),
            )
        return batch

    def _settle(self, all_but: int = 0) -> None:
        """Waits for steps in flight, all but the newest so many: checks and records them."""
        while len(self.pending) > all_but:
            update = self.pending.popleft()
            if not jax.device_get(update.metrics["finite"]):
                values = {k: float(v) for k, v in update.metrics.items()}
                ids = (
                    None if update.example_ids is None else np.asarray(update.example_ids).tolist()
                )
                raise NonFiniteLossError(update.step, values, ids, self.checkpointer.latest)
            self.stopwatch.lap(update.tokens)
            if _is_due(update.step, self.config.log_every):
                self._log(update)

    def _log(self, update: _Update) -> None:
        values = {k: float(v) for k, v in jax.device_get(update.metrics).items() if k != "finite"}
        self._record(update.step, {f"train/{name}": value for name, value in values.items()})
        rate = self.stopwatch.tokens_per_second
        if self.timing is not None and rate:
            self.timing.write(update.step, {"tokens_per_second": rate})
        if self.progress is not None:
            self.progress.update(update.step, values["loss"], rate)

    def _record(self, step: int, metrics: dict[str, float]) -> None:
        self.latest = {**self.latest, **metrics}
        for writer in self.writers:
            writer.write(step, metrics)

    def _save(self) -> None:
        meta = {"finished": self.finished, "latest": self.latest, "data": self.data.get_state()}
        self.checkpointer.save(self.step, self.state, meta)

    def _print(self, text: str) -> None:
        if self.progress is not None:
            self.progress.print(text)


def _is_due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


def _check_stop_when(config: TrainConfig, slices: Iterable[str], metrics: Iterable[str]) -> None:
    names = [f"{name}/{metric}" for name in slices for metric in metrics]
    if not set(config.stop_when) <= set(names):
        raise config.error("stop_when", f"keys among {', '.join(names)}")
