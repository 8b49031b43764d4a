r"""Linear regression in context, :math:`y_i = w^\top x_i + \sigma \varepsilon_i`, a new w a row.

The defaults are those of von Oswald et al. 2022 (arXiv 2212.07677) as their code has them: inputs
uniform on (-0.5, 0.5), where the text says (-1, 1). The losses of the paper are those of the code.
"""

import dataclasses
from typing import override

import jax
import jax.numpy as jnp
import numpy as np

from lcattn.tasks.regression.batch import Regression, RegressionTask
from lcattn.tasks.regression.laws import Law, draw
from lcattn.typing import Array, PRNGKeyArray

Matrix = tuple[tuple[float, ...], ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearRegressionConfig(RegressionTask):
    """Linear functions.

    Attributes:
      law: of the coordinates of inputs: "uniform" on (-0.5, 0.5), "normal", "exponential" or
        "laplace", the standard ones.
      scale: inputs are multiplied by it.
      teacher_scale: w is multiplied by it.
      label_noise: standard deviation of the noise on labels; the target has none.
      num_corrupted: labels in a row, at random places, that are replaced by N(0, 1).
      covariance: rows of Σ, positive definite; its symmetric root multiplies inputs. None: I.
      teacher_covariance: the same for w, which is normal.
    """

    law: Law = "uniform"
    scale: float = 1.0
    teacher_scale: float = 1.0
    label_noise: float = 0.0
    num_corrupted: int = 0
    covariance: Matrix | None = None
    teacher_covariance: Matrix | None = None

    @override
    def validate(self) -> None:
        super().validate()
        self.require_positive("scale", "teacher_scale")
        if self.label_noise < 0:
            raise self.error("label_noise", "a value of at least 0")
        if not 0 <= self.num_corrupted <= self.num_examples:
            raise self.error("num_corrupted", f"0 to num_examples ({self.num_examples})")
        for field in ("covariance", "teacher_covariance"):
            self._check_covariance(field)

    def _check_covariance(self, field: str) -> None:
        rows, shape = getattr(self, field), (self.dim, self.dim)
        if rows is None:
            return
        if len(rows) != self.dim or any(len(row) != self.dim for row in rows):
            raise self.error(field, f"a matrix of shape {shape}")
        matrix = np.asarray(rows)
        if not np.allclose(matrix, matrix.T) or np.linalg.eigvalsh(matrix)[0] <= 0:
            raise self.error(field, "a symmetric, positive definite matrix")

    @override
    def sample(self, key: PRNGKeyArray, count: int) -> Regression:
        """Draws `count` rows."""
        x_key, w_key, noise_key, corrupt_key = jax.random.split(key, 4)
        x = draw(self.law, x_key, (count, self.num_examples + 1, self.dim))
        x = self.scale * x @ _root(self.covariance, self.dim)
        w = jax.random.normal(w_key, (count, self.dim))
        w = self.teacher_scale * w @ _root(self.teacher_covariance, self.dim)
        values = jnp.einsum("bnd,bd->bn", x, w)
        y = values[:, :-1]
        if self.label_noise:
            y += self.label_noise * jax.random.normal(noise_key, y.shape)
        if self.num_corrupted:
            places_key, value_key = jax.random.split(corrupt_key)
            order = jnp.argsort(jax.random.uniform(places_key, y.shape))
            wrong = jax.random.normal(value_key, y.shape)
            y = jnp.where(order < self.num_corrupted, wrong, y)
        return Regression(x[:, :-1], y, x[:, -1], values[:, -1])


def random_covariance(
    dim: int, seed: int = 0, condition: float = 10.0, inverse: bool = False
) -> Matrix:
    """A random positive definite matrix of trace `dim`.

    Args:
      dim: its size.
      seed: of its axes, uniform among rotations.
      condition: largest over smallest eigenvalue; eigenvalues are spread evenly in the logarithm.
      inverse: its inverse instead.
    """
    axes, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(dim, dim)))
    eigenvalues = np.geomspace(1.0, condition, dim)
    eigenvalues *= dim / eigenvalues.sum()
    if inverse:
        eigenvalues = 1 / eigenvalues
    matrix = (axes * eigenvalues) @ axes.T
    return tuple(tuple(row) for row in ((matrix + matrix.T) / 2).tolist())


def _root(covariance: Matrix | None, dim: int) -> Array:
    if covariance is None:
        return jnp.eye(dim)
    eigenvalues, axes = np.linalg.eigh(np.asarray(covariance))
    return jnp.asarray((axes * np.sqrt(eigenvalues)) @ axes.T, jnp.float32)
