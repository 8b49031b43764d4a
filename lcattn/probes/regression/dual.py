r"""Attention and gradient descent as two forms of one thing, and softmax regression.

Dai et al. 2022 (arXiv 2212.10559): unnormalised linear attention over demonstrations X' and a
query's own prefix X is :math:`(W_{ZSL} + \Delta W_{ICL})\, q`, a linear map that the demonstrations
change as gradient descent would, with values for errors and keys for inputs. Li et al. 2023 (arXiv
2304.13276) bound how far one layer of softmax attention, or one gradient step, moves the residual
of :math:`\mathrm{softmax}(Ax) - b`.
"""

from typing import Any

import jax
import jax.numpy as jnp

from lcattn import ops
from lcattn.typing import Array, Float


def linear_map(keys: Float[Array, "S K"], values: Float[Array, "S V"]) -> Float[Array, "V K"]:
    r""":math:`\sum_i v_i k_i^\top`: of a prefix :math:`W_{ZSL}`, of demonstrations ΔW."""
    return jnp.einsum("sv,sk->vk", values, keys)


def momentum_values(v: Float[Array, "B T N H"], decay: float) -> Float[Array, "B T N H"]:
    r"""Exponentially weighted sums of what came before, :math:`\sum_{i<t} \eta^{t-i} v_i`."""

    def step(sums: Array, value: Array) -> tuple[Array, Array]:
        return decay * (sums + value), sums

    return jax.lax.scan(step, jnp.zeros_like(v[:, 0]), v.swapaxes(0, 1))[1].swapaxes(0, 1)


def momentum_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T N H"],
    v: Float[Array, "B T N H"],
    *,
    decay: float,
    causal: bool = True,
) -> Float[Array, "B T N H"]:
    """Softmax attention plus the momentum of its values; with `decay` 0, softmax attention.

    Args:
      q, k, v: as for `lcattn.ops.softmax_attention`, with as many heads of keys as of queries.
      decay: η, from 0 to below 1.
      causal: query t sees keys 0..t; the momentum is always that of the past.
    """
    attended: Any = ops.softmax_attention(q, k, v, causal=causal)
    return attended + momentum_values(v, decay)


def softmax_residual(
    a: Float[Array, "n d"], x: Float[Array, "d"], b: Float[Array, "n"]
) -> Float[Array, "n"]:
    """`softmax(Ax) - b`, of which softmax regression minimises the norm over x."""
    return jax.nn.softmax(a @ x) - b


def residual_shift_bound(
    a: Float[Array, "n d"],
    x: Float[Array, "d"],
    a_shift: Float[Array, "n d"],
    x_shift: Float[Array, "d"],
) -> Float[Array, ""]:
    """The most that a shift of the data and one of the weights move the residual's norm.

    Softmax is Lipschitz with constant ½, so nothing here grows with the size of A x, unlike the
    published factor `n^1.5 exp(10 R²)`: `½ |A_shift x + (A + A_shift) x_shift|`.
    """
    return jnp.linalg.norm(a_shift @ x + (a + a_shift) @ x_shift) / 2
