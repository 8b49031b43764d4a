"""Who is read for an answer, of models without an attention map as of any other.

All work on repeated rows (`lcattn.tasks.repeated`): token i of a later copy asks for token i + 1,
whose earlier copy stands at `i + 1 - r` (the *source* of the answer), right after the earlier copy
of the query at `i - r` (the *match*). `score` below is anything that maps tokens `[B,T]` to logits
`[B,T,V]`, a `lcattn.models.LM` for one.

Of these measures the counterfactual copy is the plainest: a model that knows its answers by heart,
or guesses them from what is frequent, scores 0, whatever its layers look like.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lcattn.errors import argument_error
from lcattn.models import LM
from lcattn.nn import Mixer
from lcattn.probes.losses import token_losses
from lcattn.typing import Array, Float, Hidden, Int, Logits, PRNGKeyArray, Tokens

Score = Callable[[Tokens], Logits]


class CounterfactualCopy(NamedTuple):
    """Means over rows.

    Attributes:
      copied: probability of the token that now stands at the source; 1 for a perfect copier.
      kept: probability of the token that stood there before.
    """

    copied: Float[Array, ""]
    kept: Float[Array, ""]


def counterfactual_copy(
    score: Score, key: PRNGKeyArray, tokens: Tokens, period: int, *, first_token: int = 1,
    vocab_size: int,
) -> CounterfactualCopy:  # fmt: skip
    """Does the answer change when nothing but the source of the answer does?

    In each row one query of the last copy is drawn; the source of its answer becomes another token
    of `[first_token, vocab_size)`. With more than two copies the older ones contradict it.

    Args:
      score: the model.
      key: draws queries and replacements.
      tokens: `[B,T]`, rows that end in two copies of `period` tokens.
      period: r.
      first_token, vocab_size: the tokens to replace by.
    """
    B, T = tokens.shape
    _check_period(tokens, period, "two copies", 2 * period)
    query_key, token_key = jax.random.split(key)
    rows = jnp.arange(B)
    # The last token has no answer in the row.
    query = jax.random.randint(query_key, (B,), T - period, T - 1)
    answer = tokens[rows, query + 1]
    other = _another(token_key, answer, first_token, vocab_size)
    changed = tokens.at[rows, query + 1 - period].set(other)
    probabilities = jax.nn.softmax(score(changed)[rows, query].astype(jnp.float32))
    return CounterfactualCopy(
        copied=probabilities[rows, other].mean(), kept=probabilities[rows, answer].mean()
    )


def occlusion(
    score: Score, key: PRNGKeyArray, tokens: Tokens, *, first_token: int = 1, vocab_size: int
) -> Float[Array, "t T"]:
    """By how many nats the log probability of each answer falls when one token is replaced.

    Entry `[i, j]` is for the answer of token i (what followed it before anything was replaced) and
    token j replaced by a random other one; 0 where j > i. The mean over rows; i < T - 1. Costs T
    forward passes.
    """
    T = tokens.shape[1]
    answers = tokens[:, 1:]
    before = token_losses(score(tokens)[:, :-1], answers)

    def without(j: Int[Array, ""], key: PRNGKeyArray) -> Float[Array, "t"]:
        other = _another(key, tokens[:, j], first_token, vocab_size)
        after = token_losses(score(tokens.at[:, j].set(other))[:, :-1], answers)
        return (after - before).mean(axis=0)

    drops = jax.lax.map(lambda at: without(*at), (jnp.arange(T), jax.random.split(key, T)))
    return jnp.where(jnp.tri(T - 1, T, dtype=bool), drops.T, 0)


class GradientShares(NamedTuple):
    """Shares of each token in the gradient of each answer's log probability; rows sum to 1.

    Attributes:
      times_input: by `|<gradient, embedding>|`.
      norm: by the norm of the gradient.
    """

    times_input: Float[Array, "t T"]
    norm: Float[Array, "t T"]


def gradient_shares(model: LM, tokens: Tokens) -> GradientShares:
    """Gradient by the embeddings, `[i, j]` of answer i by token j; means over rows.

    Costs T backward passes. A share of the query itself is large for any model.
    """
    T = tokens.shape[1]
    embeddings = model.embed(tokens)

    def answers(embeddings: Hidden) -> Float[Array, "B t"]:
        return -token_losses(model.score(embeddings, tokens=tokens)[0][:, :-1], tokens[:, 1:])

    losses, pull_back = jax.vjp(answers, embeddings)

    def of_answer(i: Int[Array, ""]) -> tuple[Array, Array]:
        (gradient,) = pull_back(jnp.zeros_like(losses).at[:, i].set(1))
        inner = jnp.abs(jnp.einsum("btd,btd->bt", gradient, embeddings))
        return _share(inner), _share(jnp.linalg.norm(gradient, axis=-1))

    return GradientShares(*jax.lax.map(of_answer, jnp.arange(T - 1)))


def effective_attention(
    read: Callable[[Float[Array, "B T K H"]], Float[Array, "B T N H"]],
    values: Float[Array, "B T K H"],
) -> Float[Array, "B N T T"]:
    """The weight of each value in each head that is read, by one VJP for each reader.

    The mean over channels of `d heads[t, n, h] / d values[s, k, h]`. For an op linear in its values
    it is the op's attention map, wherever it is taken; for others its linearisation at `values`.
    With grouped queries, head n reads key head `n // (N / K)`.
    """
    heads, pull_back = jax.vjp(read, values)
    _, T, N, H = heads.shape
    K = values.shape[2]

    def of_reader(t: Int[Array, ""], n: Int[Array, ""]) -> Float[Array, "B T"]:
        def of_channel(h: Int[Array, ""]) -> Float[Array, "B T"]:
            (gradient,) = pull_back(jnp.zeros_like(heads).at[:, t, n, h].set(1))
            return gradient[:, :, n // (N // K), h]

        return jax.vmap(of_channel)(jnp.arange(H)).mean(axis=0)

    over_heads = jax.vmap(of_reader, in_axes=(None, 0))
    rows = jax.lax.map(lambda t: over_heads(t, jnp.arange(N)), jnp.arange(T))  # [t,N,B,T]
    return rows.transpose(2, 1, 0, 3)


def sensitivity(
    mixer: Mixer, x: Hidden, key: PRNGKeyArray, *, delta: float = 1e-3
) -> Float[Array, "T T"]:
    """How far each output of a mixer moves for a small move of each input, `[output, input]`.

    Central differences along one random unit direction for each token of each row, mean over rows:
    the norm of the Jacobian, up to a factor, without any backward pass.
    """
    B, T, D = x.shape
    moves = jax.random.normal(key, (T, B, D), x.dtype)
    moves *= delta / jnp.linalg.norm(moves, axis=-1, keepdims=True)

    def of_input(j: Int[Array, ""], move: Float[Array, "B D"]) -> Float[Array, "T"]:
        change = mixer(x.at[:, j].add(move)) - mixer(x.at[:, j].add(-move))
        return jnp.linalg.norm(change / (2 * delta), axis=-1).mean(axis=0)

    return jax.lax.map(lambda at: of_input(*at), (jnp.arange(T), moves)).T


class Roles(NamedTuple):
    """Means of an attribution over the queries of the last copy.

    Attributes:
      source: at the earlier copy of the answer.
      match: at the earlier copy of the query.
      query: at the query itself.
      other: at any other token up to the query.
    """

    source: Float[Array, ""]
    match: Float[Array, ""]
    query: Float[Array, ""]
    other: Float[Array, ""]


def by_role(attribution: Float[Array, "t T"], period: int) -> Roles:
    """Sums up a map `[answer of token i, token j]` of rows that end in two copies.

    Args:
      attribution: of `occlusion` or `gradient_shares`: T - 1 answers, T tokens.
      period: r.
    """
    T = attribution.shape[1]
    if not 2 <= period <= T // 2:
        raise argument_error("period", f"2 to {T // 2} (two copies in {T} tokens)", period)
    i = jnp.arange(T - period, T - 1)
    source, match, query = (attribution[i, j] for j in (i + 1 - period, i - period, i))
    rest = attribution[i].sum(axis=-1) - source - match - query
    return Roles(source.mean(), match.mean(), query.mean(), (rest / (i + 1 - 3)).mean())


def _check_period(tokens: Tokens, period: int, what: str, needed: int) -> None:
    if not period >= 2 or tokens.shape[1] < needed:
        expected = f"2 or more, and {what} in {tokens.shape[1]} tokens"
        raise argument_error("period", expected, period)


def _another(key: PRNGKeyArray, tokens: Array, first: int, end: int) -> Array:
    """For each token another one of `[first, end)`, all as likely."""
    steps = jax.random.randint(key, tokens.shape, 1, end - first)
    return first + (tokens - first + steps) % (end - first)


def _share(x: Float[Array, "B T"]) -> Float[Array, "T"]:
    """Rows as shares of their sums, averaged."""
    total = x.sum(axis=-1, keepdims=True)
    return jnp.where(total > 0, x / jnp.where(total > 0, total, 1), 0).mean(axis=0)
