"""Models that learn to repeat: a problem for `train_seeds`, and what is recorded on the way."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple, override

import jax
import jax.numpy as jnp

from lcattn.models import LM, LMConfig
from lcattn.probes import attention, behavior, losses
from lcattn.probes.behavior import Roles
from lcattn.tasks.repeated import RepeatedTokensConfig, repeated_tokens
from lcattn.training.problem import TokenProblem
from lcattn.training.state import Tree
from lcattn.training.step import Batch
from lcattn.typing import Array, Float, PRNGKeyArray

_ROWS, _BLOCKS, _PAIRS, _SAMPLES, _CHOICE = (
    jax.random.fold_in(jax.random.key(0), i) for i in range(5)
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class InductionProblem(TokenProblem):
    """A language model on repeated random blocks (`lcattn.tasks.repeated`).

    Attributes:
      model: its vocabulary is that of the data, or larger.
      data: the rows it is trained on.
      batch_size: of training.
      period, copies: of the blocks of different tokens that heads are judged on.
      eval_rows: rows of each evaluation.
      num_token_losses: tokens whose losses are recorded one by one, for their trajectory.
    """

    model: LMConfig
    data: RepeatedTokensConfig = dataclasses.field(default_factory=RepeatedTokensConfig)
    batch_size: int = 32
    period: int = 16
    copies: int = 4
    eval_rows: int = 64
    num_token_losses: int = 256

    @override
    def validate(self) -> None:
        self.require_positive("batch_size", "eval_rows", "num_token_losses")
        if self.model.vocab_size < self.data.vocab_size:
            raise self.error("model", f"a vocabulary of at least {self.data.vocab_size} tokens")
        if not 2 <= self.period < self.data.vocab_size:
            raise self.error("period", f"2 to {self.data.vocab_size - 1} different tokens")
        if self.copies < 2:
            raise self.error("copies", "at least 2")
        if self.num_token_losses > self.eval_rows * self.data.length:
            raise self.error("num_token_losses", f"at most {self.eval_rows * self.data.length}")

    @override
    def batch(self, key: PRNGKeyArray) -> Batch:
        return _next_token(self.data.rows(key, self.batch_size))

    @property
    def positions(self) -> tuple[int, int]:
        """The early and the late token of the in-context score, counted from 1."""
        length = self.data.length
        return max(length // 10, 1), max(length - length // 5, 2)

    def evaluate(self, params: Tree, model_state: Tree) -> Mapping[str, Array]:
        """Losses on rows as in training, and what heads and behaviour are on repeated blocks.

        Returns:
          By name: "loss", "loss_by_position" `[T]`, "token_losses", "in_context_score"; on blocks
          "first_loss" (first copy), "repeat_loss", "repeat_accuracy" (later copies), "copied" and
          "kept" (`counterfactual_copy`); and for each layer i with an attention map
          "prefix_matching/i", "previous_token/i", "duplicate_token/i", for each with heads
          "copying/i", all `[N]`.
        """
        model: Any = self.model_def.merge(params, model_state)
        model.eval()
        return {**self._losses(model), **self._repeats(model), **self._heads(model)}

    def _losses(self, model: Any) -> dict[str, Array]:
        batch = _next_token(self.data.rows(_ROWS, self.eval_rows))
        per_token = losses.token_losses(model(batch["tokens"]), batch["targets"])
        chosen = jax.random.permutation(_CHOICE, per_token.size)[: self.num_token_losses]
        return {
            "loss": per_token.mean(),
            "loss_by_position": per_token.mean(axis=0),
            "token_losses": per_token.ravel()[chosen],
            "in_context_score": losses.in_context_score(per_token, *self.positions),
        }

    def _repeats(self, model: Any) -> dict[str, Array]:
        tokens = self._blocks(_BLOCKS, self.copies)
        logits, targets = model(tokens[:, :-1]), tokens[:, 1:]
        per_token = losses.token_losses(logits, targets)
        right = logits.argmax(axis=-1) == targets
        # Token r begins the second copy unannounced: only its successors can be known.
        copy = behavior.counterfactual_copy(
            model, _CHOICE, self._blocks(_PAIRS, 2), self.period, vocab_size=self.data.vocab_size
        )
        return {
            "first_loss": per_token[:, : self.period].mean(),
            "repeat_loss": per_token[:, self.period + 1 :].mean(),
            "repeat_accuracy": right[:, self.period + 1 :].mean(),
            "copied": copy.copied,
            "kept": copy.kept,
        }

    def _heads(self, model: LM) -> dict[str, Array]:
        tokens = self._blocks(_BLOCKS, self.copies)
        scores = {}
        for layer, found in attention.attention_maps(model, tokens).items():
            maps = attention.as_shares(found)
            scores[f"prefix_matching/{layer}"] = attention.prefix_matching(maps, tokens).value
            scores[f"duplicate_token/{layer}"] = attention.duplicate_token(maps, tokens).value
            scores[f"previous_token/{layer}"] = attention.previous_token(maps).value
        sample = repeated_tokens(
            _SAMPLES, self.eval_rows, period=min(25, self.data.vocab_size - 1), copies=1,
            vocab_size=self.data.vocab_size,
        )[:, 1:]  # fmt: skip
        for layer, score in attention.copying(model, sample).items():
            scores[f"copying/{layer}"] = score
        return scores

    def _blocks(self, key: PRNGKeyArray, copies: int) -> Array:
        return repeated_tokens(
            key, self.eval_rows, period=self.period, copies=copies,
            vocab_size=self.data.vocab_size,
        )  # fmt: skip


class Attributions(NamedTuple):
    """Who is read for the answers of the second copy, for S seeds.

    Attributes:
      occlusion: `[S, T - 1, T]` nats lost, `[answer, token replaced]`.
      roles: of "occlusion", "gradient x input" and "gradient norm", each number `[S]`.
      offsets: by layer, `[S, N, 5]`: prefix matching at offsets 0 to 4.
    """

    occlusion: Float[Array, "S t T"]
    roles: dict[str, Roles]
    offsets: dict[int, Float[Array, "S N 5"]]


def attributions(
    problem: InductionProblem, params: Tree, model_state: Tree, *, num_rows: int = 16
) -> Attributions:
    """The behavioural probes on trained models, whose arrays have a leading axis of seeds."""
    return Attributions(*_attributions(problem, num_rows, params, model_state))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _attributions(problem: InductionProblem, num_rows: int, params: Tree, model_state: Tree):
    size = problem.data.vocab_size
    tokens = repeated_tokens(_PAIRS, num_rows, period=problem.period, copies=2, vocab_size=size)

    def of_seed(params: Tree, model_state: Tree):
        model: Any = problem.model_def.merge(params, model_state)
        model.eval()
        drops = behavior.occlusion(model, _CHOICE, tokens, vocab_size=size)
        shares = behavior.gradient_shares(model, tokens)
        maps = {
            "occlusion": drops,
            "gradient x input": shares.times_input,
            "gradient norm": shares.norm,
        }
        roles = {name: behavior.by_role(m, problem.period) for name, m in maps.items()}
        offsets = {
            layer: jnp.stack(
                [
                    attention.prefix_matching(attention.as_shares(m), tokens, offset=o).value
                    for o in range(5)
                ],
                axis=-1,
            )
            for layer, m in attention.attention_maps(model, tokens).items()
        }
        return drops, roles, offsets

    return jax.vmap(of_seed)(params, model_state)


def _next_token(rows: Array) -> Batch:
    tokens, targets = rows[:, :-1], rows[:, 1:]
    return {"tokens": tokens, "targets": targets, "weights": jnp.ones(tokens.shape, jnp.float32)}
