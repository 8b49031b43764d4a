"""Run folders: `results.json` holds every number, `report.md` and its figures are made from it.

A report is regenerated from its folder alone by `python -m experiments.reporting RUN_DIR`.
"""

import dataclasses
import datetime
import importlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import rich.table
from rich.console import Console

import lcattn
from experiments.figures import Figure

RESULTS = "results.json"
REPORT = "report.md"

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
    """A table of a report. Floats are shown with three significant digits, None as a dash."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[Any]]

    def markdown(self) -> str:
        """The table in Markdown, under its title."""
        rows = [self.header, ["---"] * len(self.header), *self._text()]
        lines = ["| " + " | ".join(cell.replace("|", r"\|") for cell in row) + " |" for row in rows]
        return "\n".join([f"**{self.title}**", "", *lines])

    def rich(self) -> rich.table.Table:
        """The table for a terminal."""
        table = rich.table.Table(title=self.title, title_justify="left")
        for i, name in enumerate(self.header):
            numeric = any(isinstance(row[i], int | float) for row in self.rows)
            table.add_column(name, justify="right" if numeric else "left")
        for row in self._text():
            table.add_row(*(rich.markup.escape(cell) for cell in row))
        return table

    def _text(self) -> list[list[str]]:
        return [[show(cell) for cell in row] for row in self.rows]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """A page: paragraphs of Markdown, tables and figures, in order."""

    title: str
    blocks: Sequence[str | Table | Figure]

    def save(self, run_dir: Path) -> Path:
        """Writes `report.md` and the figures into the run folder."""
        for block in self.blocks:
            if isinstance(block, Figure):
                block.save(run_dir)
        path = run_dir / REPORT
        path.write_text(self.markdown())
        return path

    def markdown(self) -> str:
        """The page, which takes its figures from files beside it."""
        return "\n\n".join([f"# {self.title}", *map(_markdown, self.blocks)]) + "\n"

    def print(self, console: Console | None = None) -> None:
        """Prints the tables to the terminal."""
        console = console or Console()
        for block in self.blocks:
            if isinstance(block, Table):
                console.print(block.rich())


def _markdown(block: str | Table | Figure) -> str:
    match block:
        case Table():
            return block.markdown()
        case Figure():
            return f"![{block.caption}]({block.file})\n\n{block.caption}"
        case _:
            return block


def show(value: Any) -> str:
    """A cell of a table as text."""
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def show_bytes(count: float) -> str:
    """A number of bytes in a unit a reader can take in."""
    for unit in ("B", "KiB", "MiB"):
        if abs(count) < 1024:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.3g} GiB"


def environment() -> dict[str, Any]:
    """What a number depends on besides the config: device, versions, commit, command, date."""
    device = jax.devices()[0]
    return {
        "command": _command(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "device": device.device_kind if device.platform != "cpu" else _cpu_name(),
        "platform": device.platform,
        "num_devices": jax.device_count(),
        "cpu_cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "versions": {
            "lcattn": lcattn.__version__,
            **{name: importlib.metadata.version(name) for name in _PACKAGES},
        },
        "commit": _commit(),
    }


def describe_environment(record: Mapping[str, Any]) -> str:
    """The lines of a report that say where its numbers come from."""
    cost = f"{record['cpu_seconds']:,} s of CPU time; " if "cpu_seconds" in record else ""
    return (
        f"`{record['command']}`\n\n{record['date']} on {describe_machine(record)}; {cost}"
        f"commit {record['commit'] or 'unknown'}."
    )


def describe_machine(record: Mapping[str, Any]) -> str:
    """Device, cores and versions."""
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    device = f"{record['num_devices']} × {record['device']} ({record['platform']})"
    return f"{device}, {record['cpu_cores']} CPU cores; Python {record['python']}, {versions}"


def write_results(run_dir: Path, results: Mapping[str, Any]) -> None:
    """Writes `results.json`, whole or not at all. Its key "script" names who made it."""
    run_dir.mkdir(parents=True, exist_ok=True)
    partial = run_dir / f"{RESULTS}.partial"
    partial.write_text(json.dumps(results, indent=2, allow_nan=False) + "\n")
    partial.replace(run_dir / RESULTS)


def publish(
    results: Mapping[str, Any], report: Callable[[Mapping[str, Any]], Report], run_dir: Path
) -> None:
    """Writes the results, and the report made from them, and prints its tables.

    The time that the process took of all cores goes with them: unlike seconds on the clock, it says
    what the script costs on a machine that does other work too.
    """
    environment = {**results["environment"], "cpu_seconds": round(time.process_time())}
    results = {**results, "environment": environment}
    write_results(run_dir, results)
    page = report(results)
    page.save(run_dir)
    page.print()
    print(f"\nreport: {run_dir / REPORT}")


def took(seconds: float) -> str:
    """The sentence on the time of a script that reads finished runs back."""
    return f"This took {seconds:.0f} s, runs that were already finished not counted."


def regenerate(run_dir: Path) -> Report:
    """Makes report and figures anew from the recorded results, and returns the report.

    Raises:
      ValueError: if the folder holds no results of one of the scripts.
    """
    try:
        results = json.loads((run_dir / RESULTS).read_text())
        script = results["script"]
    except (OSError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"{run_dir}: no results to report on ({error})") from error
    if not (Path(__file__).parent / f"{script}.py").is_file():
        raise ValueError(f"{run_dir}: results of an unknown script, {script!r}")
    report = importlib.import_module(f"experiments.{script}").report(results)
    report.save(run_dir)
    return report


def _command() -> str:
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    program = f"python -m {spec.name}" if spec else Path(sys.argv[0]).name
    # Where the results go decides none of them.
    return " ".join([program, *(a for a in sys.argv[1:] if not a.startswith("--run_dir"))])


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _commit() -> str | None:
    def git(*arguments: str) -> str:
        folder = Path(__file__).parent
        return subprocess.run(
            ["git", *arguments], cwd=folder, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + (
            " with changes" if git("status", "--porcelain", "--untracked-files=no") else ""
        )
    except (OSError, subprocess.CalledProcessError):
        return None


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m experiments.reporting RUN_DIR")
    try:
        regenerate(Path(sys.argv[1])).print()
    except ValueError as mistake:
        sys.exit(f"error: {mistake}")
