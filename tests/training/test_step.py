import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from toy import Batches, ToyConfig

from lcattn.training import LossSums, MeshConfig, OptimizerConfig, cross_entropy, evaluate
from lcattn.training.evaluation import Evaluator, device_batch
from lcattn.training.state import abstract_model, abstract_state, init_state
from lcattn.training.step import jit_train_step, make_train_step, split_batch


def one_device():
    return MeshConfig().make(jax.devices()[:1])


@pytest.fixture
def mesh():
    with jax.set_mesh(one_device()):
        yield one_device()


@functools.cache  # Compilation is what takes time here.
def setup(config=ToyConfig(), donate=False, **options):  # noqa: B008
    """The model, a state, and the jitted step, on one device."""
    mesh = one_device()
    optimizer, schedule = OptimizerConfig(learning_rate=1e-2, warmup_steps=3).make(10)
    model_def, params, model_state = abstract_model(config, mesh)
    target = abstract_state(params, model_state, optimizer, mesh)
    state = init_state(config, optimizer, 0, target)
    step = make_train_step(model_def, optimizer, schedule, **options)
    return model_def, state, jit_train_step(step, target) if donate else jax.jit(step)


def test_microbatches_equal_the_whole_batch(mesh):
    batch = device_batch(next(Batches()), mesh)
    # Weights that differ between parts: a mean of the parts' means would be wrong.
    batch["weights"] = batch["weights"].at[::4].set(0.0).at[1].mul(3.0)
    _, state, whole = setup(z_loss=1e-2)
    _, _, parts = setup(z_loss=1e-2, num_microbatches=4)
    (state_1, metrics_1), (state_4, metrics_4) = whole(state, batch), parts(state, batch)
    one, four = ((state.params, state.opt_state) for state in (state_1, state_4))
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(four), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-7)
    for name in ("loss", "accuracy", "grad_norm"):
        np.testing.assert_allclose(metrics_1[name], metrics_4[name], rtol=1e-5)


def test_parts_hold_each_row_once():
    rows = jnp.arange(12)
    parts = split_batch({"x": rows}, 3)["x"]
    assert parts.shape == (3, 4)
    np.testing.assert_array_equal(parts[1], [1, 4, 7, 10])


def test_metrics_are_those_of_the_gradient_at_the_old_parameters(mesh):
    model_def, state, step = setup()
    batch = device_batch(next(Batches()), mesh)

    def loss(params):
        logits = model_def.merge(params, state.model_state)(batch["tokens"])
        sums = cross_entropy(logits, batch["targets"], batch["weights"])
        return sums.loss / sums.weight

    value, grads = jax.value_and_grad(loss)(state.params)
    squares = [float((g.astype(jnp.float32) ** 2).sum()) for g in jax.tree.leaves(grads)]
    new, metrics = step(state, batch)
    np.testing.assert_allclose(metrics["loss"], value, rtol=1e-6)
    np.testing.assert_allclose(metrics["grad_norm"], np.sqrt(sum(squares)), rtol=1e-5)
    np.testing.assert_allclose(metrics["learning_rate"], 1e-2 / 4, rtol=1e-6)
    assert bool(metrics["finite"])
    assert int(new.step) == 1


def test_z_loss_pulls_the_normaliser_to_one(mesh):
    model_def, state, plain = setup()
    _, _, pulled = setup(z_loss=10.0)
    batch = device_batch(next(Batches()), mesh)

    def z(state):
        logits = model_def.merge(state.params, state.model_state)(batch["tokens"])
        return float(cross_entropy(logits, batch["targets"], batch["weights"]).z)

    assert z(pulled(state, batch)[0]) < z(plain(state, batch)[0])


def test_a_batch_without_weight_changes_nothing_but_weight_decay(mesh):
    _, state, step = setup()
    batch = device_batch(next(Batches()), mesh)
    new, metrics = step(state, {**batch, "weights": 0 * batch["weights"]})
    assert bool(metrics["finite"])
    assert float(metrics["loss"]) == float(metrics["grad_norm"]) == 0.0
    np.testing.assert_array_equal(new.params["bias"], state.params["bias"])


def test_infinite_gradient_is_reported_although_the_loss_is_finite(mesh):
    _, state, step = setup()
    batch = device_batch(next(Batches()), mesh)
    huge = {**state.params, "embedding": jnp.full_like(state.params["embedding"], 1e-30)}
    huge["head"] = state.params["head"].at[0].set(3e38)
    _, metrics = step(dataclasses.replace(state, params=huge), batch)
    assert np.isfinite(metrics["loss"])
    assert not np.isfinite(metrics["grad_norm"])
    assert not bool(metrics["finite"])


def test_random_streams_advance_and_repeat(mesh):
    _, state, step = setup(ToyConfig(dropout=0.5))
    batch = device_batch(next(Batches()), mesh)
    first, again = step(state, batch), step(state, batch)
    assert float(first[1]["loss"]) == float(again[1]["loss"])
    # The same weights a step later: only the step's key differs.
    later = step(dataclasses.replace(state, step=state.step + 1), batch)
    assert float(later[1]["loss"]) != float(first[1]["loss"])
    count = lambda state: int(state.model_state["dropout"]["rngs"]["count"])  # noqa: E731
    assert count(first[0]) == count(state) + 1


def test_evaluation_means_over_all_tokens_without_dropout(mesh):
    config = ToyConfig(dropout=0.5)
    model_def, state, _ = setup(config)
    data = Batches()
    batches = [next(data), next(data)]
    found = Evaluator(model_def, mesh)(state.params, state.model_state, {"all": batches})
    model = model_def.merge(state.params, state.model_state)
    model.eval()
    sums = LossSums.zeros()
    for batch in batches:
        batch = device_batch(batch, mesh)
        sums += cross_entropy(model(batch["tokens"]), batch["targets"], batch["weights"])
    loss = float(sums.loss / sums.weight)
    np.testing.assert_allclose(found["all/loss"], loss, rtol=1e-6)
    np.testing.assert_allclose(found["all/bits_per_byte"], loss / np.log(2), rtol=1e-6)
    np.testing.assert_allclose(found["all/accuracy"], float(sums.correct / sums.weight), rtol=1e-6)


def test_evaluate_takes_any_model_and_refuses_an_empty_slice():
    model = ToyConfig().make(nnx.Rngs(0))
    batch = next(Batches())
    metrics = "loss", "accuracy", "exact_match", "bits_per_byte"
    assert set(evaluate(model, {"a": [batch]})) == {f"a/{metric}" for metric in metrics}
    with pytest.raises(ValueError, match="slice 'a': expected tokens of non-zero weight"):
        evaluate(model, {"a": []})


def test_the_step_compiles_once_and_reuses_the_memory_of_the_state(mesh):
    _, state, step = setup(donate=True)
    data = Batches()
    for _ in range(3):
        old = state
        state, _ = step(state, device_batch(next(data), mesh))
        assert old.params["head"].is_deleted()
    assert step._cache_size() == 1
