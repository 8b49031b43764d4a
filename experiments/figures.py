"""Figures of reports, in one style: colours that colour-blind readers tell apart, units on axes."""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas

# Okabe and Ito (2008), black last. Every curve also has a marker of its own.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")

_STYLE = {
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.constrained_layout.use": True,
    "figure.dpi": 120,
    "font.size": 10,
    "grid.alpha": 0.3,
    "legend.fontsize": 8,
    "legend.frameon": False,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Series:
    """One curve, or a set of points.

    Attributes:
      label: its name in the legend. Series of one label share colour and marker in a figure.
      x, y: the points. A None in `y` leaves a gap.
      line: "-", "--", or "" for points alone.
      marker: whether to mark the points; long curves look better without.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float | None]
    line: Literal["-", "--", ""] = "-"
    marker: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class Panel:
    """One pair of axes. Labels carry the unit, as in "time (ms)"; `ylim` None fits the data."""

    xlabel: str
    ylabel: str
    series: Sequence[Series]
    title: str = ""
    xscale: Literal["linear", "log", "log2"] = "linear"
    yscale: Literal["linear", "log", "log2"] = "linear"
    ylim: tuple[float, float] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Figure:
    """Panels side by side with one legend, saved as `<name>.png`."""

    name: str
    caption: str
    panels: Sequence[Panel]

    def save(self, folder: Path) -> Path:
        """Draws the figure into `folder` and returns the file."""
        labels = list(dict.fromkeys(s.label for panel in self.panels for s in panel.series))
        looks = {label: (PALETTE[i], MARKERS[i]) for i, label in _cycle(labels)}
        with mpl.rc_context(_STYLE):
            canvas = Canvas(figsize=(4.6 * len(self.panels), 3.6))
            grid = canvas.subplots(1, len(self.panels), squeeze=False)
            for axes, panel in zip(grid[0], self.panels, strict=True):
                _draw(axes, panel, looks)
            handles = {label: h for a in grid[0] for h, label in zip(*_legend(a), strict=True)}
            canvas.legend(
                handles.values(),
                handles.keys(),
                loc="outside lower center",
                ncols=min(len(handles), 4),
            )
            path = folder / f"{self.name}.png"
            canvas.savefig(path)
        return path


def _cycle(labels: Sequence[str]) -> Iterator[tuple[int, str]]:
    return ((i % len(PALETTE), label) for i, label in enumerate(labels))


def _legend(axes: Axes) -> tuple[list, list]:
    return axes.get_legend_handles_labels()


def _draw(axes: Axes, panel: Panel, looks: dict[str, tuple[str, str]]) -> None:
    for series in panel.series:
        color, marker = looks[series.label]
        y = [math.nan if value is None else value for value in series.y]
        axes.plot(
            series.x, y, color=color, label=series.label, linestyle=series.line or "none",
            marker=marker if series.marker else "", markersize=5,
        )  # fmt: skip
    _scale(axes, "x", panel.xscale)
    _scale(axes, "y", panel.yscale)
    axes.set(xlabel=panel.xlabel, ylabel=panel.ylabel, title=panel.title)
    if panel.ylim is not None:
        axes.set_ylim(panel.ylim)


def _scale(axes: Axes, axis: Literal["x", "y"], scale: str) -> None:
    if scale == "log2":
        getattr(axes, f"set_{axis}scale")("log", base=2)
        # Lengths and sizes are read as 64 and 4096, not as powers.
        getattr(axes, f"{axis}axis").set_major_formatter("{x:g}")
    else:
        getattr(axes, f"set_{axis}scale")(scale)
