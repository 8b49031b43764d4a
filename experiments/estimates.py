"""What several seeds say together: a mean, and the interval it is known to."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import scipy.stats

from experiments.figures import Series

CONFIDENCE = 0.95


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean over seeds with its confidence interval (Student's t, 95 %), each of any shape.

    Attributes:
      mean: over the first axis.
      margin: half the width of the interval; 0 for one seed, of which nothing is known.
    """

    mean: np.ndarray
    margin: np.ndarray

    @staticmethod
    def of(values: Any) -> "Estimate":
        """From values of shape `[seeds, ...]`."""
        values = np.asarray(values, np.float64)
        n = len(values)
        if n == 1:
            return Estimate(values[0], np.zeros_like(values[0]))
        error = values.std(axis=0, ddof=1) / np.sqrt(n)
        return Estimate(values.mean(axis=0), scipy.stats.t.ppf((1 + CONFIDENCE) / 2, n - 1) * error)

    def __str__(self) -> str:
        return f"{self.mean:.3g} ± {self.margin:.1g}" if self.margin else f"{self.mean:.3g}"


def curve(
    label: str,
    x: Sequence[float],
    values: Any,
    *,
    line: Literal["-", "--", ""] = "-",
    marker: bool = False,
) -> Series:
    """The mean of `values [seeds, points]` against `x [points]`, with its interval as a band."""
    estimate = Estimate.of(values)
    return Series(
        label=label,
        x=x,
        y=estimate.mean.tolist(),
        low=(estimate.mean - estimate.margin).tolist(),
        high=(estimate.mean + estimate.margin).tolist(),
        line=line,
        marker=marker,
    )
