"""A plan's lists as kernels take them."""

from lcattn.ops.block_sparse_attention.plan import BlockPlan
from lcattn.ops.block_sparse_attention.tiles import spread
from pallas_kernels.block_sparse_attention.items import Lists


def entries(plan: BlockPlan) -> Lists:
    """The lists, with the kind of each entry, by queries and by keys."""
    kinds = plan.kinds()
    shape = kinds.shape[:2]
    return Lists(
        spread(plan.blocks, *shape),
        kinds,
        None if plan.log_weight is None else spread(plan.log_weight, *shape),
        *(spread(x, *shape) for x in plan.transposed()),
    )
