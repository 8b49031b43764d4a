r"""How much of every write is left at every later token: products of gates, no network involved.

The update S_t = eta_t S_{t-1} - theta_t g_t, W_t = a_t W_{t-1} + S_t is linear in the gradients g,
which are all taken at the start of the chunk. Unrolled from there, with
A_ti = a_{i+1}...a_t and P_ij = eta_{j+1}...eta_i (1 on the diagonal, 0 above it):

    S_t = m_t S_0 - sum_{j<=t} P_tj theta_j g_j            m_t = eta_1...eta_t
    W_t = b_t W_0 + f_t S_0 - sum_{j<=t} G_tj g_j          b_t = a_1...a_t
    f = A m,   G = A P diag(theta)

Products are formed as products: in sums of logs a gate of 0 is -inf, with no gradient, and ratios
of running products are 0/0 as soon as they underflow.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax

from lcattn.typing import Array, Bool, Float

BLOCK = 8
"""Tokens whose gates are multiplied one by one, in long chunks."""


class Coefficients(NamedTuple):
    """What each token of a chunk sees, and what the chunk leaves behind.

    Attributes:
      kept: b, share of the incoming weights at each token.
      carried: f, share of the incoming momentum that has entered the weights by then.
      written: G, what each token's weights hold of each gradient.
      momentum: m after the last token, share of the incoming momentum left.
      pending: last row of P diag(theta), what the momentum left holds of each gradient.
    """

    kept: Float[Array, "*M C"]
    carried: Float[Array, "*M C"]
    written: Float[Array, "*M C C"]
    momentum: Float[Array, "*M"]
    pending: Float[Array, "*M C"]


def coefficients(
    learning_rate: Float[Array, "*M C"],
    momentum: Float[Array, "*M C"],
    decay: Float[Array, "*M C"],
    *,
    used: Bool[Array, "*#M C"] | None = None,
    first: Bool[Array, "*#M C"] | None = None,
) -> Coefficients:
    """The coefficients of every chunk.

    Args:
      learning_rate: theta.
      momentum: eta.
      decay: alpha; a = 1 - alpha.
      used: slots that hold a token; the others leave no trace. Gates alone cannot say that, since a
        token of neutral gates still adds the momentum to the weights.
      first: slots that see the incoming state right before themselves, always the first slot. Where
        a later one starts, what was before is forgotten.
    """
    keep = 1 - decay
    if used is not None:
        learning_rate = jnp.where(used, learning_rate, 0)
        momentum, keep = jnp.where(used, momentum, 1), jnp.where(used, keep, 1)
    is_whole = first is None
    if first is None:
        first = jnp.arange(keep.shape[-1]) == 0
    a, p = (_between(jnp.where(first, 0, gate)) for gate in (keep, momentum))
    if is_whole:
        kept, reach = (lax.cumprod(gate, axis=gate.ndim - 1) for gate in (keep, momentum))
    else:
        kept, reach = (
            jnp.einsum("...tj,...j->...t", x, jnp.where(first, gate, 0))
            for x, gate in ((a, keep), (p, momentum))
        )
    p = p * learning_rate[..., None, :]
    entering = (reach[..., None], p) if used is None else (
        jnp.where(used, reach, 0)[..., None], jnp.where(used[..., None], p, 0)
    )  # fmt: skip
    carried, written = (jnp.einsum("...ti,...ij->...tj", a, x, precision="highest")
                        for x in entering)  # fmt: skip
    return Coefficients(
        kept=kept,
        carried=carried[..., 0],
        written=written,
        momentum=reach[..., -1],
        pending=p[..., -1, :],
    )


def _between(gates: Float[Array, "*M C"]) -> Float[Array, "*M C C"]:
    """Products of gates after each token (column), up to each later one (row).

    Of many tokens, those of two blocks are products of three parts: to the end of the one, over the
    blocks between, and from the start of the other.
    """
    size = gates.shape[-1]
    if size % BLOCK or size <= 2 * BLOCK:
        return _between_few(gates)
    blocks = gates.reshape(*gates.shape[:-1], size // BLOCK, BLOCK)
    inside = _between_few(blocks)
    from_start, to_end = lax.cumprod(blocks, axis=blocks.ndim - 1), inside[..., -1, :]
    over = _between_few(from_start[..., -1])[..., :-1, :]
    over = jnp.pad(over, [(0, 0)] * (over.ndim - 2) + [(1, 0), (0, 0)])
    rows, columns = from_start[..., None, None], to_end[..., None, None, :, :]
    across = rows * over[..., :, None, :, None] * columns
    same = jnp.eye(size // BLOCK, dtype=bool)[:, None, :, None]
    return jnp.where(same, inside[..., None, :], across).reshape(*gates.shape, size)


def _between_few(gates: Float[Array, "*M C"]) -> Float[Array, "*M C C"]:
    index = jnp.arange(gates.shape[-1])
    later = index[:, None] > index
    factors = jnp.where(later, gates[..., :, None], 1)
    return jnp.tril(lax.cumprod(factors, axis=factors.ndim - 2))
