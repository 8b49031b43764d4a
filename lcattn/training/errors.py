"""Why a run stopped before its end."""

from collections.abc import Sequence
from pathlib import Path


class NonFiniteLossError(ArithmeticError):
    """The loss or its gradient became NaN or infinite. No checkpoint holds the state after it.

    Attributes:
      step: the update at fault, counted from 1 as in the metrics.
      example_ids: the batch's examples, where the task names them.
      checkpoint: the last good checkpoint, if there is one.
      seed: which of several seeds trained at once, None where there is one.
    """

    def __init__(
        self,
        step: int,
        values: dict[str, float],
        example_ids: Sequence[int] | None,
        checkpoint: Path | None,
        *,
        seed: int | None = None,
    ):
        self.step, self.example_ids, self.checkpoint = step, example_ids, checkpoint
        self.seed = seed
        run = "" if seed is None else f" of seed {seed}"
        ids = "not named by the task" if example_ids is None else ", ".join(map(str, example_ids))
        super().__init__(
            f"step {step}{run}: loss {values['loss']}, gradient norm {values['grad_norm']}; "
            f"examples of the batch: {ids}; "
            f"last good checkpoint: {checkpoint or 'none was saved'}"
        )


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, or none could be read."""


class ConfigMismatchError(ValueError):
    """The run folder holds a run of another configuration."""


class RunLockedError(RuntimeError):
    """Another process is training in the same run folder."""


class TrainingInterrupted(SystemExit):
    """Ctrl-C or SIGTERM came; a checkpoint was saved, and the same call will continue from it.

    A `SystemExit`: a script that does not catch it ends with the customary status (128 + signal)
    and no stack trace.
    """

    def __init__(self, signum: int, step: int, checkpoint: Path):
        self.step, self.checkpoint = step, checkpoint
        super().__init__(128 + signum)

    def __str__(self) -> str:
        return f"interrupted after step {self.step}; saved {self.checkpoint}"
