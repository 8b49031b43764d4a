r"""Linear self-attention (LSA), the layer whose weights can be read as a step of gradient descent.

.. math::
    e_j \leftarrow e_j + \sum_h P_h \sum_{i \le n} (W_{V,h} e_i)(W_{K,h} e_i)^\top W_{Q,h} e_j

(von Oswald et al. 2022, arXiv 2212.07677): no softmax, no scale, no mask. Keys and values come from
the n context tokens alone; every token, the query included, asks and is updated.
"""

import dataclasses
from typing import Literal, no_type_check

import jax
import jax.numpy as jnp

from lcattn.typing import Array, Float

Kind = Literal["linear", "softmax"]


@no_type_check  # JAX also fills it with shapes
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LSAWeights:
    """The four matrices of each head.

    Attributes:
      query, key, value: `[E,N,H]`, from tokens to N heads of size H.
      out: `[N,H,E]`, P.
    """

    query: Float[Array, "E N H"]
    key: Float[Array, "E N H"]
    value: Float[Array, "E N H"]
    out: Float[Array, "N H E"]

    @property
    def key_query(self) -> Float[Array, "N E E"]:
        r""":math:`W_K^\top W_Q` of each head, which alone decides the scores."""
        return jnp.einsum("anh,bnh->nab", self.key, self.query)

    @property
    def out_value(self) -> Float[Array, "N E E"]:
        r""":math:`P W_V` of each head, which alone decides what is written."""
        return jnp.einsum("nhb,anh->nba", self.out, self.value)

    @staticmethod
    def of_products(
        key_query: Float[Array, "N E E"], out_value: Float[Array, "N E E"]
    ) -> "LSAWeights":
        """Heads of the size of a token, with the given products."""
        num_heads, size, _ = key_query.shape
        identity = jnp.broadcast_to(jnp.eye(size), (num_heads, size, size))
        return LSAWeights(
            query=jnp.einsum("nhe->enh", key_query),
            key=jnp.einsum("nhe->enh", identity),
            value=jnp.einsum("nhe->enh", out_value),
            out=identity,
        )


def attend(
    weights: LSAWeights,
    tokens: Float[Array, "B T E"],
    context: Float[Array, "B S E"],
    *,
    kind: Kind = "linear",
    causal: bool = False,
) -> Float[Array, "B T E"]:
    """What a layer adds to `tokens` when it reads `context`.

    Args:
      weights: of the layer.
      tokens: those that ask.
      context: those that are read.
      kind: "softmax" puts a softmax over the context around scores divided by √H.
      causal: token j reads the context up to j; the query, which follows it, reads all.

    Returns:
      The update, to be added to `tokens`.
    """
    q, k, v = (
        jnp.einsum("bte,enh->btnh", x, w)
        for x, w in ((tokens, weights.query), (context, weights.key), (context, weights.value))
    )
    scores = jnp.einsum("btnh,bsnh->bnts", q, k)
    visible = jnp.tril(jnp.ones(scores.shape[-2:], bool)) if causal else True
    if kind == "softmax":
        scores = jnp.where(visible, scores * q.shape[-1] ** -0.5, -jnp.inf)
        scores = jax.nn.softmax(scores, axis=-1)
    else:
        scores = jnp.where(visible, scores, 0)
    return jnp.einsum("bnts,bsnh,nhe->bte", scores, v, weights.out)


def fast_weights(weights: LSAWeights, context: Float[Array, "B S E"]) -> Float[Array, "B N H F"]:
    r"""The state that linear attention is, :math:`S = \sum_i (W_V e_i)(W_K e_i)^\top`.

    Built example by example: each is one update of rank one, and all that a stream has to keep.
    """
    B, (_, N, H) = context.shape[0], weights.value.shape

    def write(state: Array, token: Array) -> tuple[Array, None]:
        k, v = (jnp.einsum("be,enh->bnh", token, w) for w in (weights.key, weights.value))
        return state + v[..., :, None] * k[..., None, :], None

    zeros = jnp.zeros((B, N, H, weights.key.shape[-1]), context.dtype)
    return jax.lax.scan(write, zeros, context.swapaxes(0, 1))[0]


def read(
    weights: LSAWeights, state: Float[Array, "B N H F"], tokens: Float[Array, "B T E"]
) -> Float[Array, "B T E"]:
    """What a layer adds to `tokens`, from its state: `P S W_Q e`."""
    q = jnp.einsum("bte,enh->btnh", tokens, weights.query)
    return jnp.einsum("bnvk,btnk,nve->bte", state, q, weights.out)
