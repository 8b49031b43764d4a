"""Short RASP-L programs: proof that a task has a solution that works at every length.

Each maps the tokens of a row so far to the next token at every position; only what it says after
SEP counts. There is none for copying repeated tokens, addition and parity without their hints,
which have no short one, and for reversal, on which the source is silent.
"""

from collections.abc import Callable

import numpy as np

from lcattn.tasks.algorithmic import rasp
from lcattn.tasks.algorithmic.rows import AlgorithmicConfig

Program = Callable[[AlgorithmicConfig, np.ndarray], np.ndarray]


def count(config: AlgorithmicConfig, x: np.ndarray) -> np.ndarray:
    """From the first number on, one more each time, until the second."""
    first = rasp.induct(x, rasp.full(x, config.bos))
    last = rasp.induct(x, first, how="min")
    up = np.where(x == last, config.eos, x + 1)
    return np.where(x == config.sep, first, up)


def mode(config: AlgorithmicConfig, x: np.ndarray) -> np.ndarray:
    """The token whose latest occurrence has the most of its kind up to it."""
    so_far = rasp.sel_width(rasp.select(x, x, rasp.equals))
    so_far = np.where(x < config.num_values, so_far, 0)
    most = rasp.kqv(rasp.full(x, 0), rasp.full(x, 0), so_far, how="max")
    winner = rasp.kqv(so_far, most, x, how="max")
    return np.where(x == config.sep, winner, config.eos)


def copy(config: AlgorithmicConfig, x: np.ndarray) -> np.ndarray:
    """What followed the current token before, since no token comes twice in the question."""
    following = rasp.induct(x, np.where(x == config.sep, config.bos, x))
    return np.where(following == config.sep, config.eos, following)


def sort(config: AlgorithmicConfig, x: np.ndarray) -> np.ndarray:
    """The smallest of the larger ones."""
    current = np.where(x == config.sep, -1, x)
    values = np.where(x < config.num_values, x, -1)
    return rasp.kqv(values, current, values, rasp.greater, how="min", default=config.eos)


def parity(config: AlgorithmicConfig, x: np.ndarray) -> np.ndarray:
    """Place by place: the bit of this place and the parity before it."""
    before = rasp.shift_right(x, 1, default=config.sep)
    so_far = np.where(before == config.sep, 0, before)
    return _placewise(config, x, (rasp.induct(x, x, how="min") + so_far) % 2)


def addition(config: AlgorithmicConfig, x: np.ndarray) -> np.ndarray:
    """Place by place: both digits and the carry, which the last digit of the answer tells."""
    before = rasp.shift_right(x, 1, default=config.sep)
    digits = rasp.induct(x, x, how="min") + rasp.induct(x, x, how="max")
    # digits + carry in = digit + 10 · carry out, so without the carry out this is 0 or -1.
    carry = (before != config.sep) & (rasp.shift_right(digits, 2) - before >= 9)
    return _placewise(config, x, (digits + carry) % 10)


def _placewise(config: AlgorithmicConfig, x: np.ndarray, value: np.ndarray) -> np.ndarray:
    """The value after the name of a place, the name of the next place after a value."""
    first = rasp.induct(x, rasp.full(x, config.bos))
    following = rasp.shift_right(x, 1) + 1
    is_asked = rasp.sel_width(rasp.select(x, following, rasp.equals)) > 0
    next_place = np.where(is_asked, following, config.eos)
    after = np.where(x >= config.places, value, next_place)
    return np.where(x == config.sep, first, after)


PROGRAMS: dict[tuple[str, str | None], Program] = {
    ("count", None): count,
    ("mode", None): mode,
    ("copy", None): copy,
    ("sort", None): sort,
    ("addition", "index"): addition,
    ("parity", "scratchpad"): parity,
}
"""The program of each task and hint that has one."""


def run(config: AlgorithmicConfig, asked: list[int], limit: int) -> list[int]:
    """What the program of a task answers, token by token until EOS or `limit` tokens."""
    program = PROGRAMS[config.task, config.hint]
    tokens = [config.bos, *asked, config.sep]
    answer: list[int] = []
    while len(answer) < limit:
        token = int(program(config, np.array(tokens))[-1])
        if token == config.eos:
            break
        tokens.append(token)
        answer.append(token)
    return answer
