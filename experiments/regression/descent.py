"""Layers of LSA beside the steps of gradient descent that they could be."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.regression.study import Study, curves
from lcattn.probes.regression import (
    DescentConfig,
    DescentProblem,
    LSAConfig,
    LSAWeights,
    RegressionProblem,
    best_rate,
    evaluation_key,
    gradient_step,
    half_mse,
    interpolate,
    normalized_products,
    predict,
    roll_out,
)
from lcattn.tasks.regression import SECOND_MOMENT, LinearRegressionConfig
from lcattn.training import OptimizerConfig, SeedsConfig, SeedsResult, train_seeds

LAWS = ("uniform", "normal", "exponential", "laplace")
DAMPINGS = (1.0, 0.875, 0.75)
ROLL_OUT_STEPS = 50


@dataclasses.dataclass(frozen=True, kw_only=True)
class DescentStudy(Study):
    """A transformer of linear self-attention is trained, and compared with gradient descent.

    Compared with are one step of gradient descent at the rate that fits best ("GD, 1 step") and,
    for more layers, as many steps of it ("GD, K steps") and of GD++ ("GD++, K steps"), whose rates
    and curvatures are trained likewise.

    Attributes:
      task: draws the rows.
      model: what is trained.
      batch_size: rows in a batch.
      eval_size: rows of the evaluations during training.
      final_size: rows of the last one, from which the figures are.
      fit_steps: updates for the rates of several steps.
      probe: also measure, for one linear head in one layer: interpolated weights, inputs and labels
        unlike those of training, and the layer applied many times.
      scales, teacher_scales, corrupted: of these probes: factors of inputs and of weights, numbers
        of labels replaced by noise.
    """

    task: LinearRegressionConfig
    model: LSAConfig
    batch_size: int = 2048
    eval_size: int = 1000
    final_size: int = 20_000
    fit_steps: int = 400
    probe: bool = False
    scales: tuple[float, ...] = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0)
    teacher_scales: tuple[float, ...] = (0.5, 1.0, 2.0, 3.0, 4.0, 5.0)
    corrupted: tuple[int, ...] = (0, 2, 4, 6, 8)

    def validate(self) -> None:
        """Checks sizes, and that what is probed can be."""
        self.require_positive("batch_size", "eval_size", "final_size", "fit_steps")
        single = self.model.num_layers == self.model.num_heads == 1
        if self.probe and not (single and self.model.kind == "linear"):
            raise self.error("probe", "False for any model but one linear head in one layer")
        if self.model.token_size != self.task.token_size:
            raise self.error("model", f"token_size={self.task.token_size}, the task's")

    def run(self, run_dir: Path) -> dict[str, Any]:
        """Trains the seeds and gives the record."""
        references = self.references(run_dir)
        problem = RegressionProblem(
            model=self.model, task=self.task, references=references,
            batch_size=self.batch_size, eval_size=self.eval_size,
        )  # fmt: skip
        result = train_seeds(problem, self.training, run_dir / "model")
        final = problem.replace(eval_size=self.final_size)
        measured = jax.jit(jax.vmap(final.evaluate))(result.params, result.model_state)
        more: dict[str, Any] = {}
        if self.model.kind == "linear" and self.model.num_heads == 1:
            more["weights"] = self._weights(result)
        if self.probe:
            step = gradient_step(self.task.dim, references["GD, 1 step"].rates[0],
                                 self.task.num_examples)  # fmt: skip
            probed = _Probe(self, problem, result, step)
            measured["interpolated/loss"] = probed.interpolated_losses(self.task)
            more |= {"shifts": probed.shifts(), "roll_out": probed.roll_out()}
        steps = {
            name: {"rates": descent.rates, "curvatures": descent.curvatures}
            for name, descent in references.items()
        }
        return self.record(measured, kind="descent", curves=curves(result), steps=steps, **more)

    def references(self, run_dir: Path) -> dict[str, DescentConfig]:
        """The algorithms to compare with, each at its best."""
        rate = best_rate(self.task, jax.random.key(1), 50_000)
        references = {"GD, 1 step": DescentConfig(rates=(rate,))}
        K = self.model.num_layers
        if K > 1:
            for name, curved in ((f"GD, {K} steps", False), (f"GD++, {K} steps", True)):
                problem = DescentProblem(
                    task=self.task, num_steps=K, tied=self.model.tied, curved=curved,
                    initial_rate=rate,
                )  # fmt: skip
                optimizer = OptimizerConfig(
                    learning_rate=0.03, weight_decay=0.0, clip_norm=None, final_lr_fraction=0.0
                )
                fit = SeedsConfig(num_steps=self.fit_steps, num_seeds=1, optimizer=optimizer)
                folder = run_dir / ("GD++" if curved else "GD")
                references[name] = problem.best(train_seeds(problem, fit, folder).params)
        return references

    def _weights(self, result: SeedsResult) -> dict[str, Any]:
        """The products of the first layer's weights, of every seed `[S,E,E]`."""
        layer = _first_layer(result)
        scores, writes = jax.vmap(lambda w: normalized_products(w, self.task.dim))(layer)
        return {"key_query": scores[:, 0].tolist(), "out_value": writes[:, 0].tolist()}


class _Probe:
    """Measurements of a trained layer and of the step that it should be."""

    def __init__(
        self, study: DescentStudy, problem: RegressionProblem, result: SeedsResult, step: LSAWeights
    ):
        self.study, self.problem, self.result, self.step = study, problem, result, step
        dim = study.task.dim
        self.layer = _first_layer(result)
        self.midway = jax.vmap(lambda w: interpolate(w, step, dim))(self.layer)
        self._of_weights = jax.jit(
            jax.vmap(
                lambda weights, tokens, target: half_mse(predict([weights], tokens), target),
                in_axes=(0, None, None),
            )
        )

    def interpolated_losses(self, task: LinearRegressionConfig) -> np.ndarray:
        batch = task.sample(evaluation_key(), self.study.final_size)
        return np.asarray(self._of_weights(self.midway, batch.tokens(), batch.target))

    def shifts(self) -> dict[str, Any]:
        """Losses on tasks unlike that of training, by what is shifted."""
        task, study = self.study.task, self.study
        same_size = {
            law: task.replace(
                law=law,
                scale=task.scale * (SECOND_MOMENT[task.law] / SECOND_MOMENT[law]) ** 0.5,
            )
            for law in LAWS
        }
        return {
            "scale of inputs": self._losses(
                study.scales, [task.replace(scale=task.scale * a) for a in study.scales]
            ),
            "scale of weights": self._losses(
                study.teacher_scales,
                [task.replace(teacher_scale=task.teacher_scale * a) for a in study.teacher_scales],
            ),
            "labels replaced by noise": self._losses(
                study.corrupted, [task.replace(num_corrupted=n) for n in study.corrupted]
            ),
            "law of inputs": self._losses(LAWS, list(same_size.values())),
        }

    def _losses(self, at: Any, tasks: list[LinearRegressionConfig]) -> dict[str, Any]:
        """Losses by model: of descent `[points]`, of what was trained `[S, points]`."""
        descent, trained, midway = [], [], []
        one = jax.tree.map(lambda w: w[None], self.step)
        for task in tasks:
            batch = task.sample(evaluation_key(), self.study.final_size)
            descent.append(self._of_weights(one, batch.tokens(), batch.target)[0])
            trained.append(self.problem.losses(self.result.params, self.result.model_state, batch))
            midway.append(self._of_weights(self.midway, batch.tokens(), batch.target))
        return {
            "at": list(at),
            "GD, 1 step": np.asarray(descent).tolist(),
            "trained": np.asarray(trained).T.tolist(),
            "interpolated": np.asarray(midway).T.tolist(),
        }

    def roll_out(self) -> dict[str, Any]:
        """Half the squared error after each of many applications, by damping."""
        batch = self.study.task.sample(evaluation_key(), self.study.final_size)

        @jax.jit
        @jax.vmap
        def losses(weights: LSAWeights, damping: jax.Array) -> jax.Array:
            said = roll_out(weights, batch.tokens(), ROLL_OUT_STEPS, damping)
            return jnp.square(said - batch.target).mean(-1) / 2

        record: dict[str, Any] = {}
        count = len(self.layer.query)
        steps = jax.tree.map(lambda w: jnp.stack([w] * count), self.step)
        for damping in DAMPINGS:
            seeds = jnp.full(count, damping)
            descent = np.asarray(losses(steps, seeds))[0]
            record[f"{damping:g}"] = {
                "GD": _finite(descent),
                "trained": [_finite(line) for line in np.asarray(losses(self.layer, seeds))],
            }
        return record


def _finite(line: np.ndarray) -> list[float]:
    """A diverging line up to where it is still of any interest."""
    return np.minimum(np.nan_to_num(line, nan=1e3, posinf=1e3), 1e3).tolist()


def _first_layer(result: SeedsResult) -> LSAWeights:
    """Its weights, with a leading axis of seeds."""
    layer: Mapping[str, Any] = result.params["layers"][0]
    return LSAWeights(layer["query"], layer["key"], layer["value"], layer["out"])
