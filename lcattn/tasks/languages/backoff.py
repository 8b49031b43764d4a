"""What counting can know of a language from its strings so far: an n-gram model in context."""

from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from lcattn.tasks.languages.instances import LanguagesConfig

_START = -1


def backoff_laws(
    config: LanguagesConfig, tokens: Sequence[int], max_order: int
) -> Float[np.ndarray, "n T V"]:
    r"""The law of each next letter by counts of n-grams in the row so far; order 2 is a bigram.

    With u the last n-1 letters of the string (starts of strings count as letters before it),

    .. math::
        P_n(a | u) = c(ua) / c(u) \text{ if } c(ua) > 0

    and the other letters share what is left in proportion to the law of the shorter context. c(u)
    counts the current occurrence too, whose letter is yet to come, so that something is always
    left. The empty context falls back to the uniform law over the letters seen so far in the row.

    Source: Akyürek et al. (2024), arXiv:2401.12973, its n-gram baselines.

    Args:
      config: which tokens are letters.
      tokens: a row.
      max_order: the largest n.

    Returns:
      `[n, T, V]` float64: for orders 1 to n, after each token, the law of the next one; zeros at
      padding.
    """
    contexts: Counter[tuple[int, ...]] = Counter()
    followers: defaultdict[tuple[int, ...], Counter[int]] = defaultdict(Counter)
    seen = np.zeros(config.vocab_size, bool)
    laws = np.zeros((max_order, len(tokens), config.vocab_size))
    start = (_START,) * (max_order - 1)

    string, suffixes = start, [start[:n] for n in range(max_order)]
    contexts.update(suffixes)
    for t, token in enumerate(tokens):
        if token > config.separator:
            break
        if token == config.separator:
            string = start
        else:
            for context in suffixes:
                followers[context][token] += 1
            seen[token] = True
            string = (*string, token)
        suffixes = [string[len(string) - n :] for n in range(max_order)]
        contexts.update(suffixes)
        law = seen / seen.sum() if seen.any() else np.zeros(config.vocab_size)
        for n, context in enumerate(suffixes):
            laws[n, t] = law = _with_counts(law, followers[context], contexts[context])
    return laws


def _with_counts(shorter: np.ndarray, counts: Counter, total: int) -> np.ndarray:
    """The law after a context, given that after the shorter one."""
    law = np.zeros_like(shorter)
    for letter, count in counts.items():
        law[letter] = count / total
    unseen = np.where(law > 0, 0, shorter)
    if unseen.any():
        return law + (1 - law.sum()) * unseen / unseen.sum()
    return law / law.sum() if counts else shorter
