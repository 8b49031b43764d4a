"""Position encodings: rotary angles, ALiBi slopes, and positions of packed tokens."""

import jax.numpy as jnp
import numpy as np

from lcattn.errors import argument_error
from lcattn.ops import checks
from lcattn.ops.segments import document_bounds
from lcattn.typing import Array, Float, Positions, SegmentIds


def rotary(
    x: Float[Array, "B T N H"],
    positions: Positions,
    *,
    base: float = 10_000.0,
    size: int | None = None,
) -> Float[Array, "B T N H"]:
    r"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864), half-split convention.

    Channels (i, i + size/2) of the token at position p are turned by the angle p·base^(-2i/size),
    so that inner products of queries and keys depend on the difference of their positions only.
    Checkpoints of the interleaved convention (GPT-J) need the rows of their projections permuted.

    Angles, sines and the rotation are float32 whatever the dtype of `x`: in bfloat16 positions
    past 256 are not even distinct.

    Args:
      x: queries or keys `[B,T,N,H]`.
      positions: `[B,T]` whole numbers.
      base: of the geometric series of frequencies.
      size: even number of leading channels to rotate; the rest pass unchanged. Default: H.

    Raises:
      ValueError: for an odd or too large `size`, or positions of another shape.
    """
    size = x.shape[-1] if size is None else size
    if size % 2 or not 0 < size <= x.shape[-1]:
        raise argument_error("size", f"an even number from 2 to H={x.shape[-1]}", size)
    checks.check_shape("positions", positions, x.shape[:2], "[B,T]")
    dtype = checks.accumulation_dtype(x.dtype)
    frequencies = jnp.asarray(base ** (-np.arange(0, size, 2) / size), dtype)
    angles = positions[..., None, None].astype(dtype) * frequencies
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    first, second, rest = jnp.split(x.astype(dtype), [size // 2, size], axis=-1)
    turned = [first * cos - second * sin, second * cos + first * sin, rest]
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)


def alibi_slopes(num_heads: int) -> Float[Array, "N"]:
    """The published slopes of `num_heads` heads (Press et al. 2021, arXiv 2108.12409), float32.

    2^(-8h/N) for N a power of two; otherwise those of the power of two below, then every second
    one of the power of two above.
    """
    checks.check_size("num_heads", num_heads)
    below = 2 ** int(np.log2(num_heads))
    slopes = [2 ** (-8 * h / below) for h in range(1, below + 1)]
    slopes += [2 ** (-4 * h / below) for h in range(1, 2 * below + 1, 2)]
    return jnp.asarray(slopes[:num_heads], jnp.float32)


def segment_positions(segment_ids: SegmentIds) -> Positions:
    """Number of tokens of the same document before each token; 0 for padding."""
    is_real = segment_ids >= 0
    before = jnp.cumsum(is_real, axis=1, dtype=jnp.int32) - is_real
    first, _ = document_bounds(segment_ids)
    positions = before - jnp.take_along_axis(before, first, axis=1)
    return jnp.where(is_real, positions, 0)
