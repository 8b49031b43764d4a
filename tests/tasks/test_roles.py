"""Rows of roles: who reads the sentence answers all of them, and each set holds what it says."""

import jax
import numpy as np
import pytest

from lcattn.tasks.roles import KINDS, RolesConfig, roles_rows

CONFIG = RolesConfig(num_words=100, zipf=1.0)
ROWS = jax.jit(roles_rows, static_argnums=(0, 2, 3))


def rows(kind="validation", config=CONFIG, count=4000):
    return [np.asarray(array) for array in ROWS(config, jax.random.key(1), count, kind)]


def read(tokens):
    """The adjective comes after the copula, the noun is the other one."""
    place = np.argmax(tokens[:, :3] == CONFIG.copula, axis=1)
    row = np.arange(len(tokens))
    return tokens[row, np.where(place == 0, 2, 0)], tokens[row, place + 1]


@pytest.mark.parametrize("kind", KINDS)
def test_the_sentence_tells_everything(kind):
    tokens, targets = rows(kind)
    noun, adjective = read(tokens)
    query = tokens[:, 3]
    assert ((query == noun) | (query == adjective)).all()
    assert (noun != adjective).all()
    second = np.where(query == noun, noun, adjective)
    np.testing.assert_array_equal(targets[:, 4:], np.stack([adjective, second, second], axis=1))
    assert not targets[:, :4].any()
    assert (tokens[:, 4:] == CONFIG.mask).all()
    assert {0.45 < share.mean() < 0.55 for share in (query == noun, tokens[:, 0] == noun)} == {True}

    rank = np.stack([noun, adjective]) % CONFIG.half
    exchanged = (noun >= CONFIG.half) & (adjective < CONFIG.half)
    match kind:
        case "held_out":
            assert min(noun.min(), adjective.min()) == CONFIG.held_out
            assert max(noun.max(), adjective.max()) == CONFIG.vocab_size - 1
            return
        case "switch" | "tail_switch":
            assert exchanged.all()
        case _:
            assert 0 < (noun >= CONFIG.half).mean() < 0.1  # the ambiguous ones, half of the time
    if kind.startswith("tail"):
        assert rank.min() >= 0.9 * CONFIG.half
    else:
        # Of the first two ranks, the first comes twice as often.
        assert (rank == 0).sum() / (rank == 1).sum() == pytest.approx(2, rel=0.15)


def test_one_word_in_ten_takes_both_roles_if_any():
    tokens, _ = rows()
    nouns, adjectives = (set(words.tolist()) for words in read(tokens))
    assert nouns & adjectives == {w for w in range(100) if w % 10 == 9}
    tokens, _ = rows(config=CONFIG.replace(ambiguous=False))
    nouns, adjectives = (set(words.tolist()) for words in read(tokens))
    assert nouns <= set(range(50))
    assert adjectives <= set(range(50, 100))


def test_refusals():
    with pytest.raises(ValueError, match=r"num_words: expected a multiple of 20"):
        RolesConfig(num_words=50)
