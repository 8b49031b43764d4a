"""Retrieval heads: those that look at what is copied from a long context while it is copied.

Source: Wu, Wang, Xiao, Peng and Fu, "Retrieval Head Mechanistically Explains Long-Context
Factuality" (2024), arXiv 2404.15574. Their code finds the needle by the overlap of its words with a
sliding window, which can miss short needles; here the task says where it stands.
"""

import jax
import jax.numpy as jnp

from lcattn.errors import argument_error
from lcattn.typing import Array, Bool, Float, Int, PRNGKeyArray, Tokens


def retrieval_scores(
    maps: Float[Array, "B N T T"],
    tokens: Tokens,
    *,
    prompt_length: int,
    needle: Bool[Array, "B T"],
    counted: Bool[Array, "B"] | None = None,
) -> Float[Array, "N"]:
    """The share of a needle's tokens that each head copies, mean over the rows that count.

    A head copies a token of the needle if, where that token is generated, no place gets more of
    its attention than one in the needle that holds this very token.

    Args:
      maps: of the whole rows: `[b, n, t]` is what head n attends to while token t + 1 is made.
      tokens: `[B,T]`, prompts and what was generated after them.
      prompt_length: tokens of the prompt; the same for all rows.
      needle: marks the needle's tokens in each row.
      counted: rows that count, such as those with the right answer; others would say little of how
        answers are found. None: all. If none counts, scores are 0.
    """
    B, T = tokens.shape
    if not 1 <= prompt_length < T:
        raise argument_error("prompt_length", f"1 to {T - 1}, in rows of {T} tokens", prompt_length)
    counted = jnp.ones(B, bool) if counted is None else counted
    # The reader of each generated token is the token before it.
    made = tokens[:, prompt_length:]
    top = maps[:, :, prompt_length - 1 : T - 1].argmax(axis=-1)  # [B,N,m]
    rows = jnp.arange(B)[:, None, None]
    copies = needle[rows, top] & (tokens[rows, top] == made[:, None])
    # A token of the needle that is copied twice counts once.
    places = jax.nn.one_hot(jnp.where(copies, top, T), T, dtype=bool).any(axis=2)
    share = places.sum(axis=-1) / jnp.maximum(needle.sum(axis=-1), 1)[:, None]
    return (share * counted[:, None]).sum(axis=0) / jnp.maximum(counted.sum(), 1)


def best_heads(scores: Float[Array, "L N"], count: int) -> Float[Array, "L N"]:
    """A mask of the heads that stay if the `count` of the highest scores are taken out."""
    order = jnp.argsort(-scores.ravel(), stable=True)
    return _without(order, scores.shape, count)


def random_heads(
    key: PRNGKeyArray, scores: Float[Array, "L N"], count: int, *, spared: int = 0
) -> Float[Array, "L N"]:
    """A mask that takes out `count` random heads, but for the `spared` of the highest scores.

    The released code means to spare the best 100, and by a slip spares none.
    """
    if count + spared > scores.size:
        raise argument_error("count", f"at most {scores.size - spared} heads", count)
    others = jnp.argsort(-scores.ravel(), stable=True)[spared:]
    return _without(jax.random.permutation(key, others), scores.shape, count)


def _without(order: Int[Array, "heads"], shape: tuple[int, ...], count: int) -> Array:
    if not 0 <= count <= len(order):
        raise argument_error("count", f"0 to {len(order)} heads", count)
    total = shape[0] * shape[1]
    return jnp.ones(total, jnp.float32).at[order[:count]].set(0).reshape(shape)
