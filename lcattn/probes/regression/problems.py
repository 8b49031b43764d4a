"""What is trained: a model that predicts the query's label, and what is recorded of it."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, override

import jax

from lcattn.config import Config
from lcattn.nn import auxiliary_loss
from lcattn.probes.regression.alignment import Predictor, alignment, half_mse, sensitivity
from lcattn.probes.regression.descent import DescentConfig, evaluation_key
from lcattn.tasks.regression import Regression, RegressionTask
from lcattn.training import ModelProblem
from lcattn.training.state import ModelDef, Tree
from lcattn.typing import Array, Float, PRNGKeyArray


@dataclasses.dataclass(frozen=True, kw_only=True)
class RegressionProblem(ModelProblem):
    """Regression in context, and how near a model comes to the algorithms it is compared with.

    Attributes:
      model: builds a module that gives predictions `[B]` for tokens `[B,n+1,d+1]`.
      task: draws the rows, new ones in each step.
      references: algorithms by name; of each is recorded `alignment` with the model, as
        "name/cos" and so on, and its own loss as "name/loss".
      batch_size: rows in a batch.
      eval_size: rows of the evaluation, the same throughout.
    """

    model: Config
    task: RegressionTask
    references: Mapping[str, DescentConfig] = dataclasses.field(default_factory=dict)
    batch_size: int = 512
    eval_size: int = 2000

    @override
    def validate(self) -> None:
        self.require_positive("batch_size", "eval_size")

    def loss(self, params: Tree, model_state: Tree, key: PRNGKeyArray) -> tuple[Array, Tree]:
        """Half the mean squared error, and what layers contribute themselves."""
        batch = self.task.sample(key, self.batch_size)
        model: Any = self.model_def.merge(params, model_state)
        model.train()
        loss = half_mse(model(batch.tokens()), batch.target) + auxiliary_loss(model)
        return loss, ModelDef.split(model)[1]

    def evaluate(self, params: Tree, model_state: Tree) -> Mapping[str, Array]:
        """The loss, and the alignment with every reference."""
        batch = self.task.sample(evaluation_key(), self.eval_size)
        tokens = batch.tokens()
        ours = sensitivity(self.predictor(params, model_state), tokens)
        metrics = {"loss": half_mse(ours[0], batch.target)}
        for name, reference in self.references.items():
            theirs = sensitivity(reference, tokens)
            metrics[f"{name}/loss"] = half_mse(theirs[0], batch.target)
            near = alignment(ours, theirs)
            metrics |= {f"{name}/{metric}": value for metric, value in near.items()}
        return metrics

    def predictor(self, params: Tree, model_state: Tree) -> Predictor:
        """The model of one seed, as it is used once trained."""

        def predict(tokens: Array) -> Array:
            model: Any = self.model_def.merge(params, model_state)
            model.eval()
            return model(tokens)

        return predict

    @functools.partial(jax.jit, static_argnums=0)
    def losses(self, params: Tree, model_state: Tree, batch: Regression) -> Float[Array, "S"]:
        """The loss of every seed on given rows, which may be of another task."""

        def one(params: Tree, model_state: Tree) -> Array:
            return half_mse(self.predictor(params, model_state)(batch.tokens()), batch.target)

        return jax.vmap(one)(params, model_state)
