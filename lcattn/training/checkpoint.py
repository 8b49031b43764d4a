"""Checkpoints: written in the background, all or nothing, and checked when they are read.

A checkpoint is a folder `<run>/checkpoints/<step>` of three items: `model` (parameters and other
variables), `training` (moments, step, random key) and `meta` (JSON: the configs, the position of
the data iterator, the latest metrics, a digest of each array). Orbax writes it under a temporary
name and renames it when it is whole.
"""

import dataclasses
import hashlib
import json
import logging
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from flax import nnx
from orbax.checkpoint import checkpoint_managers

from lcattn.config import Config
from lcattn.training.errors import CheckpointError, ConfigMismatchError
from lcattn.training.mesh import MeshConfig
from lcattn.training.state import TrainState, Tree, abstract_model

FOLDER = "checkpoints"


@dataclasses.dataclass(frozen=True)
class Restored:
    """What a checkpoint held."""

    step: int
    state: TrainState
    meta: dict[str, Any]


class Checkpointer:
    """Saves and restores the checkpoints of one run.

    Args:
      run_dir: the run's folder.
      configs: what the run is: `{"model": ..., "train": ...}` as dictionaries, and the fingerprint
        of the model it started from, if any. Stored with each checkpoint; `restore` refuses a
        checkpoint of others.
      keep: how many of the newest checkpoints are kept.
    """

    def __init__(self, run_dir: Path, configs: Mapping[str, Any], keep: int = 2):
        self.directory = run_dir.absolute() / FOLDER
        self._configs = dict(configs)
        self._manager = _manager(
            self.directory,
            preservation_policy=checkpoint_managers.LatestN(keep),
            cleanup_tmp_directories=True,
        )

    def path(self, step: int) -> Path:
        """The folder of the checkpoint of `step`."""
        return self.directory / str(step)

    @property
    def latest(self) -> Path | None:
        """The newest checkpoint that is written whole. Waits for one that is being written."""
        self.wait()
        step = _newest(self.directory)
        return None if step is None else self.path(step)

    def save(self, step: int, state: TrainState, meta: Mapping[str, Any]) -> None:
        """Copies the state off the devices and returns; the files are written in the background.

        Raises:
          CheckpointError: if this checkpoint, or the one before it, cannot be written. Checkpoints
            that exist are left as they are.
        """
        if step == _newest(self.directory):
            return
        items = _items(state)
        meta = {**meta, "configs": self._configs, "digests": digests(items)}
        arrays = {name: ocp.args.StandardSave(item) for name, item in items.items()}
        args = ocp.args.Composite(meta=ocp.args.JsonSave(meta), **arrays)
        try:
            self._manager.save(step, args=args, force=True)
        except Exception as error:
            raise self._write_error(error) from error

    def wait(self) -> None:
        """Returns once everything is on disk. Raises as `save` does."""
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise self._write_error(error) from error

    def close(self) -> None:
        """Waits, and frees the background threads."""
        try:
            self.wait()
        finally:
            self._manager.close()

    def restore(self, target: TrainState) -> Restored | None:
        """The newest checkpoint that is whole, or None where there is none.

        A damaged one is passed over with a warning and renamed to `<step>.damaged`, out of the way
        of the run that will write this step again.

        Args:
          target: shapes, dtypes and shardings to restore to. The mesh may differ from the one that
            saved.

        Raises:
          ConfigMismatchError: if the checkpoint is of another config; lists the fields.
          CheckpointError: if there are checkpoints and none can be read.
        """
        damaged: dict[int, Exception] = {}
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                meta = _read_meta(self._manager, step)
                self._check_configs(step, meta["configs"])
                items = _read_items(self._manager, step, _items(target), meta)
            except ConfigMismatchError:
                raise
            except Exception as error:  # Whatever a broken file may cause.
                damaged[step] = error
                continue
            self._set_aside(damaged, step)
            return Restored(step, TrainState(**items["model"], **items["training"]), meta)
        if damaged:
            raise CheckpointError(f"no checkpoint in {self.directory} is whole: {_list(damaged)}")
        return None

    def _check_configs(self, step: int, saved: Mapping[str, Any]) -> None:
        differing = differences(saved, self._configs)
        if differing:
            raise ConfigMismatchError(
                f"{self.path(step)} was saved with another config (use another run folder, or "
                "restore these fields):\n  " + "\n  ".join(differing)
            )

    def _set_aside(self, damaged: Mapping[int, Exception], used: int) -> None:
        for step, error in damaged.items():
            warnings.warn(
                f"checkpoint {self.path(step)} is damaged ({_first_line(error)}); "
                f"continuing from step {used} instead of step {step}",
                RuntimeWarning,
                stacklevel=3,
            )
            if jax.process_index() == 0:
                self.path(step).rename(self.directory / f"{step}.damaged")
        if damaged:
            self._manager.reload()

    def _write_error(self, error: Exception) -> CheckpointError:
        newest = _newest(self.directory)
        kept = "there is no earlier one" if newest is None else f"{self.path(newest)} is untouched"
        return CheckpointError(
            f"cannot write a checkpoint under {self.directory}: {_first_line(error)} ({kept})"
        )


def load_model(run_dir: str | Path, step: int | None = None) -> nnx.Module:
    """Rebuilds a trained model from its run folder alone.

    Args:
      run_dir: the folder that `train` wrote to.
      step: which checkpoint. None: the newest.

    Returns:
      The model, with its parameters on one device.

    Raises:
      ValueError: if there is no such checkpoint.
      CheckpointError: if its files are damaged.
    """
    directory = Path(run_dir).absolute() / FOLDER
    step = _newest(directory) if step is None else step
    if step is None or not (directory / str(step)).is_dir():
        raise ValueError(
            f"run_dir: expected a folder with a checkpoint, got {directory / str(step)}"
        )
    with _manager(directory, create=False) as manager:
        try:
            meta = _read_meta(manager, step)
            config: Any = Config.from_dict(meta["configs"]["model"])
            mesh = MeshConfig().make(jax.local_devices()[:1])
            model_def, params, model_state = abstract_model(config, mesh)
            target = {"model": {"params": params, "model_state": model_state}}
            model = _read_items(manager, step, target, meta)["model"]
        except Exception as error:
            raise CheckpointError(
                f"cannot read checkpoint {directory / str(step)}: {_first_line(error)}"
            ) from error
    return model_def.merge(**model)


def differences(saved: Any, now: Any, path: str = "") -> list[str]:
    """The fields in which two JSON-like values differ, each as one readable line."""
    if isinstance(saved, Mapping) and isinstance(now, Mapping):
        keys = list(dict.fromkeys([*saved, *now]))
        return [
            line
            for key in keys
            for line in differences(saved.get(key), now.get(key), f"{path}.{key}".lstrip("."))
        ]
    return [] if saved == now else [f"{path}: checkpoint {saved!r}, now {now!r}"]


def digests(items: Tree) -> dict[str, int]:
    """A checksum of each array by its path, computed where the array lives.

    File systems and disks flip bits now and then, and the array files carry no checksums. Sums of
    integers do not depend on their order, so neither on the mesh.
    """
    named = jax.tree_util.tree_leaves_with_path(items)
    sums = jax.device_get([_digest(leaf) for _, leaf in named])
    return {jax.tree_util.keystr(p): int(s) for (p, _), s in zip(named, sums, strict=True)}


def fingerprint(tree: Tree) -> str:
    """Equal for trees of equal values."""
    values = json.dumps(digests(tree), sort_keys=True)
    return hashlib.sha256(values.encode()).hexdigest()


@jax.jit
def _digest(array: jax.Array) -> jax.Array:
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        array = jax.random.key_data(array)
    if array.dtype == jnp.bool_:
        array = array.astype(jnp.uint8)
    bits = jax.lax.bitcast_convert_type(array, jnp.dtype(f"uint{8 * array.dtype.itemsize}"))
    place = jnp.arange(1, 2 * bits.size, 2, dtype=jnp.uint32).reshape(bits.shape)
    return (bits.astype(jnp.uint32) * place).sum(dtype=jnp.uint32)


def _items(state: TrainState) -> dict[str, Tree]:
    return {
        "model": {"params": state.params, "model_state": state.model_state},
        "training": {"step": state.step, "opt_state": state.opt_state, "rng": state.rng},
    }


def _manager(directory: Path, **options: Any) -> ocp.CheckpointManager:
    logging.getLogger("absl").addFilter(_is_not_a_failed_thread)
    options = {"save_decision_policy": checkpoint_managers.FixedIntervalPolicy(1), **options}
    return ocp.CheckpointManager(directory, options=ocp.CheckpointManagerOptions(**options))


def _is_not_a_failed_thread(record: logging.LogRecord) -> bool:
    # Each thread of Orbax that fails logs a stack trace. The error itself reaches the caller.
    return not (record.exc_info and "orbax" in record.pathname)


def _read_meta(manager: ocp.CheckpointManager, step: int) -> dict[str, Any]:
    return manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]


def _read_items(
    manager: ocp.CheckpointManager, step: int, targets: Tree, meta: Mapping[str, Any]
) -> Tree:
    args = {name: ocp.args.StandardRestore(target) for name, target in targets.items()}
    restored = manager.restore(step, args=ocp.args.Composite(**args))
    items = {name: restored[name] for name in targets}
    for path, digest in digests(items).items():
        if meta["digests"].get(path) != digest:
            raise CheckpointError(f"the values of {path} are not those that were saved")
    return items


def _newest(directory: Path) -> int | None:
    # From the folder, not from the manager: after a failed write its list is not to be trusted.
    steps = [int(p.name) for p in directory.glob("*") if p.name.isdecimal()]
    return max(steps, default=None)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition('\n')[0]}"


def _list(damaged: Mapping[int, Exception]) -> str:
    return "; ".join(f"step {step}: {_first_line(error)}" for step, error in damaged.items())
