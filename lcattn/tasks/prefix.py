"""Training and prompting as "just read twice" does (JRT, Arora et al. 2024, arXiv 2407.05483)."""

import numpy as np
from numpy.typing import ArrayLike

from lcattn.errors import argument_error
from lcattn.tasks.batch import Batch


def mask_prefix(
    batch: Batch,
    rng: np.random.Generator,
    *,
    prefix_length: int,
    mask_token: int,
    mask_probability: float = 0.15,
    masked_weight: float = 0.25,
) -> Batch:
    """A batch of next-token prediction, as models train on it that see a prefix both ways.

    In a prefix the next token is in the input, so it is not asked for. Instead some tokens are
    hidden there, to be named where they stand; after the prefix all stays as it was::

        tokens    a b c d e f     prefix of 4, c hidden     a b # d e f
        targets   b c d e f g     ---------------------->   . . c . f g     (. has weight 0)

    The weighted mean of the cross entropies is then the published loss,

        (L_next + masked_weight · L_masked) / (1 + masked_weight),

    of two means over this batch; without any hidden token it is L_next. (The published code leaves
    out the division, and drops hidden tokens of id 0.)

    Args:
      batch: `tokens`, `targets` and `weights`, as in `lcattn.tasks.batch`; with `segment_ids`, each
        document has its own prefix.
      rng: draws what is hidden.
      prefix_length: tokens M in the prefix of a document.
      mask_token: the id that hides a token; one that no text has.
      mask_probability: of each token of a prefix to be hidden.
      masked_weight: of the mean over hidden tokens, the mean over next tokens having 1.

    Raises:
      ValueError: for options out of range, or where `mask_token` occurs in the batch.
    """
    if prefix_length < 1:
        raise argument_error("prefix_length", "at least 1", prefix_length)
    if not 0 <= mask_probability <= 1:
        raise argument_error("mask_probability", "a probability", mask_probability)
    if not masked_weight >= 0:
        raise argument_error("masked_weight", "a value of at least 0", masked_weight)
    tokens, weights = batch["tokens"], batch["weights"]
    if np.any(tokens == mask_token):
        raise argument_error("mask_token", "an id that no text has", mask_token)
    in_prefix, is_text = _prefix(batch, prefix_length)
    hidden = in_prefix & is_text & (rng.random(tokens.shape) < mask_probability)
    weights = np.where(in_prefix, 0, weights)
    share = masked_weight * (weights.sum() or 1) / max(hidden.sum(), 1)
    weights = np.where(hidden, share, weights).astype(np.float32)
    targets = np.where(hidden, tokens, batch["targets"])
    return {
        **batch,
        "tokens": np.where(hidden, mask_token, tokens).astype(tokens.dtype),
        "targets": np.where(weights > 0, targets, 0).astype(tokens.dtype),
        "weights": weights,
    }


def _prefix(batch: Batch, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Which tokens are in the prefix of their document, and which are not padding."""
    index = np.arange(batch["tokens"].shape[1])
    ids = batch.get("segment_ids", np.zeros_like(batch["tokens"]))
    starts = np.where(np.diff(ids, axis=1, prepend=ids[:, :1] - 1) != 0, index, 0)
    return index - np.maximum.accumulate(starts, axis=1) < length, ids >= 0


def repeat_prompt(
    context: ArrayLike, question: ArrayLike, *, times: int = 2, separator: ArrayLike = ()
) -> np.ndarray:
    """The JRT prompt: context and question, and both again, so that nothing is read unprepared.

    A model with a state of fixed size must choose what to keep of a context before it sees the
    question; on the second reading it knows the question. Any causal model takes it, untrained.

    Args:
      context, question: token ids, `[..., C]` and `[..., Q]`.
      times: how often they are read; 1 is the plain prompt.
      separator: token ids between two readings.

    Returns:
      `[..., times · (C + Q) + (times - 1) · len(separator)]` int32, to be continued by the answer.
    """
    if times < 1:
        raise argument_error("times", "at least 1", times)
    parts = [np.asarray(part, np.int32) for part in (context, question, separator)]
    lead = np.broadcast_shapes(*(part.shape[:-1] for part in parts))
    context, question, separator = (
        np.broadcast_to(part, (*lead, part.shape[-1])) for part in parts
    )
    again = [separator, context, question] * (times - 1)
    return np.concatenate([context, question, *again], axis=-1)
