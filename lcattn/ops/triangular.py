"""Lower-triangular matrices over the tokens of a chunk, built from small blocks to large ones.

Cut a chunk of C = 2^m tokens into halves, those into halves, and so on. Every pair of tokens
s < t is parted exactly once, with s in a left half and t in the right half beside it. So a
lower-triangular matrix is its diagonal, and below it, for h = 1, 2, 4 ... C/2, the C/2h squares of
h rows (a right half) by h columns (the left half beside it):

    0                h = 1: squares 1
    1 0              h = 2: squares 2
    2 2 0
    2 2 1 0

Blocks of one size are stacked: `[..., C/h, h, h]`.
"""

import jax
import jax.numpy as jnp

from lcattn.typing import Array


def halves(blocks: Array) -> tuple[Array, Array]:
    """The left and the right ones of stacked blocks: `[..., 2m, h, F]` -> two `[..., m, h, F]`."""
    return blocks[..., 0::2, :, :], blocks[..., 1::2, :, :]


def merge(blocks: Array, squares: Array, above: float = 0.0) -> Array:
    """Blocks `[..., 2m, h, h]` and the squares `[..., m, h, h]` below them: `[..., m, 2h, 2h]`."""
    left, right = halves(blocks)
    top = jnp.concatenate([left, jnp.full_like(squares, above)], axis=-1)
    return jnp.concatenate([top, jnp.concatenate([squares, right], axis=-1)], axis=-2)


def split(blocks: Array) -> tuple[Array, Array]:
    """Undoes `merge`: blocks `[..., 2m, h, h]` and squares `[..., m, h, h]`."""
    m, h = blocks.shape[-3], blocks.shape[-1] // 2
    parts = jnp.stack([blocks[..., :h, :h], blocks[..., h:, h:]], axis=-3)
    return parts.reshape(*blocks.shape[:-3], 2 * m, h, h), blocks[..., h:, :h]


@jax.custom_jvp
def inverse(lower: Array) -> Array:
    r"""`(I + L)^-1` with L what `[..., C, C]` holds below its diagonal; C a power of two.

    By blocks of doubling size, matrix products only, as accurate as forward substitution:

        [ A    ]^-1     [    A^-1           ]
        [ L  B ]      = [ -B^-1 L A^-1  B^-1 ]
    """
    blocks, levels = lower[..., None, :, :], []
    while blocks.shape[-1] > 1:
        blocks, squares = split(blocks)
        levels.append(squares)
    blocks = jnp.ones_like(blocks)
    for squares in reversed(levels):
        left, right = halves(blocks)
        blocks = merge(blocks, -_product(right, squares, left))
    return blocks[..., 0, :, :]


@inverse.defjvp
def _inverse_jvp(primals, tangents):
    # d(X) = -X dL X: two products in place of the whole ladder.
    (lower,), (change,) = primals, tangents
    x = inverse(lower)
    return x, -_product(x, jnp.tril(change, -1), x)


def _product(a: Array, b: Array, c: Array) -> Array:
    # Rounding in an inverse spreads, so that its few products are full float32 on any device.
    return jnp.einsum("...ij,...jk,...kl->...il", a, b, c, precision="highest")
