"""Softmax attention over lists of blocks of keys, and the plans that say which."""

from lcattn.ops.block_sparse_attention.api import block_sparse_attention, block_sparse_part
from lcattn.ops.block_sparse_attention.builders import (
    block_mask_plan,
    causal_plan,
    document_plan,
    sliding_window_plan,
    top_blocks_plan,
)
from lcattn.ops.block_sparse_attention.plan import BlockPlan, PlanColumns, TransposedLists

__all__ = [
    "BlockPlan",
    "PlanColumns",
    "TransposedLists",
    "block_mask_plan",
    "block_sparse_attention",
    "block_sparse_part",
    "causal_plan",
    "document_plan",
    "sliding_window_plan",
    "top_blocks_plan",
]
