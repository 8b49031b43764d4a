"""Data sets that are computed, not stored: any row can be had at any time, in any process."""

import abc
import dataclasses
import hashlib
import json
import zlib
from collections.abc import Iterator
from typing import override

import numpy as np

from lcattn.config import Config
from lcattn.errors import argument_error
from lcattn.tasks.batch import Batch


@dataclasses.dataclass(frozen=True, kw_only=True)
class ComputedConfig(Config):
    """What configs of computed data sets share.

    Attributes:
      length: tokens in a row, T.
      num_examples: rows in the data set.
      seed: of the data set.
    """

    length: int
    num_examples: int = 1000
    seed: int = 0

    @override
    def validate(self) -> None:
        self.require_positive("length", "num_examples")
        if self.seed < 0:
            raise self.error("seed", "a value of at least 0")

    @property
    @abc.abstractmethod
    def name(self) -> str:
        """A name for tables and metric keys, such as `length_64_pairs_4`."""

    @property
    @abc.abstractmethod
    def numbers(self) -> dict[str, int]:
        """The numbers in the name: coordinates of plots."""

    @abc.abstractmethod
    def make(self, split: str = "train") -> "ComputedRows":
        """The data set. Splits of different names share no random numbers."""


class ComputedRows[C: ComputedConfig](abc.ABC):
    """Row i is a pure function of (seed, split, i).

    The random numbers are those of a Philox generator whose key is made from the config and the
    split and whose counter starts at the row's own number, so rows can be computed in any order, on
    any number of processes.

    Args:
      config: the data set.
      split: its name; splits of different names share no random numbers.
      sizes: of the rows. Data sets of other sizes share no random numbers either.
    """

    def __init__(self, config: C, split: str, *sizes: int):
        self.config = config
        self.split = split
        entropy = [config.seed, zlib.crc32(split.encode()), *sizes]
        self._key = np.random.SeedSequence(entropy).generate_state(2, np.uint64)

    def __len__(self) -> int:
        return self.config.num_examples

    @property
    def fingerprint(self) -> str:
        """Equal for data sets of equal rows; part of the state of an iterator over them."""
        description = json.dumps([self.config.to_dict(), self.split], sort_keys=True)
        return hashlib.sha256(description.encode()).hexdigest()

    def batch(self, indices: np.ndarray) -> Batch:
        """The rows of the given indices.

        Args:
          indices: [B] integers in `[0, len(self))`.

        Returns:
          `tokens`, `targets` [B, T] int32, `weights` [B, T] float32, `example_ids` [B] int64.
        """
        indices = np.asarray(indices, np.int64)
        if indices.size and not (indices.min() >= 0 and indices.max() < len(self)):
            span = f"{indices.min()}..{indices.max()}"
            raise argument_error("indices", f"row numbers in [0, {len(self)})", span)
        return {**self._rows(indices), "example_ids": indices}

    @abc.abstractmethod
    def _rows(self, indices: np.ndarray) -> Batch:
        """`tokens`, `targets` and `weights` of the rows."""

    def _generators(self, indices: np.ndarray) -> Iterator[tuple[int, np.random.Generator]]:
        """For each row its place in the batch and its random numbers, to be used in turn."""
        # One generator for the batch, set to each row's counter: six times cheaper than a generator
        # for each row.
        philox = np.random.Philox(key=self._key)
        rng, state = np.random.Generator(philox), philox.state
        for row, index in enumerate(indices):
            state["state"]["counter"][:] = (0, index, 0, 0)
            philox.state = state
            yield row, rng
