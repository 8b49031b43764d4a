"""Options of the TPU kernels, and how packed documents share a state."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.linear_attention.tpu_features import FeatureMap
from pallas_kernels.tpu import column


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a sweep runs, as fixed while tracing.

    Attributes:
      feature_map: phi.
      normalize: whether outputs are divided by the sum of weights.
      groups: query heads that share a head of keys, G.
      H: the size of values, without a row of ones.
      chunk: tokens a step.
      interpret: whether to run in the TPU simulator.
    """

    feature_map: FeatureMap
    normalize: bool
    groups: int
    H: int
    chunk: int
    interpret: bool = False


def make_marks(documents: jax.Array, chunk: int) -> jax.Array:
    """What kernels need to know of packed documents: `[B,4,T]` in int32, to be read by `Marks`.

    Args:
      documents: document of each token `[B,T]`: 0 for the first of a row, larger for later ones,
        negative for padding. Documents never decrease along a row but for padding.
      chunk: tokens of a chunk, which divides T.
    """
    chunks = documents.reshape(documents.shape[0], -1, chunk)
    # The state belongs to the newest document seen so far. An initial state is the first one's.
    after = jnp.maximum(lax.cummax(chunks.max(axis=2), axis=1), 0)[:, :, None]
    before = jnp.pad(after[:, :-1], ((0, 0), (1, 0), (0, 0)))
    rows = (
        chunks,
        chunks == before,
        chunks == after,
        jnp.broadcast_to(before == after, chunks.shape),
    )
    return jnp.stack([x.astype(jnp.int32).reshape(documents.shape) for x in rows], axis=1)


class Marks(NamedTuple):
    """Of each token of a chunk, `[1,C]`; None where all tokens of a row are one document.

    Attributes:
      document: its document, negative for padding.
      reads: 1 if it sees the incoming state.
      writes: 1 if it belongs to the outgoing state.
      keeps: 1 if the incoming state is part of the outgoing one; the same for all tokens.
    """

    document: jax.Array | None = None
    reads: jax.Array | None = None
    writes: jax.Array | None = None
    keeps: jax.Array | None = None

    @classmethod
    def of(cls, ref: Any) -> "Marks":
        """The marks of a chunk, from its block of `make_marks`."""
        return cls() if ref is None else cls(*(ref[i : i + 1, :] for i in range(4)))

    def seen(self, chunk: int) -> jax.Array:
        """Which key (row) each query (column) of the chunk sees."""
        key, query = (lax.broadcasted_iota(jnp.int32, (chunk, chunk), axis) for axis in (0, 1))
        seen = key <= query
        if self.document is None:
            return seen
        return seen & (column(self.document) == self.document) & (self.document >= 0)

    def reading(self, rows: jax.Array) -> jax.Array:
        """Features `[D,C]` of queries, 0 of those that do not see the state."""
        return rows if self.reads is None else jnp.where(self.reads > 0, rows, 0.0)

    def writing(self, rows: jax.Array) -> jax.Array:
        """Features `[D,C]` of keys, 0 of those that do not belong to the state."""
        return rows if self.writes is None else jnp.where(self.writes > 0, rows, 0.0)

    def kept(self, state: jax.Array) -> jax.Array:
        """The incoming state `[D,W]`, or zeros."""
        return state if self.keeps is None else jnp.where(self.keeps[:, :1] > 0, state, 0.0)
