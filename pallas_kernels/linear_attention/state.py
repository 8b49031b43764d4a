"""The recurrent state inside a kernel: float32 in registers, a bfloat16 copy for the matrix unit.

A state is cut into tiles of 64 features by 64 values. Products sum into the float32 tiles; reading
it (`phi(q) S`) needs it as a right operand, which lives in shared memory, in bfloat16. The copy is
renewed once a chunk, and so is one of the normaliser: its sums lie along rows of the register
tiles, and come back from shared memory along columns.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.linear_attention.documents import Chunk
from pallas_kernels.linear_attention.features import Side
from pallas_kernels.products import Products
from pallas_kernels.tiles import (
    ALONG_COLUMNS,
    ALONG_ROWS,
    TILE,
    WGMMA,
    unknown_zero,
)


class State(NamedTuple):
    """Sums over the tokens so far.

    Attributes:
      tiles: `phi(x)ᵀ y`, one `[64 features, 64 values]` a slice.
      totals: `phi(x)` summed, one `[64]` a slice; empty where outputs are not normalised.
    """

    tiles: tuple[jax.Array, ...]
    totals: tuple[jax.Array, ...]


def zero_state(num_slices: int, normalize: bool) -> State:
    """The state before the first token."""
    tile = plgpu.layout_cast(jnp.zeros((TILE, TILE), jnp.float32), WGMMA)
    total = plgpu.layout_cast(jnp.zeros((TILE,), jnp.float32), ALONG_ROWS)
    return State((tile,) * num_slices, (total,) * num_slices if normalize else ())


def load_state(tiles, totals, num_slices: int) -> State:
    """The state from global memory: `[D, 64]` and `[D]`, or None."""

    def load(ref, i, layout):
        return plgpu.load(ref.at[pl.ds(i * TILE, TILE)], layout=layout, optimized=False)

    return State(
        tuple(load(tiles, i, WGMMA) for i in range(num_slices)),
        () if totals is None else tuple(load(totals, i, ALONG_ROWS) for i in range(num_slices)),
    )


def store_state(state: State, tiles, totals, first: int | jax.Array = 0) -> None:
    """The state to global memory, its slices from `first` on."""
    for i, tile in enumerate(state.tiles):
        tiles[pl.ds((first + i) * TILE, TILE)] = tile
    for i, total in enumerate(state.totals):
        totals[pl.ds((first + i) * TILE, TILE)] = total


class Copy(NamedTuple):
    """The state in shared memory, for reading.

    Attributes:
      tiles: `[64 features, 64 values]` in bfloat16, one a slice.
      totals: `[64]` in float32, one a slice, or none.
    """

    tiles: tuple[Any, ...]
    totals: tuple[Any, ...]

    def renew(self, state: State) -> None:
        """Writes the state and makes it visible to the matrix unit."""
        for i, tile in enumerate(state.tiles):
            self.tile(i)[...] = tile.astype(jnp.bfloat16)
        for ref, total in zip(self.totals, state.totals, strict=True):
            ref[...] = total
        plgpu.commit_smem()

    def tile(self, index: int):
        """A slice of the sums, found anew."""
        return self.tiles[index].at[pl.ds(unknown_zero() * TILE, TILE)]

    def totals_of(self, index: int) -> jax.Array:
        """The totals of a slice, for a tile with the features along its columns."""
        return plgpu.load(self.totals[index], layout=ALONG_COLUMNS)


def absorb(
    state: State,
    side: Side,
    chunk: Chunk,
    y,
    w,
    products: Products,
    weights: jax.Array | None = None,
    constant: jax.Array | None = None,
) -> State:
    """Adds a chunk: `S += phi(y)ᵀ w`, `z += phi(y)` times weights.

    While one slice is being added, the matrix unit makes the features of the next.

    Args:
      state: S and z.
      side: phi.
      chunk: the chunk.
      y: tokens that write; those that do not belong to the new state are lost.
      w: what they write.
      products: the matrix unit.
      weights: of tokens, along columns, in z; None for ones.
      constant: the constant feature of tokens, along columns; None for ones.
    """
    chunk.silence(y)
    state, constant = chunk.keep(state), chunk.weights(constant)
    tiles, totals = list(state.tiles), list(state.totals)
    product = products.maybe(side.column_product(0, y))
    for i in range(len(tiles)):
        columns = side.columns(i, y, product, constant)
        if totals:
            totals[i] += columns.summed(weights)
        following = side.column_product(i + 1, y) if i + 1 < len(tiles) else None
        tiles[i], product = products.accumulate_beside(tiles[i], columns.operand, w, following)
    return State(tuple(tiles), tuple(totals))
