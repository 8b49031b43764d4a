"""What training changes, as one pytree, and the model as functions of it."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from lcattn.errors import argument_error
from lcattn.training.mesh import param_shardings, replicated

Tree = Any
"""Nested dictionaries of arrays, or of their shapes."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that a step of training reads and writes.

    Attributes:
      step: updates made so far, an int32 scalar.
      params: the model's `nnx.Param` values.
      model_state: its other variables, e.g. random streams that it keeps (`nnx.Rngs`).
      opt_state: the optimiser's moments and counts.
      rng: the key from which each step derives its own.
    """

    step: Tree
    params: Tree
    model_state: Tree
    opt_state: Tree
    rng: Tree


@dataclasses.dataclass(frozen=True)
class ModelDef:
    """A model without its arrays, hashable.

    Arrays are kept outside of Flax's `State`, in plain dictionaries: these cross the boundary of a
    jitted call several times faster, which counts once a step.
    """

    graphdef: nnx.GraphDef

    @staticmethod
    def of(model: nnx.Module) -> "ModelDef":
        """The definition of an existing model."""
        return ModelDef(nnx.graphdef(model))

    @staticmethod
    def split(model: nnx.Module) -> tuple[Tree, Tree]:
        """The model's parameters and its other variables."""
        _, params, model_state = nnx.split(model, nnx.Param, ...)
        return nnx.to_pure_dict(params), nnx.to_pure_dict(model_state)

    def merge(self, params: Tree, model_state: Tree) -> nnx.Module:
        """The inverse of `split`."""
        return nnx.merge(self.graphdef, params, model_state)


def abstract_model(model_config: Any, mesh: Mesh) -> tuple[ModelDef, Tree, Tree]:
    """The model's definition, and its shapes with their places on the mesh; computes nothing."""
    graphdef, params, model_state = nnx.eval_shape(
        lambda: nnx.split(model_config.make(nnx.Rngs(0)), nnx.Param, ...)
    )
    return (
        ModelDef(graphdef),
        _place(nnx.to_pure_dict(params), param_shardings(params, mesh)),
        _place(nnx.to_pure_dict(model_state), replicated(mesh)),
    )


def abstract_state(
    params: Tree, model_state: Tree, optimizer: optax.GradientTransformation, mesh: Mesh
) -> TrainState:
    """Shapes and places of a `TrainState`. Moments live where their parameters live."""
    everywhere = replicated(mesh)
    opt_state = optax.tree.map_params(
        optimizer.init,
        lambda moment, param: _place(moment, param.sharding),
        jax.eval_shape(optimizer.init, params),
        params,
        transform_non_params=lambda leaf: _place(leaf, everywhere),
    )
    step, rng = jax.eval_shape(lambda: (jnp.int32(0), jax.random.key(0)))
    return TrainState(
        _place(step, everywhere), params, model_state, opt_state, _place(rng, everywhere)
    )


def init_state(
    model_config: Any,
    optimizer: optax.GradientTransformation,
    seed: int,
    target: TrainState,
    given: tuple[Tree, Tree] | None = None,
) -> TrainState:
    """A new state, each array made where `target` says it lives.

    Args:
      model_config: makes the model.
      optimizer: makes the moments.
      seed: of parameters and random streams.
      target: shapes and places.
      given: parameters and other variables to copy instead of making new ones.
    """

    def init(given: tuple[Tree, Tree] | None) -> TrainState:
        model_key, rng = jax.random.split(jax.random.key(seed))
        if given is None:
            params, model_state = ModelDef.split(model_config.make(nnx.Rngs(model_key)))
        else:  # Copied, since training overwrites the state.
            params, model_state = jax.tree.map(jnp.copy, given)
        return TrainState(jnp.int32(0), params, model_state, optimizer.init(params), rng)

    return jax.jit(init, out_shardings=shardings_of(target))(given)


def place_model(model: nnx.Module, target: TrainState) -> tuple[Tree, Tree]:
    """The model's parameters and its other variables, where `target` says they live.

    Raises:
      ValueError: if they are not of the shapes of `target`.
    """
    values, places = ModelDef.split(model), (target.params, target.model_state)
    expected, got = _shapes(places), _shapes(values)
    for path in dict.fromkeys([*expected, *got]):
        if expected.get(path) != got.get(path):
            raise argument_error(
                f"initial{path}", expected.get(path, "nothing"), got.get(path, "nothing")
            )
    return jax.device_put(values, shardings_of(places))


def _shapes(tree: Tree) -> dict[str, str]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path[1:]): f"{x.dtype}{list(x.shape)}" for path, x in leaves}


def shardings_of(tree: Tree) -> Tree:
    """The sharding of each leaf."""
    return jax.tree.map(lambda leaf: leaf.sharding, tree)


def _place(shapes: Tree, shardings: Tree) -> Tree:
    if isinstance(shardings, jax.sharding.Sharding):
        shardings = jax.tree.map(lambda _: shardings, shapes)
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        shardings,
    )
