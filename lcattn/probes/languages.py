"""Does a model infer a language in context? Its next letters against those of the automaton."""

import dataclasses
from collections.abc import Mapping
from typing import Any, override

import jax
import jax.numpy as jnp

from lcattn.models import LMConfig
from lcattn.tasks.languages import LanguagesConfig
from lcattn.training.problem import TokenProblem
from lcattn.training.state import Tree
from lcattn.training.step import Batch
from lcattn.typing import Array, Float, PRNGKeyArray


def language_scores(
    predicted: Float[Array, "B T V"], law: Float[Array, "B T V"], weights: Float[Array, "B T"]
) -> dict[str, Array]:
    """How close predicted laws of the next letter are to the true ones; in float32.

    Args:
      predicted: probabilities of the next token.
      law: the true probabilities of the next letter.
      weights: 1 where the next token is a letter.

    Returns:
      `letters_at`, `tvd_at` and `accuracy_at`, `[T]`: at each position the number of letters that
      come next, and the sums over these of the total variation distance and of whether the most
      likely token, the first among equals, is possible at all. (The distance is half the sum of
      absolute differences; what the published code logs is all of it.)
    """
    distance = 0.5 * jnp.abs(predicted.astype(jnp.float32) - law).sum(axis=-1)
    guess = predicted.argmax(axis=-1)
    possible = jnp.take_along_axis(law, guess[..., None], axis=-1)[..., 0] > 0
    return {
        "letters_at": weights.sum(axis=0),
        "tvd_at": (weights * distance).sum(axis=0),
        "accuracy_at": (weights * possible).sum(axis=0),
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class LanguageProblem(TokenProblem):
    """A language model on rows of random languages.

    Attributes:
      data: the languages.
      batch_size: rows in a batch, drawn with replacement.
      num_instances: how many rows of the training data to use. None: all.
    """

    model: LMConfig
    data: LanguagesConfig
    batch_size: int = 32
    num_instances: int | None = None

    @override
    def validate(self) -> None:
        self.require_positive("batch_size", "num_instances")
        if self.num_instances is not None and self.num_instances > self.data.num_train:
            raise self.error("num_instances", f"at most num_train={self.data.num_train}")
        if self.model.vocab_size < self.data.vocab_size:
            words = f"a vocab_size of at least {self.data.vocab_size}"
            raise self.error("model", words)

    @override
    def batch(self, key: PRNGKeyArray) -> Batch:
        rows = self.data.make().train
        count = self.num_instances or self.data.num_train
        index = jax.random.randint(key, (self.batch_size,), 0, count)
        # The rows are part of the program: as bytes they are a quarter of the size.
        tokens, targets = (
            jnp.asarray(array[:count].astype(jnp.uint8))[index].astype(jnp.int32)
            for array in (rows.tokens, rows.targets)
        )
        weights = jnp.asarray(rows.weights[:count].astype(bool))[index].astype(jnp.float32)
        return {"tokens": tokens, "targets": targets, "weights": weights}

    def evaluate(self, params: Tree, model_state: Tree) -> Mapping[str, Array]:
        """The scores on the test rows (see `language_scores`)."""
        rows = self.data.make().test
        model: Any = self.model_def.merge(params, model_state)
        model.eval()
        predicted = jax.nn.softmax(model(jnp.asarray(rows.tokens)), axis=-1)
        law = jnp.asarray(rows.law)
        missing = predicted.shape[-1] - law.shape[-1]
        law = jnp.pad(law, ((0, 0), (0, 0), (0, missing)))
        return language_scores(predicted, law, jnp.asarray(rows.weights))
