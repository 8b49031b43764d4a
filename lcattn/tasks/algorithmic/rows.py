"""Questions and answers of algorithmic tasks, as rows `BOS question SEP answer EOS`."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Literal, NamedTuple, override

import numpy as np

from lcattn.config import Config

Question = tuple[list[int], list[int]]

HINTS = {
    "sort": ("successor", "predecessor", "fill", "parity"),
    "addition": ("index",),
    "parity": ("scratchpad",),
}
"""The hints of each task that has any."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AlgorithmicConfig(Config):
    """One task, short rows to train on and rows of several lengths to be judged by.

    | task            | question          | answer                                          |
    | --------------- | ----------------- | ----------------------------------------------- |
    | `count`         | a, b              | a, a+1, ..., b; the length is that of the answer |
    | `mode`          | tokens            | the one that comes most often                   |
    | `copy`          | different tokens  | the same                                        |
    | `copy_repeated` | tokens 0 and 1    | the same                                        |
    | `reverse`       | different tokens  | the same, the last one first                    |
    | `sort`          | different tokens  | the same, the smallest first                    |
    | `addition`      | digits of a, b    | those of a + b; all of length + 1, highest first |
    | `parity`        | tokens 0 and 1    | the sum modulo 2                                |

    Hints. To `sort`: every other row of training asks, of the same kind of list, for the
    "successor" or "predecessor" of one element in the order (EOS at the end), for the one missing
    from the sorted list ("fill"), or for the parity of its rank ("parity"). To `addition`:
    "index" writes digits lowest first, each after a token that names its place. To `parity`:
    "scratchpad" answers with the running parity, each after such a token. The first place is
    random, so that the names of late places are known from training.

    Sources: Awasthi and Gupta, "Improving Length-Generalization in Transformers via Task Hinting"
    (2023), arXiv:2310.00726 (whose code is not public: the forms of the hints are ours); Zhou et
    al., "What Algorithms can Transformers Learn?" (2023), arXiv:2310.16028.

    Attributes:
      task, hint: see above.
      num_values: values, digits or letters; the tokens 0 to `num_values - 1`.
      train_length: rows to train on have lengths from 1 to this, each as often.
      test_lengths: those to be judged by.
      num_train, num_test: rows to train on, and rows of each length to be judged by.
      seed: of the data.
    """

    task: Literal[
        "count", "mode", "copy", "copy_repeated", "reverse", "sort", "addition", "parity"
    ]  # fmt: skip
    hint: str | None = None
    num_values: int = 64
    train_length: int = 20
    test_lengths: tuple[int, ...] = (20, 25, 30, 40)
    num_train: int = 20_000
    num_test: int = 200
    seed: int = 0

    @override
    def validate(self) -> None:
        self.require_positive("num_values", "train_length", "num_train", "num_test")
        if self.hint is not None and self.hint not in HINTS.get(self.task, ()):
            raise self.error("hint", f"None or one of {HINTS.get(self.task, ())} for {self.task}")
        if not self.test_lengths or min(self.test_lengths) < 1:
            raise self.error("test_lengths", "at least one length, none below 1")
        needed = 10 if self.task == "addition" else self.longest
        if self.num_values < needed and self.task not in ("mode", "copy_repeated", "parity"):
            raise self.error("num_values", f"at least {needed}, to have different values")
        if self.num_values < 2:
            raise self.error("num_values", "at least 2")

    @property
    def longest(self) -> int:
        """The largest length of all rows."""
        return max(self.train_length, *self.test_lengths)

    @property
    def bos(self) -> int:
        """The token that starts a row; SEP, EOS, padding, a hint's question and places follow."""
        return self.num_values

    @property
    def sep(self) -> int:
        """The token before an answer."""
        return self.num_values + 1

    @property
    def eos(self) -> int:
        """The token after an answer."""
        return self.num_values + 2

    @property
    def padding(self) -> int:
        """The token of the rest of a row."""
        return self.num_values + 3

    @property
    def ask(self) -> int:
        """The token between two parts of a question: plus, or a hint's own question."""
        return self.num_values + 4

    @property
    def places(self) -> int:
        """The first of the tokens that name places."""
        return self.num_values + 5

    @property
    def vocab_size(self) -> int:
        """All tokens; there are names for one place more than the longest row has."""
        return self.places + self.longest + 1

    def make(self) -> "AlgorithmicRows":
        """The rows; those of a config are made once."""
        return _make(self)


class Rows(NamedTuple):
    """`tokens`, `targets` int32 and `weights` float32, each `[N, T]`; answers and EOS weigh 1."""

    tokens: np.ndarray
    targets: np.ndarray
    weights: np.ndarray


class AlgorithmicRows:
    """See `AlgorithmicConfig`. Attributes: `train`, `Rows`; `tests`, `Rows` by length."""

    def __init__(self, config: AlgorithmicConfig):
        """Draws everything."""
        self.config = config
        rng = np.random.default_rng([config.seed, 0])
        lengths = rng.integers(1, config.train_length + 1, config.num_train)
        is_aux = (np.arange(config.num_train) % 2 == 1) & (config.task == "sort")
        questions = [
            hint_question(config, rng, n) if aux and config.hint else question(config, rng, n)
            for n, aux in zip(lengths.tolist(), is_aux, strict=True)
        ]
        self.train = _rows(config, questions)
        self.tests = {}
        for length in config.test_lengths:
            rng = np.random.default_rng([config.seed, 1, length])
            asked = [question(config, rng, length) for _ in range(config.num_test)]
            self.tests[length] = _rows(config, asked)


@functools.cache
def _make(config: AlgorithmicConfig) -> AlgorithmicRows:
    return AlgorithmicRows(config)


def question(config: AlgorithmicConfig, rng: np.random.Generator, length: int) -> Question:
    """A random question of the task, and its answer, without BOS, SEP and EOS."""
    match config.task:
        case "count":
            first = int(rng.integers(config.num_values - length + 1))
            return [first, first + length - 1], list(range(first, first + length))
        case "mode":
            return _mode(config, rng, length)
        case "copy_repeated":
            tokens = rng.integers(2, size=length).tolist()
            return tokens, tokens
        case "parity":
            return _parity(config, rng, length)
        case "addition":
            return _addition(config, rng, length)
    tokens = _different(config, rng, length)
    answers: dict[str, Callable[[list[int]], list[int]]] = {
        "copy": list, "reverse": lambda t: t[::-1], "sort": sorted,
    }  # fmt: skip
    return tokens, answers[config.task](tokens)


def hint_question(config: AlgorithmicConfig, rng: np.random.Generator, length: int) -> Question:
    """A random question of the hint to sorting."""
    tokens = _different(config, rng, length)
    ordered, rank = sorted(tokens), int(rng.integers(length))
    element = ordered[rank]
    match config.hint:
        case "successor":
            return [*tokens, config.ask, element], ordered[rank + 1 : rank + 2]
        case "predecessor":
            return [*tokens, config.ask, element], ordered[:rank][-1:]
        case "fill":
            without = [*ordered[:rank], config.ask, *ordered[rank + 1 :]]
            return [*tokens, config.ask, *without], [element]
    return [*tokens, config.ask, element], [rank % 2]


def _different(config: AlgorithmicConfig, rng: np.random.Generator, length: int) -> list[int]:
    return rng.permutation(config.num_values)[:length].tolist()


def _mode(config: AlgorithmicConfig, rng: np.random.Generator, length: int) -> Question:
    tokens = rng.integers(max(2, config.num_values // 4), size=length)
    counts = np.bincount(tokens)
    # One more of the most frequent, so that it is alone.
    most = int(counts.argmax())
    if (counts == counts.max()).sum() > 1:
        tokens[np.flatnonzero(tokens != most)[0]] = most
    return tokens.tolist(), [most]


def _parity(config: AlgorithmicConfig, rng: np.random.Generator, length: int) -> Question:
    bits = rng.integers(2, size=length)
    if config.hint is None:
        return bits.tolist(), [int(bits.sum() % 2)]
    places = _places(config, rng, length)
    return _named(places, bits), _named(places, bits.cumsum() % 2)


def _addition(config: AlgorithmicConfig, rng: np.random.Generator, length: int) -> Question:
    terms = np.zeros((2, length + 1), int)  # lowest digit first
    terms[:, :length] = rng.integers(10, size=(2, length))
    total = np.zeros(length + 1, int)
    carry = 0
    for place in range(length + 1):
        carry, total[place] = divmod(int(terms[:, place].sum()) + carry, 10)
    if config.hint is None:
        a, b, answer = ([int(d) for d in digits[::-1]] for digits in (*terms, total))
    else:
        places = _places(config, rng, length + 1)
        a, b, answer = (_named(places, digits) for digits in (*terms, total))
    return [*a, config.ask, *b], answer


def _places(config: AlgorithmicConfig, rng: np.random.Generator, count: int) -> np.ndarray:
    first = rng.integers(config.longest + 2 - count)
    return config.places + first + np.arange(count)


def _named(places: np.ndarray, values: np.ndarray) -> list[int]:
    return np.stack([places, values], axis=1).ravel().tolist()


def _rows(config: AlgorithmicConfig, questions: list[Question]) -> Rows:
    sequences = [
        ([config.bos, *asked, config.sep], [*answer, config.eos]) for asked, answer in questions
    ]
    T = max(len(asked) + len(answer) for asked, answer in sequences)
    tokens = np.full((len(sequences), T), config.padding, np.int32)
    weights = np.zeros((len(sequences), T - 1), np.float32)
    for row, (asked, answer) in enumerate(sequences):
        end = len(asked) + len(answer)
        tokens[row, :end] = [*asked, *answer]
        weights[row, len(asked) - 1 : end - 1] = 1
    return Rows(tokens[:, :-1], np.where(weights > 0, tokens[:, 1:], 0), weights)
