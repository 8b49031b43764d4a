"""Figures of reports, in one style: colours that colour-blind readers tell apart, units on axes."""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.image import AxesImage

from lcattn.errors import argument_error

# Okabe and Ito (2008), black last, and olive for their yellow, which no line on white can wear.
# Every curve also has a marker of its own.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#999933", "#000000")
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
      low, high: the ends of an interval around each point, drawn as a band. None: no band.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float | None]
    line: Literal["-", "--", ""] = "-"
    marker: bool = True
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Panel:
    """One pair of axes.

    Attributes:
      xlabel, ylabel: with the unit, as in "time (ms)".
      series: what is drawn.
      xscale, yscale: "log2" marks powers of 2 by their values.
      ylim: None fits the data.
      shade: a stretch of x to set off from the rest. None: none.
      direct_labels: name each curve at its last point, beside the axes, where many curves make a
        legend hard to follow. The panel is then larger.
    """

    xlabel: str
    ylabel: str
    series: Sequence[Series]
    title: str = ""
    xscale: Literal["linear", "log", "log2"] = "linear"
    yscale: Literal["linear", "log", "log2"] = "linear"
    ylim: tuple[float, float] | None = None
    shade: tuple[float, float] | None = None
    direct_labels: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeatMap:
    """A grid of numbers between two limits.

    Attributes:
      xlabel, ylabel: with the unit.
      columns, rows: what stands at the cells of the axes; the first row is at the top.
      values: `[row][column]`. None: an empty cell.
      limits: the numbers of the first and the last colour.
      label: what the numbers are, for the colour bar that all heat maps of a figure share.
      written: write each number into its cell. Off for grids too fine to read, which also name
        only some of their columns and rows.
    """

    xlabel: str
    ylabel: str
    columns: Sequence[str]
    rows: Sequence[str]
    values: Sequence[Sequence[float | None]]
    title: str = ""
    limits: tuple[float, float] = (0.0, 1.0)
    label: str = ""
    written: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bars:
    """A number for each of many names, as horizontal bars from the top.

    Attributes:
      xlabel: with the unit.
      names, values: what the bars are and how long.
      margins: half the width of the interval around each value, drawn as a whisker.
      levels: values to compare with by name, drawn as lines across the bars.
      limits: of the axis.
    """

    xlabel: str
    names: Sequence[str]
    values: Sequence[float]
    margins: Sequence[float]
    title: str = ""
    levels: Mapping[str, float] = dataclasses.field(default_factory=dict)
    limits: tuple[float, float] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Figure:
    """Panels with one legend and one colour bar, saved as `<name>.png`.

    Attributes:
      name: of the file.
      caption: one or two sentences on what is seen.
      panels: from left to right. Heat maps have the same limits and label.
      max_columns: panels in a row; more of them begin another row.
    """

    name: str
    caption: str
    panels: Sequence[Panel | HeatMap | Bars]
    max_columns: int = 4

    @property
    def file(self) -> str:
        """The name of its file."""
        return f"{self.name}.png"

    def save(self, folder: Path) -> Path:
        """Draws the figure into `folder` and returns the file."""
        curves = [panel for panel in self.panels if isinstance(panel, Panel)]
        labels = dict.fromkeys(s.label for panel in curves for s in panel.series)
        looks = dict(zip(labels, _looks(), strict=False))
        columns = min(len(self.panels), self.max_columns)
        rows = math.ceil(len(self.panels) / columns)
        named = any(panel.direct_labels for panel in curves)
        width, height = (7.2, 5.0) if named else (4.6, 3.6) if curves else (3.2, 2.6)
        bars = [len(panel.names) for panel in self.panels if isinstance(panel, Bars)]
        if bars:
            width, height = 6.2, max(height, 1.2 + 0.24 * max(bars))
        with mpl.rc_context(_STYLE):
            canvas = Canvas(figsize=(width * columns, height * rows))
            grid = canvas.subplots(rows, columns, squeeze=False).flat
            colors = {}
            for axes, panel in itertools.zip_longest(grid, self.panels):
                match panel:
                    case Panel():
                        _draw(axes, panel, looks)
                    case HeatMap():
                        colors[axes] = _draw_grid(axes, panel)
                    case Bars():
                        _draw_bars(axes, panel)
                    case _:
                        axes.set_axis_off()
            if labels and not named:
                _add_legend(canvas, max_columns=min(4, 2 * columns))
            if colors:
                _add_color_bar(canvas, colors, self.panels)
            path = folder / self.file
            canvas.savefig(path)
        return path


def _looks() -> Iterator[tuple[str, str]]:
    """Pairs of colour and marker, no two alike."""
    for turn in range(len(MARKERS)):
        yield from zip(PALETTE, MARKERS[turn:] + MARKERS[:turn], strict=True)


def _add_legend(canvas: Canvas, max_columns: int) -> None:
    handles = {
        label: handle
        for axes in canvas.axes
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    ncols = min(len(handles), max_columns)
    canvas.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=ncols)


def _add_color_bar(
    canvas: Canvas, colors: dict[Axes, AxesImage], panels: Sequence[Panel | HeatMap | Bars]
) -> None:
    scales = {(p.label, p.limits) for p in panels if isinstance(p, HeatMap)}
    if len(scales) > 1:
        raise argument_error("panels", "heat maps of one label and one pair of limits", scales)
    [(label, _)] = scales
    bar = canvas.colorbar(next(iter(colors.values())), ax=list(colors), label=label)
    bar.outline.set_visible(False)


def _draw(axes: Axes, panel: Panel, looks: dict[str, tuple[str, str]]) -> None:
    for series in panel.series:
        color, marker = looks[series.label]
        y = [math.nan if value is None else value for value in series.y]
        axes.plot(
            series.x, y, color=color, label=series.label, linestyle=series.line or "none",
            marker=marker if series.marker else "", markersize=5,
        )  # fmt: skip
        if series.low is not None and series.high is not None:
            axes.fill_between(
                series.x, series.low, series.high, color=color, alpha=0.2, linewidth=0
            )
    _scale(axes, "x", panel.xscale)
    _scale(axes, "y", panel.yscale)
    axes.set(xlabel=panel.xlabel, ylabel=panel.ylabel, title=panel.title)
    if panel.ylim is not None:
        axes.set_ylim(panel.ylim)
    if panel.shade is not None:
        axes.axvspan(*panel.shade, color="black", alpha=0.08, linewidth=0)
    if panel.direct_labels:
        _name_curves(axes, panel, looks)


def _name_curves(axes: Axes, panel: Panel, looks: dict[str, tuple[str, str]]) -> None:
    """Writes names beside the axes, in the order of the curves' ends, and ties them to these."""
    axes.autoscale_view()  # otherwise the axes fit the data only once they are drawn
    ends = {}
    for series in panel.series:
        points = [(x, y) for x, y in zip(series.x, series.y, strict=True) if y is not None]
        if points:
            ends[series.label] = points[-1]
    heights = {label: _height(axes, end) for label, end in ends.items()}
    placed = _spread(heights, gap=min(0.055, 1 / max(len(heights), 1)))
    for label, height in placed.items():
        color, _ = looks[label]
        axes.annotate(
            label, xy=ends[label], xytext=(1.04, height), textcoords="axes fraction",
            fontsize=8, va="center", color=color,
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-", "color": color, "linewidth": 0.7, "alpha": 0.6, "shrinkB": 4,
                "relpos": (0, 0.5),
            },
        )  # fmt: skip


def _height(axes: Axes, point: tuple[float, float]) -> float:
    """Where a point stands in the axes, 0 at the bottom and 1 at the top."""
    pixels = axes.transData.transform(point)
    return float(axes.transAxes.inverted().transform(pixels)[1])


def _spread(heights: dict[str, float], gap: float) -> dict[str, float]:
    """Moves heights apart to at least `gap`, keeping their order, within 0 and 1."""
    order = sorted(heights, key=heights.__getitem__)
    placed, floor = {}, 0.0
    for label in order:
        placed[label] = floor = max(heights[label], floor)
        floor += gap
    ceiling = 1.0
    for label in reversed(order):
        placed[label] = ceiling = min(placed[label], ceiling)
        ceiling -= gap
    return placed


def _draw_grid(axes: Axes, panel: HeatMap) -> AxesImage:
    low, high = panel.limits
    values = [[math.nan if v is None else v for v in row] for row in panel.values]
    image = axes.imshow(values, cmap="cividis", vmin=low, vmax=high, aspect="auto")
    axes.grid(visible=False)
    axes.set_xticks(*_named(panel.columns, all_of_them=panel.written))
    axes.set_yticks(*_named(panel.rows, all_of_them=panel.written))
    axes.set(xlabel=panel.xlabel, ylabel=panel.ylabel, title=panel.title)
    for y, row in enumerate(panel.values if panel.written else ()):
        for x, value in enumerate(row):
            if value is not None:
                dark = value < (low + high) / 2
                axes.text(
                    x, y, f"{value:.2f}", ha="center", va="center", fontsize=7,
                    color="white" if dark else "black",
                )  # fmt: skip
    return image


def _draw_bars(axes: Axes, panel: Bars) -> None:
    places = range(len(panel.names))
    axes.barh(
        places, panel.values, xerr=panel.margins, color=PALETTE[0], alpha=0.75,
        error_kw={"elinewidth": 1, "capsize": 2},
    )  # fmt: skip
    axes.set_yticks(places, panel.names)
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    if panel.limits is not None:
        axes.set_xlim(panel.limits)
    for color, (name, value) in zip(itertools.cycle(PALETTE[1:]), panel.levels.items()):
        axes.axvline(value, color=color, linestyle="--", linewidth=1)
        axes.annotate(
            f"{name} ", xy=(value, 1.0), xycoords=("data", "axes fraction"), rotation=30,
            ha="left", va="bottom", fontsize=7, color=color, annotation_clip=False,
        )  # fmt: skip
    axes.set(xlabel=panel.xlabel, title=panel.title)


def _named(names: Sequence[str], *, all_of_them: bool) -> tuple[range, Sequence[str]]:
    """Where ticks stand and what they say: at most eight, unless all are asked for."""
    step = 1 if all_of_them else math.ceil(len(names) / 8)
    return range(0, len(names), step), names[::step]


def _scale(axes: Axes, axis: Literal["x", "y"], scale: str) -> None:
    if scale == "log2":
        getattr(axes, f"set_{axis}scale")("log", base=2)
        # Lengths and sizes are read as 64 and 4096, not as powers.
        getattr(axes, f"{axis}axis").set_major_formatter("{x:g}")
    else:
        getattr(axes, f"set_{axis}scale")(scale)
