"""Where metrics go: one protocol, a JSON-lines file, TensorBoard events."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from tensorboardX import SummaryWriter


@runtime_checkable
class MetricWriter(Protocol):
    """Anything that takes metrics. Hand your own to `train(..., writers=[...])`."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Records the metrics of one step."""

    def close(self) -> None:
        """Called once, at the end of the run or when it stops."""


class JsonlWriter:
    """One JSON object a line: `{"step": 10, "train/loss": 2.3, ...}`.

    Args:
      path: the file. Lines of an earlier, interrupted run stay, up to `step`.
      step: the step that the run continues from. Later lines are cut off, and so is a half-written
        last line, since the run will write them again.
    """

    def __init__(self, path: Path, step: int = 0):
        self.path = path
        _keep_lines_up_to(path, step)
        self._file = path.open("a", encoding="utf-8")

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Appends a line and hands it to the operating system, so that `kill -9` cannot lose it."""
        self._file.write(json.dumps({"step": step, **metrics}) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


class TensorBoardWriter:
    """TensorBoard events, written without TensorFlow.

    Args:
      folder: where the event files go.
      step: the step that the run continues from; TensorBoard hides what was recorded after it.
    """

    def __init__(self, folder: Path, step: int = 0):
        self._writer = SummaryWriter(str(folder), purge_step=step + 1, flush_secs=10)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Records each metric as a scalar."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Flushes and closes."""
        self._writer.close()


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """The records of a file that `JsonlWriter` wrote, for tables and plots."""
    with Path(path).open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def _keep_lines_up_to(path: Path, step: int) -> None:
    if not path.exists():
        return
    kept = []
    for line in path.read_bytes().splitlines(keepends=True):
        # Steps only grow along the file, and only its last line can be half-written.
        if not line.endswith(b"\n") or json.loads(line)["step"] > step:
            break
        kept.append(line)
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.writelines(kept)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
