"""Laws of the coordinates of inputs."""

from typing import Literal

import jax

from lcattn.typing import Array, PRNGKeyArray

Law = Literal["uniform", "normal", "exponential", "laplace"]

SECOND_MOMENT: dict[Law, float] = {
    "uniform": 1 / 12, "normal": 1.0, "exponential": 2.0, "laplace": 2.0,
}  # fmt: skip
FOURTH_MOMENT: dict[Law, float] = {
    "uniform": 1 / 80, "normal": 3.0, "exponential": 24.0, "laplace": 24.0,
}  # fmt: skip


def draw(law: Law, key: PRNGKeyArray, shape: tuple[int, ...]) -> Array:
    """Independent float32 numbers: uniform on (-0.5, 0.5), or the standard law of that name."""
    match law:
        case "uniform":
            return jax.random.uniform(key, shape, minval=-0.5, maxval=0.5)
        case "normal":
            return jax.random.normal(key, shape)
        case "exponential":
            return jax.random.exponential(key, shape)
        case "laplace":
            return jax.random.laplace(key, shape)
