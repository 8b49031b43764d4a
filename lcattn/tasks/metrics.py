"""What is measured on a batch, beside the loss."""

from typing import Any

import numpy as np

from lcattn.errors import argument_error
from lcattn.tasks.batch import Batch


def accuracy(predictions: Any, batch: Batch) -> float:
    """Share of weighted positions that are right, per row, averaged over rows.

    For MQAR this is the published metric. Rows of no weight (the filler rows of a last batch) do
    not count.

    Args:
      predictions: [B, T] integers, the predicted tokens.
      batch: the batch they were predicted for.

    Raises:
      ValueError: if the shapes differ, or no position of the batch has any weight.
    """
    predictions, weights = np.asarray(predictions), np.asarray(batch["weights"], np.float64)
    if predictions.shape != weights.shape:
        raise argument_error("predictions", f"shape {weights.shape}", predictions.shape)
    total = weights.sum(axis=1)
    if not total.any():
        raise argument_error("batch['weights']", "a position that counts", "zeros only")
    right = (weights * (predictions == batch["targets"])).sum(axis=1)
    return float(np.mean(right[total > 0] / total[total > 0]))
