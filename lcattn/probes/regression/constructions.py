r"""Weights of linear self-attention that are gradient descent, to the last digit.

Tokens are :math:`[x_i; y_i]`, x of size d and y of size m (von Oswald et al. 2022, section 3 and
appendix A.10). A layer of `gradient_step` replaces every :math:`y_j` by :math:`y_j - \Delta W x_j`
with the step

.. math::
    \Delta W = -\frac{\eta}{n} \sum_{i \le n} (W_0 x_i - y_i) x_i^\top

of gradient descent on the mean squared error, so that K layers are K steps, whose prediction is
minus the last coordinates of a query that began as :math:`[x; -W_0 x]`.
"""

import jax.numpy as jnp

from lcattn.probes.regression.attention import LSAWeights
from lcattn.typing import Array, Float


def gradient_step(
    dim: int,
    rate: float | Array,
    num_examples: int,
    *,
    initial: Float[Array, "m d"] | None = None,
    curvature: float | Array = 0.0,
    dtype=jnp.float32,
) -> LSAWeights:
    r"""A head that makes one step of gradient descent, or of GD++.

    GD++ also moves the inputs, :math:`x_j \leftarrow (I - \gamma X X^\top) x_j` with
    :math:`X X^\top = \sum_{i \le n} x_i x_i^\top`, which maps an eigenvalue λ of the curvature to
    :math:`\lambda (1 - \gamma \lambda)^2`: large and small ones come closer together, and the
    next step of gradient descent reaches further.

    Args:
      dim: size d of an input.
      rate: η.
      num_examples: n.
      initial: `W_0 [m,d]`. None: zeros, of one output.
      curvature: γ; 0 is plain gradient descent.
      dtype: of the weights.

    Returns:
      One head of the size of a token.
    """
    initial = jnp.zeros((1, dim), dtype) if initial is None else jnp.asarray(initial, dtype)
    outputs = initial.shape[0]
    reads_inputs = jnp.diag(jnp.arange(dim + outputs) < dim).astype(dtype)
    moves_inputs = jnp.where(jnp.asarray(curvature) != 0, 1.0, 0.0).astype(dtype)
    value = jnp.block(
        [
            [moves_inputs * jnp.eye(dim, dtype=dtype), jnp.zeros((dim, outputs), dtype)],
            [initial, -jnp.eye(outputs, dtype=dtype)],
        ]
    )
    scale = jnp.where(jnp.arange(dim + outputs) < dim, -curvature, rate / num_examples)
    return LSAWeights(
        query=reads_inputs[:, None],
        key=reads_inputs[:, None],
        value=value.T[:, None],
        out=jnp.diag(scale.astype(dtype))[None],
    )
