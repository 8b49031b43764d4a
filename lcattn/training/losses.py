"""Next-token cross entropy as sums, so that microbatches, batches and devices simply add up."""

import dataclasses

import jax
import jax.numpy as jnp

from lcattn.typing import Array, Float, Logits, Tokens


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LossSums:
    """Weighted sums over tokens, float32 scalars. Sums of two batches add field by field.

    Attributes:
      weight: sum of the weights: the number of tokens, where weights are 0 and 1.
      loss: sum of `weight * -log p(target)`, in nats.
      correct: sum of the weights of tokens whose most likely value is the target.
      z: sum of `weight * log(Z)**2`, with Z the normaliser of the softmax.
      rows: number of rows that have any weight.
      exact: number of those whose every weighted token is most likely.
    """

    weight: Float[Array, ""]
    loss: Float[Array, ""]
    correct: Float[Array, ""]
    z: Float[Array, ""]
    rows: Float[Array, ""]
    exact: Float[Array, ""]

    @staticmethod
    def zeros() -> "LossSums":
        """The sums over no tokens."""
        return LossSums(*(jnp.zeros((), jnp.float32) for _ in dataclasses.fields(LossSums)))

    def __add__(self, other: "LossSums") -> "LossSums":
        return jax.tree.map(jnp.add, self, other)


def cross_entropy(logits: Logits, targets: Tokens, weights: Float[Array, "B T"]) -> LossSums:
    """Sums of the loss of predicting `targets [B, T]` from `logits [B, T, V]`, in float32.

    Tokens of weight 0 contribute nothing, whatever their logits are (infinities included).
    """
    # Zero logits where nothing counts: 0 * inf would be NaN, in the value or in the gradient.
    logits = jnp.where(weights[..., None] != 0, logits.astype(jnp.float32), 0.0)
    weights = weights.astype(jnp.float32)
    log_z = jax.nn.logsumexp(logits, axis=-1)
    target_logits = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    is_correct = logits.argmax(axis=-1) == targets
    has_weight = (weights != 0).any(axis=1)
    return LossSums(
        weight=weights.sum(),
        loss=(weights * (log_z - target_logits)).sum(),
        correct=(weights * is_correct).sum(),
        z=(weights * log_z**2).sum(),
        rows=has_weight.sum().astype(jnp.float32),
        exact=(has_weight & (is_correct | (weights == 0)).all(axis=1)).sum().astype(jnp.float32),
    )


def per_token(total: Float[Array, ""], weight: Float[Array, ""]) -> Float[Array, ""]:
    """The weighted mean, and 0 where there is no weight."""
    return total / jnp.where(weight == 0, 1.0, weight)
