"""Packing: documents of any length into rows of one length, told apart by `segment_ids`.

A document longer than a row is cut: full rows of it stand alone, and the rest is packed. Packing is
best-fit decreasing: pieces are taken longest first, and each goes into the row that it fills best.
No document is cut that would fit, and next to no padding is left (Ding et al., "Fewer Truncations
Improve Language Modeling", 2024, arXiv:2404.10830).

Why not Grain's packing transforms: they read a stream, so neither the number of rows nor row i is
known without reading up to it, and a checkpoint in mid-pass re-packs what it had read. Planned from
the lengths alone, packed text is a random-access source like any other: shuffled, sharded and
resumed by one integer.
"""

import dataclasses
import functools
import hashlib

import numpy as np

from lcattn.errors import argument_error
from lcattn.tasks.batch import Batch
from lcattn.tasks.text import ByteTokenizer, Documents


@dataclasses.dataclass(frozen=True)
class Packing:
    """Where each piece of each document lies; all arrays [pieces] int64, in order of (row, column).

    Attributes:
      document: index of the document.
      start: where in the document the piece begins.
      size: tokens of the piece.
      row: row it was put in.
      column: where in the row it begins.
      num_rows: number of rows.
    """

    document: np.ndarray
    start: np.ndarray
    size: np.ndarray
    row: np.ndarray
    column: np.ndarray
    num_rows: int


def pack(sizes: np.ndarray, length: int) -> Packing:
    """Plans rows of `length` tokens for documents of the given sizes. Empty documents vanish.

    Args:
      sizes: [documents] integers, tokens in each document.
      length: tokens in a row.
    """
    if length < 1:
        raise argument_error("length", "a positive number of tokens", length)
    sizes = np.asarray(sizes, np.int64)
    pieces = -(-sizes // length)
    document = np.repeat(np.arange(len(sizes)), pieces)
    start = (np.arange(len(document)) - np.repeat(np.cumsum(pieces) - pieces, pieces)) * length
    size = np.minimum(length, sizes[document] - start)
    row, column = _best_fit_decreasing(size, length)
    order = np.lexsort((column, row))
    num_rows = int(row.max(initial=-1)) + 1
    return Packing(document[order], start[order], size[order], row[order], column[order], num_rows)


def _best_fit_decreasing(sizes: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    row, column = np.empty_like(sizes), np.zeros_like(sizes)
    rows_with: list[list[int]] = [[] for _ in range(length + 1)]  # indexed by the room left
    rooms = 0  # bit r is set while a row with room r is open: the best fit is one shift away
    num_rows = 0
    for piece in np.argsort(-sizes, kind="stable").tolist():
        size = int(sizes[piece])
        fitting = rooms >> size
        if fitting:
            room = size + (fitting & -fitting).bit_length() - 1
            row[piece] = rows_with[room].pop()
            rooms ^= 0 if rows_with[room] else 1 << room
        else:
            room = length
            row[piece] = num_rows
            num_rows += 1
        column[piece] = length - room
        if room > size:
            rows_with[room - size].append(int(row[piece]))
            rooms |= 1 << (room - size)
    return row, column


class PackedText:
    """Documents packed into rows of next-byte prediction.

    Each byte of each document is a target exactly once. The first is predicted from `bos`; a piece
    that continues a document opens with the byte before it. Padding has segment id -1, weight 0.
    """

    def __init__(self, documents: Documents, length: int):
        self.documents = documents
        self.length = length
        self.packing = pack(np.diff(documents.offsets), length)
        self._first_piece = np.searchsorted(self.packing.row, np.arange(len(self) + 1))

    def __len__(self) -> int:
        return self.packing.num_rows

    @functools.cached_property
    def fingerprint(self) -> str:
        """Equal for data sets of equal rows; part of the state of an iterator over them."""
        return hashlib.sha256(f"{self.length} {self.documents.fingerprint}".encode()).hexdigest()

    def batch(self, indices: np.ndarray) -> Batch:
        """The rows of the given indices.

        Args:
          indices: [B] integers in `[0, len(self))`.

        Returns:
          `tokens`, `targets`, `segment_ids` [B, T] int32, `weights` [B, T] float32, `example_ids`
          [B] int64.
        """
        indices = np.asarray(indices, np.int64)
        if indices.size and not (indices.min() >= 0 and indices.max() < len(self)):
            span = f"{indices.min()}..{indices.max()}"
            raise argument_error("indices", f"row numbers in [0, {len(self)})", span)
        plan, data, offsets = self.packing, self.documents.data, self.documents.offsets

        # The pieces of these rows, one after another, and their bytes, one after another.
        counts = self._first_piece[indices + 1] - self._first_piece[indices]
        rank = _count_within(counts)
        piece = np.repeat(self._first_piece[indices], counts) + rank
        row = np.repeat(np.arange(len(indices)), counts)
        size = plan.size[piece]
        within = _count_within(size)
        source = np.repeat(offsets[plan.document[piece]] + plan.start[piece], size) + within
        place = np.repeat(row * self.length + plan.column[piece], size) + within
        opens_document = np.repeat(plan.start[piece] == 0, size) & (within == 0)

        def filled(values: np.ndarray | np.generic, fill: int, dtype: type) -> np.ndarray:
            flat = np.full(len(indices) * self.length, fill, dtype)
            flat[place] = values
            return flat.reshape(len(indices), self.length)

        bos = np.int32(ByteTokenizer.bos)
        return {
            "tokens": filled(np.where(opens_document, bos, data[source - 1]), int(bos), np.int32),
            "targets": filled(data[source], 0, np.int32),
            "weights": filled(np.float32(1), 0, np.float32),
            "segment_ids": filled(np.repeat(rank, size), -1, np.int32),
            "example_ids": indices,
        }


def _count_within(sizes: np.ndarray) -> np.ndarray:
    """`0 .. size-1` for each size, concatenated."""
    ends = np.cumsum(sizes)
    return np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - sizes, sizes)
