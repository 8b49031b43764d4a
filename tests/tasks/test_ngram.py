import itertools
import math

import numpy as np
import pytest

from lcattn.tasks import Documents, NGramModel

TEXTS = ["abracadabra", "a cat sat", "", "b", "banana banana"]


def _literal(texts, order):
    """Witten-Bell from its definition, with dictionaries. Returns p(w | h) for any n <= order."""
    counts = {}
    for text in texts:
        tokens = [256] * (order - 1) + list(text.encode())
        for t, n in itertools.product(range(order - 1, len(tokens)), range(order)):
            follow = counts.setdefault(tuple(tokens[t - n : t]), {})
            follow[tokens[t]] = follow.get(tokens[t], 0) + 1

    def p(w, h):
        shorter = p(w, h[1:]) if h else 1 / 256
        follow = counts.get(h)
        if not follow:
            return shorter
        total, kinds = sum(follow.values()), len(follow)
        return (follow.get(w, 0) + kinds * shorter) / (total + kinds)

    return p


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_against_the_literal_definition(order):
    heldout = ["abba cadabra", "zebra", "", "ban"]
    p = _literal(TEXTS, order)
    expected = []
    for text in heldout:
        tokens = [256] * (order - 1) + list(text.encode())
        expected += [
            p(tokens[t], tuple(tokens[t - order + 1 : t])) for t in range(order - 1, len(tokens))
        ]
    model, documents = NGramModel(Documents(TEXTS), order), Documents(heldout)
    np.testing.assert_allclose(model.probabilities(documents), expected, rtol=1e-12)
    assert model.bits_per_byte(documents) == pytest.approx(-np.log2(expected).mean(), rel=1e-12)


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("context", ["", "a", "ab", "zz", "qb"])
def test_probabilities_of_all_bytes_sum_to_one(order, context):
    model = NGramModel(Documents(TEXTS), order)
    continued = Documents([context.encode() + bytes([byte]) for byte in range(256)])
    last = model.probabilities(continued)[continued.offsets[1:] - 1]
    assert last.sum() == pytest.approx(1, rel=1e-12)
    assert last.min() > 0


def test_longer_contexts_help_on_text_and_nothing_helps_on_noise():
    text = Documents(["the cat sat on the mat and the rat ran to the cat " * 30])
    heldout = Documents(["the rat sat on the cat and the mat " * 5])
    bits = [NGramModel(text, order).bits_per_byte(heldout) for order in (1, 2, 3)]
    assert bits[0] > bits[1] > bits[2]
    noise = np.random.default_rng(0).bytes(40_000)
    model = NGramModel(Documents([noise[:30_000]]), 1)
    assert abs(model.bits_per_byte(Documents([noise[30_000:]])) - 8) < 0.05


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="order: expected an integer from 1 to 7, got 8"):
        NGramModel(Documents(["ab"]), 8)
    with pytest.raises(ValueError, match="documents: expected some text"):
        NGramModel(Documents([""]), 2)
    with pytest.raises(ValueError, match="documents: expected some text"):
        NGramModel(Documents(["a"]), 2).bits_per_byte(Documents([]))


def test_the_highest_order_does_not_overflow():
    text = Documents([b"\xff" * 20])
    bits = NGramModel(text, 7).bits_per_byte(text)
    assert 0 < bits < math.log2(256)
