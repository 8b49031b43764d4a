"""Retrieval from a haystack as a task: trained at some lengths, judged over depths and lengths."""

import dataclasses
from typing import override

from lcattn.config import Config
from lcattn.tasks.needle import NeedleConfig
from lcattn.tasks.passkey import PasskeyConfig
from lcattn.tasks.pipeline import DataConfig
from lcattn.tasks.task import ComputedTask


@dataclasses.dataclass(frozen=True, kw_only=True)
class NeedleTaskConfig(Config):
    """Needles or passkeys; see `lcattn.tasks.needle` and `lcattn.tasks.passkey`.

    Attributes:
      train: training data, of one kind; each batch holds rows of one of these.
      lengths: of the test rows, which are otherwise like the first of `train`.
      depths: of the needle in the test rows, in per cent of the haystack. Each length is tested at
        each depth: these are the slices.
      eval_examples: test rows of each length and depth.
      data: batching of the training data.
      eval_batch_size: rows in a batch of evaluation. None: as in training.
    """

    train: tuple[NeedleConfig, ...] | tuple[PasskeyConfig, ...]
    lengths: tuple[int, ...]
    depths: tuple[int, ...] = (0, 25, 50, 75, 100)
    eval_examples: int = 100
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    eval_batch_size: int | None = None

    @override
    def validate(self) -> None:
        self.require_positive("eval_examples", "eval_batch_size")
        if not self.train:
            raise self.error("train", "at least one NeedleConfig or PasskeyConfig")
        if len({config.vocab_size for config in self.train}) > 1:
            raise self.error("train", "one vocab_size in all")
        for field in ("lengths", "depths"):
            values = getattr(self, field)
            if not values or len(set(values)) < len(values):
                raise self.error(field, "at least one value, none of them twice")
        self.evaluation()  # each must be possible

    def evaluation(self) -> tuple[NeedleConfig | PasskeyConfig, ...]:
        """The test data, length by length."""
        return tuple(
            self.train[0].replace(length=length, depth=depth, num_examples=self.eval_examples)
            for length in self.lengths
            for depth in self.depths
        )

    def make(self) -> "NeedleTask":
        """The task."""
        return NeedleTask(self)


class NeedleTask(ComputedTask):
    """See `NeedleTaskConfig` and `Task`."""

    def __init__(self, config: NeedleTaskConfig):
        super().__init__(
            config.train, config.evaluation(), config.data, config.eval_batch_size,
            vocab_size=config.train[0].vocab_size, metrics=("loss", "accuracy", "exact_match"),
        )  # fmt: skip
