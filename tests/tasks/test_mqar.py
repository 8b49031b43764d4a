"""The generator against a literal replay of the definition's five steps."""

import dataclasses

import numpy as np
import pytest

from lcattn.tasks import PAPER_TEST, PAPER_TRAIN, MQARConfig

CONFIG = MQARConfig(length=64, num_pairs=8, num_examples=4000, vocab_size=512)


@pytest.fixture(scope="module")
def rows():
    return CONFIG.make().batch(np.arange(len(CONFIG.make())))


def test_context_holds_distinct_keys_and_values(rows):
    keys, values = rows["tokens"][:, 0:16:2], rows["tokens"][:, 1:16:2]
    assert keys.min() == 1
    assert keys.max() == 255
    assert values.min() == 256
    assert values.max() == 511
    for part in (keys, values):
        assert all(len(set(row)) == 8 for row in part.tolist())


def test_each_key_is_asked_once_for_its_value(rows):
    tokens, targets, weights = rows["tokens"], rows["targets"], rows["weights"]
    assert set(np.unique(weights)) == {0, 1}
    assert (weights.sum(axis=1) == 8).all()
    assert not targets[weights == 0].any()
    asked = np.nonzero(weights[0])[0]
    assert asked.min() >= 16
    columns = np.unique(np.nonzero(weights)[1])
    np.testing.assert_array_equal(columns, np.arange(16, 64, 2))  # every slot, at even distances
    for row in range(200):
        pairs = dict(zip(tokens[row, 0:16:2].tolist(), tokens[row, 1:16:2].tolist(), strict=True))
        asked = np.nonzero(weights[row])[0]
        answers = {int(tokens[row, t]): int(targets[row, t]) for t in asked}
        assert answers == pairs


def test_fillers_are_uniform_over_all_tokens(rows):
    fillers = rows["tokens"][:, 16:][rows["weights"][:, 16:] == 0]
    counts = np.bincount(fillers, minlength=512)
    expected = len(fillers) / 512
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert abs(chi_square - 511) < 5 * np.sqrt(2 * 511)


def test_without_fillers_the_rest_is_zero():
    batch = CONFIG.replace(random_fillers=False).make().batch(np.arange(50))
    assert not batch["tokens"][:, 16:][batch["weights"][:, 16:] == 0].any()


def test_slots_are_those_of_sequential_draws_without_replacement(rows):
    """Which key lands in which slot: the race against numpy's sequential weighted draws."""
    num_slots = 24
    weights = 0.01 * np.arange(1, num_slots + 1) ** (0.01 - 1)
    rng = np.random.default_rng(1)
    draws = [
        rng.choice(num_slots, 8, replace=False, p=weights / weights.sum()) for _ in range(4000)
    ]
    expected = _slot_counts(np.array(draws), num_slots)

    order = rows["tokens"][:, 0:16:2]  # key j is the j-th to draw its slot
    asked = np.where(rows["weights"] > 0, rows["tokens"], -1)[:, 16::2]
    got = _slot_counts(np.argmax(asked[:, None, :] == order[:, :, None], axis=2), num_slots)

    # Two samples of 4000 rows; each count differs by a few standard deviations at most.
    assert np.all(np.abs(got - expected) < 5 * np.sqrt(got + expected + 1))
    # The first key meets each slot in proportion to its weight.
    first = 4000 * weights / weights.sum()
    assert np.all(np.abs(got[0] - first) < 5 * np.sqrt(first))


def _slot_counts(slots, num_slots):
    return np.stack([np.bincount(column, minlength=num_slots) for column in slots.T])


def test_rows_depend_on_nothing_but_seed_split_and_index(rows):
    indices = np.array([3999, 7, 7, 0])
    again = CONFIG.make().batch(indices)
    for key, value in again.items():
        np.testing.assert_array_equal(value, rows[key][indices])
    longer = CONFIG.replace(num_examples=10_000).make().batch(indices)
    np.testing.assert_array_equal(longer["tokens"], again["tokens"])


@pytest.mark.parametrize("other", [CONFIG.replace(seed=1).make(), CONFIG.make("test")])
def test_seeds_and_splits_share_no_rows(rows, other):
    keys = {tuple(row) for row in rows["tokens"][:, :16].tolist()}
    assert len(keys) == 4000
    others = other.batch(np.arange(4000))["tokens"][:, :16].tolist()
    assert not any(tuple(row) in keys for row in others)
    assert other.fingerprint != CONFIG.make().fingerprint


def test_the_rows_of_a_seed_are_fixed():
    """A change here changes the data of every published run: it must be deliberate."""
    batch = MQARConfig(length=16, num_pairs=2, vocab_size=64).make().batch(np.array([0, 999]))
    assert batch["tokens"].tolist() == [
        [10, 35, 3, 57, 10, 6, 60, 4, 4, 58, 3, 45, 16, 17, 11, 43],
        [14, 32, 24, 59, 24, 32, 1, 34, 14, 46, 14, 15, 60, 59, 16, 22],
    ]
    assert batch["targets"].nonzero()[1].tolist() == [4, 10, 4, 8]
    assert batch["example_ids"].tolist() == [0, 999]


def test_indices_out_of_range_are_refused():
    with pytest.raises(ValueError, match=r"indices: .*\[0, 4000\), got 5\.\.4000"):
        CONFIG.make().batch(np.array([5, 4000]))
    with pytest.raises(ValueError, match="indices"):
        CONFIG.make().batch(np.array([-1]))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("length", 63, "an even number"),
        ("num_pairs", 17, "at most length / 4 = 16"),
        ("num_pairs", 0, "greater than 0"),
        ("vocab_size", 64, "more than length = 64"),
        ("power", 0.0, "greater than 0"),
        ("num_examples", 0, "greater than 0"),
        ("seed", -1, "at least 0"),
    ],
)
def test_wrong_sizes_are_named(field, value, message):
    with pytest.raises(ValueError, match=f"MQARConfig.{field}: expected .*{message}, got {value}"):
        CONFIG.replace(**{field: value})


def test_every_pair_count_that_validates_can_be_made():
    tight = MQARConfig(length=64, num_pairs=16, num_examples=3, vocab_size=65)
    tokens = tight.make().batch(np.arange(3))["tokens"]
    assert tokens.min() >= 0
    assert tokens.max() < 65


def test_published_mixtures():
    sizes = [(c.length, c.num_pairs, c.num_examples) for c in PAPER_TRAIN]
    assert sizes[0] == (64, 4, 100_000)
    assert sum(size[2] for size in sizes) == 180_000
    assert [(c.length, c.num_pairs) for c in PAPER_TEST][-1] == (1024, 256)
    assert {dataclasses.replace(c, length=64, num_pairs=4).num_examples for c in PAPER_TEST} == {
        1000
    }
