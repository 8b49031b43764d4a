"""What counting can know of a language from its strings so far: an n-gram model in context."""

from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np

from lcattn.tasks.languages.instances import LanguagesConfig

_START = -1


def backoff_law(config: LanguagesConfig, tokens: Sequence[int], order: int) -> np.ndarray:
    r"""The law of each next letter by counts of n-grams in the row so far; order 2 is a bigram.

    With u the last n-1 letters of the string (starts of strings count as letters before it),

    .. math::
        P_n(a | u) = c(ua) / c(u) \text{ if } c(ua) > 0

    and the other letters share what is left in proportion to the law of the shorter context. c(u)
    counts the current occurrence too, whose letter is yet to come, so that something is always
    left. The empty context is uniform over the letters seen so far in the row.

    Source: Akyürek et al. (2024), arXiv:2401.12973, its n-gram baselines.

    Args:
      config: which tokens are letters.
      tokens: a row.
      order: n, from 1.

    Returns:
      `[T, V]` float64: after each token, the law of the next one.
    """
    contexts: defaultdict[tuple[int, ...], int] = defaultdict(int)
    followers: defaultdict[tuple[int, ...], Counter[int]] = defaultdict(Counter)
    seen = np.zeros(config.vocab_size, bool)
    laws = np.zeros((len(tokens), config.vocab_size))

    def suffixes(string: list[int]) -> list[tuple[int, ...]]:
        return [tuple(string[len(string) - n :]) for n in range(order)]

    start = [_START] * (order - 1)
    string = start
    for context in suffixes(string):
        contexts[context] += 1
    for t, token in enumerate(tokens):
        if token < config.separator:
            for context in suffixes(string):
                followers[context][token] += 1
            seen[token] = True
            string = [*string, token]
        else:
            string = start
        law = seen / max(seen.sum(), 1)
        for context in suffixes(string):
            contexts[context] += 1
            law = _with_counts(law, followers[context], contexts[context])
        laws[t] = law
    return laws


def _with_counts(shorter: np.ndarray, counts: Counter[int], total: int) -> np.ndarray:
    """The law of a context, given that of the shorter one."""
    law = np.zeros_like(shorter)
    for letter, count in counts.items():
        law[letter] = count / total
    unseen = np.where(law > 0, 0, shorter)
    left = 1 - law.sum()
    if unseen.sum() > 0:
        return law + left * unseen / unseen.sum()
    return law / law.sum() if law.sum() > 0 else shorter
