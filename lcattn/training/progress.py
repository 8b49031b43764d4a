"""What the person at the terminal sees."""

import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

_SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """A progress bar with loss, tokens/s and time left; plain lines where there is no terminal.

    Args:
      num_steps: the length of the run.
      step: where it starts.
      console: where to print (default: standard error).
    """

    def __init__(self, num_steps: int, step: int = 0, console: Console | None = None):
        self._console = console or Console(stderr=True)
        self._num_steps = num_steps
        self._last_line = float("-inf")
        self._bar = None
        if self._console.is_terminal or self._console.is_jupyter:
            self._bar = Bar(
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.description}"),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._task = self._bar.add_task("compiling", total=num_steps, completed=step)
            self._bar.start()

    def update(self, step: int, loss: float, tokens_per_second: float) -> None:
        """Shows how far the run is."""
        text = f"loss {loss:.4f}"
        if tokens_per_second:  # Not known before the second step.
            text += f"  {tokens_per_second:,.0f} tokens/s"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, description=text)
        elif time.monotonic() - self._last_line > _SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            self.print(f"step {step}/{self._num_steps}  {text}")

    def print(self, text: str) -> None:
        """Prints a line above the bar."""
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def close(self) -> None:
        """Leaves the bar as it stands."""
        if self._bar is not None:
            self._bar.stop()


class Stopwatch:
    """Tokens per second of training itself: not compilation, evaluation, or checkpoints."""

    def __init__(self) -> None:
        self._tokens = 0
        self._seconds = 0.0
        self._last: float | None = None

    def lap(self, tokens: int) -> None:
        """A step of so many tokens ended. The first only starts the clock: it compiled."""
        now = time.perf_counter()
        if self._last is not None:
            self._tokens += tokens
            self._seconds += now - self._last
        self._last = now

    def skip(self) -> None:
        """Leaves out the time since the last lap."""
        self._last = time.perf_counter()

    @property
    def tokens_per_second(self) -> float:
        """The mean so far; 0 before there is one."""
        return self._tokens / self._seconds if self._seconds else 0.0
