"""The score that distance adds (ALiBi, Press et al. 2021, arXiv 2108.12409)."""

from typing import NamedTuple

import jax.numpy as jnp

from lcattn.typing import Array, Float, Int


class Alibi(NamedTuple):
    """Scores fall by `slopes` for each token between query and key."""

    slopes: Float[Array, "N"]
    query_positions: Int[Array, "T"]
    key_positions: Int[Array, "S"]

    def bias(self) -> Float[Array, "N T S"]:
        """`-slope * |t - s|`, in float32 because bfloat16 cannot count past 256."""
        return -self.slopes[:, None, None] * self.distance()

    def distance(self) -> Float[Array, "T S"]:
        """`|t - s|`."""
        distance = jnp.abs(self.query_positions[:, None] - self.key_positions[None, :])
        return distance.astype(self.slopes.dtype)
