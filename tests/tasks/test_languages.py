"""Random languages: the law of their letters, their smallest automata, and what counting knows."""

import itertools

import numpy as np
import pytest

from lcattn.tasks.languages import (
    AutomataConfig,
    LanguagesConfig,
    backoff_laws,
    minimal,
    random_automata,
)


def published():
    return LanguagesConfig(num_train=2, num_test=60, length=600).make()


def scores(laws, rows):
    distance = 0.5 * abs(laws - rows.law).sum(axis=-1)
    guess = laws.argmax(axis=-1)[..., None]
    possible = np.take_along_axis(rows.law, guess, axis=-1)[..., 0] > 0
    return [(rows.weights * values).sum() / rows.weights.sum() for values in (distance, possible)]


def test_letters_follow_the_law():
    rows = published().test
    letters = rows.weights > 0
    np.testing.assert_allclose(rows.law.sum(axis=-1), 1, rtol=1e-6)
    chosen = np.take_along_axis(rows.law, rows.targets[..., None], axis=-1)[..., 0]
    assert (chosen[letters] > 0).all()  # Every string is accepted.
    assert not rows.targets[~letters].any()
    # The k-th of m possible letters comes 1/m of the times: chi² of all places at once.
    for m in (2, 3):
        here = letters & ((rows.law > 0).sum(axis=-1) == m)
        rank = ((rows.law > 0).cumsum(axis=-1) - 1)[here][np.arange(here.sum()), rows.targets[here]]
        counts = np.bincount(rank, minlength=m)
        assert ((counts - here.sum() / m) ** 2).sum() / (here.sum() / m) < 13.8  # p = 0.001


def test_rows_are_strings_of_the_published_lengths():
    config, rows = published().config, published().test
    lengths, counts = [], []
    for row in rows.tokens.tolist():
        row = row[: row.index(config.separator + 1)]
        strings = [
            list(group)
            for is_letter, group in itertools.groupby(row, lambda t: t != config.separator)
            if is_letter
        ]
        counts.append(len(strings))
        lengths += map(len, strings)
    assert (min(counts), max(counts)) == (10, 19)
    assert (min(lengths), max(lengths)) == (1, 49)
    assert np.mean(lengths) == pytest.approx(25, abs=1)


def test_every_row_has_a_language_of_its_own():
    config = AutomataConfig(num_letters=3, min_states=3, max_states=4, min_letters=2, max_letters=3)
    tables = random_automata(config, 300, seed=0)
    assert len({table.tobytes() for table in tables}) == 300
    assert all(len({tuple(state) for state in t.tolist()}) == len(t) for t in tables)
    few = AutomataConfig(num_letters=1, min_states=2, max_states=2, min_letters=1, max_letters=1)
    with pytest.raises(ValueError, match="at most the 1 languages that were found, got 5"):
        random_automata(few, 5, seed=0)


def strings_of(table, length):
    """All strings of one length that an automaton accepts, by their letters."""
    found = {((), 0)}
    for _ in range(length):
        found = {
            ((*string, letter), int(table[state, letter]))
            for string, state in found
            for letter in range(table.shape[1])
            if table[state, letter] >= 0
        }
    return {string for string, _ in found}


def test_the_smallest_automaton_accepts_the_same_strings():
    # States 1 and 2 are alike, 3 is never reached.
    table = np.array([[1, 2, -1], [-1, -1, 0], [-1, -1, 0], [0, 0, 0]])
    np.testing.assert_array_equal(minimal(table), [[1, 1, -1], [-1, -1, 0]])
    renumbered = np.array([[2, 1, -1], [-1, -1, 0], [-1, -1, 0]])
    np.testing.assert_array_equal(minimal(renumbered), minimal(table))
    rng = np.random.default_rng(0)
    for _ in range(20):
        table = rng.integers(-1, 4, (4, 2))
        table[:, 0] = abs(table[:, 0])  # Strings end nowhere.
        assert len(minimal(table)) <= 4
        assert strings_of(minimal(table), 5) == strings_of(table, 5)


def test_counting_reproduces_the_reference_figures():
    """TVD and accuracy by order, of an independent implementation, at its small protocol."""
    automata = AutomataConfig(
        num_letters=8, min_states=3, max_states=6, min_letters=4, max_letters=8
    )  # fmt: skip
    config = LanguagesConfig(
        automata=automata, length=128, min_length=4, max_length=16, num_train=1, num_test=80
    )
    rows = config.make().test
    reference = {1: (0.504, 0.605), 2: (0.337, 0.858), 3: (0.312, 0.914)}
    laws = np.stack([backoff_laws(config, row, 3) for row in rows.tokens.tolist()], axis=1)
    for order, figures in reference.items():
        # Each side is a mean over its own random languages.
        np.testing.assert_allclose(scores(laws[order - 1], rows), figures, atol=0.025)
    assert scores(rows.law, rows) == [0, 1]


def test_counting_by_hand():
    config = LanguagesConfig(automata=AutomataConfig(num_letters=4, min_letters=2, max_letters=4))
    a, b, bar = 0, 1, config.separator
    one, two, three = backoff_laws(config, [a, b, a, bar, a], 3)
    # Of five places for a letter, the next included, "a" filled three and "b" one.
    np.testing.assert_allclose(one[-1, [a, b]], [3 / 4, 1 / 4])
    # "b" came once after three "a"s: one ended a string, one is the last token.
    np.testing.assert_allclose(two[-1, [a, b]], [2 / 3, 1 / 3])
    # A new string begins as the earlier one did, as far as counting knows: one of two.
    np.testing.assert_allclose(three[3, [a, b]], two[3, [a, b]])
    for laws in (one, two, three):
        np.testing.assert_allclose(laws.sum(axis=-1), 1)


def test_refusals():
    for field, value in (("max_states", 1), ("min_states", 1), ("max_letters", 19)):
        with pytest.raises(ValueError, match=rf"AutomataConfig\.{field}"):
            AutomataConfig(**{field: value})
    with pytest.raises(ValueError, match=r"LanguagesConfig\.max_strings: expected at least"):
        LanguagesConfig(max_strings=9)
