"""How packed documents share one recurrent state.

Ids never decrease along a row, so the state belongs to the largest id seen so far; padding
(negative ids) neither writes nor reads. Masks say which tokens of a chunk read the incoming state,
which write the outgoing one, and whether the incoming one survives the chunk.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax

from lcattn.typing import Array, Bool, Int


class ChunkMasks(NamedTuple):
    """Masks of all chunks, leading axis: chunk. None stands for all true.

    Attributes:
      pair: whether two tokens of a chunk belong to one document.
      read: whether a token sees the incoming state.
      write: whether a token belongs to the outgoing state.
      keep: whether the incoming state is part of the outgoing one.
    """

    pair: Bool[Array, "n B C C"] | None = None
    read: Bool[Array, "n B C"] | None = None
    write: Bool[Array, "n B C"] | None = None
    keep: Bool[Array, "n B"] | None = None


def owners(ids: Int[Array, "n B C"]) -> tuple[Int[Array, "n B"], Int[Array, "n B"]]:
    """The document that owns the state before and after each chunk.

    Before the first chunk it is the row's first document, so that an initial state continues it.
    """
    newest = lax.cummax(jnp.max(ids, axis=-1), axis=0)
    first = jnp.min(jnp.where(ids < 0, jnp.iinfo(ids.dtype).max, ids), axis=(0, 2))
    first = jnp.where(newest[-1] < 0, -1, first)
    after = jnp.maximum(newest, first[None])
    before = jnp.concatenate([first[None], after[:-1]], axis=0)
    return before, after


def chunk_masks(ids: Int[Array, "n B C"]) -> ChunkMasks:
    """The masks of every chunk of every row."""
    before, after = owners(ids)
    real = ids >= 0
    return ChunkMasks(
        pair=(ids[..., :, None] == ids[..., None, :]) & real[..., None, :],
        read=(ids == before[..., None]) & real,
        write=(ids == after[..., None]) & real,
        keep=before == after,
    )


def document_bounds(ids: Int[Array, "B T"]) -> tuple[Int[Array, "B T"], Int[Array, "B T"]]:
    """The first position of each token's document, and the one after its last.

    Padding counts as part of the document before it.
    """
    T = ids.shape[1]
    index = jnp.arange(T, dtype=jnp.int32)
    owner = lax.cummax(ids, axis=1)
    is_new = jnp.pad(owner[:, 1:] != owner[:, :-1], ((0, 0), (1, 0)))
    first = lax.cummax(jnp.where(is_new, index, 0), axis=1)
    is_last = jnp.pad(is_new[:, 1:], ((0, 0), (0, 1)), constant_values=True)
    end = lax.cummin(jnp.where(is_last, index + 1, T), axis=1, reverse=True)
    return first, end


class DensePositions(NamedTuple):
    """Positions in a row without its padding.

    Attributes:
      token: of each token; -1 for padding.
      first: of the first token of its document.
      end: the one after its document's last.
    """

    token: Int[Array, "b T"]
    first: Int[Array, "b T"]
    end: Int[Array, "b T"]


def dense_positions(ids: Int[Array, "B T"]) -> DensePositions:
    """Where each token, and its document, would be if the padding were taken out."""
    is_real = ids >= 0
    before = jnp.cumsum(is_real, axis=1, dtype=jnp.int32)  # tokens up to each index
    before = jnp.pad(before, ((0, 0), (1, 0)))
    first, end = (jnp.take_along_axis(before, x, axis=1) for x in document_bounds(ids))
    return DensePositions(jnp.where(is_real, before[:, :-1], -1), first, end)
