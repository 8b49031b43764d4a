"""Which word is the adjective? Known by heart for frequent words, told by the sentence for any.

A row is a sentence of a noun, an adjective and a copula, a query, and three masks:

    cop adj noun q _ _ _    or    noun cop adj q _ _ _

Where q is the adjective the answers are adj adj adj, where it is the noun adj noun noun. The role
of q stands in the sentence, the adjective being the word after the copula, but a model can also
remember the class of every word it has met.

Source: Anand et al., "Dual Process Learning: Controlling Use of In-Context vs. In-Weights
Strategies with Weight Forgetting" (2024), arXiv:2406.00053.
"""

import dataclasses
from typing import Literal, override

import jax
import jax.numpy as jnp

from lcattn.config import Config
from lcattn.typing import Array, Int, PRNGKeyArray

Kind = Literal["validation", "switch", "tail", "tail_switch", "held_out"]

KINDS: tuple[Kind, ...] = ("validation", "switch", "tail", "tail_switch", "held_out")
"""Sets to be judged by: as in training; with the classes of both words exchanged; the rarest tenth
of the words; both; words that training never shows."""

LENGTH = 7


@dataclasses.dataclass(frozen=True, kw_only=True)
class RolesConfig(Config):
    """The words and how often they come.

    Tokens: nouns, then adjectives, the copula, the mask, then the held-out words. The rank of a
    word within its class is its number.

    Attributes:
      num_words: V, a multiple of 20: half nouns, half adjectives, and V/10 held-out words.
      zipf: a in the frequency `rank ** -a`; 0 is uniform.
      ambiguous: whether one word in ten, at every frequency, takes the other role half of the time.
    """

    num_words: int = 100
    zipf: float = 1.5
    ambiguous: bool = True

    @override
    def validate(self) -> None:
        if self.num_words < 20 or self.num_words % 20:
            raise self.error("num_words", "a multiple of 20")
        if self.zipf < 0:
            raise self.error("zipf", "a value of at least 0")

    @property
    def half(self) -> int:
        """Words in a class."""
        return self.num_words // 2

    @property
    def copula(self) -> int:
        """The token next to the adjective."""
        return self.num_words

    @property
    def mask(self) -> int:
        """The token that asks."""
        return self.num_words + 1

    @property
    def held_out(self) -> int:
        """The first held-out word."""
        return self.num_words + 2

    @property
    def vocab_size(self) -> int:
        """All tokens."""
        return self.held_out + self.num_words // 10


def roles_rows(
    config: RolesConfig, key: PRNGKeyArray, count: int, kind: Kind = "validation"
) -> tuple[Int[Array, "B T"], Int[Array, "B T"]]:
    """Random rows.

    Returns:
      `tokens` and `targets`, `[B, 7]` int32; targets stand at the masks, elsewhere they are 0.
    """
    word_key, order_key, query_key = jax.random.split(key, 3)
    noun, adjective = _words(config, word_key, count, kind)
    copula = jnp.full_like(noun, config.copula)
    first, asks_noun = (jax.random.bernoulli(k, shape=(count,)) for k in (order_key, query_key))
    sentence = jnp.where(
        first,
        jnp.stack([copula, adjective, noun]),
        jnp.stack([noun, copula, adjective]),
    )
    query = jnp.where(asks_noun, noun, adjective)
    masks = jnp.full((3, count), config.mask, jnp.int32)
    tokens = jnp.concatenate([sentence, query[None], masks]).T
    answers = jnp.stack([adjective, query, query])
    targets = jnp.concatenate([jnp.zeros((4, count), jnp.int32), answers]).T
    return tokens, targets


def _words(
    config: RolesConfig, key: PRNGKeyArray, count: int, kind: Kind
) -> tuple[Int[Array, " B"], Int[Array, " B"]]:
    """A noun and an adjective for each row, or what takes their places."""
    noun_key, adjective_key, *swap_keys = jax.random.split(key, 4)
    if kind == "held_out":
        words = config.num_words // 10
        noun = jax.random.randint(noun_key, (count,), 0, words)
        further = jax.random.randint(adjective_key, (count,), 1, words)
        return config.held_out + noun, config.held_out + (noun + further) % words
    rank = jnp.arange(1, config.half + 1, dtype=jnp.float32)
    logits = -config.zipf * jnp.log(rank)
    if kind.startswith("tail"):
        logits = jnp.where(rank > 0.9 * config.half, 0.0, -jnp.inf)
    noun, adjective = (
        jax.random.categorical(k, logits, shape=(count,)) for k in (noun_key, adjective_key)
    )
    noun, adjective = noun.astype(jnp.int32), config.half + adjective.astype(jnp.int32)
    if kind.endswith("switch"):
        return adjective, noun

    def swapped(word: Array, key: PRNGKeyArray) -> Array:
        takes_the_other = (word % 10 == 9) & jax.random.bernoulli(key, shape=(count,))
        return jnp.where(takes_the_other, (word + config.half) % config.num_words, word)

    if not config.ambiguous:
        return noun, adjective
    nouns, adjectives = swapped(noun, swap_keys[0]), swapped(adjective, swap_keys[1])
    is_one = nouns == adjectives  # No word is both in one sentence.
    return jnp.where(is_one, noun, nouns), jnp.where(is_one, adjective, adjectives)
