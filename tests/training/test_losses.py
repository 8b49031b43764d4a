import jax
import jax.numpy as jnp
import numpy as np

from lcattn.training import LossSums, cross_entropy
from lcattn.training.losses import per_token


def make_inputs(dtype=jnp.float32):
    rng = np.random.default_rng(0)
    logits = jnp.asarray(5 * rng.normal(size=(3, 4, 7)), dtype)
    targets = jnp.asarray(rng.integers(0, 7, (3, 4)), jnp.int32)
    weights = jnp.asarray(rng.integers(0, 3, (3, 4)), jnp.float32)
    return logits, targets, weights


def test_sums_equal_a_loop_in_float64():
    logits, targets, weights = make_inputs()
    loss = correct = z = 0.0
    for b, t in np.ndindex(3, 4):
        row = np.asarray(logits[b, t], np.float64)
        log_z = np.log(np.exp(row).sum())
        w = float(weights[b, t])
        loss += w * (log_z - row[targets[b, t]])
        correct += w * (row.argmax() == targets[b, t])
        z += w * log_z**2
    sums = cross_entropy(logits, targets, weights)
    np.testing.assert_allclose(
        [sums.weight, sums.loss, sums.correct, sums.z],
        [np.asarray(weights).sum(), loss, correct, z],
        rtol=1e-6,
    )


def test_a_row_is_exact_if_all_that_counts_is_right():
    targets = jnp.array([[1, 2, 3], [1, 2, 3], [1, 2, 3], [1, 2, 3]])
    predictions = jnp.array([[1, 2, 0], [1, 0, 3], [1, 2, 3], [1, 2, 3]])
    weights = jnp.array([[1.0, 1, 0], [1, 1, 0], [0, 0, 0], [2, 0.5, 1]])
    sums = cross_entropy(jax.nn.one_hot(predictions, 4), targets, weights)
    assert (sums.rows, sums.exact) == (3, 2)


def test_float32_sums_whatever_the_dtype_of_the_logits():
    sums = cross_entropy(*make_inputs(jnp.bfloat16))
    assert {leaf.dtype for leaf in jax.tree.leaves(sums)} == {jnp.dtype(jnp.float32)}


def test_batches_add_up():
    logits, targets, weights = make_inputs()
    whole = cross_entropy(logits, targets, weights)
    parts = LossSums.zeros()
    for b in range(3):
        row = slice(b, b + 1)
        parts += cross_entropy(logits[row], targets[row], weights[row])
    np.testing.assert_allclose(jax.tree.leaves(parts), jax.tree.leaves(whole), rtol=1e-6)


def test_ignored_tokens_are_ignored_even_where_they_are_infinite():
    logits, targets, weights = make_inputs()
    weights = weights.at[0].set(0.0)
    mean = lambda logits: cross_entropy(logits, targets, weights).loss  # noqa: E731
    spoiled = logits.at[0, 1].set(jnp.inf).at[0, 2].set(jnp.nan)
    np.testing.assert_array_equal(mean(spoiled), mean(logits))
    gradient = jax.grad(mean)(spoiled)
    np.testing.assert_array_equal(gradient[0], 0.0)
    np.testing.assert_array_equal(gradient, jax.grad(mean)(logits))


def test_no_weight_at_all_gives_zero_loss_and_zero_gradient():
    logits, targets, weights = make_inputs()

    def mean(logits):
        sums = cross_entropy(logits, targets, 0 * weights)
        return per_token(sums.loss, sums.weight)

    value, gradient = jax.value_and_grad(mean)(logits)
    assert value == 0
    np.testing.assert_array_equal(gradient, 0.0)
