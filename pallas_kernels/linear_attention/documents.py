"""Documents packed in a row, and the one state that they share as a walk passes through them.

Documents never decrease along a row, so the state is that of the newest one: tokens of a chunk read
it if that is their document, and of a chunk only the newest document goes into it.
"""

import dataclasses
from typing import Any, NamedTuple, override

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.tiles import (
    ALONG_COLUMNS,
    ALONG_ROWS,
    TILE,
    WGMMA,
    iota,
    over_columns,
    over_rows,
)

# As many as TMA copies from one place in shared memory to the next at least: 128 bytes.
_OWNERS = 32


class Documents(NamedTuple):
    """Packed documents, in int32.

    Attributes:
      rows, columns: document of each token `[B,T]`, for tiles with the tokens along rows and along
        columns. Padding is -1 in one and -2 in the other, so that it does not even see itself. (The
        layout solver never ends where one vector in shared memory is loaded in both layouts.)
      owners: `[B,chunks,32]`, of which three are used: whose the state is before each chunk, and
        after it, and whether the chunk has tokens of others than the first.
    """

    rows: Any
    columns: Any
    owners: Any


def pack(documents: jax.Array) -> Documents:
    """From the document of each token `[B,T]`: 0 for the first of a row, negative for padding."""
    chunks = documents.reshape(documents.shape[0], -1, TILE)
    # An initial state is that of the first document.
    after = jnp.maximum(lax.cummax(chunks.max(axis=2), axis=1), 0)
    before = jnp.pad(after[:, :-1], ((0, 0), (1, 0)))
    mixed = (chunks != before[:, :, None]).any(axis=2).astype(jnp.int32)
    rows, columns = (jnp.where(documents < 0, padding, documents) for padding in (-1, -2))
    owners = jnp.stack([before, after, mixed], axis=2)
    return Documents(rows, columns, jnp.pad(owners, ((0, 0), (0, 0), (0, _OWNERS - 3))))


@dataclasses.dataclass(frozen=True)
class Chunk:
    """A chunk of a walk, inside a kernel.

    Attributes:
      tokens: its slice of the sequence.
      transposed: whether keys read what later queries wrote.
    """

    tokens: Any
    transposed: bool

    def seen(self) -> jax.Array:
        """Which writer (column) each reader (row) sees."""
        return iota(0) <= iota(1) if self.transposed else iota(0) >= iota(1)

    def read(self, past: jax.Array) -> jax.Array:
        """What tokens read from the state, a row or a number each: 0 where it is not theirs."""
        return past

    def weights(self, weights: jax.Array | None = None) -> jax.Array | None:
        """Weights of tokens that write, along columns, 0 of those that do not; None for ones."""
        return weights

    def silence(self, y) -> None:
        """Makes zeros, in shared memory, of the tokens that do not write."""

    def keep(self, state: Any) -> Any:
        """The state where it goes on, zeros where another document's begins."""
        return state


@dataclasses.dataclass(frozen=True)
class PackedChunk(Chunk):
    """A chunk of packed documents.

    Attributes:
      documents: the chunk's part, in shared memory.
    """

    documents: Documents

    @override
    def seen(self):
        return super().seen() & (
            over_columns(self._along_rows()) == over_rows(self._along_columns())
        )

    @override
    def read(self, past):
        own = self._along_rows()
        if past.ndim == 2:
            own = over_columns(own, past.shape[1])
        return jnp.where(own == self._owner(), past, 0.0)

    @override
    def weights(self, weights=None):
        own = self._along_columns() == self._next_owner()
        return jnp.where(own, 1.0 if weights is None else weights, 0.0)

    @override
    def silence(self, y):

        @pl.when(self.documents.owners[2] > 0)
        def _():
            plgpu.commit_smem()  # all warps have read the tile
            own = over_columns(self._along_rows(), y.shape[1]) == self._next_owner()
            y[...] = jnp.where(own, plgpu.load(y, layout=WGMMA), 0.0).astype(y.dtype)
            plgpu.commit_smem()

    @override
    def keep(self, state):
        new = self._owner() - self._next_owner()
        return jax.tree.map(lambda x: jnp.where(jnp.full(x.shape, new) == 0, x, 0.0), state)

    def _along_rows(self):
        return plgpu.load(self.documents.rows, layout=ALONG_ROWS)

    def _along_columns(self):
        return plgpu.load(self.documents.columns, layout=ALONG_COLUMNS)

    def _owner(self):
        return self.documents.owners[int(self.transposed)]

    def _next_owner(self):
        return self.documents.owners[1 - int(self.transposed)]
