r"""The best that one layer of linear self-attention can do, in closed form.

Such a layer predicts :math:`\hat y = x_q^\top M b` with :math:`b = \sum_i x_i y_i`; the other
blocks of its weights are zero at the optimum. For normal inputs of covariance Σ, normal weights of
covariance :math:`\Sigma_w` and noise of variance σ²

.. math::
    E\,b b^\top = n \left[(n+1)\,\Sigma\Sigma_w\Sigma
                  + (\mathrm{tr}(\Sigma\Sigma_w) + \sigma^2)\,\Sigma\right],
    \qquad E\,b w^\top = n\, \Sigma \Sigma_w

and so :math:`M^* = \Sigma_w[(n+1)\Sigma\Sigma_w + (\mathrm{tr}(\Sigma\Sigma_w)+\sigma^2) I]^{-1}`.
With Σ = Σ_w = I that is one step of gradient descent, with :math:`\Sigma_w = \Sigma^{-1}` one of
preconditioned gradient descent (Mahankali et al. 2023, arXiv 2307.03576, theorems 1 and 2). Their
theorem 3 (a nonlinear target invariant to rotations, normal inputs) is gradient descent at the rate
that fits best: `lcattn.probes.regression.best_rate`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from lcattn.tasks.regression import (
    FOURTH_MOMENT,
    SECOND_MOMENT,
    LinearRegressionConfig,
    RegressionTask,
)
from lcattn.typing import Array, Float, PRNGKeyArray


@dataclasses.dataclass(frozen=True)
class Optimum:
    """The best matrix, and the squared error that it leaves.

    Attributes:
      matrix: `M* [d,d]`.
      risk: `E (ŷ - wᵀx_q)²`.
    """

    matrix: np.ndarray
    risk: float


def optimum(task: LinearRegressionConfig) -> Optimum:
    """The optimum of one layer on a task of normal inputs, or of independent coordinates.

    Raises:
      ValueError: for corrupted labels, and for inputs neither normal nor independent and centred.
    """
    if task.num_corrupted:
        raise task.error("num_corrupted", "0: there is no closed form otherwise")
    if task.law == "normal":
        sigma, teacher = _covariances(task)
        shared = (task.num_examples + 1) * sigma @ teacher
        rest = np.trace(sigma @ teacher) + task.label_noise**2
        matrix = teacher @ np.linalg.inv(shared + rest * np.eye(task.dim))
        return Optimum(matrix, risk(matrix, task))
    if task.law == "exponential":
        raise task.error("law", "one of mean 0")
    if task.covariance is not None or task.teacher_covariance is not None:
        raise task.error("law", "normal, where a covariance is given")
    return _independent(task)


def risk(matrix: np.ndarray, task: LinearRegressionConfig) -> float:
    """`E (x_qᵀ M b - wᵀx_q)²` of any matrix, for normal inputs."""
    sigma, teacher = _covariances(task)
    n, product = task.num_examples, sigma @ teacher
    noise = np.trace(product) + task.label_noise**2
    squares = n * ((n + 1) * product @ sigma + noise * sigma)
    crossed = matrix @ (n * product)
    error = matrix @ squares @ matrix.T - crossed - crossed.T + teacher
    return float(np.trace(sigma @ error))


def _covariances(task: LinearRegressionConfig) -> tuple[np.ndarray, np.ndarray]:
    def covariance(rows: Any, scale: float) -> np.ndarray:
        return scale**2 * (np.eye(task.dim) if rows is None else np.asarray(rows))

    return (
        covariance(task.covariance, task.scale),
        covariance(task.teacher_covariance, task.teacher_scale),
    )


def _independent(task: LinearRegressionConfig) -> Optimum:
    """Independent coordinates with second moment s and fourth moment m, and weights N(0, τ² I)."""
    s = task.scale**2 * SECOND_MOMENT[task.law]
    m = task.scale**4 * FOURTH_MOMENT[task.law]
    n, d = task.num_examples, task.dim
    noise = task.label_noise**2 / task.teacher_scale**2
    value = s / (m + (n + d - 2) * s**2 + noise * s)
    left = task.teacher_scale**2 * d * s * (1 - n * s * value)
    return Optimum(value * np.eye(d), left)


def recover_matrix(
    predict: Callable[[Float[Array, "B T E"]], Float[Array, "B"]],
    task: RegressionTask,
    key: PRNGKeyArray,
    count: int = 10_000,
) -> Float[Array, "d d"]:
    """The matrix M whose `x_qᵀ M b` comes closest to what a predictor says, by least squares."""
    batch = task.sample(key, count)
    b = jnp.einsum("bnd,bn->bd", batch.x, batch.y)
    pairs = jnp.einsum("bi,bj->bij", batch.query, b).reshape(count, -1)
    said = predict(batch.tokens())
    # The normal equations: d² unknowns and many rows.
    flat = jnp.linalg.solve(pairs.T @ pairs, pairs.T @ said)
    return flat.reshape(task.dim, task.dim)


def matrix_cosine(a: Any, b: Any) -> float:
    """The cosine of two matrices as vectors: 1 where they differ by a factor alone."""
    a, b = np.asarray(a, np.float64).ravel(), np.asarray(b, np.float64).ravel()
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))
