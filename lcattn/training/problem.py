"""What a seed trains: parameters, a loss on data it draws itself, and what to record."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import jax
from flax import nnx

from lcattn.config import Config
from lcattn.nn import auxiliary_loss
from lcattn.training.losses import per_token
from lcattn.training.state import ModelDef, TrainState, Tree
from lcattn.training.step import Batch, apply
from lcattn.typing import Array, PRNGKeyArray


@runtime_checkable
class Problem(Protocol):
    """What one seed trains: a `Config`, so that it is hashable and a checkpoint can name it.

    All methods are traced, and mapped over seeds.
    """

    def to_dict(self) -> dict[str, Any]:
        """What a checkpoint stores, to refuse one of another problem."""
        ...

    def init(self, key: PRNGKeyArray) -> tuple[Tree, Tree]:
        """Parameters, and what else changes during training (`{}` for nothing)."""
        ...

    def loss(self, params: Tree, model_state: Tree, key: PRNGKeyArray) -> tuple[Array, Tree]:
        """The loss on a batch that `key` draws, and the changed `model_state`."""
        ...

    def evaluate(self, params: Tree, model_state: Tree) -> Mapping[str, Array]:
        """What to record of a model, always on the same data."""
        ...


@runtime_checkable
class Intervening(Protocol):
    """A problem that changes the state of training beside the gradient, such as by forgetting."""

    def before_update(self, state: TrainState) -> TrainState:
        """The state from which to make the update of number `state.step`, counted from 0."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelProblem(Config):
    """A problem whose parameters are those of a module; `loss` and `evaluate` are left open.

    Attributes:
      model: builds the module: `model.make(rngs)`.
    """

    model: Config

    def init(self, key: PRNGKeyArray) -> tuple[Tree, Tree]:
        """The parameters and the other variables of a new module."""
        return ModelDef.split(_build(self.model, nnx.Rngs(key)))

    @property
    def model_def(self) -> ModelDef:
        """Joins parameters and other variables to the module again."""
        return _definition(self.model)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenProblem(ModelProblem):
    """A language model on rows that `batch` draws; `batch` and `evaluate` are left open."""

    def batch(self, key: PRNGKeyArray) -> Batch:
        """Rows to train on: `tokens`, `targets` and `weights`, each `[B, T]`."""
        raise NotImplementedError

    def loss(self, params: Tree, model_state: Tree, key: PRNGKeyArray) -> tuple[Array, Tree]:
        """The mean cross entropy of the weighted tokens, and what layers contribute themselves."""
        data_key, model_key = jax.random.split(key)
        sums, model = apply(
            self.model_def, params, model_state, self.batch(data_key), rng=model_key
        )
        loss = per_token(sums.loss, sums.weight) + auxiliary_loss(model)
        return loss, ModelDef.split(model)[1]


@functools.cache
def _definition(config: Config) -> ModelDef:
    return ModelDef.of(nnx.eval_shape(lambda: _build(config, nnx.Rngs(0))))


def _build(config: Any, rngs: nnx.Rngs) -> nnx.Module:
    make: Callable[[nnx.Rngs], nnx.Module] = config.make
    return make(rngs)
