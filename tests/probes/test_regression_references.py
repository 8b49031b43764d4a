"""What models are compared with: learning algorithms, closed forms, metrics."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcattn.probes import regression as probes
from lcattn.probes.regression import DescentConfig, agreement, dual, learners
from lcattn.tasks.regression import (
    LinearRegressionConfig,
    Regression,
    random_covariance,
)

NORMAL = LinearRegressionConfig(dim=4, num_examples=7, law="normal")


@pytest.fixture(scope="module")
def batch():
    return NORMAL.sample(jax.random.key(0), 400)


def test_limits_of_the_learners(batch):
    ols = learners.least_squares(batch.x, batch.y)
    assert np.abs(learners.apply(ols, batch.query) - batch.target).max() < 1e-3
    np.testing.assert_allclose(learners.ridge(batch.x, batch.y, 1e-7), ols, atol=1e-3)
    x, y = np.asarray(batch.x[0], np.float64), np.asarray(batch.y[0], np.float64)
    solution = np.linalg.solve(x.T @ x + 0.5 * np.eye(4), x.T @ y)
    np.testing.assert_allclose(learners.ridge(batch.x, batch.y, 0.5)[0], solution, atol=1e-5)
    np.testing.assert_allclose(learners.correlation(batch.x, batch.y)[0], x.T @ y, rtol=1e-4)
    # 10⁴ steps reach the solution where the curvature allows; the least eigenvalue decides.
    well = np.linalg.eigvalsh(np.einsum("bni,bnj->bij", batch.x, batch.x))[:, 0] > 0.1
    many = learners.gradient_descent(batch.x, batch.y, 0.03, 10_000)
    np.testing.assert_allclose(many[well], ols[well], atol=1e-3)
    w = np.zeros(4)
    for i in range(7):
        w += 0.1 * (y[i] - w @ x[i]) * x[i]
    np.testing.assert_allclose(learners.sgd(batch.x, batch.y, 0.1)[0], w, atol=1e-5)


def test_least_squares_of_too_few_examples_has_the_least_norm(batch):
    many = NORMAL.replace(num_examples=2).sample(jax.random.key(5), 10_000)
    for count in (1, 2):
        few = many.first(count)
        error = learners.apply(learners.least_squares(few.x, few.y), few.query) - few.target
        # Of the variance d of the target, the part that examples do not span is left.
        assert np.square(error).mean() / 4 == pytest.approx(1 - count / 4, rel=0.05)
    one = batch.first(1)
    w = learners.least_squares(one.x, one.y)
    x, y = one.x[:, 0], one.y[:, 0]
    np.testing.assert_allclose(w, x * (y / (x**2).sum(-1))[:, None], rtol=1e-3, atol=1e-5)


def test_nearest_neighbours_by_hand():
    x = jnp.asarray([[[0.0], [1.0], [3.0], [9.0]]])
    y, query = jnp.asarray([[1.0, 2.0, 4.0, 8.0]]), jnp.asarray([[2.0]])
    near = learners.nearest_neighbours
    np.testing.assert_allclose(near(x, y, query), [(2 + 4 + 1) / 3])
    weighted = near(x, y, query, weighted=True)
    np.testing.assert_allclose(weighted, [(2 + 4 + 1 / 4) / (1 + 1 + 1 / 4)], rtol=1e-5)
    np.testing.assert_allclose(near(x, y, query, count=2), [1.5])
    np.testing.assert_allclose(near(x, y, query, count=0), [0])


def step_matrix(matrix):
    """The predictor `x_qᵀ M b`."""

    def predict(tokens):
        x, y, query = tokens[:, :-1, :-1], tokens[:, :-1, -1], tokens[:, -1, :-1]
        return jnp.einsum("bi,ij,bnj,bn->b", query, jnp.asarray(matrix, jnp.float32), x, y)

    return predict


COVARIANCE = random_covariance(4, seed=0)
INVERSE = tuple(map(tuple, np.linalg.inv(COVARIANCE).tolist()))


@pytest.mark.parametrize(
    "task",
    [
        NORMAL.replace(label_noise=0.5),
        NORMAL.replace(covariance=COVARIANCE, label_noise=0.5),
        NORMAL.replace(covariance=COVARIANCE, teacher_covariance=INVERSE, teacher_scale=1.5),
        LinearRegressionConfig(dim=4, num_examples=7, label_noise=0.1, teacher_scale=2.0),
        NORMAL.replace(law="laplace", scale=0.7),
    ],
    ids=["isotropic", "anisotropic", "preconditioned", "uniform", "laplace"],
)  # fmt: skip
def test_the_optimum_is_what_regression_finds(task):
    best, rng, rows = probes.optimum(task), np.random.default_rng(0), 200_000
    draw = {"normal": rng.standard_normal, "laplace": lambda shape: rng.laplace(size=shape),
            "uniform": lambda shape: rng.uniform(-0.5, 0.5, shape)}[task.law]  # fmt: skip
    x = task.scale * draw((rows, 8, 4)) @ np.linalg.cholesky(task.covariance or np.eye(4)).T
    root = np.linalg.cholesky(task.teacher_covariance or np.eye(4))
    w = task.teacher_scale * rng.standard_normal((rows, 4)) @ root.T
    values = np.einsum("bnd,bd->bn", x, w)
    y, target = values[:, :7] + task.label_noise * rng.standard_normal((rows, 7)), values[:, 7]
    b = np.einsum("bnd,bn->bd", x[:, :7], y)
    pairs = np.einsum("bi,bj->bij", x[:, 7], b).reshape(rows, 16)
    fitted = np.linalg.solve(pairs.T @ pairs, pairs.T @ target).reshape(4, 4)
    heavy = 0.06 if task.law == "laplace" else 0.02
    assert np.linalg.norm(fitted - best.matrix) / np.linalg.norm(best.matrix) < heavy
    assert probes.matrix_cosine(fitted, best.matrix) > 0.998
    assert np.square(pairs @ best.matrix.ravel() - target).mean() == pytest.approx(
        best.risk, rel=0.02
    )
    if task.law == "normal":
        assert probes.risk(1.1 * best.matrix, task) > best.risk


def test_the_matrix_of_a_predictor_is_recovered():
    matrix = np.random.default_rng(0).normal(size=(4, 4))
    found = probes.recover_matrix(step_matrix(matrix), NORMAL, jax.random.key(0), 2000)
    np.testing.assert_allclose(found, matrix, atol=1e-3)


def test_the_optimum_by_its_published_formulas():
    n, d, noise = 12, 8, 0.25
    task = LinearRegressionConfig(dim=d, num_examples=n, law="normal", label_noise=noise**0.5)
    best = probes.optimum(task)
    np.testing.assert_allclose(best.matrix, np.eye(d) / (n + d + 1 + noise), rtol=1e-12)
    assert best.risk == pytest.approx(d * (1 - n / (n + d + 1 + noise)))
    # Theorem 1 as it is stated, by simulation.
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(20_000, n, d)), rng.normal(size=(20_000, d))
    y = np.einsum("bnd,bd->bn", x, w) + 0.5 * rng.normal(size=(20_000, n))
    b = np.einsum("bnd,bn->bd", x, y)
    ridge = np.linalg.solve(x.swapaxes(1, 2) @ x + noise * np.eye(d), b[..., None])[..., 0]
    assert (ridge * b).sum() / (b * b).sum() == pytest.approx(0.04706, rel=0.02)
    # The anchors of von Oswald et al.: rate 6.06, half the error 0.2062.
    uniform = probes.optimum(LinearRegressionConfig())
    assert uniform.matrix[0, 0] == pytest.approx(0.606, abs=1e-3)
    assert uniform.risk / 2 == pytest.approx(0.2062, abs=1e-4)
    assert probes.best_rate(LinearRegressionConfig(), jax.random.key(2)) == pytest.approx(
        6.06, rel=0.03
    )


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (NORMAL.replace(law="exponential"), "law: expected one of mean 0"),
        (NORMAL.replace(law="laplace", covariance=COVARIANCE), "normal, where a covariance"),
        (NORMAL.replace(num_corrupted=2), "num_corrupted: expected 0"),
    ],
)
def test_no_closed_form_is_said(task, message):
    with pytest.raises(ValueError, match=message):
        probes.optimum(task)


def test_sensitivity_and_alignment_by_hand(batch):
    matrix = np.diag([1.0, 2.0, 0.0, 0.0])
    tokens = batch.tokens()
    said, gradient = probes.sensitivity(step_matrix(matrix), tokens)
    b = np.asarray(learners.correlation(batch.x, batch.y))
    np.testing.assert_allclose(gradient, b @ matrix, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(said, (np.asarray(batch.query) * (b @ matrix)).sum(-1), rtol=1e-3,
                               atol=1e-3)  # fmt: skip
    near = probes.alignment((said, gradient), (said + 0.5, 3 * gradient))
    assert near["pred_diff"] == pytest.approx(0.5, abs=1e-5)
    assert near["cos"] == pytest.approx(1, abs=1e-5)
    assert near["model_diff"] == pytest.approx(
        2 * np.linalg.norm(b @ matrix, axis=-1).mean(), rel=1e-4
    )
    zero = probes.alignment((said, 0 * gradient), (said, gradient))
    assert zero["cos"] == 0
    assert probes.half_mse(said, said + 2) == pytest.approx(2, rel=1e-5)


@pytest.mark.parametrize(
    "rows",
    [
        LinearRegressionConfig(dim=1, num_examples=1).sample(jax.random.key(0), 3),
        Regression(jnp.zeros((2, 3, 2)), jnp.ones((2, 3)), jnp.zeros((2, 2)), jnp.zeros(2)),
        Regression(jnp.ones((2, 3, 2)), jnp.ones((2, 3)), jnp.ones((2, 2)), jnp.ones(2)),
    ],
    ids=["one", "zeros", "duplicates"],
)
def test_degenerate_rows_give_numbers(rows):
    descent = DescentConfig(rates=(1.0, 1.0), curvatures=(0.1, 0.1))
    pair = probes.sensitivity(descent, rows.tokens())
    values = [*probes.alignment(pair, pair).values(), learners.least_squares(rows.x, rows.y)]
    values.append(learners.nearest_neighbours(rows.x, rows.y, rows.query, weighted=True))
    assert all(np.isfinite(value).all() for value in values)


def as_stream_predictor(learner):
    """An algorithm in the place of a model that reads streams."""

    def predict(stream):
        x, y = stream[:, ::2, 1:], stream[:, 1::2, 0]
        rows = Regression(x[:, :-1], y, x[:, -1], jnp.zeros(len(x)))
        said = agreement.learner_predictions(learner, rows).T
        return jnp.repeat(said, 2, axis=1)[:, :-1]

    return predict


def test_agreement_tells_algorithms_apart(batch):
    few = jax.tree.map(lambda a: a[:20], batch)
    ols = as_stream_predictor(learners.least_squares)
    said = agreement.prefix_predictions(ols, few)
    assert said.shape == (8, 20)
    at_three = few.first(3)
    w = learners.least_squares(at_three.x, at_three.y)
    np.testing.assert_allclose(said[3], learners.apply(w, few.x[:, 3]), rtol=1e-3, atol=1e-3)
    np.testing.assert_array_equal(
        agreement.prefix_targets(few)[jnp.array([0, -1])], [few.y[:, 0], few.target]
    )
    assert agreement.spd(said, said).max() == 0
    np.testing.assert_allclose(agreement.spd(said, said + 2), 4, rtol=1e-4)

    probes_ = jax.random.normal(jax.random.key(3), (6, 4))
    implied = agreement.implied_weights(ols, few, probes_)
    known = agreement.learner_weights(learners.least_squares, few)
    np.testing.assert_allclose(implied, known, rtol=1e-2, atol=1e-2)
    step = agreement.learner_weights(lambda x, y: learners.gradient_descent(x, y, 0.04), few)
    assert agreement.ilwd(implied, step)[-1] > 0.1 > agreement.ilwd(implied, known).max()


def test_a_linear_probe_reads_what_is_there_and_no_more():
    states = jax.random.normal(jax.random.key(0), (400, 6))
    target = states[:, :2] @ jnp.ones((2, 3)) + 5
    assert agreement.linear_probe(states, target) > 0.99
    other = jax.random.normal(jax.random.key(1), (400, 3))
    assert agreement.linear_probe(states, other) < 0.1


def test_attention_is_a_map_that_demonstrations_change():
    rng = np.random.default_rng(0)
    demos, prefix, q = rng.normal(size=(4, 3)), rng.normal(size=(2, 3)), rng.normal(size=3)
    w_k, w_v = rng.normal(size=(3, 3)), rng.normal(size=(3, 3))
    both = np.concatenate([demos, prefix])
    attended = sum((w_v @ e) * ((w_k @ e) @ q) for e in both)
    keys, values = (lambda e: jnp.asarray(e @ w_k.T)), (lambda e: jnp.asarray(e @ w_v.T))
    zero_shot = dual.linear_map(keys(prefix), values(prefix))
    change = dual.linear_map(keys(demos), values(demos))
    np.testing.assert_allclose((zero_shot + change) @ q, attended, rtol=1e-4)


def test_momentum_attention():
    v = jax.random.normal(jax.random.key(0), (2, 5, 1, 3))
    literal = np.zeros(v.shape)
    for t in range(5):
        for i in range(t):
            literal[:, t] += 0.7 ** (t - i) * np.asarray(v[:, i])
    np.testing.assert_allclose(dual.momentum_values(v, 0.7), literal, atol=1e-5)
    plain = dual.momentum_attention(v, v, v, decay=0.0)
    np.testing.assert_allclose(
        dual.momentum_attention(v, v, v, decay=0.7) - plain, literal, atol=1e-5
    )


def test_softmax_moves_no_further_than_its_bound():
    keys = jax.random.split(jax.random.key(0), 5)
    a, da = (3 * jax.random.normal(k, (50, 6, 4)) for k in keys[:2])
    x, dx = (jax.random.normal(k, (50, 4)) for k in keys[2:4])
    b = jax.random.normal(keys[4], (6,))

    def moved(a, x, da, dx):
        after, before = dual.softmax_residual(a + da, x + dx, b), dual.softmax_residual(a, x, b)
        return jnp.linalg.norm(after - before), dual.residual_shift_bound(a, x, da, dx)

    for size in (1.0, 1e-2):
        distance, bound = jax.vmap(moved)(a, x, size * da, size * dx)
        assert (distance <= bound * (1 + 1e-4) + 1e-6).all()
    # Attained where two terms share all weight and move apart.
    two = jnp.zeros((2, 1)), jnp.zeros(1), jnp.array([[1e-2], [-1e-2]]), jnp.array([1.0])
    before = dual.softmax_residual(two[0], two[1], jnp.zeros(2))
    after = dual.softmax_residual(two[2], two[3], jnp.zeros(2))
    bound = dual.residual_shift_bound(two[0], two[3], two[2], jnp.zeros(1))
    assert jnp.linalg.norm(after - before) == pytest.approx(float(bound), rel=1e-3)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (lambda: DescentConfig(rates=()), "rates: expected at least one"),
        (lambda: DescentConfig(rates=(1.0,), curvatures=(1.0, 2.0)), "as many as rates"),
    ],
)
def test_mistakes_are_named(config, message):
    with pytest.raises(ValueError, match=message):
        config()


def test_first_keeps_the_query(batch):
    seen = batch.first(2)
    assert np.all(seen.x[:, 2:] == 0)
    assert np.all(seen.y[:, 2:] == 0)
    for field in dataclasses.fields(Regression)[2:]:
        np.testing.assert_array_equal(getattr(seen, field.name), getattr(batch, field.name))
