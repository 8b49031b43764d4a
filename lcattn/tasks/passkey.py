"""Passkey retrieval, on bytes: a number hidden in five sentences that repeat, asked for at the end.

    There is an important info hidden inside a lot of irrelevant text. [...]
    The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. [...]
    The pass key is 9054. Remember it. 9054 is the pass key.
    The grass is green. [...]
    What is the pass key? The pass key is 9054.

The key is uniform on 1 .. 50,000. Only its digits and the full stop after them have weight: the
full stop, since a number is right only where it ends. Published tests sample text and take the
first integer in it; where the most likely token is always taken, that integer is right exactly if
every weighted token of the row is predicted (`exact_match`).

Source: Mohtashami and Jaggi, "Landmark Attention: Random-Access Infinite Context Length for
Transformers" (2023), arXiv:2305.16300, whose released prompt this is. It counts the length of the
filler in characters; here the row has a given length in bytes, and filler completes it.
"""

import dataclasses
from typing import ClassVar, override

import numpy as np

from lcattn.tasks.batch import Batch
from lcattn.tasks.computed import ComputedRows
from lcattn.tasks.needle import HaystackConfig
from lcattn.tasks.text import ByteTokenizer

_PREAMBLE = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
    "I will quiz you about the important information there.\n"
)
_FILLER = (
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
)
_QUESTION = "What is the pass key? The pass key is "
_LARGEST = 50_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class PasskeyConfig(HaystackConfig):
    """Rows of one length, in bytes.

    Attributes:
      preamble: begin with the published instruction, 149 bytes that say what will be asked. A model
        trained on the task does not need it.
    """

    vocab_size: ClassVar[int] = ByteTokenizer.vocab_size

    preamble: bool = True

    @override
    def validate(self) -> None:
        super().validate()
        if self.haystack_size(_LARGEST) < 0:
            needed = self.length - self.haystack_size(_LARGEST)
            raise self.error("length", f"at least {needed}, for needle, question and answer")

    def haystack_size(self, key: int) -> int:
        """Bytes of filler in a row with this key."""
        return self.length - len(self.text(key, "", ""))

    def text(self, key: int, before: str, after: str) -> str:
        """The whole row, from the filler before the needle and the filler after it."""
        preamble = _PREAMBLE if self.preamble else ""
        needle = f"The pass key is {key}. Remember it. {key} is the pass key."
        return f"{preamble}{before}\n{needle}\n{after}\n{_QUESTION}{key}."

    @override
    def make(self, split: str = "train") -> "Passkey":
        return Passkey(self, split)


class Passkey(ComputedRows[PasskeyConfig]):
    """Rows of text with a passkey."""

    def __init__(self, config: PasskeyConfig, split: str = "train"):
        super().__init__(config, split, config.length)

    @override
    def _rows(self, indices: np.ndarray) -> Batch:
        shape = len(indices), self.config.length
        tokens, targets = np.empty(shape, np.int32), np.zeros(shape, np.int32)
        weights = np.zeros(shape, np.float32)
        for row, rng in self._generators(indices):
            key = int(rng.integers(1, _LARGEST + 1))
            ids = ByteTokenizer().encode(self._text(key, rng))
            answer = len(str(key)) + 1
            tokens[row] = ids[:-1]
            targets[row, -answer:] = ids[-answer:]
            weights[row, -answer:] = 1
        return {"tokens": tokens, "targets": targets, "weights": weights}

    def _text(self, key: int, rng: np.random.Generator) -> str:
        size = self.config.haystack_size(key)
        split = self.config.split_point(size, rng)
        filler = _FILLER * (size // len(_FILLER) + 1)
        # As published, the sentences begin anew after the needle.
        return self.config.text(key, filler[:split], filler[: size - split])
