"""The kernels for Hopper GPUs, behind the op's contract."""

import jax.numpy as jnp

from lcattn.ops import dispatch
from lcattn.ops.block_sparse_attention.entries import entries
from lcattn.ops.block_sparse_attention.plan import BlockPlan
from lcattn.ops.checks import Sizes
from lcattn.typing import Array


def attend(
    q: Array, k: Array, v: Array, plan: BlockPlan, *, scale: float, is_part: bool = False
) -> tuple[Array, Array]:
    """Attention over the listed blocks, of a call that `objection` lets pass."""
    from pallas_kernels.block_sparse_attention import mosaic_gpu

    return mosaic_gpu.block_sparse_attention(
        q, k, v, entries(plan), tuple(plan.seen),
        query_block=plan.query_block, key_block=plan.key_block, scale=scale, is_part=is_part,
    )  # fmt: skip


def objection(*, sizes: Sizes, dtype: jnp.dtype, plan: BlockPlan) -> str | None:
    """Why the kernels cannot serve a call, in words."""
    return _objection(
        sizes=sizes, dtype=dtype, query_block=plan.query_block, key_block=plan.key_block
    )


def runs_blocks(*, sizes: Sizes, dtype: jnp.dtype, query_block: int, key_block: int) -> bool:
    """Whether the kernels would be taken unasked for a plan of such blocks, before there is one."""
    refusal = dispatch.no_hopper() or _objection(
        sizes=sizes, dtype=dtype, query_block=query_block, key_block=key_block
    )
    return refusal is None and pays()


def _objection(*, sizes: Sizes, dtype: jnp.dtype, query_block: int, key_block: int) -> str | None:
    # Imported where it can run: it takes longer to import than the rest of the ops.
    from pallas_kernels.block_sparse_attention import mosaic_gpu

    return mosaic_gpu.objection(
        dtype=dtype, B=sizes.B, N=sizes.N, F=sizes.F, H=sizes.H,
        query_block=query_block, key_block=key_block,
    ) or dispatch.no_grid(sizes.B)  # fmt: skip


def pays(**call) -> bool:
    """Whether the kernels are the better choice where they can serve."""
    del call
    return dispatch.on_one_device()
