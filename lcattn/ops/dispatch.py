"""How an op chooses among its implementations.

An op declares a table `name -> Implementation`, best first. `implementation=None` takes the first
that can serve the call and pays there; there always is one. A name runs that implementation or
raises an error that says why it cannot. Nothing falls back silently, and no environment variable
steers it.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.sharding import AxisType

from lcattn.errors import argument_error


class UnsupportedImplementationError(ValueError):
    """The named implementation exists, but cannot serve this call here; the message says why."""


def _runs_anywhere() -> str | None:
    return None


def _serves_every_call(**call: Any) -> str | None:
    del call


def _always_pays(**call: Any) -> bool:
    del call
    return True


def only_when_named(**call: Any) -> bool:
    """A `pays` of what, as it stands, was never timed where it runs.

    So are the kernels for TPUs of ops that have a fast form in XLA: no TPU was at hand.
    """
    del call
    return False


@dataclasses.dataclass(frozen=True)
class Implementation:
    """One way to compute an op.

    Attributes:
      run: the function that computes it.
      objection: given the call's description, says in words why `run` cannot serve it, or None.
      pays: given the same, whether `run` is worth taking unasked.
      absence: says in words what machine `run` lacks here, or None; asked before `objection`.
    """

    run: Callable[..., Any]
    objection: Callable[..., str | None] = _serves_every_call
    pays: Callable[..., bool] = _always_pays
    absence: Callable[[], str | None] = _runs_anywhere

    def refusal(self, **call: Any) -> str | None:
        """Why it cannot serve a call here, in words, or None."""
        return self.absence() or self.objection(**call)

    def is_best(self, **call: Any) -> bool:
        """Whether to take it when no implementation is named, all better ones being ruled out."""
        return self.refusal(**call) is None and self.pays(**call)


OPS: dict[str, Mapping[str, Implementation]] = {}
"""The implementations of every op, best first; filled by `declare` as op modules are imported."""


def declare(op: str, table: Mapping[str, Implementation]) -> None:
    """Makes an op's implementations known, best first. The last must serve every call."""
    OPS[op] = table


def choose(op: str, name: str | None, **call: Any) -> Callable[..., Any]:
    """The function that serves this call.

    Args:
      op: the op's name.
      name: the implementation asked for, or None for the first that serves the call.
      **call: what objections look at: sizes, dtype and options.

    Raises:
      UnsupportedImplementationError: if `name` cannot serve the call.
      ValueError: if the op has no implementation of that name.
    """
    table = OPS[op]
    if name is None:
        return table[best(op, **call)].run
    if name not in table:
        raise argument_error(
            "implementation", f"None or one of {sorted(table)} for {op}", repr(name)
        )
    refusal = table[name].refusal(**call)
    if refusal is not None:
        raise UnsupportedImplementationError(f"{op}: implementation {name!r} {refusal}")
    return table[name].run


def best(op: str, **call: Any) -> str:
    """The name of the implementation that serves this call if none is asked for."""
    return next(name for name, impl in OPS[op].items() if impl.is_best(**call))


def default_platform() -> str:
    """Where a computation traced now would run: "gpu", "tpu", or "cpu" for anything else."""
    device = jax.config.jax_default_device
    if device is None:
        name = jax.default_backend()
    else:
        name = device if isinstance(device, str) else device.platform
    return {"gpu": "gpu", "cuda": "gpu", "rocm": "gpu", "tpu": "tpu"}.get(name, "cpu")


def on_hopper() -> bool:
    """Whether that is a Hopper GPU (compute capability 9.0)."""
    if default_platform() != "gpu":
        return False
    return getattr(jax.devices()[0], "compute_capability", None) == "9.0"


def no_hopper() -> str | None:
    """The `absence` of kernels for Hopper GPUs."""
    return _wide() if on_hopper() else "needs a Hopper GPU (compute capability 9.0)"


def _wide() -> str | None:
    """The absence of the 32-bit types that kernels, and their gradients, are traced in."""
    return "needs jax_enable_x64 to be off" if jax.config.jax_enable_x64 else None


def on_one_device() -> bool:
    """Whether kernels may be taken unasked: for one device, outside `shard_map`.

    Compilers cannot partition kernels, nor does JAX know how their results vary over a mesh: there
    they belong inside `shard_map(..., check_vma=False)`, and only who writes that can tell. Ops see
    explicit axes as automatic ones (`lcattn.ops.sharding`).
    """
    axes = jax.sharding.get_abstract_mesh().axis_types
    return jax.device_count() == 1 and all(axis is AxisType.Auto for axis in axes)


def no_grid(rows: int) -> str | None:
    """The objection of kernels for GPUs to rows that no grid holds: it has 1 to 65535 places."""
    return None if 0 < rows < 2**16 else f"takes 1 to 65535 rows, in all their parts, not {rows}"


def no_tpu() -> str | None:
    """The `absence` of kernels for TPUs."""
    return _wide() if default_platform() == "tpu" else "needs a TPU"
