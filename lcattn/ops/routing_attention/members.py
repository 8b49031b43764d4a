"""Which tokens attend to which: lists of tokens, and who sees whom within a list."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax

from lcattn.ops.segments import document_bounds
from lcattn.ops.visibility import HIDDEN, Visibility
from lcattn.typing import Array, Float, Int, SegmentIds

_LAST = jnp.iinfo(jnp.int32).max  # sorts padding behind all documents


class Members(NamedTuple):
    """Lists of M tokens, L for each row and head.

    Attributes:
      index: place of each member in the row, or T where a list has no more.
      seen: who sees whom, arrays `[B,N,L,M]`. (The axes of `Visibility` once they are joined.)
    """

    index: Int[Array, "B N L M"]
    seen: Visibility


def top_members(
    affinity: Float[Array, "B N C T"], segment_ids: SegmentIds | None, *, size: int, causal: bool
) -> Members:
    """The `size` tokens of each document that are nearest to each centroid, in their order.

    One list a cluster: of min(size, T) tokens, or of T where documents share a row and each sends
    its own. Of equally near tokens the first are taken.
    """
    T = affinity.shape[-1]
    document = _documents(affinity, segment_ids)
    by_rank = jnp.arange(T, dtype=jnp.int32)
    place = jnp.broadcast_to(by_rank, affinity.shape)
    sort_keys = jnp.broadcast_to(document, affinity.shape), -affinity
    _, _, place = lax.sort((*sort_keys, place), num_keys=2)
    # Documents lie at the same ranks for every head and cluster.
    document = jnp.sort(document, axis=-1)
    first, _ = document_bounds(document.reshape(-1, T))
    is_top = (by_rank - first.reshape(document.shape) < size) & (document != _LAST)
    index = jnp.sort(jnp.where(is_top, place, T), axis=-1)
    if segment_ids is None:
        index = index[..., : min(size, T)]
        begin, end = jnp.zeros_like(index), jnp.full_like(index, T)
    else:
        begin, end = (
            jnp.take_along_axis(x[:, None, None], jnp.minimum(index, T - 1), axis=-1)
            for x in document_bounds(segment_ids)
        )
    if causal:
        begin = index
    is_member = index < T
    queries, end = jnp.where(is_member, index, HIDDEN), jnp.where(is_member, end, begin)
    return Members(index, Visibility(queries, begin, end))


def recent_members(
    clusters: Int[Array, "B N T"], segment_ids: SegmentIds | None, *, size: int
) -> Members:
    """The last `size` tokens of the same document and cluster, the token itself included.

    One list of all tokens, cluster after cluster, in which each sees a sliding window.
    """
    T = clusters.shape[-1]
    place = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), clusters.shape)
    document = jnp.broadcast_to(_documents(clusters, segment_ids), clusters.shape)
    document, clusters, index = lax.sort((document, clusters, place), num_keys=2)
    changes = (jnp.diff(document) != 0) | (jnp.diff(clusters) != 0)
    run = jnp.pad(jnp.cumsum(changes, axis=-1, dtype=jnp.int32), ((0, 0), (0, 0), (1, 0)))
    _, end = document_bounds(run.reshape(-1, T))
    is_real = document != _LAST
    end = jnp.where(is_real, jnp.minimum(end.reshape(run.shape), place + size), place)
    seen = Visibility(jnp.where(is_real, place, HIDDEN), place, end)
    index = jnp.where(is_real, index, T)
    return Members(index[:, :, None], Visibility(*(x[:, :, None] for x in seen)))


def _documents(like: Array, segment_ids: SegmentIds | None) -> Int[Array, "b ... T"]:
    """Ids that sort, padding last, with axes of size 1 to match `like`."""
    if segment_ids is None:
        segment_ids = jnp.zeros((1, like.shape[-1]), jnp.int32)
    ids = jnp.where(segment_ids < 0, _LAST, segment_ids.astype(jnp.int32))
    return ids.reshape(ids.shape[0], *(1,) * (like.ndim - 2), ids.shape[1])
