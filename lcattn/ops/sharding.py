"""Ops on meshes whose axes are explicit, without saying how every step of them is sharded."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType, PartitionSpec

from lcattn.typing import Array


def like_queries(attend: Callable[..., tuple[Array, Array]]) -> Callable[..., tuple[Array, Array]]:
    """`attend(q, ...)`, for compilers to partition also where a mesh has explicit axes.

    Results, `[B,T,N,H]` and `[B,T,N]`, are sharded as `q` is.
    """

    def run(q: Array, *rest: Any) -> tuple[Array, Array]:
        sharding = jax.typeof(q).sharding
        if AxisType.Explicit not in sharding.mesh.axis_types:
            return attend(q, *rest)
        out, lse = sharding.spec, PartitionSpec(*sharding.spec[:3])
        partitioned: Any = jax.sharding.auto_axes(attend, out_sharding=(out, lse))
        return partitioned(q, *rest)

    return run
