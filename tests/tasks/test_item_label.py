"""Items and labels: norms, laws of classes, burstiness, fresh classes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from lcattn.tasks import ItemLabelConfig, RepeatedTokensConfig, repeated_tokens

CONFIG = ItemLabelConfig(
    num_classes=32, num_labels=16, content_size=16, num_items=4, max_items=6, noise=0.0
)


SIZE = 4096


@functools.cache
def program(config):
    world = config.world(jax.random.key(0))
    return world, jax.jit(lambda key, shift: config.draw(key, world, SIZE, label_shift=shift))


def draw(config, label_shift=0):
    world, run = program(config)
    return world, jax.device_get(run(jax.random.key(1), label_shift))


def contents(config, sequences):
    return sequences.tokens[..., config.num_places :]


def classes_of(config, world, sequences):
    """The nearest class of each item."""
    items = contents(config, sequences)[:, ::2]
    return np.asarray(jnp.argmax(items @ world.classes.T - (world.classes**2).sum(-1) / 2, axis=-1))


def test_a_sequence_is_what_it_says():
    world, sequences = draw(CONFIG)
    assert sequences.tokens.shape == (SIZE, 9, 13 + 16)
    known = classes_of(CONFIG, world, sequences)
    np.testing.assert_array_equal(sequences.labels, known[:, :4] % 16)
    np.testing.assert_array_equal(sequences.target, known[:, 4] % 16)
    np.testing.assert_array_equal(sequences.matches, known[:, :4] == known[:, 4:])
    np.testing.assert_allclose(
        contents(CONFIG, sequences)[:, 1::2], world.labels[sequences.labels], rtol=1e-6
    )
    places = sequences.tokens[..., :13].argmax(axis=-1)
    assert (np.diff(places, axis=1) == 1).all()
    assert set(places[:, 0]) == set(range(5))  # 0 to 2 (6 - 4)


def test_labels_that_contradict_training():
    world, moved = draw(CONFIG, label_shift=1)
    np.testing.assert_array_equal(moved.target, (classes_of(CONFIG, world, moved)[:, 4] + 1) % 16)
    np.testing.assert_allclose(
        contents(CONFIG, moved)[:, 1::2], world.labels[moved.labels], rtol=1e-6
    )


def test_a_bursty_context_holds_each_of_its_classes_so_often():
    config = CONFIG.replace(burstiness=2, zipf=1.0)
    world, sequences = draw(config)
    for *context, target in classes_of(config, world, sequences)[:200]:
        assert np.unique(context, return_counts=True)[1].tolist() == [2, 2]
        assert target in context
    assert len({tuple(row) for row in sequences.matches}) == 6  # 2 of 4 places, shuffled


def test_labels_can_differ_too():
    _, sequences = draw(CONFIG.replace(num_labels=4, distinct="labels", fresh=0.5))
    assert (np.sort(sequences.labels, axis=1) == np.arange(4)).all()


def test_the_law_of_classes():
    config = CONFIG.replace(bursty=0.0, zipf=1.0)
    world, sequences = draw(config)
    counts = np.bincount(classes_of(config, world, sequences).ravel(), minlength=32)
    law = 1 / np.arange(1, 33)
    assert scipy.stats.chisquare(counts, counts.sum() * law / law.sum()).pvalue > 1e-3


def test_shares_and_norms():
    """Half of the sequences bursty, half fresh (and so bursty); classes may come twice."""
    config = CONFIG.replace(num_classes=1600, bursty=0.5, fresh=0.5, noise=0.5, distinct=None)
    _, sequences = draw(config)
    assert sequences.matches.any(axis=1).mean() == pytest.approx(0.75, abs=0.03)
    items = contents(config, sequences)[:, ::2]
    assert (items**2).sum(-1).mean() == pytest.approx(1, rel=1e-2)
    labels = config.replace(num_labels=16_000, num_classes=16_000).world(jax.random.key(2)).labels
    assert (labels**2).sum(-1).mean() == pytest.approx(1, rel=1e-2)
    _, sequences = draw(CONFIG.replace(distinct=None, bursty=1.0))
    assert sequences.matches.sum(axis=1).max() > 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_classes": 40}, "num_classes: expected a multiple of num_labels=16"),
        ({"burstiness": 3}, "burstiness: expected a divisor of num_items=4"),
        ({"max_items": 3}, "max_items: expected at least num_items=4"),
        ({"bursty": 1.5}, "bursty: expected a share"),
        ({"noise": -1.0}, "noise: expected a value of at least 0"),
        ({"num_labels": 2, "distinct": "labels"}, "distinct: expected None, or at least 4 labels"),
    ],
)
def test_what_does_not_fit(fields, message):
    with pytest.raises(ValueError, match=message):
        CONFIG.replace(**fields)


def test_repeated_blocks():
    rows = np.asarray(repeated_tokens(jax.random.key(0), 8, period=5, copies=3, vocab_size=6))
    assert (rows[:, 0] == 0).all()
    assert (np.sort(rows[:, 1:6], axis=1) == np.arange(1, 6)).all()
    assert (rows[:, 1:11] == rows[:, 6:]).all()
    assert len({tuple(row) for row in rows}) > 4
    with pytest.raises(ValueError, match="period: expected 1 to 5 different tokens, got 6"):
        repeated_tokens(jax.random.key(0), 8, period=6, copies=1, vocab_size=6)


def test_training_rows_have_periods_of_their_own():
    config = RepeatedTokensConfig(vocab_size=1000, length=20, min_period=3, max_period=9)
    rows = np.asarray(config.rows(jax.random.key(0), 64))
    assert rows.shape == (64, 21)
    assert (rows[:, 0] == 0).all()
    assert rows[:, 1:].min() > 0
    periods = [next(r for r in range(1, 20) if (row[1 + r :] == row[1:-r]).all()) for row in rows]
    assert set(periods) == set(range(3, 10))
    with pytest.raises(ValueError, match="max_period: expected at least min_period=3"):
        config.replace(max_period=2)
