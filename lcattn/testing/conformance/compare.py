"""Assertions whose messages carry numbers."""

from typing import Any

import jax
import numpy as np


def relative_rms(actual: np.ndarray, expected: np.ndarray) -> float:
    """Root mean square of the difference over that of `expected`; NaN counts as infinitely far."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    if actual.shape != expected.shape:
        raise AssertionError(f"shape {actual.shape}, expected {expected.shape}")
    if not np.array_equal(np.isfinite(actual), np.isfinite(expected)):
        return np.inf
    # The scale goes first, so that neither huge nor tiny values leave float64 when squared.
    scale = np.max(np.abs(expected), initial=0) or 1.0
    difference, size = (
        np.sqrt(np.mean(np.square(x / scale)) if x.size else 0.0)
        for x in (actual - expected, expected)
    )
    return float(difference / (size + 1e-8))


def assert_close(what: str, actual: Any, expected: Any, tolerance: float) -> None:
    """Leaf by leaf, the relative RMS error is at most `tolerance`."""
    for name, a, e in _leaves(actual, expected):
        error = relative_rms(a, e)
        if not error <= tolerance:
            worst = _worst(np.asarray(a, np.float64), np.asarray(e, np.float64))
            raise AssertionError(
                f"{what}{name}: relative RMS error {error:.3g}, allowed {tolerance:.3g}; {worst}"
            )


def assert_identical(what: str, actual: Any, expected: Any) -> None:
    """Leaf by leaf, equal to the last bit."""
    for name, a, e in _leaves(actual, expected):
        if not np.array_equal(a, e, equal_nan=True):
            worst = _worst(np.asarray(a, np.float64), np.asarray(e, np.float64))
            raise AssertionError(f"{what}{name}: not bit-identical; {worst}")


def assert_zero(what: str, actual: Any) -> None:
    """Leaf by leaf, exactly zero."""
    for name, a in _named(actual):
        if np.any(a != 0):
            raise AssertionError(f"{what}{name}: {_count(a != 0)}; expected exact zeros")


def assert_finite(what: str, actual: Any) -> None:
    """Leaf by leaf, neither inf nor NaN."""
    for name, a in _named(actual):
        broken = ~np.isfinite(np.asarray(a, np.float64))
        if np.any(broken):
            raise AssertionError(f"{what}{name}: inf or NaN, {_count(broken)}")


def assert_raises(what: str, words: str, call: Any) -> None:
    """A ValueError that says `words`."""
    try:
        call()
    except ValueError as error:
        if words in str(error):
            return
        raise AssertionError(f"{what}: the error does not say {words!r}: {error}") from error
    raise AssertionError(f"{what}: expected a ValueError that says {words!r}, none was raised")


def _named(tree: Any) -> list[tuple[str, np.ndarray]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [(jax.tree_util.keystr(path), np.asarray(leaf)) for path, leaf in leaves]


def _leaves(actual: Any, expected: Any):
    left, right = _named(actual), _named(expected)
    if [name for name, _ in left] != [name for name, _ in right]:
        raise AssertionError(f"structure {[n for n, _ in left]}, expected {[n for n, _ in right]}")
    for (name, a), (_, e) in zip(left, right, strict=True):
        if a.shape != e.shape:
            raise AssertionError(f"{name}: shape {a.shape}, expected {e.shape}")
        yield name, a, e


def _worst(actual: np.ndarray, expected: np.ndarray) -> str:
    distance = np.where(np.isfinite(actual - expected), np.abs(actual - expected), np.inf)
    if not distance.size:
        return "no elements"
    at = np.unravel_index(np.argmax(distance), distance.shape)
    index = tuple(int(i) for i in at)
    return f"at {index} {actual[at]:.8g}, expected {expected[at]:.8g}"


def _count(where: np.ndarray) -> str:
    first = tuple(int(i[0]) for i in np.nonzero(where))
    return f"{np.count_nonzero(where)} of {where.size}, first at {first}"
