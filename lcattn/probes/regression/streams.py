"""Decoders that read inputs and labels one after another and predict every label."""

import dataclasses
from collections.abc import Mapping
from typing import Any, override

import jax
import jax.numpy as jnp
from flax import nnx

from lcattn.config import Config
from lcattn.models.lm import Block, LMConfig
from lcattn.nn import MixerConfig, auxiliary_loss
from lcattn.nn.layers import projection, rms_norm
from lcattn.probes.regression import agreement, learners
from lcattn.probes.regression.descent import evaluation_key
from lcattn.probes.regression.learners import Learner
from lcattn.tasks.regression import RegressionTask
from lcattn.training import ModelProblem
from lcattn.training.state import ModelDef, Tree
from lcattn.typing import Array, Float, PRNGKeyArray


@dataclasses.dataclass(frozen=True, kw_only=True)
class StreamRegressorConfig(Config):
    """The blocks of the language model between a linear embedding and a linear read-out.

    Attributes:
      token_size: E.
      mixer: of every block.
      num_layers: blocks.
      width: D.
      mlp_width: inner size of the SwiGLU of each block.
    """

    token_size: int
    mixer: MixerConfig
    num_layers: int = 4
    width: int = 64
    mlp_width: int = 256

    @override
    def validate(self) -> None:
        self.require_positive("token_size", "num_layers", "width", "mlp_width")

    @property
    def decoder(self) -> LMConfig:
        """The blocks, as a language model has them."""
        return LMConfig(
            vocab_size=1,  # there is no table of tokens
            width=self.width,
            num_layers=self.num_layers,
            pattern=("mixer",),
            mixers={"mixer": self.mixer},
            mlp_width=self.mlp_width,
            init_std=self.width**-0.5,
        )

    def make(self, rngs: nnx.Rngs) -> "StreamRegressor":
        """Builds the model."""
        return StreamRegressor(self, rngs)


class StreamRegressor(nnx.Module):
    """At each token a number; at those of inputs, the label that is to follow."""

    def __init__(self, config: StreamRegressorConfig, rngs: nnx.Rngs):
        """Args: `config`; `rngs`, for the parameters."""
        decoder = config.decoder
        layer, width = decoder.layer, config.width
        self.embed = projection(layer, config.token_size, width, axes=(None, "embed"), rngs=rngs)
        self.blocks = nnx.List([Block(decoder, i, rngs) for i in range(config.num_layers)])
        self.norm = rms_norm(width, dtype=None, rngs=rngs)
        self.head = projection(layer, width, 1, axes=("embed", None), rngs=rngs)

    def __call__(self, tokens: Float[Array, "B T E"]) -> Float[Array, "B T"]:
        """The predictions."""
        return self.head(self.norm(self.states(tokens)[-1]))[..., 0]

    def states(self, tokens: Float[Array, "B T E"]) -> list[Float[Array, "B T D"]]:
        """The residual stream after the embedding and after each block."""
        states = [self.embed(tokens)]
        for block in self.blocks:
            states.append(block(states[-1], None, None)[0])
        return states


@dataclasses.dataclass(frozen=True, kw_only=True)
class StreamProblem(ModelProblem):
    """Every label from its prefix, and the agreement with learning algorithms.

    Of an evaluation is recorded, by the number of examples 0 .. n and divided by d: the squared
    error ("error"), and the squared prediction difference from each algorithm ("spd/ols",
    "spd/ridge_0.1", "spd/gd").

    Attributes:
      model: builds a module that gives predictions `[B,T]` for a stream `[B,T,E]`.
      task: draws the rows.
      rate: of the one step of gradient descent.
      penalties: of ridge regression.
      batch_size: rows in a batch.
      eval_size: rows of the evaluation.
    """

    model: StreamRegressorConfig
    task: RegressionTask
    rate: float = 0.02
    penalties: tuple[float, ...] = (0.1,)
    batch_size: int = 64
    eval_size: int = 1000

    @override
    def validate(self) -> None:
        self.require_positive("rate", "batch_size", "eval_size")

    def learners(self) -> dict[str, Learner]:
        """The algorithms by name. The step of gradient descent is `w = 2 rate Xᵀy`."""
        ridge = {
            f"ridge_{penalty:g}": lambda x, y, p=penalty: learners.ridge(x, y, p)
            for penalty in self.penalties
        }
        step = 2 * self.rate
        return {
            "ols": learners.least_squares,
            **ridge,
            "gd": lambda x, y: learners.gradient_descent(x, y, step),
            "sgd": lambda x, y: learners.sgd(x, y, step),
        }

    def loss(self, params: Tree, model_state: Tree, key: PRNGKeyArray) -> tuple[Array, Tree]:
        """The mean squared error over all labels."""
        batch = self.task.sample(key, self.batch_size)
        model: Any = self.model_def.merge(params, model_state)
        model.train()
        said = agreement.prefix_predictions(model, batch)
        error = jnp.square(said - agreement.prefix_targets(batch)).mean()
        return error + auxiliary_loss(model), ModelDef.split(model)[1]

    def evaluate(self, params: Tree, model_state: Tree) -> Mapping[str, Array]:
        """Errors and differences, each `[n + 1]`."""
        batch = self.task.sample(evaluation_key(), self.eval_size)
        said = agreement.prefix_predictions(self.predictor(params, model_state), batch)
        dim, targets = self.task.dim, agreement.prefix_targets(batch)
        metrics = {"error": agreement.spd(said, targets) / dim}
        for name, learner in self.learners().items():
            theirs = agreement.learner_predictions(learner, batch)
            metrics[f"spd/{name}"] = agreement.spd(said, theirs) / dim
            metrics[f"error/{name}"] = agreement.spd(theirs, targets) / dim
        return metrics

    def predictor(self, params: Tree, model_state: Tree) -> agreement.StreamPredictor:
        """The model of one seed, as it is used once trained."""

        def predict(stream: Array) -> Array:
            model: Any = self.model_def.merge(params, model_state)
            model.eval()
            return model(stream)

        return predict

    def weight_differences(
        self, params: Tree, model_state: Tree, num_probes: int = 32, count: int = 200
    ) -> dict[str, Float[Array, "S m"]]:
        """ILWD / d of every seed from each algorithm, by the number of examples."""
        batch = self.task.sample(evaluation_key(), count)
        probes = jax.random.normal(jax.random.key(1), (num_probes, self.task.dim))

        def one(params: Tree, model_state: Tree) -> Array:
            return agreement.implied_weights(self.predictor(params, model_state), batch, probes)

        ours = jax.jit(jax.vmap(one))(params, model_state)
        return {
            name: jax.vmap(agreement.ilwd, (0, None))(
                ours, agreement.learner_weights(learner, batch)
            )
            / self.task.dim
            for name, learner in self.learners().items()
        }

    def decoded(
        self, params: Tree, model_state: Tree, count: int = 2000
    ) -> dict[str, Float[Array, "S layers"]]:
        """R² of linear probes for `Xᵀy` and for the OLS weights, by layer, the embedding first.

        Read from the last token, the query's, which has seen all examples.
        """
        batch = self.task.sample(evaluation_key(), count)
        targets = {
            "Xᵀy": learners.correlation(batch.x, batch.y),
            "w": learners.least_squares(batch.x, batch.y),
        }

        def one(params: Tree, model_state: Tree) -> dict[str, Array]:
            model: Any = self.model_def.merge(params, model_state)
            model.eval()
            states = [state[:, -1] for state in model.states(batch.stream())]
            return {
                name: jnp.stack([agreement.linear_probe(state, target) for state in states])
                for name, target in targets.items()
            }

        return jax.jit(jax.vmap(one))(params, model_state)
