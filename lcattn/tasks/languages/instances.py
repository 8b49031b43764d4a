"""Rows of strings, one random automaton a row, with the true law of the next letter."""

import dataclasses
import functools
from typing import NamedTuple, override

import numpy as np

from lcattn.config import Config
from lcattn.tasks.languages.automata import AutomataConfig, random_automata


@dataclasses.dataclass(frozen=True, kw_only=True)
class LanguagesConfig(Config):
    """Rows to train on and to be judged by; the defaults are the published ones.

    A row holds strings of one automaton, each from its start, joined by a separator. Letters are
    the tokens 0 to `num_letters - 1`, then come the separator and the padding. Only letters are
    predicted.

    Attributes:
      automata: what languages are drawn from.
      length: tokens in a row; longer rows are cut.
      min_strings, max_strings: bounds of the number of strings in a row.
      min_length, max_length: bounds of the letters in a string.
      num_train, num_test: rows, each of a language that no other row has.
      seed: of the data.
    """

    automata: AutomataConfig = dataclasses.field(default_factory=AutomataConfig)
    length: int = 512
    min_strings: int = 10
    max_strings: int = 19
    min_length: int = 1
    max_length: int = 49
    num_train: int = 40_000
    num_test: int = 1000
    seed: int = 0

    @override
    def validate(self) -> None:
        self.require_positive("length", "min_strings", "min_length", "num_train", "num_test")
        for what in ("strings", "length"):
            low = getattr(self, f"min_{what}")
            if getattr(self, f"max_{what}") < low:
                raise self.error(f"max_{what}", f"at least min_{what}={low}")

    @property
    def separator(self) -> int:
        """The token between two strings."""
        return self.automata.num_letters

    @property
    def vocab_size(self) -> int:
        """Letters, separator and padding."""
        return self.automata.num_letters + 2

    def make(self) -> "Languages":
        """The rows; those of a config are made once."""
        return _make(self)


class Rows(NamedTuple):
    """N rows.

    Attributes:
      tokens, targets: `[N, T]` int32.
      weights: `[N, T]` float32: 1 where the target is a letter.
      law: `[N, T, V]` float32: the true probabilities of the next letter, if there is one.
    """

    tokens: np.ndarray
    targets: np.ndarray
    weights: np.ndarray
    law: np.ndarray


class Languages:
    """See `LanguagesConfig`. Attributes: `train` and `test`, `Rows` of different languages."""

    def __init__(self, config: LanguagesConfig):
        """Draws everything."""
        self.config = config
        count = config.num_test + config.num_train
        tables = random_automata(config.automata, count, config.seed)
        rows = _rows(config, tables)
        self.test = Rows(*(array[: config.num_test] for array in rows))
        self.train = Rows(*(array[config.num_test :] for array in rows))


@functools.cache
def _make(config: LanguagesConfig) -> Languages:
    return Languages(config)


def _rows(config: LanguagesConfig, tables: list[np.ndarray]) -> Rows:
    N, T, letters = len(tables), config.length, config.automata.num_letters
    rng = np.random.default_rng([config.seed, 1])
    edges = np.full((N, max(map(len, tables)), letters), -1, np.int8)
    for row, table in enumerate(tables):
        edges[row, : len(table)] = table

    kinds = _layout(config, N, rng)
    tokens = np.full((N, T + 1), config.separator + 1, np.int32)
    law = np.zeros((N, T + 1, config.vocab_size), np.float32)
    state, row = np.zeros(N, int), np.arange(N)
    for t in range(T + 1):  # all rows at once
        known = edges[row, state] >= 0
        law[:, t, :letters] = known / known.sum(axis=1, keepdims=True)
        letter = np.where(known, rng.random((N, letters)), -1).argmax(axis=1)
        is_letter, is_separator = kinds[:, t] == _LETTER, kinds[:, t] == _SEPARATOR
        tokens[is_letter, t] = letter[is_letter]
        tokens[is_separator, t] = config.separator
        state = np.where(is_letter, edges[row, state, letter], np.where(is_separator, 0, state))
    weights = (kinds[:, 1:] == _LETTER).astype(np.float32)
    targets = np.where(weights > 0, tokens[:, 1:], 0)
    return Rows(tokens[:, :-1], targets, weights, law[:, 1:])


_LETTER, _SEPARATOR, _PADDING = range(3)


def _layout(config: LanguagesConfig, count: int, rng: np.random.Generator) -> np.ndarray:
    """What stands at each place of each row, `[N, T + 1]`."""
    shape = (count, config.max_strings)
    lengths = rng.integers(config.min_length, config.max_length + 1, shape)
    strings = rng.integers(config.min_strings, config.max_strings + 1, (count, 1))
    lengths = np.where(np.arange(config.max_strings) < strings, lengths, -1)
    ends = np.cumsum(lengths + 1, axis=1)  # after the separator that follows a string
    places = np.arange(config.length + 1)
    kinds = np.full((count, config.length + 1), _LETTER)
    kinds[(places[None, :, None] == ends[:, None, :] - 1).any(axis=-1)] = _SEPARATOR
    kinds[places >= ends[:, -1:] - 1] = _PADDING
    return kinds
