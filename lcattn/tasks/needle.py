r"""Needle in a haystack (S-NIAH, MK-NIAH), on tokens: one fact in much filler, asked for last.

A needle says that a key has m values. It stands somewhere in a haystack of filler tokens, and the
row ends with the question for its key and the answer, here with m = 2::

    tokens    .  .  .  N k v1 v2 .  .  .  .  .  .  Q  k  v1     (N needle, Q query, . filler)
    targets                                           v1 v2     (weight 0 elsewhere)

Token 1 is N and 2 is Q; 0 and 3 are kept free, for padding and a separator. Of the vocabulary, a
quarter are keys, a quarter values, the rest filler. Keys and values are uniform, and the keys of a
row are distinct. The haystack is one of

- "cycle": the first 20 filler tokens over and over, as S-NIAH-1 repeats five sentences;
- "chain": a Markov chain, each filler followed by one of 4 others, in place of S-NIAH-2's essays.

`num_values=8` is S-NIAH-3's long value, `num_needles=4` is MK-NIAH-1: three more needles, of other
keys, at uniform depths.

Source: Hsieh et al., "RULER: What's the Real Context Size of Your Long-Context Language Models?"
(2024), arXiv:2404.06654; its words, numbers and UUIDs are single tokens and rows of m tokens here.
"""

import dataclasses
from typing import Literal, override

import numpy as np

from lcattn.tasks.batch import Batch
from lcattn.tasks.computed import ComputedConfig, ComputedRows

_NEEDLE, _QUERY, _FIRST_KEY = 1, 2, 4
_CYCLE = 20
_SUCCESSORS = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class HaystackConfig(ComputedConfig):
    """What the configs of all retrieval tasks share.

    Attributes:
      depth: how much of the haystack stands before the needle, in per cent, 0 to 100. None: any
        split of the haystack, each as likely, as in training.
    """

    depth: int | None = None

    @override
    def validate(self) -> None:
        super().validate()
        if self.depth is not None and not 0 <= self.depth <= 100:
            raise self.error("depth", "per cent, 0 to 100, or None")

    @property
    @override
    def name(self) -> str:
        return "_".join(f"{name}_{number}" for name, number in self.numbers.items())

    @property
    @override
    def numbers(self) -> dict[str, int]:
        depth = {} if self.depth is None else {"depth": self.depth}
        return {"length": self.length, **depth}

    def split_point(self, haystack: int, rng: np.random.Generator) -> int:
        """How many of the tokens of a haystack stand before the needle."""
        # Drawn in any case: rows of two depths are otherwise the same.
        anywhere = int(rng.integers(haystack + 1))
        return anywhere if self.depth is None else round(haystack * self.depth / 100)


@dataclasses.dataclass(frozen=True, kw_only=True)
class NeedleConfig(HaystackConfig):
    """Rows of one length with needles of one form.

    Attributes:
      vocab_size: number of tokens, V.
      haystack: "cycle" or "chain", see the module.
      num_needles: in a row; the row asks for the first one drawn, whose depth is `depth`.
      num_values: tokens in a value, m.
    """

    vocab_size: int = 512
    haystack: Literal["cycle", "chain"] = "cycle"
    num_needles: int = 1
    num_values: int = 1

    @override
    def validate(self) -> None:
        super().validate()
        self.require_positive("num_needles", "num_values")
        if self.num_fillers < _CYCLE:
            raise self.error("vocab_size", "at least 46, which leaves 20 filler tokens")
        if self.num_needles > self.num_keys:
            raise self.error("num_needles", f"at most the vocab_size // 4 = {self.num_keys} keys")
        if self.haystack_size < 0:
            needed = self.length - self.haystack_size
            raise self.error("length", f"at least {needed}, for needles, question and answer")

    @property
    def num_keys(self) -> int:
        """Tokens that are keys; as many are values."""
        return self.vocab_size // 4

    @property
    def first_filler(self) -> int:
        """Fillers are this token and all after it."""
        return _FIRST_KEY + 2 * self.num_keys

    @property
    def num_fillers(self) -> int:
        """Tokens that are fillers."""
        return self.vocab_size - self.first_filler

    @property
    def haystack_size(self) -> int:
        """Filler tokens in a row."""
        needles = self.num_needles * (2 + self.num_values)
        return self.length - needles - (1 + self.num_values)

    @override
    def make(self, split: str = "train") -> "Needle":
        return Needle(self, split)


class Needle(ComputedRows[NeedleConfig]):
    """Rows of needles in a haystack."""

    def __init__(self, config: NeedleConfig, split: str = "train"):
        super().__init__(config, split, config.length, config.num_needles, config.num_values)
        self._chain = _chain(config.num_fillers, config.seed)

    @override
    def _rows(self, indices: np.ndarray) -> Batch:
        c = self.config
        size, n, m = len(indices), c.num_needles, c.num_values
        keys, values = np.empty((size, n), np.int32), np.empty((size, n, m), np.int32)
        places = np.empty((size, n), np.int32)  # fillers before each needle
        start = np.empty(size, np.int32)
        turns = np.empty((size, c.haystack_size), np.int8)
        for row, rng in self._generators(indices):
            keys[row] = _FIRST_KEY + rng.choice(c.num_keys, n, replace=False)
            values[row] = _FIRST_KEY + c.num_keys + rng.integers(c.num_keys, size=(n, m))
            places[row] = rng.integers(c.haystack_size + 1, size=n)
            places[row, 0] = c.split_point(c.haystack_size, rng)
            if c.haystack == "chain":
                start[row] = rng.integers(c.num_fillers)
                turns[row] = rng.integers(_SUCCESSORS, size=c.haystack_size)

        marks = np.full((size, n, 1), _NEEDLE, np.int32)
        needles = np.concatenate([marks, keys[..., None], values], axis=2).reshape(size, -1)
        context = _insert(needles, np.repeat(places, 2 + m, axis=1), self._fillers(start, turns))
        query = np.full((size, 1), _QUERY, np.int32)
        answer = values[:, 0]
        tokens = np.concatenate([context, query, keys[:, :1], answer[:, :-1]], axis=1)
        targets, weights = np.zeros_like(tokens), np.zeros(tokens.shape, np.float32)
        targets[:, -m:] = answer
        weights[:, -m:] = 1
        return {"tokens": tokens, "targets": targets, "weights": weights}

    def _fillers(self, start: np.ndarray, turns: np.ndarray) -> np.ndarray:
        if self.config.haystack == "cycle":
            fillers = np.broadcast_to(np.arange(turns.shape[1]) % _CYCLE, turns.shape)
        else:
            fillers = np.empty(turns.shape, np.int32)
            here = start
            for t in range(turns.shape[1]):
                fillers[:, t] = here
                here = self._chain[here, turns[:, t]]
        return (self.config.first_filler + fillers).astype(np.int32)


def _chain(num_fillers: int, seed: int) -> np.ndarray:
    """The followers of each filler, `[fillers, 4]`: one language for all splits of a seed."""
    rng = np.random.default_rng(seed)
    return np.stack(
        [rng.choice(num_fillers, _SUCCESSORS, replace=False) for _ in range(num_fillers)]
    )


def _insert(needles: np.ndarray, places: np.ndarray, fillers: np.ndarray) -> np.ndarray:
    """Puts each token of the needles before the filler whose number is its place."""
    ranks = np.broadcast_to(2 * np.arange(fillers.shape[1]) + 1, fillers.shape)
    # Stable: the tokens of a needle stay together and in order.
    order = np.argsort(np.concatenate([2 * places, ranks], axis=1), axis=1, kind="stable")
    return np.take_along_axis(np.concatenate([needles, fillers], axis=1), order, axis=1)
