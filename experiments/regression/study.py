"""What studies share: a record of numbers per seed, and the table that sets papers beside them."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.estimates import Estimate
from experiments.figures import Panel, Series
from experiments.reporting import Table
from lcattn.config import Config
from lcattn.training import SeedsConfig, SeedsResult


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study(Config):
    """One question to models of several seeds.

    A record of it is JSON: "measured" holds the numbers of each seed by name, of which those that
    `published` names are compared; "published" and "source" come from the config.

    Attributes:
      training: the run.
      published: figures of the paper by the name of what is measured here.
      source: where they are from.
    """

    training: SeedsConfig
    published: Mapping[str, float] = dataclasses.field(default_factory=dict)
    source: str = ""

    def run(self, run_dir: Path) -> dict[str, Any]:
        """Trains, or reads back, what the study is about, and gives its record."""
        raise NotImplementedError

    def record(self, measured: Mapping[str, Any], **more: Any) -> dict[str, Any]:
        """What every record holds; `measured` are arrays `[S]`."""
        values = {name: np.asarray(value, float).tolist() for name, value in measured.items()}
        missing = sorted(set(self.published) - set(values))
        if missing:
            raise self.error("published", f"names among {sorted(values)}")
        return {
            "measured": values,
            "published": dict(self.published),
            "source": self.source,
            "num_steps": self.training.num_steps,
            **more,
        }


def curves(result: SeedsResult) -> dict[str, Any]:
    """The evaluations of a run: "steps" `[E]`, and each metric `[S, E]`, as JSON has them."""
    return {
        "steps": result.steps.tolist(),
        "metrics": {name: values.T.tolist() for name, values in result.metrics.items()},
    }


def against_paper(records: Mapping[str, Mapping[str, Any]]) -> Table:
    """Every published figure beside ours."""
    rows = []
    for study, record in records.items():
        for name, published in record["published"].items():
            ours = Estimate.of(record["measured"][name])
            difference = f"{float(ours.mean) - published:+.2g}"
            rows.append((study, name, published, str(ours), difference, record["source"]))
    header = ("study", "what", "published", "ours", "difference", "source")
    return Table(title="The papers' figures and ours", header=header, rows=rows)


def level(label: str, x: Sequence[float], value: float) -> Series:
    """A horizontal line."""
    return Series(label=label, x=[x[0], x[-1]], y=[value, value], line="--", marker=False)


def identity_panel(title: str, pairs: Iterable[tuple[Any, Any]], names: tuple[str, str]) -> Panel:
    """Numbers against those they should be, and the line on which they would agree."""
    x, y = (
        np.concatenate([np.ravel(side) for side in sides]) for sides in zip(*pairs, strict=True)
    )
    ends = [float(min(x.min(), y.min())), float(max(x.max(), y.max()))]
    return Panel(
        title=title, xlabel=names[0], ylabel=names[1],
        series=[
            Series(label="entries, all seeds", x=x.tolist(), y=y.tolist(), line=""),
            Series(label="equality", x=ends, y=ends, line="--", marker=False),
        ],
    )  # fmt: skip
