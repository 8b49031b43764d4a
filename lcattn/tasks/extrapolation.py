"""Text, trained on at one length and judged at longer ones, each time by the same bytes."""

import dataclasses
from collections.abc import Sequence
from typing import override

import numpy as np

from lcattn.errors import argument_error
from lcattn.tasks.batch import Batch
from lcattn.tasks.packing import PackedText
from lcattn.tasks.task import TextTask, TextTaskConfig, for_evaluation
from lcattn.tasks.text import Documents


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExtrapolationTaskConfig(TextTaskConfig):
    """Next-byte prediction, judged at multiples of the training length.

    What is judged is the beginning of held-out documents, as much of each as the longest rows hold;
    shorter documents are left out. Rows of every length cut these same bytes, so that losses differ
    by the context that a row gives and by nothing else: a model that holds at every length gains
    from it.

    Attributes:
      factors: lengths to judge at, over the training length; each divides the largest.
      eval_batch_size: rows in a batch of evaluation at the training length, fewer at longer ones,
        for the same number of tokens. None: as in training.
      max_eval_batches: judge by this many batches at each length. None: by all documents.
    """

    factors: tuple[int, ...] = (1, 2, 4, 8, 16)

    @override
    def validate(self) -> None:
        super().validate()
        if not self.factors or min(self.factors) < 1 or len(set(self.factors)) < len(self.factors):
            raise self.error("factors", "different whole numbers of at least 1")
        if any(max(self.factors) % factor for factor in self.factors):
            raise self.error("factors", "divisors of the largest of them")
        if self.eval_rows % max(self.factors):
            expected = f"a multiple of the largest factor, {max(self.factors)}"
            raise self.error("eval_batch_size", expected)

    @property
    def eval_rows(self) -> int:
        """Rows in a batch of evaluation at the training length."""
        return self.eval_batch_size or self.data.batch_size

    @override
    def make(self) -> "ExtrapolationTask":
        return ExtrapolationTask(self)


class ExtrapolationTask(TextTask):
    """See `ExtrapolationTaskConfig` and `Task`.

    Attributes:
      judged_documents: the text that is judged at every length.
    """

    def __init__(self, config: ExtrapolationTaskConfig):
        super().__init__(config)
        self.slices = {
            f"length_{factor * config.length}": {"length": factor * config.length, "factor": factor}
            for factor in config.factors
        }
        self.judged_documents = _beginnings(self.heldout_documents, config)
        self._batches = {
            name: for_evaluation(config.data, config.eval_rows // numbers["factor"]).batches(
                PackedText(self.judged_documents, numbers["length"])
            )
            for name, numbers in self.slices.items()
        }

    @override
    def evaluation(self) -> dict[str, Sequence[Batch]]:
        """The judged text in rows of each length."""
        return dict(self._batches)


def _beginnings(documents: Documents, config: ExtrapolationTaskConfig) -> Documents:
    """As much of each document as the longest rows hold, of those that have so much."""
    most = max(config.factors)
    length = config.length * most
    long = [i for i, text in enumerate(documents) if len(text) >= length]
    if not long:
        longest = max((len(text) for text in documents), default=0)
        raise argument_error(
            "ExtrapolationTaskConfig.factors",
            f"a held-out document of length * {most} = {length} bytes",
            f"{longest} bytes at most",
        )
    if config.max_eval_batches is not None:
        chosen = np.random.default_rng(config.data.seed).permutation(long)
        long = sorted(chosen[: config.max_eval_batches * config.eval_rows // most].tolist())
    texts = [documents[i][:length].tobytes() for i in long]
    return Documents(texts, [documents.names[i] for i in long])
