"""Labelling items in context or by heart: training, the evaluations, the progress measures."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import override

import jax
import jax.numpy as jnp

from lcattn.config import Config
from lcattn.probes.classification.networks import AttentionNetwork, Reading, TwoParameterNetwork
from lcattn.tasks.item_label import ItemLabelConfig, Sequences, World
from lcattn.training.state import Tree
from lcattn.typing import Array, Float, PRNGKeyArray

EVALUATIONS = {
    "train": "as in training",
    "ic": "fresh classes, the target among them: only the context can tell",
    "ic2": "trained classes, every label moved by one: the context says otherwise than training",
    "iw": "trained classes drawn alone: the context hardly ever helps",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ItemLabelProblem(Config):
    """A network that is trained to label the target; a `lcattn.training.Problem`.

    Each seed draws its own classes and labels.

    Attributes:
      data: the sequences.
      network: what is trained.
      batch_size: of training.
      eval_size: sequences of each evaluation.
    """

    data: ItemLabelConfig
    network: AttentionNetwork | TwoParameterNetwork = dataclasses.field(
        default_factory=AttentionNetwork
    )
    batch_size: int = 128
    eval_size: int = 1000

    @override
    def validate(self) -> None:
        self.require_positive("batch_size", "eval_size")

    def init(self, key: PRNGKeyArray) -> tuple[Tree, Tree]:
        """The network, and the world it lives in."""
        network_key, world_key = jax.random.split(key)
        world = self.data.world(world_key)
        return self.network.init(network_key, self.data), world._asdict()

    def loss(self, params: Tree, model_state: Tree, key: PRNGKeyArray) -> tuple[Array, Tree]:
        """The cross entropy of the target's label."""
        batch = self.data.draw(key, World(**model_state), self.batch_size)
        return _cross_entropy(self._read(params, batch).logits, batch.target), model_state

    def evaluate(self, params: Tree, model_state: Tree) -> Mapping[str, Array]:
        """Each of `EVALUATIONS`, and the progress measures on fresh classes.

        Returns:
          By name: "{evaluation}/accuracy" and "train/loss"; "iw/seen", the share of the "iw"
          targets whose class the context happens to show; and of "ic"

          - "first_to_item" (ILA1): attention of label tokens to their items in the first layer;
          - "second_to_labels" (TLA2): that of the target to label tokens in the second;
          - "second_to_right_labels" (TILA2): to those whose items are of the target's class;
          - "context_label" (CLA): how often the answer is any label of the context.

          For the two-parameter network "beta1" and "beta2" too.
        """
        world, metrics = World(**model_state), {}
        for i, (name, (data, shift)) in enumerate(self._evaluations.items()):
            key = jax.random.fold_in(jax.random.key(0), i)
            batch = data.draw(key, world, self.eval_size, label_shift=shift)
            reading = self._read(params, batch)
            answer = reading.logits.argmax(axis=-1)
            metrics[f"{name}/accuracy"] = (answer == batch.target).mean()
            if name == "train":
                metrics["train/loss"] = _cross_entropy(reading.logits, batch.target)
            if name == "iw":
                metrics["iw/seen"] = batch.matches.any(axis=-1).mean()
            if name == "ic":
                metrics |= progress(reading, batch)
        return metrics | {name: params[name] for name in ("beta1", "beta2") if name in params}

    @property
    def _evaluations(self) -> dict[str, tuple[ItemLabelConfig, int]]:
        """The data and the shift of labels of each of `EVALUATIONS`."""
        data = self.data
        return {
            "train": (data, 0),
            "ic": (data.replace(fresh=1.0), 0),
            "ic2": (data.replace(fresh=0.0, bursty=1.0), 1),
            "iw": (data.replace(fresh=0.0, bursty=0.0), 0),
        }

    def _read(self, params: Tree, batch: Sequences) -> Reading:
        read = functools.partial(self.network.read, params, self.data)
        return jax.vmap(read)(batch.tokens)


def progress(reading: Reading, batch: Sequences) -> dict[str, Float[Array, ""]]:
    """The progress measures of a batch; names as in `ItemLabelProblem.evaluate`.

    Args:
      reading: arrays with a leading axis of sequences.
      batch: the sequences.
    """
    item = jnp.arange(0, 2 * batch.labels.shape[1], 2)
    label = item + 1
    to_labels = reading.second[:, label]
    answer = reading.logits.argmax(axis=-1)
    return {
        "first_to_item": reading.first[:, label, item].mean(),
        "second_to_labels": to_labels.sum(axis=-1).mean(),
        "second_to_right_labels": (to_labels * batch.matches).sum(axis=-1).mean(),
        "context_label": (answer[:, None] == batch.labels).any(axis=-1).mean(),
    }


def _cross_entropy(logits: Float[Array, "B L"], target: Array) -> Float[Array, ""]:
    logs = jax.nn.log_softmax(logits)
    return -jnp.take_along_axis(logs, target[:, None], axis=-1).mean()
