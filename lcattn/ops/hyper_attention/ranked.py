"""Members of groups in the order of their ranks, from one sort that serves all groups.

A group is a stretch of tokens, but for those of no group; the groups of one level are apart. So a
member's place among those of its rank is the number of earlier tokens of that rank, less those that
come before the group begins::

    group      . . a a a a b b b         in the order of ranks
    rank       1 0 1 0 1 0 1 1 0         a: 0 0 1 1    b: 0 1 1
    nth        0 0 1 1 2 2 3 4 3         place = nth + origin[group, rank]

with `origin` the members of lower ranks, less the tokens of that rank before the group.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax

from lcattn.typing import Array, Int

# Tokens that are counted apart at most. Where one counter serves many of those that a GPU works on
# at a time, they wait for each other.
_STRETCH = 1024


class Ranked(NamedTuple):
    """The order of all members, of P groups and V ranks.

    Attributes:
      counts: members of each rank.
      below: members of lower ranks.
      origin: what is added to `nth` for a place in the group.
      nth: how many earlier tokens, of any group, have the rank of each token.
    """

    counts: Int[Array, "P V"]
    below: Int[Array, "P V"]
    origin: Int[Array, "P V"]
    nth: Int[Array, "T"]


def passed(edges: Int[Array, "edges"], size: int) -> Int[Array, "size"]:
    """How many edges are at or before each place.

    One kernel or two; a search for each place is a loop of many.
    """
    return jnp.cumsum(jnp.zeros(size, jnp.int32).at[edges].add(1, mode="drop"))


def by_rank(
    groups: Int[Array, "L T"], ranks: Int[Array, "T"], num_groups: int, num_ranks: int
) -> Ranked:
    """The order of members; `groups` has `num_groups` for those of none."""
    token = jnp.arange(len(ranks), dtype=jnp.int32)
    is_member = jnp.any(groups < num_groups, axis=0)
    ranks = jnp.where(is_member, ranks, num_ranks)
    end = jnp.zeros(num_groups, jnp.int32).at[groups].max(token + 1, mode="drop")
    begin = jnp.full(num_groups, len(token), jnp.int32).at[groups].min(token, mode="drop")
    begin = jnp.minimum(begin, end)  # of groups that have no members
    # Members of each rank between neighbouring edges, then before each edge.
    edges = jnp.concatenate([begin, end, jnp.arange(0, len(token), _STRETCH, jnp.int32)])
    stretch = passed(edges, len(token) + 1)
    counts = jnp.zeros((len(edges) + 1, num_ranks), jnp.int32)
    counts = jnp.cumsum(counts.at[stretch[:-1], ranks].add(1, mode="drop"), axis=0)
    before, until = (
        jnp.where(edge[:, None] > 0, counts[stretch[edge - 1]], 0) for edge in (begin, end)
    )

    # A radix sort passes over every bit of its keys: few of them take a GPU a third of the time.
    in_order, order = lax.sort((_narrowed(ranks, num_ranks), token), num_keys=1)
    first = jnp.pad(jnp.cumsum(counts[-1]), (1, 0))
    nth = jnp.zeros_like(token).at[order].set(token - first[in_order], unique_indices=True)
    counts = until - before
    below = jnp.cumsum(counts, axis=1) - counts
    return Ranked(counts, below, below - before, nth)


def _narrowed(ranks: Int[Array, "T"], highest: int) -> Array:
    return ranks.astype(np.min_scalar_type(highest))
