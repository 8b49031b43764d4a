"""One process per run folder, and signals that let it end in order."""

import contextlib
import fcntl
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from lcattn.training.errors import RunLockedError


@contextlib.contextmanager
def lock(run_dir: Path) -> Iterator[None]:
    """Holds the run folder, creating it where it is missing.

    The operating system lets go of the lock when the process ends, however it ends.

    Raises:
      RunLockedError: if another process holds it.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    if jax.process_index() != 0:  # The first process holds it for all hosts.
        yield
        return
    with (run_dir / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunLockedError(f"another process is training in {run_dir}") from None
        yield


class Interrupt:
    """Notes the first SIGINT (Ctrl-C) or SIGTERM, for the loop to act on between two steps.

    The second one ends the process at once. Outside of the main thread, where Python delivers no
    signals, this does nothing.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "Interrupt":
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGINT, signal.SIGTERM):
                self._previous[signum] = signal.signal(signum, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    def _note(self, signum: int, frame: object) -> None:
        self.signum = signum
        for other in self._previous:
            signal.signal(other, signal.SIG_DFL)
