"""Loss and accuracy over held-out slices."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from lcattn.errors import argument_error
from lcattn.training.losses import LossSums
from lcattn.training.mesh import MeshConfig, replicated, shard_batch
from lcattn.training.state import ModelDef, Tree
from lcattn.training.step import make_eval_step

METRICS = ("loss", "accuracy", "exact_match", "bits_per_byte")

Slices = Mapping[str, Iterable[Mapping[str, Any]]]


class Evaluator:
    """Evaluates parameters as they change; compiles once per shape of batch."""

    def __init__(self, model_def: ModelDef, mesh: Mesh, metrics: Sequence[str] = METRICS):
        self._mesh, self._metrics = mesh, metrics
        self._step = jax.jit(make_eval_step(model_def), donate_argnums=3)

    def __call__(self, params: Tree, model_state: Tree, slices: Slices) -> dict[str, float]:
        """Metrics by the name `slice/metric`, see `evaluate`."""
        metrics = {}
        for name, batches in slices.items():
            sums = jax.device_put(LossSums.zeros(), replicated(self._mesh))
            for batch in batches:
                sums = self._step(params, model_state, device_batch(batch, self._mesh), sums)
            means = _means(name, sums)
            metrics |= {f"{name}/{metric}": means[metric] for metric in self._metrics}
        return metrics


def evaluate(
    model: nnx.Module, slices: Slices, metrics: Sequence[str] = METRICS
) -> dict[str, float]:
    """Evaluates a model, where its parameters live.

    Args:
      model: called as `model(tokens, segment_ids=..., rng=None)`.
      slices: batches by the name of the slice, as `task.evaluation()` gives them.
      metrics: which to compute, as in `task.metrics`.

    Returns:
      For each slice, `slice/loss` (mean nats per token), `slice/accuracy` (share of tokens whose
      most likely value is right), `slice/exact_match` (share of rows where all of them are) and
      `slice/bits_per_byte` (the loss in bits: per byte where tokens are bytes).
    """
    params, model_state = ModelDef.split(model)
    sharding = jax.tree.leaves(params)[0].sharding
    mesh = sharding.mesh if isinstance(sharding, NamedSharding) else None
    if not isinstance(mesh, Mesh):  # Never trained here: whole, on one device.
        mesh = MeshConfig().make(list(sharding.device_set))
    with jax.set_mesh(mesh):
        return Evaluator(ModelDef.of(model), mesh, metrics)(params, model_state, slices)


def device_batch(batch: Mapping[str, Any], mesh: Mesh) -> dict[str, jax.Array]:
    """The part of a batch that the model needs, on the devices."""
    return shard_batch({k: v for k, v in batch.items() if k != "example_ids"}, mesh)


def _means(name: str, sums: LossSums) -> dict[str, float]:
    total = {key: float(value) for key, value in jax.device_get(vars(sums)).items()}
    if total["weight"] == 0:
        raise argument_error(f"slice {name!r}", "tokens of non-zero weight", "none")
    loss = total["loss"] / total["weight"]
    return {
        "loss": loss,
        "accuracy": total["correct"] / total["weight"],
        "exact_match": total["exact"] / total["rows"],
        "bits_per_byte": loss / math.log(2),
    }
