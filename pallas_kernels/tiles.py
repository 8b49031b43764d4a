"""Register tiles of 64 rows: layouts, masks and broadcasts."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

TILE = 64
"""The rows of one wgmma: tokens a chunk, features a slice and values a block."""

WGMMA = plgpu.Layout.WGMMA
ALONG_ROWS = WGMMA.reduce(1)  # one number a row of a tile
ALONG_COLUMNS = WGMMA.reduce(0)  # one number a column


def zeros(columns: int, rows: int = TILE) -> jax.Array:
    """A float32 tile of zeros."""
    return plgpu.layout_cast(jnp.zeros((rows, columns), jnp.float32), WGMMA)


def unknown_zero() -> jax.Array:
    """0, but the compiler cannot know.

    Offsets of shared memory that count from it are found where they are used. All others LLVM finds
    before a loop, and where two dozen operands of products do not change with the chunk, their
    descriptors take two hundred registers: that spilled 384 bytes a thread, and this spills 4.
    """
    return lax.optimization_barrier(jnp.int32(0))


def iota(axis: int, columns: int = TILE) -> jax.Array:
    """The row (axis 0) or column (axis 1) of each element."""
    return plgpu.broadcasted_iota(jnp.int32, (TILE, columns), axis, layout=WGMMA)


def over_columns(vector: jax.Array, columns: int = TILE) -> jax.Array:
    """`[64]`, one number a row, over all columns."""
    return lax.broadcast_in_dim(vector, (TILE, columns), [0])


def over_rows(vector: jax.Array) -> jax.Array:
    """One number a column, over all rows."""
    return lax.broadcast_in_dim(vector, (TILE, vector.shape[0]), [1])
