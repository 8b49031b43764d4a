"""What a block of queries may see of a block of keys, from the extremes of a rule over both."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax

from lcattn.ops.blocks import pad
from lcattn.ops.visibility import NEVER, Visibility
from lcattn.typing import Array, Int


class Tiles(NamedTuple):
    """The extremes of a rule over blocks of queries `[b,h,m]` and of keys `[b,h,n]`.

    Attributes:
      lowest, highest: positions of the queries of a block.
      oldest: the lowest that is not negative, since queries at negative positions see nothing.
      begins, last_begins: the lowest and highest begin in a block.
      ends, last_ends: the lowest and highest end.
      some_wrap, all_wrap: whether keys end before they begin.
    """

    lowest: Array
    oldest: Array
    highest: Array
    begins: Array
    last_begins: Array
    ends: Array
    last_ends: Array
    some_wrap: Array
    all_wrap: Array

    @classmethod
    def of(cls, seen: Visibility, query_block: int, key_block: int) -> "Tiles":
        """The extremes of a rule."""
        p = whole_blocks(seen.queries, query_block, mode="edge")
        begin, end = (whole_blocks(x, key_block, constant_values=NEVER) for x in seen[1:])
        highest = p.max(axis=-1)
        oldest = jnp.where(p < 0, highest[..., None], p).min(axis=-1)
        lows, highs = ([reduce(x, -1) for x in (begin, end)] for reduce in (jnp.min, jnp.max))
        extremes = lows[0], highs[0], lows[1], highs[1]
        wraps = end < begin
        return cls(p.min(axis=-1), oldest, highest, *extremes, wraps.any(-1), wraps.all(-1))

    def at(self, blocks: Int[Array, "b h m e"]) -> "Tiles":
        """Those of each pair of a block of queries and the e-th block of keys listed for it."""
        flat = lax.collapse(blocks, 2)

        def take(x: Array) -> Array:
            return jnp.take_along_axis(x, flat, axis=-1, mode="clip").reshape(blocks.shape)

        return Tiles(*(x[..., None] for x in self[:3]), *map(take, self[3:]))

    def crossed(self) -> "Tiles":
        """Those of all pairs of blocks."""
        return Tiles(*(x[..., :, None] for x in self[:3]), *(x[..., None, :] for x in self[3:]))

    def some_seen(self) -> Array:
        """Whether a pair may be seen: false only where none is."""
        return self.some_wrap | (self.begins <= self.highest) & (self.oldest < self.last_ends)

    def all_seen(self) -> Array:
        """Whether all pairs are seen: true only where they are."""
        begun, unended = self.last_begins <= self.lowest, self.highest < self.ends
        return begun & unended | self.all_wrap & (begun | unended)


def whole_blocks(x: Array, block: int, **options) -> Array:
    """`[..., T] -> [..., m, block]`, padded as `jnp.pad` does with `options`."""
    x = pad(x, block, x.ndim - 1, **options)
    return x.reshape(*x.shape[:-1], x.shape[-1] // block, block)


def spread(x: Array, rows: int, heads: int, axis: int = 0) -> Array:
    """`[b,h,...] -> [rows,heads,...]`: row b of one stands for all, head h for those it serves."""
    for i, size in ((axis, rows), (axis + 1, heads)):
        have = x.shape[i]
        if have == 1:
            x = jnp.broadcast_to(x, (*x.shape[:i], size, *x.shape[i + 1 :]))
        elif have != size:
            x = jnp.repeat(x, size // have, axis=i)
    return x
