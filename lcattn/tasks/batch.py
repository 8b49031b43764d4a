"""What a batch is: a dictionary of NumPy arrays of static shapes.

| key           | shape and dtype   | meaning                                                      |
| ------------- | ----------------- | ------------------------------------------------------------ |
| `tokens`      | `[B, T]` int32    | what the model reads                                         |
| `targets`     | `[B, T]` int32    | what it should predict at each position; 0 where weight is 0 |
| `weights`     | `[B, T]` float32  | weight of each position in the loss; 0: ignored              |
| `segment_ids` | `[B, T]` int32    | document of each token, counted from 0; negative: padding    |
| `example_ids` | `[B]` int64       | index of each row in the data set; -1: a filler row          |

`segment_ids` is absent where rows are not packed. A filler row completes the last batch of a pass
over the data; all its weights are 0.
"""

import numpy as np

from lcattn.errors import argument_error

type Batch = dict[str, np.ndarray]

_INT, _FLOAT = np.integer, np.floating
_KEYS = {
    "tokens": (2, _INT),
    "targets": (2, _INT),
    "weights": (2, _FLOAT),
    "segment_ids": (2, _INT),
    "example_ids": (1, _INT),
}
_REQUIRED = ("tokens", "targets", "weights")


def check_batch(batch: Batch, vocab_size: int | None = None) -> None:
    """Checks that a batch keeps the contract of this module.

    It reads the values, so it belongs at the border (data that somebody else made, the first batch
    of a run), not in every step.

    Args:
      batch: the batch.
      vocab_size: if given, tokens and targets must lie in `[0, vocab_size)`.

    Raises:
      ValueError: naming the key, what was expected and what came.
    """
    _check_arrays(batch)
    for key in ("tokens", "targets"):
        values, top = batch[key], vocab_size or np.iinfo(np.int32).max
        if values.size and not (values.min() >= 0 and values.max() < top):
            span = f"{values.min()}..{values.max()}"
            raise argument_error(f"batch[{key!r}]", f"ids in [0, {top})", span)
    weights = batch["weights"]
    if not (np.isfinite(weights).all() and (weights >= 0).all()):
        raise argument_error("batch['weights']", "finite values, none negative", "others")
    if np.any(batch["targets"][weights == 0]):
        raise argument_error("batch['targets']", "0 where the weight is 0", "other values there")
    if "segment_ids" in batch:
        _check_segments(batch["segment_ids"], weights)


def _check_arrays(batch: Batch) -> None:
    missing = [key for key in _REQUIRED if key not in batch]
    unknown = sorted(set(batch) - set(_KEYS))
    if missing or unknown:
        got = ", ".join(map(repr, batch))
        raise argument_error("batch", f"the keys {', '.join(map(repr, _KEYS))}", got)
    shape = np.shape(batch["tokens"])
    for key, array in batch.items():
        rank, kind = _KEYS[key]
        expected_shape = shape[:rank]
        fits = array.shape == expected_shape and array.ndim == rank and 0 not in array.shape
        if not (fits and np.issubdtype(array.dtype, kind)):
            axes = "[B, T]" if rank == 2 else "[B]"
            raise argument_error(
                f"batch[{key!r}]",
                f"a non-empty {axes} array of {kind.__name__}, shaped like the tokens {shape}",
                f"{array.dtype}{list(array.shape)}",
            )


def _check_segments(segment_ids: np.ndarray, weights: np.ndarray) -> None:
    padding = segment_ids < 0
    # Padding may stand anywhere, so each token is compared with the highest id before it.
    highest = np.maximum.accumulate(segment_ids, axis=1)
    falls = ~padding & (segment_ids < highest)
    if falls.any():
        row, column = np.argwhere(falls)[0]
        raise argument_error(
            "batch['segment_ids']",
            "ids that do not decrease along a row",
            f"{segment_ids[row, column]} after {highest[row, column]} (row {row}, token {column})",
        )
    if np.any(weights[padding]):
        raise argument_error("batch['weights']", "0 on padding (segment id < 0)", "other values")
