import jax.numpy as jnp
import numpy as np
import pytest

from lcattn.training import OptimizerConfig


def rates(num_steps, **options):
    _, schedule = OptimizerConfig(learning_rate=1.0, **options).make(num_steps)
    return np.array([schedule(step) for step in range(num_steps + 1)])


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_rate_rises_to_the_peak_and_falls_to_the_final_fraction(schedule):
    lr = rates(20, schedule=schedule, warmup_steps=4, final_lr_fraction=0.1)
    np.testing.assert_allclose(lr[:5], [0.2, 0.4, 0.6, 0.8, 1.0], rtol=1e-6)
    assert np.all(np.diff(lr[4:]) < 0)
    np.testing.assert_allclose([lr[12], lr[20]], [0.55, 0.1], rtol=1e-5)  # Halfway, and the end.


def test_constant_rate_and_a_run_shorter_than_its_warmup():
    np.testing.assert_allclose(rates(3, schedule="constant"), 1.0)
    np.testing.assert_allclose(rates(2, warmup_steps=9), [0.1, 0.2, 0.3], rtol=1e-6)


def test_decay_ends_at_decay_steps():
    lr = rates(8, schedule="linear", decay_steps=4, final_lr_fraction=0.5)
    np.testing.assert_allclose(lr[4:], 0.5)


def test_weight_decay_leaves_one_axis_parameters_alone():
    optimizer, _ = OptimizerConfig(
        learning_rate=0.5, schedule="constant", weight_decay=0.1, clip_norm=None
    ).make(1)
    params = {"kernel": jnp.ones((2, 2)), "scale": jnp.ones(2)}
    zeros = {"kernel": jnp.zeros((2, 2)), "scale": jnp.zeros(2)}
    updates, _ = optimizer.update(zeros, optimizer.init(params), params)
    np.testing.assert_allclose(updates["kernel"], -0.05)
    np.testing.assert_array_equal(updates["scale"], 0.0)


def test_clipping_bounds_what_reaches_the_moments():
    optimizer, _ = OptimizerConfig(clip_norm=1.0, beta1=0.0, weight_decay=0.0).make(1)
    params = {"a": jnp.zeros(4), "b": jnp.zeros(5)}
    grads = {"a": jnp.full(4, 10.0), "b": jnp.full(5, 10.0)}
    _, state = optimizer.update(grads, optimizer.init(params), params)
    moments = np.concatenate([state[1][0].mu["a"], state[1][0].mu["b"]])
    np.testing.assert_allclose(np.linalg.norm(moments), 1.0, rtol=1e-6)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("learning_rate", 0.0),
        ("warmup_steps", -1),
        ("decay_steps", 0),
        ("final_lr_fraction", 1.5),
        ("weight_decay", -0.1),
        ("beta2", 1.0),
        ("clip_norm", 0.0),
    ],
)
def test_values_out_of_range_are_named(field, value):
    with pytest.raises(ValueError, match=rf"OptimizerConfig\.{field}: expected"):
        OptimizerConfig(**{field: value})
