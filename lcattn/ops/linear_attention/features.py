r"""Feature maps: functions phi with a similarity p(q, k) = phi(q)·phi(k) in place of exp(q·k).

`taylor` (BASED, Arora et al. 2024, arXiv 2402.18668) is the second-order Taylor series of exp:

    p = 1 + x + x²/2,   x = scale · q·k

Its features are kept packed: k_i k_j and k_j k_i are the same number, so

    phi(k) = [1,       k_i,               k_i k_j         for i <= j]
    phi(q) = [1, scale q_i, scale² q_i q_j / (2 if i == j else 1)   ]

that is 1 + F + F(F+1)/2 features instead of 1 + F + F². The series equals ((1+x)² + 1)/2, so p is
at least 1/2: weights are positive and the normaliser never vanishes. (It is not monotone: below
x = -1 it rises again.)
"""

import dataclasses
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from lcattn.errors import argument_error
from lcattn.typing import Array

FeatureMap = Literal["taylor", "elu", "identity"] | Callable[[Array], Array]


@dataclasses.dataclass(frozen=True)
class Similarity:
    """A similarity in the two forms that chunked computation needs.

    Attributes:
      score: from the scaled inner product of a query and a key to p.
      features: phi(k), over the last axis.
      query_weights: phi(q) / phi(k) where q = k, of each feature, given F; None for ones.
    """

    score: Callable[[Array], Array]
    features: Callable[[Array], Array]
    query_weights: Callable[[int], np.ndarray] | None = None

    def weighted(self, features: Array, F: int) -> Array:
        """phi(q) from phi(k) of the same numbers, F of them."""
        if self.query_weights is None:
            return features
        return features * self.query_weights(F).astype(features.dtype)

    def key_features(self, k: Array) -> Array:
        """phi(k), over the last axis: `score(q·k) = phi(q)·phi(k)`."""
        return self.features(k)

    def query_features(self, q: Array) -> Array:
        """phi(q), over the last axis."""
        return self.weighted(self.features(q), q.shape[-1])


def _same(x: Array) -> Array:
    return x


def _taylor(x: Array) -> Array:
    i, j = np.triu_indices(x.shape[-1])
    return jnp.concatenate([jnp.ones_like(x[..., :1]), x, x[..., i] * x[..., j]], axis=-1)


def _taylor_weights(F: int) -> np.ndarray:
    i, j = np.triu_indices(F)
    return np.concatenate([np.ones(1 + F), np.where(i == j, 0.5, 1.0)])


TAYLOR = Similarity(
    score=lambda x: 1 + x * (1 + 0.5 * x), features=_taylor, query_weights=_taylor_weights
)
DOT = Similarity(score=_same, features=_same)


def elu_plus_one(x: Array) -> Array:
    """`x + 1` above zero, `exp(x)` below (Katharopoulos et al. 2020, arXiv 2006.16236)."""
    return jnp.where(x > 0, x + 1, jnp.exp(jnp.minimum(x, 0)))


def resolve(feature_map: FeatureMap, q: Array, k: Array) -> tuple[Similarity, Array, Array]:
    """Splits a feature map into what is applied here and what the chunk loop computes itself.

    Only Taylor features are formed chunk by chunk: they are ten times wider than q and k. Other
    maps are applied at once, and the loop then needs nothing but inner products.
    """
    if feature_map == "taylor":
        return TAYLOR, q, k
    if feature_map == "identity":
        return DOT, q, k
    if feature_map == "elu":
        return DOT, elu_plus_one(q), elu_plus_one(k)
    if not callable(feature_map):
        raise argument_error(
            "feature_map", "'taylor', 'elu', 'identity' or a callable", repr(feature_map)
        )
    for x in (q, k):
        shape = jax.eval_shape(feature_map, x).shape
        if shape[:-1] != x.shape[:-1]:
            raise argument_error(
                "feature_map", f"a map over the last axis of {x.shape}", f"output shape {shape}"
            )
    return DOT, feature_map(q), feature_map(k)


def feature_size(similarity: Similarity, keys: Array | jax.ShapeDtypeStruct) -> int:
    """The number of features D of (mapped) keys."""
    return jax.eval_shape(similarity.key_features, keys).shape[-1]


def is_normalized_by_default(feature_map: FeatureMap) -> bool:
    """All but the identity: its weights change sign, so their sum can vanish."""
    return feature_map != "identity"
