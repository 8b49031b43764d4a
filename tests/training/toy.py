"""The smallest model and task with the signatures that training relies on."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lcattn.config import Config


class ToyLM(nnx.Module):
    def __init__(self, vocab_size, width, rngs, dropout=0.0):
        normal = jax.nn.initializers.normal(0.1)
        self.embedding = nnx.Param(
            normal(rngs.params(), (vocab_size, width)), axes=("vocab", "embed")
        )
        self.head = nnx.Param(normal(rngs.params(), (width, vocab_size)), axes=("embed", "vocab"))
        self.bias = nnx.Param(jnp.zeros(vocab_size), axes=("vocab",))
        self.dropout = nnx.Dropout(dropout, rngs=rngs) if dropout else None

    def __call__(self, tokens, segment_ids=None, *, rng=None):
        x = jnp.tanh(self.embedding[tokens])
        if rng is not None and self.dropout is not None:
            x += 0.01 * jax.random.normal(rng, x.shape)
        if self.dropout is not None:
            x = self.dropout(x)
        return x @ self.head[...] + self.bias[...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ToyConfig(Config):
    vocab_size: int = 11
    width: int = 16
    dropout: float = 0.0

    def make(self, rngs):
        return ToyLM(self.vocab_size, self.width, rngs, self.dropout)


class Batches:
    """An endless, seeded, resumable stream: the next token is a fixed function of the last."""

    def __init__(self, batch_size=8, length=6, vocab_size=11, seed=0, spoil_at=None):
        self.shape, self.vocab_size, self.seed = (batch_size, length + 1), vocab_size, seed
        self.spoil_at = spoil_at
        self.index = 0

    def __iter__(self):
        return self

    def __next__(self):
        rng = np.random.default_rng((self.seed, self.index))
        start = rng.integers(0, self.vocab_size, (self.shape[0], 1))
        tokens = (start + 3 * np.arange(self.shape[1])) % self.vocab_size
        weights = (rng.random((self.shape[0], self.shape[1] - 1)) < 0.7).astype(np.float32)
        if self.index == self.spoil_at:
            weights[0, 0] = np.nan
        ids = self.index * self.shape[0] + np.arange(self.shape[0])
        self.index += 1
        return {
            "tokens": tokens[:, :-1].astype(np.int32),
            "targets": tokens[:, 1:].astype(np.int32),
            "weights": weights,
            "segment_ids": np.zeros((self.shape[0], self.shape[1] - 1), np.int32),
            "example_ids": ids,
        }

    def close(self):
        pass

    def get_state(self):
        return {"index": self.index}

    def set_state(self, state):
        self.index = state["index"]


class ToyTask:
    vocab_size = 11
    metrics = ("loss", "accuracy")
    slices: ClassVar = {"short": {"length": 6}, "long": {"length": 6}}

    def __init__(self, spoil_at=None):
        self.spoil_at = spoil_at

    def train(self):
        return Batches(spoil_at=self.spoil_at)

    def evaluation(self):
        return {name: _take(seed, 2) for seed, name in ((100, "short"), (200, "long"))}


def _take(seed, count):
    batches = Batches(seed=seed)
    return [next(batches) for _ in range(count)]
