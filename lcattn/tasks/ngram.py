"""Count models of bytes: what a language model has to beat."""

import math
from collections.abc import Iterator

import numpy as np

from lcattn.errors import argument_error
from lcattn.tasks.text import ByteTokenizer, Documents

_MAX_ORDER = 7  # ByteTokenizer.vocab_size ** 7 is the last power that fits in 63 bits


class NGramModel:
    r"""Interpolated Witten-Bell n-gram model of bytes: order 2 is a bigram, 3 a trigram model.

    For a context h of n-1 tokens, seen c(h) times before d(h) different bytes,

        p_n(w | h) = (c(h w) + d(h) p_{n-1}(w | h')) / (c(h) + d(h))

    where h' is h without its oldest token, and p_0 is uniform over the 256 bytes. The share given
    to the shorter context is the rate at which h has shown new bytes; a context never seen leaves
    all to h'. No constant is tuned, so nothing of the held-out text is spent on it.

    Like the neural models it predicts each byte of a document once, the first ones from `bos`.

    Source: Witten and Bell, "The zero-frequency problem" (1991), method C; interpolated as in Chen
    and Goodman, "An Empirical Study of Smoothing Techniques for Language Modeling" (1998).

    Args:
      documents: the training text.
      order: n, from 1 to 7.
    """

    def __init__(self, documents: Documents, order: int):
        if not 1 <= order <= _MAX_ORDER:
            raise argument_error("order", f"an integer from 1 to {_MAX_ORDER}", order)
        if not documents.data.size:
            raise argument_error("documents", "some text", "none")
        self.order = order
        self._tables = [_Table(codes) for codes in _ngram_codes(documents, order)]

    def probabilities(self, documents: Documents) -> np.ndarray:
        """The probability of each byte of the documents, concatenated: [total bytes] float64."""
        p = np.full(documents.data.size, 1 / 256)
        for table, codes in zip(self._tables, _ngram_codes(documents, self.order), strict=True):
            p = table.interpolate(codes, p)
        return p

    def bits_per_byte(self, documents: Documents) -> float:
        """Mean of -log2 of the probability of each byte."""
        if not documents.data.size:
            raise argument_error("documents", "some text", "none")
        return float(-np.log(self.probabilities(documents)).mean() / math.log(2))


class _Table:
    """Counts of the n-grams of one order and of their contexts, as sorted codes."""

    def __init__(self, codes: np.ndarray):
        self.ngrams, self.counts = np.unique(codes, return_counts=True)
        # Sorted n-grams of one context stand together, the context being the leading digits.
        self.contexts, first, self.kinds = np.unique(
            self.ngrams // ByteTokenizer.vocab_size, return_index=True, return_counts=True
        )
        self.totals = np.add.reduceat(self.counts, first)

    def interpolate(self, codes: np.ndarray, shorter: np.ndarray) -> np.ndarray:
        context = codes // ByteTokenizer.vocab_size
        count = _look_up(self.ngrams, self.counts, codes)
        total = _look_up(self.contexts, self.totals, context)
        kinds = _look_up(self.contexts, self.kinds, context)
        seen = total > 0
        return np.where(seen, (count + kinds * shorter) / np.where(seen, total + kinds, 1), shorter)


def _look_up(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The value of each wanted key, 0 where it is absent; `keys` are sorted and not empty."""
    place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[place] == wanted, values[place], 0)


def _ngram_codes(documents: Documents, order: int) -> Iterator[np.ndarray]:
    """For n = 1 .. order: the n-gram that ends at each byte, as one integer, oldest token first."""
    data, offsets = documents.data, documents.offsets
    position = np.arange(data.size) - np.repeat(offsets[:-1], np.diff(offsets))
    codes, digit = data.astype(np.int64), 1
    yield codes
    for back in range(1, order):
        digit *= ByteTokenizer.vocab_size
        previous = np.where(position >= back, np.roll(data, back), np.int64(ByteTokenizer.bos))
        codes = codes + previous * digit
        yield codes
