"""Several seeds as one program: each as if it were alone, resumed bit for bit."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcattn.config import Config
from lcattn.training import (
    ConfigMismatchError,
    NonFiniteLossError,
    SeedsConfig,
    SGDConfig,
    TrainingInterrupted,
    train_seeds,
)
from lcattn.training import seeds as module


@dataclasses.dataclass(frozen=True, kw_only=True)
class Line(Config):
    """Fits a line; counts its batches outside the gradient."""

    slope: float = 2.0
    spoil_at: int | None = None

    def init(self, key):
        return {"w": jax.random.normal(key)}, {"batches": jnp.int32(0)}

    def loss(self, params, model_state, key):
        x = jax.random.normal(key, (16,))
        count = model_state["batches"] + 1
        spoiled = jnp.where((count == self.spoil_at) & (params["w"] > 0), jnp.nan, 0.0)
        error = ((params["w"] - self.slope) * x) ** 2
        return error.mean() + spoiled, {"batches": count}

    def evaluate(self, params, model_state):
        return {"distance": abs(params["w"] - self.slope), "batches": model_state["batches"]}


CONFIG = SeedsConfig(num_steps=12, eval_every=4, optimizer=SGDConfig(learning_rate=0.1))


@functools.cache
def unbroken():
    return train_seeds(Line(), CONFIG)


def assert_same(a, b):
    for x, y in zip(jax.tree.leaves(vars(a)), jax.tree.leaves(vars(b)), strict=True):
        np.testing.assert_array_equal(x, y)


def test_every_seed_learns_and_is_recorded():
    result = unbroken()
    assert result.steps.tolist() == [0, 4, 8, 12]
    assert result.losses.shape == (3, 5)
    assert result.metrics["batches"].tolist() == [[n] * 5 for n in (0, 4, 8, 12)]
    assert (np.diff(result.metrics["distance"], axis=0) < 0).all()
    assert len(set(result.metrics["distance"][0].tolist())) == 5
    np.testing.assert_array_equal(result.final("distance"), abs(result.params["w"] - 2))


def test_a_seed_is_the_same_among_others_and_by_hand():
    alone = train_seeds(Line(), CONFIG.replace(num_seeds=1))
    np.testing.assert_allclose(alone.params["w"], unbroken().params["w"][:1], rtol=1e-6)
    init_key, rng = jax.random.split(jax.random.fold_in(jax.random.key(0), 0))
    w = jax.random.normal(init_key)
    for step in range(12):
        x = jax.random.normal(jax.random.fold_in(rng, step), (16,))
        w -= 0.1 * 2 * (w - 2) * (x**2).mean()
    np.testing.assert_allclose(alone.params["w"][0], w, rtol=1e-5)


@pytest.mark.parametrize("checkpoint_every", [None, 4])
def test_an_interrupted_run_continues_bit_for_bit(tmp_path, monkeypatch, checkpoint_every):
    class Stopped(module.Interrupt):
        def __enter__(self):
            self.signum = 15
            return self

    config = CONFIG.replace(checkpoint_every=checkpoint_every)
    with monkeypatch.context() as patch:
        patch.setattr(module, "Interrupt", Stopped)
        with pytest.raises(TrainingInterrupted, match="after step 4"):
            train_seeds(Line(), config, tmp_path)
    assert_same(train_seeds(Line(), config, tmp_path), unbroken())
    monkeypatch.setattr(module, "_advance", None)  # A finished run trains nothing.
    assert_same(train_seeds(Line(), config, tmp_path), unbroken())
    with pytest.raises(ConfigMismatchError, match=r"problem\.slope"):
        train_seeds(Line(slope=3.0), config, tmp_path)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Restarted(Line):
    """A line that is set back before its tenth update."""

    def before_update(self, state):
        w = jnp.where(state.step == 9, -100.0, state.params["w"])
        return dataclasses.replace(state, params={"w": w})


def test_a_problem_may_intervene_before_an_update():
    distance = train_seeds(Restarted(), CONFIG).metrics["distance"]
    np.testing.assert_array_equal(distance[:3], unbroken().metrics["distance"][:3])
    assert (distance[3] > 20).all()  # three updates from -100


def test_a_loss_that_is_not_finite_names_step_and_seed():
    with pytest.raises(NonFiniteLossError, match=r"step 7 of seed \d+: loss nan") as caught:
        train_seeds(Line(spoil_at=7), CONFIG)
    assert caught.value.seed is not None


def test_intervals_that_do_not_fit():
    with pytest.raises(ValueError, match=r"eval_every: expected a divisor of num_steps \(12\)"):
        CONFIG.replace(eval_every=5)
    with pytest.raises(ValueError, match=r"checkpoint_every: expected a multiple of 4"):
        CONFIG.replace(checkpoint_every=6)


def test_gradient_descent_scales_weights_and_clips():
    optimizer, schedule = SGDConfig(learning_rate=0.5, weight_decay=0.1, clip_norm=1.0).make(3)
    params = {"w": jnp.array([2.0, 0.0])}
    updates, _ = optimizer.update({"w": jnp.array([3.0, 4.0])}, optimizer.init(params), params)
    np.testing.assert_allclose(updates["w"], [-0.5 * (0.6 + 0.2), -0.5 * 0.8], rtol=1e-6)
    assert schedule(0) == schedule(10) == 0.5
    with pytest.raises(ValueError, match=r"SGDConfig\.momentum"):
        SGDConfig(momentum=1.0)
