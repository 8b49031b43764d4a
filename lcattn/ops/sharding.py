"""Ops on meshes whose axes are explicit, without saying how every step of them is sharded."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec, reshard

from lcattn.typing import Array


def partitioned[**Arguments, Results](
    op: Callable[Arguments, Results],
) -> Callable[Arguments, Results]:
    """`op`, for compilers to partition also where a mesh has explicit axes.

    Results are then sharded as the first array is, say the queries: outputs along all axes that
    they have in common, states along that of the batch.
    """
    names = tuple(inspect.signature(op).parameters)

    @functools.wraps(op)
    def run(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Results:
        given = (*args, *(kwargs[name] for name in names if name in kwargs))
        first = next((x for x in given if isinstance(x, jax.Array)), None)
        if first is None or not (mesh := jax.typeof(first).sharding.mesh).explicit_axes:
            return op(*args, **kwargs)

        def enter(x: Any) -> Any:
            return reshard(x, PartitionSpec()) if isinstance(x, jax.Array) else x

        def leave(x: Array) -> Array:
            return reshard(x, NamedSharding(mesh, _spec(x.shape, first)))

        automatic = dict.fromkeys(mesh.explicit_axes, AxisType.Auto)
        with jax.sharding.use_abstract_mesh(mesh.update_axis_types(automatic)):
            arguments: Any = jax.tree.map(enter, (args, kwargs))
            results = op(*arguments[0], **arguments[1])
        return jax.tree.map(leave, results)

    return run


def _spec(shape: tuple[int, ...], first: Array) -> PartitionSpec:
    """How a result of some shape is sharded."""
    spec = jax.typeof(first).sharding.spec
    if shape == first.shape:
        return spec
    tokens = first.ndim - 1
    is_output = shape[:tokens] == first.shape[:tokens]
    has_batch = shape[:1] == first.shape[:1]
    return PartitionSpec(*spec[: tokens if is_output else int(has_batch)])
