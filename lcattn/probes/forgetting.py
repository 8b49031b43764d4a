"""Weight forgetting: does a model read roles off the sentence, or remember them?"""

import dataclasses
from collections.abc import Mapping
from typing import Any, override

import jax
import jax.numpy as jnp

from lcattn.config import Config
from lcattn.models import LMConfig
from lcattn.tasks.roles import KINDS, Kind, RolesConfig, roles_rows
from lcattn.training.problem import TokenProblem
from lcattn.training.state import TrainState, Tree
from lcattn.training.step import Batch
from lcattn.typing import Array, Bool, Int, PRNGKeyArray


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResetConfig(Config):
    """When the table of token embeddings is drawn anew, with its moments in the optimiser at zero.

    (The published code, where it resets for a while, zeroes the moments of all parameters, and
    where it resets throughout, those of none.)

    Attributes:
      every: before each step whose number is a multiple of this. None: never (vanilla training).
      until: only before steps below this number (temporary forgetting). None: throughout (active).
    """

    every: int | None = None
    until: int | None = None

    @override
    def validate(self) -> None:
        self.require_positive("every", "until")

    def is_due(self, step: Int[Array, "*n"]) -> Bool[Array, "*n"]:
        """Whether to reset before the step of this number, counted from 0."""
        if self.every is None:
            return jnp.zeros_like(step, bool)
        due = (step % self.every == 0) & (step > 0)
        return due if self.until is None else due & (step < self.until)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RolesProblem(TokenProblem):
    """A language model on rows of roles.

    Attributes:
      data: the words.
      reset: when the embeddings are forgotten.
      batch_size: rows in a batch.
      num_test: rows of each set to be judged by.
    """

    model: LMConfig
    data: RolesConfig
    reset: ResetConfig = dataclasses.field(default_factory=ResetConfig)
    batch_size: int = 128
    num_test: int = 500

    @override
    def validate(self) -> None:
        self.require_positive("batch_size", "num_test")
        if self.model.vocab_size != self.data.vocab_size:
            raise self.error("model", f"a vocab_size of {self.data.vocab_size}")

    @override
    def batch(self, key: PRNGKeyArray) -> Batch:
        tokens, targets = roles_rows(self.data, key, self.batch_size)
        weights = (tokens == self.data.mask).astype(jnp.float32)
        return {"tokens": tokens, "targets": targets, "weights": weights}

    def before_update(self, state: TrainState) -> TrainState:
        """Forgets the embeddings where it is time to."""
        if self.reset.every is None:
            return state
        due = self.reset.is_due(state.step)
        key = jax.random.fold_in(jax.random.fold_in(state.rng, state.step), 1)

        def forgotten(path: Any, leaf: Array) -> Array:
            if not _is_table(path):
                return leaf
            return jnp.where(due, 0, leaf)

        params = _with_table(state.params, jnp.where(due, self._table(key), _table(state.params)))
        opt_state = jax.tree_util.tree_map_with_path(forgotten, state.opt_state)
        return dataclasses.replace(state, params=params, opt_state=opt_state)

    def evaluate(self, params: Tree, model_state: Tree) -> Mapping[str, Array]:
        """The share of rows whose three answers are right, by set.

        The held-out words get the embeddings of a new model, as every word once had. `memory` is
        the share of the exchanged rows that are answered by the classes of the words instead.
        """
        new = self._table(jax.random.key(0))
        first = self.data.held_out
        params = _with_table(params, _table(params).at[first:].set(new[first:]))
        rows = {
            kind: roles_rows(self.data, jax.random.key(number), self.num_test, kind)
            for number, kind in enumerate(KINDS)
        }
        model: Any = self.model_def.merge(params, model_state)
        model.eval()
        logits = model(jnp.concatenate([tokens for tokens, _ in rows.values()]))
        guesses = logits.argmax(axis=-1).reshape(len(KINDS), self.num_test, -1)

        def right(kind: Kind, targets: Array) -> Array:
            is_right = guesses[KINDS.index(kind)] == targets
            return (is_right | (rows[kind][0] != self.data.mask)).all(axis=1).mean()

        scores = {kind: right(kind, targets) for kind, (_, targets) in rows.items()}
        return {**scores, "memory": right("switch", _by_class(self.data, rows["switch"][0]))}

    def _table(self, key: PRNGKeyArray) -> Array:
        """Embeddings as those of a new model."""
        shape = (self.model.vocab_size, self.model.width)
        return self.model.init_std * jax.random.normal(key, shape, self.model.param_dtype)


def _by_class(data: RolesConfig, tokens: Array) -> Array:
    """The answers of who knows the classes of the words and does not read the order."""
    sentence = tokens[:, :3]
    is_adjective = (sentence >= data.half) & (sentence != data.copula)
    adjective = jnp.where(is_adjective, sentence, -1).max(axis=1)
    query = tokens[:, 3]
    zeros = jnp.zeros_like(tokens[:, :4])
    return jnp.concatenate([zeros, jnp.stack([adjective, query, query], axis=1)], axis=1)


def _table(params: Tree) -> Array:
    return params["embedding"]["embedding"]


def _with_table(params: Tree, table: Array) -> Tree:
    return {**params, "embedding": {"embedding": table}}


def _is_table(path: Any) -> bool:
    keys = [entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey)]
    return keys[-2:] == ["embedding", "embedding"]
