"""Hidden tokens in a prefix, the loss they make, and prompts read twice."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcattn.tasks import check_batch, mask_prefix, repeat_prompt
from lcattn.training import cross_entropy

MASK, VOCAB = 7, 8


class Chosen(np.random.Generator):
    """Hides exactly the tokens that it is told to."""

    def __init__(self, hidden):
        super().__init__(np.random.PCG64(0))
        self.hidden = np.asarray(hidden, bool)

    def random(self, size):
        assert size == self.hidden.shape
        return np.where(self.hidden, 0.0, 1.0)


@pytest.fixture
def batch():
    """One row of six tokens, the first of which has id 0."""
    row = np.array([[0, 1, 2, 3, 4, 5, 6]], np.int32)
    return {
        "tokens": row[:, :-1],
        "targets": row[:, 1:],
        "weights": np.ones((1, 6), np.float32),
    }


def mean_loss(logits, batch):
    sums = cross_entropy(logits, jnp.asarray(batch["targets"]), jnp.asarray(batch["weights"]))
    return sums.loss / sums.weight


def test_hand_built_example(batch):
    """Prefix of 3; tokens 0 and 2 hidden, to be named in place; then next tokens, 3 -> 4, ..."""
    masked = mask_prefix(batch, Chosen([[1, 0, 1, 0, 0, 0]]), prefix_length=3, mask_token=MASK)
    check_batch(masked, VOCAB)
    np.testing.assert_array_equal(masked["tokens"], [[MASK, 1, MASK, 3, 4, 5]])
    np.testing.assert_array_equal(masked["targets"], [[0, 0, 2, 4, 5, 6]])
    np.testing.assert_allclose(masked["weights"], [[0.375, 0, 0.375, 1, 1, 1]])
    np.testing.assert_array_equal(batch["tokens"], [[0, 1, 2, 3, 4, 5]])  # not changed in place

    logits = jnp.float32(np.random.default_rng(0).standard_normal((1, 6, VOCAB)))
    costs = -np.asarray(jax.nn.log_softmax(logits))[0]
    next_tokens = (costs[3, 4] + costs[4, 5] + costs[5, 6]) / 3
    hidden_tokens = (costs[0, 0] + costs[2, 2]) / 2
    expected = (next_tokens + 0.25 * hidden_tokens) / 1.25
    np.testing.assert_allclose(mean_loss(logits, masked), expected, rtol=1e-6)
    gradient = jax.grad(mean_loss)(logits, masked)
    assert np.array_equal(np.any(gradient != 0, axis=-1), [[True, False, True, True, True, True]])


def test_with_nothing_hidden_only_the_next_tokens_count(batch):
    masked = mask_prefix(batch, Chosen(np.zeros((1, 6))), prefix_length=3, mask_token=MASK)
    np.testing.assert_array_equal(masked["weights"], [[0, 0, 0, 1, 1, 1]])
    np.testing.assert_array_equal(masked["targets"], [[0, 0, 0, 4, 5, 6]])


def test_rows_of_prefix_only_learn_from_hidden_tokens(batch):
    masked = mask_prefix(batch, Chosen([[0, 1, 0, 0, 0, 0]]), prefix_length=9, mask_token=MASK)
    np.testing.assert_array_equal(masked["targets"], [[0, 1, 0, 0, 0, 0]])
    np.testing.assert_array_equal(masked["weights"], [[0, 0.25, 0, 0, 0, 0]])


def test_each_document_has_its_prefix_and_padding_is_left_alone(batch):
    batch["segment_ids"] = np.array([[0, 0, 0, 1, 1, -1]], np.int32)
    batch["weights"] = np.array([[1, 1, 0, 1, 0, 0]], np.float32)
    batch["targets"] = batch["targets"] * (batch["weights"] > 0)
    masked = mask_prefix(batch, Chosen(np.ones((1, 6))), prefix_length=1, mask_token=MASK)
    check_batch(masked, VOCAB)
    np.testing.assert_array_equal(masked["tokens"], [[MASK, 1, 2, MASK, 4, 5]])
    np.testing.assert_array_equal(masked["targets"], [[0, 2, 0, 3, 0, 0]])
    np.testing.assert_allclose(masked["weights"], [[0.125, 1, 0, 0.125, 0, 0]])


def test_hides_as_often_as_asked():
    shape = (20, 1000)
    batch = {
        "tokens": np.ones(shape, np.int32),
        "targets": np.ones(shape, np.int32),
        "weights": np.ones(shape, np.float32),
    }
    masked = mask_prefix(batch, np.random.default_rng(0), prefix_length=500, mask_token=MASK)
    hidden = masked["tokens"] == MASK
    assert not hidden[:, 500:].any()
    assert abs(hidden[:, :500].mean() - 0.15) < 0.01


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"prefix_length": 0}, "prefix_length: expected at least 1"),
        ({"mask_token": 3}, "mask_token: expected an id that no text has, got 3"),
        ({"mask_probability": 1.5}, "mask_probability: expected a probability"),
        ({"masked_weight": -1.0}, "masked_weight: expected a value of at least 0"),
    ],
)
def test_options_that_do_not_fit(batch, options, words):
    options = {"prefix_length": 3, "mask_token": MASK} | options
    with pytest.raises(ValueError, match=words):
        mask_prefix(batch, np.random.default_rng(0), **options)


def test_prompts_are_read_again():
    prompt = repeat_prompt([1, 2, 3], [4], separator=[0])
    np.testing.assert_array_equal(prompt, [1, 2, 3, 4, 0, 1, 2, 3, 4])
    np.testing.assert_array_equal(repeat_prompt([1, 2], [3], times=1), [1, 2, 3])
    batch = repeat_prompt(np.array([[1, 2], [3, 4]]), [[5], [6]], times=3)
    np.testing.assert_array_equal(batch, [[1, 2, 5] * 3, [3, 4, 6] * 3])
    with pytest.raises(ValueError, match="times: expected at least 1"):
        repeat_prompt([1], [2], times=0)
