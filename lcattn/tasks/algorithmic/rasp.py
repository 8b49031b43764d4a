"""The core of RASP-L: what one causal transformer layer can do, as functions on sequences.

A sequence is an integer array `[T]`; every function is causal. Positions (`indices`) may only be
compared, or moved by a constant: sums of positions would not mean the same at other lengths.

Source: Zhou et al., "What Algorithms can Transformers Learn? A Study in Length Generalization"
(2023), arXiv:2310.16028.
"""

from collections.abc import Callable
from typing import Literal

import numpy as np

Sequence = np.ndarray
Predicate = Callable[[np.ndarray, np.ndarray], np.ndarray]

equals: Predicate = np.equal
greater: Predicate = np.greater


def full(x: Sequence, value: int) -> Sequence:
    """The value at every position."""
    return np.full_like(x, value)


def indices(x: Sequence) -> Sequence:
    """Every position."""
    return np.arange(len(x))


def select(k: Sequence, q: Sequence, predicate: Predicate) -> np.ndarray:
    """Which keys each query attends to, `[T, T]`: those of the past for which `predicate(k, q)`."""
    return np.tril(predicate(k[None, :], q[:, None]))


def sel_width(selected: np.ndarray) -> Sequence:
    """How many keys each query attends to."""
    return selected.sum(axis=1)


def aggr(
    selected: np.ndarray, v: Sequence, how: Literal["mean", "max", "min"] = "mean", default: int = 0
) -> Sequence:
    """The mean (rounded down), largest or smallest of the values attended to; else the default."""
    width = sel_width(selected)
    wide = np.broadcast_to(v, selected.shape)
    match how:
        case "mean":
            found = np.where(selected, wide, 0).sum(axis=1) // np.maximum(width, 1)
        case "max":
            found = np.where(selected, wide, np.iinfo(int).min).max(axis=1)
        case "min":
            found = np.where(selected, wide, np.iinfo(int).max).min(axis=1)
    return np.where(width > 0, found, default)


def kqv(
    k: Sequence,
    q: Sequence,
    v: Sequence,
    predicate: Predicate = equals,
    how: Literal["mean", "max", "min"] = "mean",
    default: int = 0,
) -> Sequence:
    """One attention head."""
    return aggr(select(k, q, predicate), v, how, default)


def shift_right(x: Sequence, steps: int, default: int = 0) -> Sequence:
    """The value some positions before."""
    return kqv(indices(x) + steps, indices(x), x, default=default)


def induct(x: Sequence, q: Sequence, how: Literal["max", "min"] = "max") -> Sequence:
    """The token that followed the last ("max") or first ("min") q of the past; -1 for none."""
    place = kqv(shift_right(x, 1, default=-1), q, indices(x), how=how, default=-1)
    return kqv(indices(x), place, x, default=-1)
