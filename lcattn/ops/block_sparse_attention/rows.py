"""Queries in blocks, with what a plan says of them.

Query heads that share a list are rows of one block, so that its keys are read once for all of them:
P heads of lists (K, or N where query heads of a group differ), each with `r = N/P * query_block`
rows a block.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from lcattn.ops import dispatch
from lcattn.ops.block_sparse_attention.plan import BlockPlan
from lcattn.ops.block_sparse_attention.tiles import spread, whole_blocks
from lcattn.typing import Array

# Queries of a head that are worked on at a time. A GPU pays for every step of a loop.
_AT_ONCE = {"cpu": 512, "gpu": 4096, "tpu": 2048}


class Layout(NamedTuple):
    """How the queries of a call are cut up, as fixed while tracing.

    Attributes:
      heads: P.
      members: query heads that share a head of lists, N/P.
      block: queries of a block.
      at_once: blocks that are worked on at a time.
      length: T.
    """

    heads: int
    members: int
    block: int
    at_once: int
    length: int

    @classmethod
    def of(cls, plan: BlockPlan, num_heads: int, num_kv_heads: int) -> "Layout":
        """The layout that a plan calls for."""
        differ = num_heads > num_kv_heads and any(
            x.shape[1] == num_heads for x in jax.tree.leaves(plan)
        )
        heads = num_heads if differ else num_kv_heads
        at_once = max(1, _AT_ONCE[dispatch.default_platform()] // plan.query_block)
        m, T = plan.blocks.shape[2], plan.seen.queries.shape[-1]
        return cls(heads, num_heads // heads, plan.query_block, min(at_once, m), T)

    def rows(self, x: Array) -> Array:
        """`[B,T,N,...] -> [m,B,P,r,...]`, padded with zeros."""
        x = jnp.moveaxis(x.reshape(*x.shape[:2], self.heads, self.members, *x.shape[3:]), 1, -1)
        x = whole_blocks(x, self.block)  # [B,P,members,...,m,block]
        x = jnp.moveaxis(jnp.moveaxis(x, -2, 0), -1, 4)  # [m,B,P,members,block,...]
        return lax.collapse(x, 3, 5)

    def unrows(self, x: Array) -> Array:
        """`[m,B,P,r,...] -> [B,T,N,...]`."""
        m, B = x.shape[:2]
        x = x.reshape(m, B, self.heads, self.members, self.block, *x.shape[4:])
        x = jnp.moveaxis(jnp.moveaxis(x, 0, 1), 4, 2)  # [B,m,block,P,members,...]
        return lax.collapse(lax.collapse(x, 3, 5), 1, 3)[:, : self.length]

    def positions(self, queries: Array) -> Array:
        """`[b,h,T] -> [m,b,h,r]`; queries added to fill the last block are like its last one."""
        x = jnp.moveaxis(whole_blocks(queries, self.block, mode="edge"), 2, 0)
        return jnp.tile(x, (1, 1, 1, self.members))

    def turns(self, x: Array) -> Array:
        """`[m,...] -> [turns,at_once,...]`, filled up with zeros."""
        x = jnp.pad(x, ((0, -len(x) % self.at_once),) + ((0, 0),) * (x.ndim - 1))
        return x.reshape(len(x) // self.at_once, self.at_once, *x.shape[1:])

    def unturns(self, x: Array, m: int) -> Array:
        """Undoes `turns`."""
        return lax.collapse(x, 0, 2)[:m]

    def spread(self, x: Array, rows: int) -> Array:
        """`[R,b,h,...] -> [R,B,P,...]`."""
        return spread(x, rows, self.heads, axis=1)


def place(heads: int, index: Array, shape: tuple[int, ...]) -> tuple[Array, Array, Array]:
    """Where indices `[R,B,P,...]` lie in an array `[b,h,n,...]` of this shape."""
    rest = (1,) * (index.ndim - 3)
    row = (jnp.arange(index.shape[1]) % shape[0]).reshape(-1, 1, *rest)
    head = (jnp.arange(heads) * shape[1] // heads).reshape(-1, *rest)
    return row, head, index


def take(x: Array, index: Array) -> Array:
    """Of `[b,h,n,...]`, what indices `[R,B,P,...]` along n name."""
    return x[place(index.shape[2], index, x.shape)]
