"""What several seeds say together: a mean, the interval it is known to, and what others found."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import scipy.stats

from experiments.figures import Series
from experiments.reporting import Table

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


class Comparison(NamedTuple):
    """Somebody else's figure and ours.

    Attributes:
      of: the model or the setting.
      what: what was measured, in words.
      quoted: the figure of the source.
      source: where it is from.
      ours: the same from our run, a number for each seed.
    """

    of: str
    what: str
    quoted: float
    source: str
    ours: Sequence[float]


class Quoted(NamedTuple):
    """A figure to set ours beside.

    Attributes:
      of: the model or the setting.
      what: what was measured, in words.
      quoted: the figure.
      source: where it is from.
      ours: finds the same in the record of our run, a number for each seed.
    """

    of: str
    what: str
    quoted: float
    source: str
    ours: Callable[[Any], Sequence[float]]

    def beside(self, record: Any) -> Comparison:
        """This figure and that of a record."""
        return Comparison(*self[:4], ours=self.ours(record))


def comparison_table(comparisons: Iterable[Comparison]) -> Table:
    """Quoted figures beside ours, with the difference and the single seeds."""
    rows = []
    for of, what, quoted, source, ours in comparisons:
        estimate = Estimate.of(ours)
        difference = f"{float(estimate.mean) - quoted:+.2g}"
        seeds = ", ".join(f"{float(x):.3g}" for x in ours)
        rows.append((of, what, quoted, str(estimate), difference, seeds, source))
    header = ("of", "figure", "quoted", "ours", "difference", "ours, by seed", "source")
    return Table(title="Quoted figures beside ours", header=header, rows=rows)
