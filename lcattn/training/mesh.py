"""Devices as a mesh, and where each array lives on it.

Two axes: `data` splits the batch, `fsdp` splits the batch and the parameters too (fully sharded
data parallelism: XLA gathers a layer's parameters where it needs them). One device is the mesh
1 x 1, so one code path serves both.
"""

import dataclasses
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any, override

import jax
import numpy as np
from flax import nnx, traverse_util
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from lcattn.config import Config
from lcattn.errors import argument_error

logger = logging.getLogger(__name__)

BATCH_AXES = ("data", "fsdp")

SHARDED_AXES: Mapping[str, str] = {"embed": "fsdp"}
"""Logical axis of a parameter -> the mesh axis that splits it. Other axes are not split."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig(Config):
    """How many devices each axis of the mesh has.

    Attributes:
      data: devices that hold copies of the parameters, each with its part of the batch.
      fsdp: devices over which the parameters, too, are split.

    One of the two may be -1: all devices that the other leaves.
    """

    data: int = -1
    fsdp: int = 1

    @override
    def validate(self) -> None:
        for field in ("data", "fsdp"):
            if getattr(self, field) < 1 and getattr(self, field) != -1:
                raise self.error(field, "a positive number, or -1 for all remaining devices")
        if self.data == self.fsdp == -1:
            raise self.error("data", "a positive number where fsdp is -1")

    def make(self, devices: Sequence[jax.Device] | None = None) -> Mesh:
        """The mesh over `devices` (default: all devices of all hosts).

        Raises:
          ValueError: if the axes do not multiply to the number of devices.
        """
        devices = jax.devices() if devices is None else devices
        rest = len(devices) // max(self.data, self.fsdp)  # The size of the axis that is -1, if any.
        shape = tuple(rest if size == -1 else size for size in (self.data, self.fsdp))
        if math.prod(shape) != len(devices):
            raise argument_error(
                "mesh",
                f"axes that multiply to the number of devices ({len(devices)})",
                f"data={self.data}, fsdp={self.fsdp}",
            )
        return jax.make_mesh(shape, BATCH_AXES, (AxisType.Auto,) * 2, devices=tuple(devices))


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on each device."""
    return NamedSharding(mesh, PartitionSpec())


def param_shardings(params: Any, mesh: Mesh) -> dict[Any, Any]:
    """Where each parameter of an `nnx.State` lives: a tree like `nnx.to_pure_dict(params)`.

    The parameters' metadata `axes` name their logical axes, which `SHARDED_AXES` maps to the mesh.
    An axis whose size the mesh does not divide is not split: an odd vocabulary costs memory, not
    the run.
    """
    flat = {
        path: NamedSharding(mesh, _partition(path, variable, mesh))
        for path, variable in nnx.to_flat_state(params)
    }
    return traverse_util.unflatten_dict(flat)


def _partition(path: tuple[Any, ...], variable: Any, mesh: Mesh) -> PartitionSpec:
    name = "/".join(map(str, path))
    axes = variable.get_metadata("axes", None) or (None,) * len(variable.shape)
    if len(axes) != len(variable.shape):
        raise argument_error(f"axes of {name}", f"{len(variable.shape)} names", repr(axes))
    split: list[str | None] = []
    for axis, size in zip(axes, variable.shape, strict=True):
        mesh_axis = SHARDED_AXES.get(axis) if axis else None
        if mesh_axis in split:  # An array can be split only once over the same devices.
            mesh_axis = None
        if mesh_axis is not None and size % mesh.shape[mesh_axis]:
            logger.info("%s: %s=%d is not split over %s", name, axis, size, mesh.shape)
            mesh_axis = None
        split.append(mesh_axis)
    return PartitionSpec(*split)


def shard_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Puts this process's rows of a batch on its devices; the results are global arrays.

    Raises:
      ValueError: if the rows do not divide evenly among the devices.
    """
    sharding = NamedSharding(mesh, PartitionSpec(BATCH_AXES))
    local_devices = len(mesh.local_devices)
    for name, rows in batch.items():
        if len(rows) % local_devices:
            raise argument_error(
                f"batch[{name!r}]", f"a multiple of {local_devices} rows (devices)", len(rows)
            )
    if jax.process_count() == 1:
        return jax.device_put(dict(batch), sharding)
    return {k: jax.make_array_from_process_local_data(sharding, v) for k, v in batch.items()}
