"""Log decays of recurrent states: their checks, their sums inside a chunk, resets at documents.

A state that decays, S_t = e^{g_t} S_{t-1} + ..., carries what token s wrote to token t with the
factor exp(g_{s+1} + ... + g_t). The textbook takes that sum as a difference G_t - G_s of
cumulative sums, which loses digits once G is large (at 1000 it has four decimals left) and is NaN
after a reset g = -inf. Here every sum is formed of its own terms, all <= 0, from the halves of ever
larger blocks (see `triangular`): nothing cancels, no exponent is positive, and -inf is exact.
"""

from collections.abc import Collection
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lcattn.errors import argument_error
from lcattn.ops.segments import owners
from lcattn.ops.triangular import halves, merge
from lcattn.typing import Array, Float, SegmentIds


class ChunkDecay(NamedTuple):
    """Sums of log decays inside each chunk; F is 1 where all channels decay alike.

    Attributes:
      halves: for h = 1, 2 ... C/2 two arrays `[..., C/2h, h, F]`: from the start of a right half
        up to each of its tokens, and from after each token of a left half to its end. The sum of
        both is the log decay between the two tokens.
      before: from the start of the chunk up to each token, itself included.
      after: from after each token to the end of the chunk.
    """

    halves: list[tuple[Array, Array]]
    before: Float[Array, "*chunks C F"]
    after: Float[Array, "*chunks C F"]

    @property
    def total(self) -> Float[Array, "*chunks F"]:
        """Over the whole chunk."""
        return self.before[..., -1, :]


def inside_chunks(log_decay: Float[Array, "*chunks C F"]) -> ChunkDecay:
    """The sums of every chunk; C a power of two."""
    before = log_decay[..., None, :]
    after = jnp.zeros_like(before)
    levels = []
    while before.shape[-3] > 1:
        (before_left, before_right), (after_left, after_right) = halves(before), halves(after)
        levels.append((before_right, after_left))
        left, right = before_left[..., -1:, :], before_right[..., -1:, :]
        before = jnp.concatenate([before_left, left + before_right], axis=-2)
        after = jnp.concatenate([after_left + right, after_right], axis=-2)
    return ChunkDecay(levels, before[..., 0, :, :], after[..., 0, :, :])


def between_tokens(decay: ChunkDecay) -> Float[Array, "*chunks C C"]:
    """Log decay from each token (column) to each later one (row), -inf above; for F = 1."""
    exponents = jnp.zeros_like(decay.before)[..., None, :]
    for to_right, from_left in decay.halves:
        exponents = merge(exponents, to_right + from_left.mT, above=-jnp.inf)
    return exponents[..., 0, :, :]


def forget_at_documents(
    k: Float[Array, "B T M F"], log_decay: Float[Array, "B T M _"], segment_ids: SegmentIds | None
) -> tuple[Array, Array]:
    """Keys and log decays under which one state serves packed documents.

    The first token of a document resets the state; padding neither decays it nor writes to it.
    """
    if segment_ids is None:
        return k, log_decay
    before, after = owners(segment_ids.T[:, :, None])

    real = (segment_ids >= 0)[:, :, None, None]
    continues = (before == after).T[:, :, None, None]
    k = jnp.where(real, k, 0)
    return k, jnp.where(continues, jnp.where(real, log_decay, 0), -jnp.inf)


def check_log_decay(log_decay: Array, shapes: Collection[tuple[int, ...]], axes: str) -> None:
    """Checks shape and dtype and, outside `jit`, that no value is above 0."""
    if log_decay.shape not in shapes:
        raise argument_error("log_decay", axes, f"shape {log_decay.shape}")
    if not jnp.issubdtype(log_decay.dtype, jnp.floating):
        raise argument_error("log_decay", "a floating-point dtype", log_decay.dtype)
    if not isinstance(log_decay, jax.core.Tracer):
        largest = np.max(np.asarray(log_decay), initial=-np.inf)
        if not largest <= 0:
            raise argument_error("log_decay", "values <= 0 (decay = exp(log_decay))", str(largest))
