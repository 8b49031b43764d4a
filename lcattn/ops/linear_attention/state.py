"""The state of linear attention, and the normaliser as one more column of it."""

import dataclasses
from typing import no_type_check

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from lcattn.errors import argument_error
from lcattn.ops import checks
from lcattn.ops.linear_attention import features
from lcattn.ops.linear_attention.features import FeatureMap, Similarity
from lcattn.typing import Array, Float


@no_type_check  # JAX also fills it with shapes and specs
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LinearAttentionState:
    """What linear attention remembers of the past: a sum over keys, in float32.

    Attributes:
      kv: sum of phi(k) vᵀ, `[B,K,D,H]` with D features.
      normalizer: sum of phi(k), `[B,K,D]`; None where outputs are not normalised.
    """

    kv: Float[Array, "B K D H"]
    normalizer: Float[Array, "B K D"] | None


def linear_attention_state(
    batch_size: int,
    num_kv_heads: int,
    key_size: int,
    value_size: int,
    *,
    feature_map: FeatureMap = "taylor",
    normalize: bool | None = None,
    dtype: DTypeLike = jnp.float32,
) -> LinearAttentionState:
    """The state before the first token: zeros of the right shape.

    Args:
      batch_size: B.
      num_kv_heads: K.
      key_size: F, the size of q and k before the feature map.
      value_size: H.
      feature_map: as in `linear_attention`.
      normalize: as in `linear_attention`.
      dtype: float32, or float64 for float64 inputs.
    """
    if normalize is None:
        normalize = features.is_normalized_by_default(feature_map)
    probe = jnp.zeros((1, 1, 1, key_size), dtype)
    similarity, _, mapped = features.resolve(feature_map, probe, probe)
    size = features.feature_size(similarity, mapped)
    kv = jnp.zeros((batch_size, num_kv_heads, size, value_size), dtype)
    return LinearAttentionState(kv=kv, normalizer=kv[..., 0] if normalize else None)


def with_normalizer(v: Array, normalize: bool) -> Array:
    """Values with one more that every token has, 1: its weighted sum is the sum of weights."""
    return jnp.concatenate([v, jnp.ones_like(v[..., :1])], axis=-1) if normalize else v


def divided(sums: Array, normalize: bool) -> Array:
    """Weighted sums over the sum of weights, their last column; 0 where that is 0."""
    return quotient(sums[..., :-1], sums[..., -1:]) if normalize else sums


def quotient(sums: Array, total: Array) -> Array:
    """`sums / total`; 0 where the total is 0."""
    return jnp.where(total == 0, 0, sums / jnp.where(total == 0, 1, total))


def checked(
    state: LinearAttentionState | None, normalize: bool, similarity: Similarity, k: Array, v: Array
) -> LinearAttentionState | None:
    """The state in the dtype of sums, checked against keys and values."""
    if state is None:
        return None
    (B, _, K, H), D = v.shape, features.feature_size(similarity, k)
    checks.check_shape("initial_state.kv", state.kv, (B, K, D, H), "[B,K,D,H]")
    if normalize != (state.normalizer is not None):
        wanted = "a normalizer" if normalize else "no normalizer"
        raise argument_error("initial_state", f"{wanted}, as normalize={normalize}", "the opposite")
    if state.normalizer is not None:
        checks.check_shape("initial_state.normalizer", state.normalizer, (B, K, D), "[B,K,D]")
    return jax.tree.map(lambda x: x.astype(checks.accumulation_dtype(v.dtype)), state)


def merged(
    state: LinearAttentionState | None, normalize: bool, similarity: Similarity, k: Array, v: Array
) -> Array | None:
    """The state, checked against keys and values, as the loops carry it: in one array."""
    state = checked(state, normalize, similarity, k, v)
    if state is None or state.normalizer is None:
        return None if state is None else state.kv
    return jnp.concatenate([state.kv, state.normalizer[..., None]], axis=-1)


def split(state: Array, normalize: bool) -> LinearAttentionState:
    """Undoes `merged`."""
    if not normalize:
        return LinearAttentionState(kv=state, normalizer=None)
    return LinearAttentionState(kv=state[..., :-1], normalizer=state[..., -1])
