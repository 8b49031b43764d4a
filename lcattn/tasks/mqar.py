r"""Multi-query associative recall (MQAR): read key-value pairs, then answer for each key.

A row begins with `n` pairs, `k1 v1 k2 v2 ... kn vn`. Each key comes back once, later in the row,
and there the model has to name its value. The value does not follow the query in the input::

    tokens    k1 v1 k2 v2  k2  .  .  .  k1  .     (. is a random token)
    targets    .  .  .  .  v2  .  .  .  v1  .     (. is ignored: weight 0)

Keys are distinct tokens of `{1 .. V/2-1}`, values distinct tokens of `{V/2 .. V-1}`. Queries stand
at even distances from the context: slot `i` is the position `2n + 2i`, and each key in turn takes
one of the free slots with probability proportional to

    w_i = a (i + 1)^(a - 1),    a = `power`

which at a = 0.01 is close to 1/(i+1): most queries come soon, some come late.

Taking slots one after another without replacement, each with probability proportional to its
weight among those left, is an *exponential race*: let slot i arrive at time E_i / w_i with
independent E_i ~ Exp(1), and take the slots in order of arrival. The first to arrive is i with
probability w_i / sum_j w_j; and since an exponential clock has no memory, the race among the rest
starts afresh. So one sort of one row of random numbers replaces n sequential draws.

Source: Arora et al., "Zoology: Measuring and Improving Recall in Efficient Language Models" (2023),
arXiv:2312.04927; the sizes of the mixtures are those of its Based follow-up, arXiv:2402.18668.
"""

import dataclasses
from typing import override

import numpy as np

from lcattn.tasks.batch import Batch
from lcattn.tasks.computed import ComputedConfig, ComputedRows


@dataclasses.dataclass(frozen=True, kw_only=True)
class MQARConfig(ComputedConfig):
    """Rows of one length with one number of pairs.

    Attributes:
      length: tokens in a row, T; even.
      num_pairs: key-value pairs, and so queries, in a row; `4 * num_pairs <= length`.
      vocab_size: number of tokens, V; greater than `length`.
      power: a in the distribution of the distance from a pair to its query.
      random_fillers: fill the rest of the row with uniform tokens of `[0, V)` (they may coincide
        with keys and values) rather than with token 0.
    """

    num_pairs: int
    vocab_size: int = 8192
    power: float = 0.01
    random_fillers: bool = True

    @override
    def validate(self) -> None:
        super().validate()
        self.require_positive("num_pairs", "power")
        if self.length % 2:
            raise self.error("length", "an even number")
        if 4 * self.num_pairs > self.length:
            raise self.error("num_pairs", f"at most length / 4 = {self.length // 4}")
        if self.vocab_size <= self.length:
            raise self.error("vocab_size", f"more than length = {self.length}")

    @property
    @override
    def name(self) -> str:
        return f"length_{self.length}_pairs_{self.num_pairs}"

    @property
    @override
    def numbers(self) -> dict[str, int]:
        return {"length": self.length, "num_pairs": self.num_pairs}

    @override
    def make(self, split: str = "train") -> "MQAR":
        return MQAR(self, split)


class MQAR(ComputedRows[MQARConfig]):
    """Rows of pairs and queries."""

    def __init__(self, config: MQARConfig, split: str = "train"):
        super().__init__(config, split, config.length, config.num_pairs)

    @override
    def _rows(self, indices: np.ndarray) -> Batch:
        c = self.config
        context = 2 * c.num_pairs
        keys, values, arrivals, fillers = self._draw(indices)

        slots = np.argsort(arrivals, axis=1)[:, : c.num_pairs]
        queries = context + 2 * slots

        tokens = np.empty((len(indices), c.length), np.int32)
        tokens[:, 0:context:2] = keys
        tokens[:, 1:context:2] = values
        tokens[:, context:] = fillers
        np.put_along_axis(tokens, queries, keys, axis=1)
        targets = np.zeros_like(tokens)
        np.put_along_axis(targets, queries, values, axis=1)
        weights = np.zeros(tokens.shape, np.float32)
        np.put_along_axis(weights, queries, np.float32(1), axis=1)
        return {"tokens": tokens, "targets": targets, "weights": weights}

    def _draw(self, indices: np.ndarray) -> tuple[np.ndarray, ...]:
        c = self.config
        size, half = len(indices), c.vocab_size // 2
        num_rest = c.length - 2 * c.num_pairs
        num_slots = num_rest // 2
        slot_weights = c.power * np.arange(1, num_slots + 1) ** (c.power - 1)

        keys = np.empty((size, c.num_pairs), np.int32)
        values = np.empty((size, c.num_pairs), np.int32)
        arrivals = np.empty((size, num_slots))
        fillers = np.zeros((size, num_rest), np.int32)
        for row, rng in self._generators(indices):
            keys[row] = 1 + rng.choice(half - 1, c.num_pairs, replace=False)
            values[row] = half + rng.choice(c.vocab_size - half, c.num_pairs, replace=False)
            rng.standard_exponential(out=arrivals[row])
            if c.random_fillers:
                fillers[row] = rng.integers(c.vocab_size, size=num_rest, dtype=np.int32)
        arrivals /= slot_weights
        return keys, values, arrivals, fillers


PAPER_TRAIN = (
    MQARConfig(length=64, num_pairs=4, num_examples=100_000),
    MQARConfig(length=128, num_pairs=8, num_examples=20_000),
    MQARConfig(length=256, num_pairs=16, num_examples=20_000),
    MQARConfig(length=256, num_pairs=32, num_examples=20_000),
    MQARConfig(length=256, num_pairs=64, num_examples=20_000),
)
"""The published training mixture, easy rows first."""

PAPER_TEST = tuple(
    MQARConfig(length=length, num_pairs=num_pairs, num_examples=1000)
    for length, num_pairs in (
        (64, 4),
        (64, 8),
        (64, 16),
        (128, 32),
        (256, 64),
        (512, 128),
        (1024, 256),
    )
)
"""The published test mixture; its longest rows are longer than any seen in training."""
