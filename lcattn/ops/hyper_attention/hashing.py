"""Angular locality-sensitive hashing: near vectors get near places in a one-dimensional order."""

import jax.numpy as jnp
from jax import lax

from lcattn.ops import dispatch
from lcattn.ops.checks import accumulation_dtype
from lcattn.typing import Array, Float, Int


def most_projections(min_seq_len: int) -> int:
    """The most hyperplanes: 7 as published, or no more buckets than the smallest group has keys.

    More would be empty, and what is counted for each group and bucket would outgrow the keys.
    """
    return max(7, min_seq_len.bit_length() - 1)


def ranks(x: Float[Array, "T F"], planes: Float[Array, "F r"]) -> Int[Array, "T"]:
    """The rank of each vector's bucket, from 0 to 2^r - 1.

    Bit i of a bucket says on which side of plane i the vector lies. Buckets are ranked along the
    reflected Gray sequence, so that neighbours in rank are separated by one plane.
    """
    x = lax.stop_gradient(x).astype(accumulation_dtype(x.dtype))
    sides = jnp.matmul(x, planes.astype(x.dtype), precision=_precision(x.dtype)) > 0
    bits = jnp.arange(planes.shape[1], dtype=jnp.int32)
    return gray_rank(jnp.sum(sides << bits, axis=-1, dtype=jnp.int32))


def _precision(dtype: jnp.dtype) -> lax.Precision | lax.DotAlgorithmPreset:
    """Of projections: in one product of bfloat16 many vectors would change sides.

    Six of them, of the parts of each number, are as exact as float32. A TPU takes them for its
    highest precision; a Hopper GPU has faster units for them than for float32. XLA refuses them to
    GPUs before Ampere.
    """
    if dtype == jnp.float32 and dispatch.on_hopper():
        return lax.DotAlgorithmPreset.BF16_BF16_F32_X6
    return lax.Precision.HIGHEST


def gray_rank(code: Int[Array, "..."]) -> Int[Array, "..."]:
    """The place of a code in the reflected Gray sequence: the inverse of `t ^ (t >> 1)`.

    The published code applies that map forward. Of the neighbours in its order, 24% differ in more
    than one of seven bits, and some in four.
    """
    for shift in (1, 2, 4, 8, 16):
        code = code ^ (code >> shift)
    return code
