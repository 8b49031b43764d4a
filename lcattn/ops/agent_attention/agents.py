"""Agents pooled from queries, as published for images."""

import jax.numpy as jnp
import numpy as np

from lcattn.errors import argument_error
from lcattn.ops import checks
from lcattn.typing import Array, Float


def pooled_agents(
    q: Float[Array, "B T N F"], shape: tuple[int, ...], *, grid: tuple[int, ...] | None = None
) -> Float[Array, "B n N F"]:
    """Agents for the non-causal form: adaptive averages of the queries, over a line or a grid.

    Not for the causal form: they know every query, so that a causal model with such agents reads
    the future through them.

    Args:
      q: queries `[B,T,N,F]`, row by row where they lie on a grid.
      shape: number of agents along each axis of the grid, such as `(7, 7)` for n = 49.
      grid: sizes of the grid, of any proportions (the published code needs a square). Default: one
        axis of T tokens.

    Raises:
      ValueError: for a grid of another number of tokens, or more agents than tokens along an axis.
    """
    T = q.shape[1]
    grid = (T,) if grid is None else grid
    if int(np.prod(grid)) != T:
        raise argument_error("grid", f"sizes with product T={T}", grid)
    if len(shape) != len(grid):
        raise argument_error("shape", f"as many axes as grid {grid}", shape)
    for agents, size in zip(shape, grid, strict=True):
        checks.check_size("shape", agents)
        if agents > size:
            raise argument_error("shape", f"at most as many agents as tokens {grid}", shape)
    dtype = checks.accumulation_dtype(q.dtype)
    weights = np.ones((1, 1))
    for agents, size in zip(shape, grid, strict=True):
        weights = np.kron(weights, _bins(agents, size))
    pooled = jnp.einsum("nt,bthf->bnhf", jnp.asarray(weights, dtype), q.astype(dtype))
    return pooled.astype(q.dtype)


def _bins(count: int, size: int) -> np.ndarray:
    """Averages `[count,size]`: bin i covers floor(i·size/count) to ceil((i+1)·size/count)."""
    i, t = np.arange(count)[:, None], np.arange(size)
    inside = (t >= i * size // count) & (t < -(-(i + 1) * size // count))
    return inside / inside.sum(axis=1, keepdims=True)
