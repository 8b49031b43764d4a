"""The training step and the evaluation step: pure functions, compiled once per shape."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from lcattn.nn import auxiliary_loss
from lcattn.training.losses import LossSums, cross_entropy, per_token
from lcattn.training.state import ModelDef, TrainState, Tree, shardings_of

Batch = Mapping[str, jax.Array]
Metrics = dict[str, jax.Array]
TrainStep = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]
EvalStep = Callable[[Tree, Tree, Batch, LossSums], LossSums]


def make_train_step(
    model_def: ModelDef,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    *,
    num_microbatches: int = 1,
    z_loss: float = 0.0,
) -> TrainStep:
    """One update: gradients of the mean loss over the batch's weighted tokens, then the optimiser.

    To the mean loss come the terms that layers contribute (`lcattn.nn.AuxiliaryLoss`), averaged
    over microbatches. Layers that learn outside the gradient do so once for each of them.

    Args:
      model_def: the model; called as `model(tokens, segment_ids=..., rng=...)`, with a new key in
        each step.
      optimizer: updates the parameters.
      schedule: its learning rate, for the metrics.
      num_microbatches: the batch is taken in this many parts one after another, to save memory.
        The result is that of the whole batch, since each part is divided by the whole's weight.
      z_loss: weight of the mean of `log(Z)**2` in the objective.
    """

    def objective(params: Tree, model_state: Tree, batch: Batch, rng: jax.Array, weight: jax.Array):
        sums, model = apply(model_def, params, model_state, batch, rng)
        loss = per_token(sums.loss + z_loss * sums.z, weight)
        loss += auxiliary_loss(model) / num_microbatches
        return loss, (sums, ModelDef.split(model)[1])

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        weight = batch["weights"].astype(jnp.float32).sum()

        def add_gradients(carry, part):
            grads, sums, model_state = carry
            (_, (more, model_state)), new = jax.value_and_grad(objective, has_aux=True)(
                state.params, model_state, *part, weight
            )
            return (jax.tree.map(jnp.add, grads, new), sums + more, model_state), None

        rng = jax.random.fold_in(state.rng, state.step)
        parts = split_batch(batch, num_microbatches), jax.random.split(rng, num_microbatches)
        nothing = (jax.tree.map(jnp.zeros_like, state.params), LossSums.zeros(), state.model_state)
        (grads, sums, model_state), _ = jax.lax.scan(add_gradients, nothing, parts)

        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        loss, grad_norm = per_token(sums.loss, sums.weight), optax.tree.norm(grads)
        metrics = {
            "loss": loss,
            "accuracy": per_token(sums.correct, sums.weight),
            "grad_norm": grad_norm,
            "learning_rate": jnp.asarray(schedule(state.step), jnp.float32),
            "finite": jnp.isfinite(loss) & jnp.isfinite(grad_norm),
        }
        return TrainState(state.step + 1, params, model_state, opt_state, state.rng), metrics

    return train_step


def jit_train_step(train_step: TrainStep, target: TrainState) -> TrainStep:
    """Compiles the step. It overwrites the state it is given, and the new one lives where it did.

    Without a word on where results live, XLA may choose another place for them, and the second
    step would be compiled anew.
    """
    return jax.jit(train_step, donate_argnums=0, out_shardings=(shardings_of(target), None))


def make_eval_step(model_def: ModelDef) -> EvalStep:
    """Adds a batch's sums to those so far, so that an evaluation reads the device once."""

    def eval_step(params: Tree, model_state: Tree, batch: Batch, sums: LossSums) -> LossSums:
        more, _ = apply(model_def, params, model_state, batch, rng=None)
        return sums + more

    return eval_step


def apply(
    model_def: ModelDef, params: Tree, model_state: Tree, batch: Batch, rng: jax.Array | None
) -> tuple[LossSums, nnx.Module]:
    """The loss sums of a batch, and the model after the call, whose variables may have changed.

    With an `rng` the model is in training, without one in evaluation.
    """
    model: Any = model_def.merge(params, model_state)
    model.eval() if rng is None else model.train()  # Switches layers such as nnx.Dropout.
    logits = model(batch["tokens"], segment_ids=batch.get("segment_ids"), rng=rng)
    return cross_entropy(logits, batch["targets"], batch["weights"]), model


def split_batch(batch: Batch, parts: int) -> Batch:
    """`[B, ...] -> [parts, B / parts, ...]`; part i takes rows i, i + parts, i + 2 parts, ...

    Strided, so that each part has an equal share of each device's rows and no row moves.
    """
    return {
        name: rows.reshape(len(rows) // parts, parts, *rows.shape[1:]).swapaxes(0, 1)
        for name, rows in batch.items()
    }
