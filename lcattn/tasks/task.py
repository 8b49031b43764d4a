"""Tasks: what a training script needs to know of data."""

import dataclasses
from collections.abc import Sequence
from typing import Protocol, override, runtime_checkable

from lcattn.config import Config
from lcattn.tasks import mqar
from lcattn.tasks.batch import Batch
from lcattn.tasks.computed import ComputedConfig
from lcattn.tasks.corpus import CorpusConfig
from lcattn.tasks.mqar import MQARConfig
from lcattn.tasks.packing import PackedText
from lcattn.tasks.pipeline import BatchIterator, DataConfig
from lcattn.tasks.text import ByteTokenizer, Documents, TextFolderConfig


@runtime_checkable
class Task(Protocol):
    """Batches to train on, batches to be judged by, and what is measured on them.

    Attributes:
      vocab_size: token ids lie in `[0, vocab_size)`.
      metrics: which of "loss", "accuracy", "exact_match" and "bits_per_byte" mean something here.
        "exact_match" is the share of rows without a mistake; "bits_per_byte" is the mean loss in
        bits, where each target is a byte of text.
      slices: for each name that `evaluation` gives, the numbers that describe it, such as
        `{"length": 64, "num_pairs": 4}`: the coordinates of plots.
    """

    vocab_size: int
    metrics: tuple[str, ...]
    slices: dict[str, dict[str, int]]

    def train(self) -> BatchIterator:
        """A new iterator over training batches, at its beginning."""
        ...

    def evaluation(self) -> dict[str, Sequence[Batch]]:
        """Batches to be judged by, one sequence a slice. Filler rows have weight 0."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class MQARTaskConfig(Config):
    """Multi-query associative recall: a mixture to train on, another to be judged by.

    The default is the published task: batches of 256 in order, so each pass goes from easy rows to
    hard ones.

    Attributes:
      train: training data; each batch holds rows of one of these.
      evaluation: test data, one slice each. Rows differ from those of training at any seed.
      data: batching of the training data.
      eval_batch_size: rows in a batch of evaluation. None: as in training.
    """

    train: tuple[MQARConfig, ...] = mqar.PAPER_TRAIN
    evaluation: tuple[MQARConfig, ...] = mqar.PAPER_TEST
    data: DataConfig = dataclasses.field(
        default_factory=lambda: DataConfig(batch_size=256, shuffle=False)
    )
    eval_batch_size: int | None = None

    @override
    def validate(self) -> None:
        self.require_positive("eval_batch_size")
        if not self.train:
            raise self.error("train", "at least one MQARConfig")
        if len({config.vocab_size for config in self.train + self.evaluation}) > 1:
            raise self.error("train", "one vocab_size in all of train and evaluation")
        if len({config.name for config in self.evaluation}) < len(self.evaluation):
            raise self.error("evaluation", "no two configs of one length and number of pairs")

    def make(self) -> "MQARTask":
        """The task."""
        return MQARTask(self)


class ComputedTask:
    """A mixture of computed rows to train on, others to be judged by; see `Task`."""

    def __init__(
        self,
        train: Sequence[ComputedConfig],
        evaluation: Sequence[ComputedConfig],
        data: DataConfig,
        eval_batch_size: int | None,
        *,
        vocab_size: int,
        metrics: tuple[str, ...] = ("loss", "accuracy"),
    ):
        """Args: see `MQARTaskConfig` for the data, `Task` for what it is called."""
        self.vocab_size = vocab_size
        self.metrics = metrics
        self.slices = {test.name: test.numbers for test in evaluation}
        self._train, self._evaluation = train, evaluation
        self._data, self._eval_data = data, for_evaluation(data, eval_batch_size)

    def train(self) -> BatchIterator:
        """A new iterator over training batches, at its beginning."""
        return self._data.make(*(config.make("train") for config in self._train))

    def evaluation(self) -> dict[str, Sequence[Batch]]:
        """The test rows, one slice for each config."""
        return {test.name: self._eval_data.batches(test.make("test")) for test in self._evaluation}


class MQARTask(ComputedTask):
    """See `MQARTaskConfig` and `Task`."""

    def __init__(self, config: MQARTaskConfig):
        super().__init__(
            config.train, config.evaluation, config.data, config.eval_batch_size,
            vocab_size=config.train[0].vocab_size,
        )  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextTaskConfig(Config):
    """Next-byte prediction on packed text.

    Attributes:
      corpus: where the text comes from.
      length: tokens in a row.
      data: batching of the training text.
      eval_batch_size: rows in a batch of evaluation. None: as in training.
      max_eval_batches: judge by this many batches of held-out rows, the same at each evaluation.
        None: by all.
    """

    corpus: TextFolderConfig | CorpusConfig
    length: int = 1024
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    eval_batch_size: int | None = None
    max_eval_batches: int | None = None

    @override
    def validate(self) -> None:
        self.require_positive("length", "eval_batch_size", "max_eval_batches")

    def make(self) -> "TextTask":
        """The task. Reads the text."""
        return TextTask(self)


class TextTask:
    """See `TextTaskConfig` and `Task`.

    Attributes:
      train_documents: the training text, for count models fitted beside.
      heldout_documents: the held-out text.
    """

    vocab_size = ByteTokenizer.vocab_size
    metrics: tuple[str, ...] = ("loss", "accuracy", "bits_per_byte")

    def __init__(self, config: TextTaskConfig):
        self.config = config
        self.train_documents: Documents = config.corpus.make("train")
        self.heldout_documents: Documents = config.corpus.make("heldout")
        self.slices = {"heldout": {"length": config.length}}
        self._train_rows = PackedText(self.train_documents, config.length)
        self._heldout_rows = PackedText(self.heldout_documents, config.length)

    def train(self) -> BatchIterator:
        """A new iterator over training batches, at its beginning."""
        return self.config.data.make(self._train_rows)

    def evaluation(self) -> dict[str, Sequence[Batch]]:
        """The held-out text, in a random order, so that any first batches are a fair sample."""
        data = for_evaluation(self.config.data, self.config.eval_batch_size)
        batches = data.replace(shuffle=True).batches(self._heldout_rows)
        return {"heldout": batches[: self.config.max_eval_batches]}


def for_evaluation(data: DataConfig, batch_size: int | None) -> DataConfig:
    """One pass over all rows in their order."""
    return data.replace(
        batch_size=batch_size or data.batch_size, shuffle=False, num_epochs=1, drop_remainder=False
    )
