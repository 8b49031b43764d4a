"""From a random-access data set to batches: shuffled, sharded, prefetched, resumable.

Everything is decided by the number of a batch: which rows it holds, in which order, in which pass
over the data. So the state of an iterator is one integer, any batch can be had without its
predecessors, and the batches do not depend on the number of processes: each computes its own slice
of the same global batch.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, overload, override, runtime_checkable

import jax
import numpy as np

from lcattn.config import Config
from lcattn.errors import argument_error
from lcattn.tasks.batch import Batch

if TYPE_CHECKING:
    # Imported where it is used: it takes a second, and making or counting text does not need it.
    import grain


@runtime_checkable
class Source(Protocol):
    """A data set with random access to its rows."""

    @property
    def fingerprint(self) -> str:
        """Equal for data sets of equal rows."""
        ...

    def __len__(self) -> int:
        """Number of rows."""
        ...

    def batch(self, indices: np.ndarray) -> Batch:
        """The rows of the given indices, [B] int64. Called from several threads."""
        ...


class Records:
    """A source of rows that are stored one by one, such as those of `tfds.data_source`.

    Args:
      records: anything with a length and random access to dictionaries of arrays, each one row of a
        batch (`lcattn.tasks.batch`).
      name: of the data, its version and split included; it stands for the rows in `fingerprint`.
    """

    def __init__(self, records: Sequence[Mapping[str, Any]], name: str):
        self.records = records
        self.fingerprint = name

    def __len__(self) -> int:
        return len(self.records)

    def batch(self, indices: np.ndarray) -> Batch:
        """The rows of the given indices; `example_ids` are the indices unless they are stored."""
        rows = [self.records[int(i)] for i in indices]
        batch = {key: np.stack([row[key] for row in rows]) for key in rows[0]}
        return {"example_ids": np.asarray(indices, np.int64)} | batch


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig(Config):
    """How rows become batches.

    Attributes:
      batch_size: rows in a batch, over all processes.
      seed: of the shuffling.
      shuffle: take rows in a new random order in each pass over the data. Off: in order.
      num_epochs: passes over the data. None: without end.
      drop_remainder: leave out the rows of a pass that do not fill a batch. Off: the last batch is
        completed with rows of weight 0 and example id -1, so that shapes stay static.
      shard_index: which slice of each batch this process computes. None: `jax.process_index()`.
      shard_count: number of slices. None: `jax.process_count()`.
      num_threads: threads that prepare batches ahead. 0: batches are made when asked for.
      prefetch: batches prepared ahead.
    """

    batch_size: int = 32
    seed: int = 0
    shuffle: bool = True
    num_epochs: int | None = None
    drop_remainder: bool = True
    shard_index: int | None = None
    shard_count: int | None = None
    num_threads: int = 1
    prefetch: int = 2

    @override
    def validate(self) -> None:
        self.require_positive("batch_size", "num_epochs", "shard_count", "prefetch")
        if not 0 <= self.seed < 2**32:
            raise self.error("seed", "a value in [0, 2**32)")
        if self.num_threads < 0:
            raise self.error("num_threads", "a value of at least 0")
        if (self.shard_index is None) != (self.shard_count is None):
            raise self.error("shard_index", "both shard_index and shard_count, or neither")
        if self.shard_index is not None and self.shard_count is not None:
            if not 0 <= self.shard_index < self.shard_count:
                raise self.error("shard_index", f"a value in [0, {self.shard_count})")
            if self.batch_size % self.shard_count:
                raise self.error("batch_size", f"a multiple of shard_count = {self.shard_count}")

    def batches(self, *sources: Source) -> "Batches":
        """The batches as a sequence. With several sources, each batch holds rows of one of them.

        Shuffling then shuffles the batches of all sources; without it they follow one another.

        Raises:
          ValueError: if a source cannot fill a single batch, or the batch cannot be divided among
            the processes.
        """
        import grain

        if not sources:
            raise argument_error("sources", "at least one data set", "none")
        *row_seeds, batch_seed = np.random.SeedSequence(self.seed).generate_state(len(sources) + 1)
        local = self._local_rows()
        parts, first_id = [], 0
        for source, seed in zip(sources, row_seeds, strict=True):
            if len(source) < (self.batch_size if self.drop_remainder else 1):
                raise self.error("batch_size", f"at most the {len(source)} rows of the data set")
            rows = grain.MapDataset.range(len(source))
            if self.shuffle:
                rows = rows.shuffle(seed=int(seed))
            groups = rows.batch(
                self.batch_size, drop_remainder=self.drop_remainder, batch_fn=np.array
            )
            load = functools.partial(_load, source, first_id, self.batch_size, local)
            parts.append(groups.map(load))
            first_id += len(source)
        dataset = grain.MapDataset.concatenate(parts)
        if self.shuffle and len(parts) > 1:
            dataset = dataset.shuffle(seed=int(batch_seed))
        if self.num_epochs != 1:
            dataset = dataset.repeat(self.num_epochs)
        order = (self.batch_size, self.seed, self.shuffle, self.drop_remainder)
        description = repr((order, [source.fingerprint for source in sources]))
        return Batches(dataset, hashlib.sha256(description.encode()).hexdigest())

    def make(self, *sources: Source) -> "BatchIterator":
        """An iterator over `batches(*sources)` that can be saved and resumed."""
        return BatchIterator(self.batches(*sources), self.num_threads, self.prefetch)

    def _local_rows(self) -> slice:
        """The rows of each batch that this process computes."""
        if self.shard_index is None or self.shard_count is None:
            index, count = jax.process_index(), jax.process_count()
            return self.replace(shard_index=index, shard_count=count)._local_rows()
        rows = self.batch_size // self.shard_count
        return slice(self.shard_index * rows, (self.shard_index + 1) * rows)


def _load(
    source: Source, first_id: int, batch_size: int, local: slice, indices: np.ndarray
) -> Batch:
    """Computes this process's rows of a batch; ids count through all sources from `first_id`."""
    fillers = batch_size - len(indices)
    mine = np.pad(indices, (0, fillers), mode="edge")[local]
    is_filler = np.arange(batch_size)[local] >= len(indices)
    batch = source.batch(mine)
    if is_filler.any():
        for key in ("targets", "weights"):
            batch[key] = batch[key] * ~is_filler[:, None]
    batch["example_ids"] = np.where(is_filler, -1, batch["example_ids"] + first_id)
    return batch


class Batches(Sequence[Batch]):
    """A sequence of batches, each made when it is asked for.

    It can be iterated any number of times; for reading ahead in threads, see `BatchIterator`.

    Attributes:
      fingerprint: equal for sequences of equal batches, whatever the number of passes or processes.
    """

    def __init__(self, dataset: "grain.MapDataset", fingerprint: str):
        self.dataset = dataset
        self.fingerprint = fingerprint

    def __len__(self) -> int:
        return len(self.dataset)

    @overload
    def __getitem__(self, index: int) -> Batch: ...
    @overload
    def __getitem__(self, index: slice) -> "Batches": ...
    def __getitem__(self, index: int | slice) -> "Batch | Batches":
        if isinstance(index, slice):
            part = f"{index.start}:{index.stop}:{index.step}"
            return Batches(self.dataset[index], f"{self.fingerprint}[{part}]")
        if not -len(self) <= index < len(self):
            raise IndexError(f"batch {index} of {len(self)}")
        batch: Any = self.dataset[index % len(self)]
        return batch


class BatchIterator(Iterator[Batch]):
    """Iterates over batches, making the next ones in threads; can be saved and resumed.

    Resuming is exact: after `set_state(s)` the batches are those that followed `get_state() == s`,
    in this process or another, on one process or many.
    """

    def __init__(self, batches: Batches, num_threads: int = 1, prefetch: int = 2):
        import grain

        options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=prefetch)
        self._iterator = iter(batches.dataset.to_iter_dataset(options))
        self._length = len(batches)
        self._fingerprint = batches.fingerprint

    def __next__(self) -> Batch:
        return next(self._iterator)

    def get_state(self) -> dict[str, Any]:
        """The number of the next batch, and the fingerprint of the data; ready for JSON."""
        return {"next_batch": self._iterator.get_state()["next_index"], "data": self._fingerprint}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues where `get_state` was called.

        Raises:
          ValueError: if the state is not one of such an iterator, or is one over other data (a file
            of a text folder changed, say), another batch size or another shuffling seed.
        """
        step, data = state.get("next_batch"), state.get("data")
        if not (type(step) is int and 0 <= step <= self._length):
            raise argument_error("state['next_batch']", f"an int in [0, {self._length}]", step)
        if data != self._fingerprint:
            raise argument_error(
                "state['data']",
                f"{self._fingerprint!r}, the fingerprint of this data, batch size and seed",
                repr(data),
            )
        self._iterator.set_state({"next_index": step})

    def close(self) -> None:
        """Ends the threads. The iterator cannot be used after that."""
        self._iterator.close()
