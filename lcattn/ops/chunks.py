"""What chunked forms share: cutting a sequence into chunks, and products on matrix units.

Arrays are cut into n chunks of C tokens: `[B,T,K,...,F]` becomes `[n,B,K,...,C,F]`, so that the
tokens of a chunk are the rows of a matrix and `lax.scan` runs over the leading axis.
"""

import jax.numpy as jnp

from lcattn.ops.checks import accumulation_dtype
from lcattn.typing import Array


def cut(x: Array, chunk: int) -> Array:
    """`[B,T,K,...,F] -> [n,B,K,...,C,F]`, padded with zeros."""
    n = -(-x.shape[1] // chunk)
    x = jnp.pad(x, ((0, 0), (0, n * chunk - x.shape[1])) + ((0, 0),) * (x.ndim - 2))
    x = x.reshape(x.shape[0], n, chunk, *x.shape[2:])
    return jnp.moveaxis(x, (1, 2), (0, -2))


def paste(x: Array, length: int) -> Array:
    """`[n,B,K,...,C,F] -> [B,T,K,...,F]`: undoes `cut`, without its padding."""
    x = jnp.moveaxis(x, (0, -2), (1, 2))
    return x.reshape(x.shape[0], x.shape[1] * x.shape[2], *x.shape[3:])[:, :length]


def einsum(spec: str, *arrays: Array, like: Array) -> Array:
    """A product summed in float32, of operands in bfloat16 if `like` is, else in float32.

    float16 operands are widened: it cannot hold sums of Taylor features.
    """
    dtype = accumulation_dtype(like.dtype)
    narrow = jnp.bfloat16 if like.dtype == jnp.bfloat16 else dtype
    return jnp.einsum(spec, *(x.astype(narrow) for x in arrays), preferred_element_type=dtype)
