"""Is what a model learned on short rows still right on long ones?"""

import dataclasses
from collections.abc import Mapping
from typing import Any, override

import jax
import jax.numpy as jnp

from lcattn.models import LMConfig
from lcattn.tasks.algorithmic import AlgorithmicConfig
from lcattn.training.losses import cross_entropy, per_token
from lcattn.training.problem import TokenProblem
from lcattn.training.state import Tree
from lcattn.training.step import Batch
from lcattn.typing import Array, PRNGKeyArray


@dataclasses.dataclass(frozen=True, kw_only=True)
class AlgorithmicProblem(TokenProblem):
    """A language model on an algorithmic task.

    Attributes:
      data: the task.
      batch_size: rows in a batch, drawn with replacement.
    """

    model: LMConfig
    data: AlgorithmicConfig
    batch_size: int = 32

    @override
    def validate(self) -> None:
        self.require_positive("batch_size")
        if self.model.vocab_size < self.data.vocab_size:
            raise self.error("model", f"a vocab_size of at least {self.data.vocab_size}")

    @override
    def batch(self, key: PRNGKeyArray) -> Batch:
        index = jax.random.randint(key, (self.batch_size,), 0, self.data.num_train)
        tokens, targets, weights = (jnp.asarray(rows)[index] for rows in self.data.make().train)
        return {"tokens": tokens, "targets": targets, "weights": weights}

    def evaluate(self, params: Tree, model_state: Tree) -> Mapping[str, Array]:
        """By test length: `exact_match`, the share of answers without a mistake, and `accuracy`,
        that of their tokens.

        A model that gives every token of the right answer after the right tokens gives this answer
        when it writes on its own, so one pass is enough.
        """
        model: Any = self.model_def.merge(params, model_state)
        model.eval()
        tests = self.data.make().tests
        sums = [
            cross_entropy(model(jnp.asarray(tokens)), jnp.asarray(targets), jnp.asarray(weights))
            for tokens, targets, weights in (tests[length] for length in self.data.test_lengths)
        ]
        return {
            "exact_match": jnp.stack([per_token(s.exact, s.rows) for s in sums]),
            "accuracy": jnp.stack([per_token(s.correct, s.weight) for s in sums]),
        }
