"""Whether a plan fits a call, and its lists are lists."""

import jax
import jax.numpy as jnp
import numpy as np

from lcattn.errors import argument_error
from lcattn.ops.block_sparse_attention.plan import BlockPlan
from lcattn.ops.checks import Sizes, check_size
from lcattn.ops.visibility import Visibility
from lcattn.typing import Array


def check_plan(plan: BlockPlan, sizes: Sizes) -> None:
    """Checks a plan against a call's sizes and, outside `jit`, that its lists are lists.

    Raises:
      ValueError: naming the attribute, what was expected and what came.
    """
    check_size("plan.query_block", plan.query_block)
    check_size("plan.key_block", plan.key_block)
    m = -(-sizes.T // plan.query_block)
    e = plan.blocks.shape[-1]
    _check_array("blocks", plan.blocks, sizes, {"m": m, "e": e}, jnp.integer)
    if not e:
        raise argument_error("plan.blocks", "at least one place a list", plan.blocks.shape)
    _check_like("count", plan.count, plan.blocks, jnp.integer, axes=3)
    for name, array, length in zip(
        Visibility._fields, plan.seen, (sizes.T, sizes.S, sizes.S), strict=True
    ):
        axis = "T" if name == "queries" else "S"
        _check_array(f"seen.{name}", array, sizes, {axis: length}, jnp.integer)
    if plan.log_weight is not None:
        _check_like("log_weight", plan.log_weight, plan.blocks, jnp.floating)
    if plan.columns is not None:
        index, count, log_weight = plan.columns
        c = index.shape[-1]
        _check_array("columns.index", index, sizes, {"m": m, "c": c}, jnp.integer)
        _check_like("columns.count", count, index, jnp.integer, axes=3)
        if log_weight is not None:
            _check_like("columns.log_weight", log_weight, index, jnp.floating)
    if not any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(plan)):
        _check_values(plan, sizes)


def _check_array(name: str, array: Array, sizes: Sizes, rest: dict[str, int], kind) -> None:
    axes = f"[b,h,{','.join(rest)}]"
    expected = f"{axes} with b in {(1, sizes.B)}, h in {(1, sizes.K, sizes.N)}, {rest}"
    fits = (
        array.ndim == 2 + len(rest)
        and array.shape[0] in (1, sizes.B)
        and array.shape[1] in (1, sizes.K, sizes.N)
        and array.shape[2:] == tuple(rest.values())
    )
    if not fits:
        raise argument_error(f"plan.{name}", expected, f"shape {array.shape}")
    _check_dtype(name, array, kind)


def _check_like(name: str, array: Array, other: Array, kind, axes: int = 4) -> None:
    if array.shape != other.shape[:axes]:
        raise argument_error(f"plan.{name}", f"shape {other.shape[:axes]}", array.shape)
    _check_dtype(name, array, kind)


def _check_dtype(name: str, array: Array, kind) -> None:
    if not jnp.issubdtype(array.dtype, kind):
        wanted = "an integer" if kind is jnp.integer else "a floating-point"
        raise argument_error(f"plan.{name}", f"{wanted} dtype", array.dtype)


def _check_values(plan: BlockPlan, sizes: Sizes) -> None:
    blocks, count = np.asarray(plan.blocks), np.asarray(plan.count)
    _check_lists("blocks", blocks, "count", count, plan.num_key_blocks)
    _check_finite("log_weight", plan.log_weight, np.arange(blocks.shape[-1]) < count[..., None])
    if plan.columns is None:
        return
    columns, column_count = np.asarray(plan.columns.index), np.asarray(plan.columns.count)
    _check_lists("columns.index", columns, "columns.count", column_count, sizes.S)
    listed = np.arange(columns.shape[-1]) < column_count[..., None]
    _check_finite("columns.log_weight", plan.columns.log_weight, listed)
    covered = np.zeros((*count.shape, plan.num_key_blocks + 1), bool)
    places = np.where(np.arange(blocks.shape[-1]) < count[..., None], blocks, plan.num_key_blocks)
    np.put_along_axis(covered, places, True, axis=-1)
    covered, columns, listed = _spread(covered, columns, listed)
    home = np.clip(columns // plan.key_block, 0, plan.num_key_blocks - 1)
    twice = listed & np.take_along_axis(covered, home, axis=-1)
    if twice.any():
        b, h, m, c = np.argwhere(twice)[0]
        raise argument_error(
            "plan.columns.index", "keys outside of the blocks listed for the same queries",
            f"key {columns[b, h, m, c]} of listed block {home[b, h, m, c]} at [{b},{h},{m}]",
        )  # fmt: skip


def _check_lists(name: str, ids: np.ndarray, count_name: str, count: np.ndarray, end: int) -> None:
    if count.size and not (count.min() >= 0 and count.max() <= ids.shape[-1]):
        found = f"{count.min()} to {count.max()}"
        raise argument_error(f"plan.{count_name}", f"lengths of 0 to {ids.shape[-1]}", found)
    listed = np.arange(ids.shape[-1]) < count[..., None]
    wrong = listed & ((ids < 0) | (ids >= end))
    wrong[..., 1:] |= listed[..., 1:] & (ids[..., 1:] <= ids[..., :-1])
    if wrong.any():
        b, h, m, _ = np.argwhere(wrong)[0]
        row = ids[b, h, m, : count[b, h, m]]
        raise argument_error(
            f"plan.{name}", f"ids below {end} that ascend, each once",
            f"{np.array2string(row, threshold=16, separator=',')} at [{b},{h},{m}]",
        )  # fmt: skip


def _check_finite(name: str, weights: Array | None, listed: np.ndarray) -> None:
    if weights is not None and not np.all(np.isfinite(np.asarray(weights)[listed])):
        raise argument_error(f"plan.{name}", "finite numbers", "others")


def _spread(*arrays: np.ndarray) -> list[np.ndarray]:
    """All with the rows and heads of the largest."""
    for axis in (0, 1):
        size = max(x.shape[axis] for x in arrays)
        arrays = tuple(np.repeat(x, size // x.shape[axis], axis=axis) for x in arrays)
    return list(arrays)
