"""Register tiles `[64, 64]`: layouts, masks and broadcasts."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

TILE = 64
"""Tokens a chunk, features a slice and values a block: the rows of one wgmma."""

WGMMA = plgpu.Layout.WGMMA
ALONG_ROWS = WGMMA.reduce(1)  # one number a row of a tile
ALONG_COLUMNS = WGMMA.reduce(0)  # one number a column


def iota(axis: int) -> jax.Array:
    """The row (axis 0) or column (axis 1) of each element."""
    return plgpu.broadcasted_iota(jnp.int32, (TILE, TILE), axis, layout=WGMMA)


def over_columns(vector: jax.Array) -> jax.Array:
    """`[64]`, one number a row, over all columns."""
    return lax.broadcast_in_dim(vector, (TILE, TILE), [0])


def over_rows(vector: jax.Array) -> jax.Array:
    """`[64]`, one number a column, over all rows."""
    return lax.broadcast_in_dim(vector, (TILE, TILE), [1])
