"""The kernels for TPUs, behind the op's contract."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from lcattn.ops import dispatch
from lcattn.ops.block_sparse_attention.entries import entries
from lcattn.ops.block_sparse_attention.plan import BlockPlan, common
from lcattn.ops.checks import Sizes
from lcattn.typing import Array

_Attend = Callable[[Array, Array, Array, BlockPlan, float], tuple[Array, Array]]


def attend(
    q: Array, k: Array, v: Array, plan: BlockPlan, *, scale: float, is_part: bool = False
) -> tuple[Array, Array]:
    """Attention over the listed blocks, of a call that `objection` lets pass."""
    turns = _Turns.of(plan, k.shape[2])
    at_once = functools.partial(_at_once, is_part=is_part)
    run = _in_turns(_in_turns(at_once, turns.heads, axis=1), turns.rows, axis=0)
    return run(q, k, v, plan, scale)


class _Turns(NamedTuple):
    """A call in parts, one after another, so that the items of each fit into scalar memory.

    Attributes:
      rows: parts of the batch.
      heads: parts of the heads.
      items: of a part.
    """

    rows: int
    heads: int
    items: int

    @classmethod
    def of(cls, plan: BlockPlan, num_kv_heads: int) -> "_Turns":
        """The fewest turns that fit; or the most there are."""
        from pallas_kernels.block_sparse_attention.mosaic_tpu import MOST_ITEMS

        b, h = common(plan.blocks, *plan.seen)
        m, e = plan.blocks.shape[2:]
        items = m * e + plan.num_key_blocks  # of a head
        most = MOST_ITEMS // (items * (2 if plan.log_weight is not None else 1))
        rows = _parts(b, most // h)
        heads = _parts(num_kv_heads, num_kv_heads * most // h) if h > 1 else 1
        return cls(rows, heads, b // rows * (h // heads) * items)


def _parts(size: int, most: int) -> int:
    """The fewest equal parts of at most `most`; parts of 1 if none are so small."""
    return next(n for n in range(1, size + 1) if size % n == 0 and size // n <= max(most, 1))


def _in_turns(run: _Attend, turns: int, *, axis: int) -> _Attend:
    """Runs parts of the rows (axis 0 of a plan) or heads (axis 1) one after another."""
    if turns == 1:
        return run
    place = 2 * axis  # in arrays [B,T,N,H]

    def cut(x: Array, at: int) -> Array:
        x = x.reshape(*x.shape[:at], turns, -1, *x.shape[at + 1 :])
        return jnp.moveaxis(x, at, 0)

    def in_turns(q: Array, k: Array, v: Array, plan: BlockPlan, scale: float):
        leaves, structure = jax.tree.flatten(plan)
        own = [cut(x, axis) if x.shape[axis] > 1 else None for x in leaves]

        def turn(part):
            q, k, v, own = part
            mine = (x if new is None else new for x, new in zip(leaves, own, strict=True))
            return run(q, k, v, structure.unflatten(mine), scale)

        results = lax.map(turn, (*(cut(x, place) for x in (q, k, v)), own))
        out, lse = (jnp.moveaxis(x, 0, place) for x in results)
        return out.reshape(*q.shape[:3], -1), lse.reshape(q.shape[:3])

    return in_turns


def _at_once(
    q: Array, k: Array, v: Array, plan: BlockPlan, scale: float, *, is_part: bool
) -> tuple[Array, Array]:
    from pallas_kernels.block_sparse_attention import mosaic_tpu

    return mosaic_tpu.block_sparse_attention(
        q, k, v, entries(plan), tuple(plan.seen),
        query_block=plan.query_block, key_block=plan.key_block, scale=scale, is_part=is_part,
    )  # fmt: skip


def objection(*, sizes: Sizes, dtype: jnp.dtype, plan: BlockPlan) -> str | None:
    """Why the kernels cannot serve a call, in words."""
    # Imported where it can run: it takes longer to import than the rest of the ops.
    from pallas_kernels.block_sparse_attention import mosaic_tpu

    _, h = common(plan.blocks, *plan.seen)
    return mosaic_tpu.objection(
        dtype=dtype, F=sizes.F, H=sizes.H, query_block=plan.query_block, key_block=plan.key_block,
        members=1 if h == sizes.N else sizes.groups,
        blocks=max(plan.blocks.shape[2], plan.num_key_blocks),
        items=_Turns.of(plan, sizes.K).items, weighted=plan.log_weight is not None,
    )  # fmt: skip


def pays(**call) -> bool:
    """Whether the kernels are the better choice where they can serve.

    No TPU was at hand to tell, but who asks for blocks by name has asked for them.
    """
    del call
    return dispatch.on_one_device()
