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
      query_features, key_features: maps over the last axis with
        `score(q·k) = query_features(q)·key_features(k)`.
    """

    score: Callable[[Array], Array]
    query_features: Callable[[Array], Array]
    key_features: Callable[[Array], Array]


def _same(x: Array) -> Array:
    return x


def _pairs(x: Array) -> Array:
    """`x_i x_j` for i <= j along the last axis."""
    i, j = np.triu_indices(x.shape[-1])
    return x[..., i] * x[..., j]


def _with_constant(first: Array, second: Array) -> Array:
    return jnp.concatenate([jnp.ones_like(first[..., :1]), first, second], axis=-1)


def _taylor_query(q: Array) -> Array:
    i, j = np.triu_indices(q.shape[-1])
    return _with_constant(q, _pairs(q) * np.where(i == j, 0.5, 1.0).astype(q.dtype))


def _taylor_key(k: Array) -> Array:
    return _with_constant(k, _pairs(k))


TAYLOR = Similarity(
    score=lambda x: 1 + x * (1 + 0.5 * x),
    query_features=_taylor_query,
    key_features=_taylor_key,
)
DOT = Similarity(score=_same, query_features=_same, key_features=_same)


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
