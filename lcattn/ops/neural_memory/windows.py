"""Which tokens share a chunk, where chunks begin anew with each document.

A chunk is C consecutive tokens of one document, counted from its first, over calls. Each chunk is
computed in a window of C slots. Documents that start anew all see the same memory, so that a
window may also hold several short ones, each whole; one that continues a document holds that alone.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax

from lcattn.ops.segments import owners
from lcattn.typing import Array, Bool, Int


class Windows(NamedTuple):
    """A layout of T tokens in n windows of C slots, filled from the left.

    Attributes:
      tokens: the token in each slot; T in empty ones.
      slots: the slot of each token; n·C for padding.
      used: whether a slot holds a token.
      first: whether a slot is the first of its window or of a document.
      starts_document: whether a window starts with a new document.
      starts_chunk: whether a window starts with a new chunk.
      position: tokens of the last chunk, if it is not whole, else 0.
    """

    tokens: Int[Array, "B nC"]
    slots: Int[Array, "B T"]
    used: Bool[Array, "n B C"]
    first: Bool[Array, "n B C"]
    starts_document: Bool[Array, "n B"]
    starts_chunk: Bool[Array, "n B"]
    position: Int[Array, "B"]

    def gather(self, x: Array) -> Array:
        """`[B,T,...] -> [B,nC,...]`, zeros in empty slots."""
        return _take(x, self.tokens)

    def scatter(self, x: Array) -> Array:
        """`[B,nC,...] -> [B,T,...]`, zeros at padding."""
        return _take(x, self.slots)

    def split(self) -> tuple["Windows", "Windows"]:
        """The first window, and the others."""
        width, most = self.used.shape[-1], self.tokens.shape[1]

        def take(windows: slice, tokens: Array, slots: Array) -> "Windows":
            return self._replace(
                tokens=tokens, slots=slots, used=self.used[windows], first=self.first[windows],
                starts_document=self.starts_document[windows],
                starts_chunk=self.starts_chunk[windows],
            )  # fmt: skip

        later = jnp.where(self.slots < width, most, self.slots - width)
        return (
            take(slice(1), self.tokens[:, :width], self.slots),
            take(slice(1, None), self.tokens[:, width:], later),
        )


def lay_out(
    segment_ids: Int[Array, "B T"] | None,
    position: Int[Array, "B"] | None,
    shape: tuple[int, ...],
    chunk: int,
) -> Windows:
    """Lays out the tokens of one call.

    Args:
      segment_ids: document of each token, or None for one document.
      position: tokens of a chunk under way in the calls before; the first document continues it.
        None: no calls before.
      shape: B, T and whatever follows.
      chunk: C.
    """
    B, T = shape[:2]
    number = _most_windows(T, chunk, packed=segment_ids is not None, continued=position is not None)
    if position is None:
        position = jnp.zeros((B,), jnp.int32)
    index = jnp.arange(T, dtype=jnp.int32)
    ids = jnp.zeros((B, T), jnp.int32) if segment_ids is None else segment_ids
    before, after = owners(ids.T[:, :, None])

    # From here on, tokens are counted without padding.
    order = jnp.argsort(ids < 0, axis=1, stable=True).astype(jnp.int32)
    count = jnp.sum(ids >= 0, axis=1, dtype=jnp.int32)[:, None]
    is_new = _take((before != after).T, order) & (index < count)
    start = lax.cummax(jnp.where(is_new, index, -position[:, None]), axis=1)
    end = lax.cummin(jnp.where(is_new, index, count), axis=1, reverse=True)
    end = jnp.concatenate([end[:, 1:], count], axis=1)
    offset = (index - start) % chunk

    # Where the window ends that begins at a token. One that begins with a document takes all that
    # are whole, or the first chunk of one that is too long.
    reach = jnp.minimum(index + chunk, count)
    cut_short = jnp.where(reach < count, _take(start, jnp.minimum(reach, T - 1)), 0)
    next_begin = jnp.where(
        is_new,
        jnp.where(cut_short > index, cut_short, reach),
        jnp.minimum(jnp.minimum(index + chunk - offset, end), count),
    )
    next_begin = jnp.concatenate([next_begin, count], axis=1)

    bounds = _follow(next_begin, number + 1)
    begins, ends = bounds[:, :-1], bounds[:, 1:]

    width = min(chunk, T)
    slot = jnp.arange(width, dtype=jnp.int32)
    counted = begins[..., None] + slot
    used = counted < ends[..., None]
    counted = jnp.where(used, counted, T).reshape(B, number * width)
    tokens = _take(jnp.pad(order, ((0, 0), (0, 1)), constant_values=T), counted)
    slots = jnp.full((B, T + 1), number * width, jnp.int32)
    slots = slots.at[jnp.arange(B)[:, None], tokens].set(
        jnp.arange(number * width, dtype=jnp.int32)
    )
    opens = _take(is_new, counted).reshape(used.shape)
    return Windows(
        tokens=tokens,
        slots=slots[:, :T],
        used=used.swapaxes(0, 1),
        first=(opens | (slot == 0)).swapaxes(0, 1),
        starts_document=opens[..., 0].T,
        starts_chunk=((_take(offset, begins) == 0) & used[..., 0]).T,
        position=_after(position, offset, count, chunk),
    )


def _follow(following: Array, count: int) -> Array:
    """0, what follows it, and so on, `count` of them.

    By doubling: each step of a loop would be two kernels of a GPU, of a microsecond each.
    """
    path = jnp.zeros_like(following[:, :1])
    while path.shape[1] < count:
        path = jnp.concatenate([path, _take(following, path)], axis=1)
        following = _take(following, following)
    return path[:, :count]


def _most_windows(length: int, chunk: int, *, packed: bool, continued: bool) -> int:
    """Windows that always suffice.

    Without documents, the first finishes a chunk and the rest are whole. With them, a window may be
    short because the rest of a document is, or because the next document did not fit; but any three
    after the first hold more than C tokens.
    """
    if not packed:
        return 1 + (length - 1 + (chunk - 1) * continued) // chunk
    return min(length, 3 + 3 * (length // (chunk + 1)))


def _after(position: Array, offset: Array, count: Array, chunk: int) -> Array:
    last = _take(offset, jnp.maximum(count - 1, 0))
    return jnp.where(count > 0, (last + 1) % chunk, position[:, None])[:, 0]


def _take(x: Array, index: Array) -> Array:
    """`x[b, index[b, i]]`, zeros past the end."""
    index = index.reshape(*index.shape, *(1,) * (x.ndim - 2))
    return jnp.take_along_axis(x, index, axis=1, mode="fill", fill_value=0)
