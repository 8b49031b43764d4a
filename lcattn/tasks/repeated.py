"""Repeated random blocks: rows that can only be predicted from themselves.

A row is token 0, which begins every row, and then copies of a block of random tokens from 1 up::

    0  b1 b2 .. br  b1 b2 .. br  b1 ..

Whoever sees a token again knows what follows: what followed it before. The first copy is noise, log
of the number of tokens at best. Source: Olsson et al. (2022), arXiv 2209.11895. A block length that
never changes could be solved by position alone, so training rows draw their own.

Drawn by JAX, on the device, from a key.
"""

import dataclasses
from typing import override

import jax
import jax.numpy as jnp

from lcattn.config import Config
from lcattn.errors import argument_error
from lcattn.typing import Array, Int, PRNGKeyArray, Tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class RepeatedTokensConfig(Config):
    """Rows for training: each with a period of its own.

    Attributes:
      vocab_size: number of tokens V; blocks are uniform over 1 to V - 1, tokens may occur twice.
      length: tokens in a row, the first included, of which each predicts the next.
      min_period, max_period: the periods, all as likely.
    """

    vocab_size: int = 64
    length: int = 64
    min_period: int = 8
    max_period: int = 32

    @override
    def validate(self) -> None:
        self.require_positive("length", "min_period")
        if self.vocab_size < 3:
            raise self.error("vocab_size", "at least 3: a first token, and two to choose from")
        if self.max_period < self.min_period:
            raise self.error("max_period", f"at least min_period={self.min_period}")

    def rows(self, key: PRNGKeyArray, batch_size: int) -> Int[Array, "B t"]:
        """`length + 1` tokens a row: inputs and, one further, targets."""
        period_key, block_key = jax.random.split(key)
        shape, last = (batch_size, 1), self.max_period + 1
        period = jax.random.randint(period_key, shape, self.min_period, last)
        block = jax.random.randint(block_key, (batch_size, self.max_period), 1, self.vocab_size)
        place = jnp.broadcast_to(jnp.arange(self.length), (batch_size, self.length)) % period
        body = jnp.take_along_axis(block, place, axis=1)
        return _with_first(body)


def repeated_tokens(
    key: PRNGKeyArray, batch_size: int, *, period: int, copies: int, vocab_size: int
) -> Tokens:
    """Rows for judging: `1 + period * copies` tokens; those of a block are all different."""

    def block(key: PRNGKeyArray) -> Int[Array, "r"]:
        return 1 + jax.random.permutation(key, vocab_size - 1)[:period]

    if not 0 < period < vocab_size:
        raise argument_error("period", f"1 to {vocab_size - 1} different tokens", period)
    blocks = jax.vmap(block)(jax.random.split(key, batch_size))
    return _with_first(jnp.tile(blocks, (1, copies)))


def _with_first(body: Int[Array, "B t"]) -> Int[Array, "B T"]:
    return jnp.pad(body.astype(jnp.int32), ((0, 0), (1, 0)))
