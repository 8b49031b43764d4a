"""Training finds the step of gradient descent; what problems record is what they say."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcattn.nn import LinearAttentionConfig
from lcattn.probes import regression as probes
from lcattn.probes.regression import DescentConfig, DescentProblem, RegressionProblem
from lcattn.tasks.regression import (
    LinearRegressionConfig,
    NetworkRegressionConfig,
    SineRegressionConfig,
    random_covariance,
)
from lcattn.training import OptimizerConfig, SeedsConfig, train_seeds

TASK = LinearRegressionConfig(dim=2, num_examples=4, law="normal")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FromDescent(RegressionProblem):
    """Starts as a step of gradient descent: small random weights may sit on a plateau for long."""

    def init(self, key):
        step = probes.gradient_step(self.task.dim, 0.5, self.task.num_examples)
        return {"layers": {0: vars(step)}}, {}


def test_training_leaves_plain_descent_for_the_optimum():
    """Inputs are anisotropic, so that the best step is preconditioned."""
    task = TASK.replace(
        covariance=random_covariance(2, condition=4.0),
        teacher_covariance=random_covariance(2, condition=4.0, inverse=True),
    )
    best = probes.optimum(task)
    model = probes.LSAConfig(token_size=3)
    problem = FromDescent(model=model, task=task, batch_size=128, eval_size=500)
    optimizer = OptimizerConfig(learning_rate=1e-2, weight_decay=0.0, final_lr_fraction=0.0)
    result = train_seeds(problem, SeedsConfig(num_steps=500, num_seeds=1, optimizer=optimizer))
    params = jax.tree.map(lambda a: a[0], result.params)
    found = probes.recover_matrix(problem.predictor(params, {}), task, jax.random.key(0), 2000)
    assert probes.matrix_cosine(np.eye(2), best.matrix) < 0.93
    assert probes.matrix_cosine(found, best.matrix) > 0.99
    assert probes.risk(np.asarray(found, np.float64), task) == pytest.approx(best.risk, rel=0.02)


def test_a_mixer_as_the_layer_is_linear_self_attention():
    """Linear attention without a norm is a bilinear map of the query, as LSA is."""
    mixer = LinearAttentionConfig(
        num_heads=1, feature_dim=4, feature_map="identity", output_norm=False
    )
    problem = RegressionProblem(
        model=probes.MixerRegressorConfig(token_size=3, mixer=mixer, width=8), task=TASK
    )
    params, state = problem.init(jax.random.key(0))
    predict = problem.predictor(params, state)
    tokens = TASK.sample(jax.random.key(1), 3).tokens()
    # The query reads itself too, so remove what it says of no examples at all.
    alone = predict(tokens.at[:, :-1].set(0))
    doubled = predict(tokens.at[:, :-1].multiply(2))
    np.testing.assert_allclose(doubled - alone, 4 * (predict(tokens) - alone), rtol=1e-3, atol=1e-5)


def test_rates_are_judged_as_descent_says():
    problem = DescentProblem(task=TASK, num_steps=2, batch_size=64, initial_rate=0.5)
    params = {"rates": jnp.array([1.5]), "curvatures": jnp.array([0.1])}
    best = problem.best(jax.tree.map(lambda p: p[None], params))
    assert best == DescentConfig(rates=(0.75, 0.75), curvatures=(best.curvatures[0],) * 2)
    batch = TASK.sample(jax.random.key(3), 64)
    expected = probes.half_mse(best(batch.tokens()), batch.target)
    loss, _ = problem.loss(params, {}, jax.random.key(3))
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    plain = problem.replace(curved=False, tied=False).best(
        {"rates": np.array([[1.0, 2.0]]), "curvatures": np.ones((1, 2))}
    )
    assert plain == DescentConfig(rates=(0.5, 1.0), curvatures=(0.0, 0.0))


def test_rows_of_a_task():
    rows = TASK.replace(num_corrupted=2).sample(jax.random.key(0), 500)
    clean = TASK.sample(jax.random.key(0), 500)
    np.testing.assert_array_equal(rows.x, clean.x)
    assert set(np.asarray(rows.y != clean.y).sum(axis=1)) == {2}
    tokens, stream = clean.tokens(), clean.stream()
    np.testing.assert_array_equal(tokens[:, :-1, -1], clean.y)
    np.testing.assert_array_equal(tokens[:, -1], np.c_[clean.query, np.zeros(500)])
    assert stream.shape == (500, 9, 3)
    np.testing.assert_array_equal(stream[:, 2], np.c_[np.zeros(500), clean.x[:, 1]])
    np.testing.assert_array_equal(stream[:, 3], np.c_[clean.y[:, 1], np.zeros((500, 2))])
    np.testing.assert_array_equal(stream[:, -1, 1:], clean.query)
    covariance = random_covariance(2, condition=4.0)
    x = np.asarray(TASK.replace(covariance=covariance).sample(jax.random.key(1), 5000).x)
    np.testing.assert_allclose(np.cov(x.reshape(-1, 2).T), covariance, atol=0.05)
    product = np.asarray(covariance) @ random_covariance(2, condition=4.0, inverse=True)
    np.testing.assert_allclose(product, np.eye(2), atol=1e-12)


def test_rows_of_other_functions():
    sine = SineRegressionConfig(num_examples=3).sample(jax.random.key(0), 200)
    assert np.abs(sine.x).max() <= 5
    assert 0.3 < np.abs(sine.y).max() <= 0.5
    task = NetworkRegressionConfig(dim=3, num_examples=12, features=2)
    rows = task.sample(jax.random.key(0), 5)
    w = probes.learners.least_squares(task.represent(rows.x), rows.y)
    np.testing.assert_allclose(
        probes.learners.apply(w, task.represent(rows.query)), rows.target, atol=1e-4
    )


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (lambda: TASK.replace(num_corrupted=5), "num_corrupted: expected 0 to num_examples"),
        (lambda: TASK.replace(label_noise=-1.0), "label_noise: expected a value of at least 0"),
        (lambda: TASK.replace(covariance=((1.0,),)), r"a matrix of shape \(2, 2\)"),
        (lambda: TASK.replace(covariance=((1.0, 2.0), (2.0, 1.0))), "positive definite"),
        (lambda: SineRegressionConfig(dim=2), "dim: expected 1"),
        (lambda: SineRegressionConfig(amplitudes=(2.0, 1.0)), "two values that rise"),
        (lambda: NetworkRegressionConfig(features=0), "features: expected a value greater"),
    ],
)
def test_mistakes_are_named(config, message):
    with pytest.raises(ValueError, match=message):
        config()
