"""Needles and passkeys: found again by a literal search, at the depth and length asked for."""

import itertools
import re

import numpy as np
import pytest

from lcattn.tasks import ByteTokenizer, NeedleConfig, PasskeyConfig, check_batch

NEEDLE, QUERY = 1, 2
CONFIGS = [
    NeedleConfig(length=64, num_examples=400),
    NeedleConfig(length=64, num_examples=400, haystack="chain", num_needles=4, num_values=3),
    NeedleConfig(length=19, num_examples=400, num_values=8),  # the empty haystack
]
PASSKEY = PasskeyConfig(length=320, num_examples=300)


def rows(config, split="train"):
    return config.make(split).batch(np.arange(config.num_examples))


def find(tokens, num_values):
    """Where the needle of the asked key begins, and its values, by looking."""
    key = tokens[list(tokens).index(QUERY) + 1]
    [place] = [t for t in range(len(tokens) - 1) if tuple(tokens[t : t + 2]) == (NEEDLE, key)]
    return place, tokens[place + 2 : place + 2 + num_values]


@pytest.mark.parametrize("config", CONFIGS)
def test_a_search_answers_every_question(config):
    batch, m = rows(config), config.num_values
    check_batch(batch, config.vocab_size)
    assert batch["tokens"].shape == (400, config.length)
    for tokens, targets, weights in zip(
        *(batch[name] for name in ("tokens", "targets", "weights")), strict=True
    ):
        assert weights.nonzero()[0].tolist() == list(range(config.length - m, config.length))
        _, answer = find(tokens, m)
        np.testing.assert_array_equal(targets[-m:], answer)
        np.testing.assert_array_equal(tokens[config.length - m + 1 :], answer[:-1])
        assert (tokens == NEEDLE).sum() == config.num_needles


def test_the_parts_of_the_vocabulary():
    batch = rows(CONFIGS[1])
    tokens = batch["tokens"]
    first = np.argwhere(tokens == NEEDLE)
    keys = tokens[first[:, 0], first[:, 1] + 1]
    values = np.concatenate([tokens[first[:, 0], first[:, 1] + 2 + i] for i in range(3)])
    assert (keys.min(), keys.max()) == (4, 131)
    assert (values.min(), values.max()) == (132, 259)
    assert all(len(set(row)) == 4 for row in keys.reshape(400, 4).tolist())
    fillers = tokens[tokens >= 260]
    assert fillers.max() == 511
    assert not ((tokens == 0) | (tokens == 3)).any()


def test_the_cycle_goes_on_after_the_needle():
    for tokens in rows(CONFIGS[0])["tokens"][:20]:
        place, _ = find(tokens, 1)
        fillers = np.concatenate([tokens[:place], tokens[place + 3 : -2]])
        np.testing.assert_array_equal(fillers, 260 + np.arange(59) % 20)


def test_a_filler_of_the_chain_has_four_followers_in_all_splits():
    config = NeedleConfig(length=256, num_examples=600, haystack="chain", vocab_size=64)
    followers = {}
    for split in ("train", "test"):
        for tokens in rows(config, split)["tokens"]:
            place, _ = find(tokens, 1)
            for before, after in itertools.pairwise(tokens[:place]):
                followers.setdefault(int(before), set()).add(int(after))
    assert sorted(followers) == list(range(36, 64))
    assert {len(tokens) for tokens in followers.values()} == {4}


@pytest.mark.parametrize("depth", [0, 30, 100])
def test_depth_is_the_share_of_the_haystack_before_the_needle(depth):
    for config in CONFIGS[:2]:
        config = config.replace(depth=depth, num_examples=50)
        for tokens in rows(config)["tokens"]:
            place, _ = find(tokens, config.num_values)
            assert (tokens[:place] >= 260).sum() == round(config.haystack_size * depth / 100)
    config = PASSKEY.replace(depth=depth, num_examples=50)
    for text in texts(config):
        before, after = filler(text)
        share = 100 * len(before) / (len(before) + len(after))
        assert share == pytest.approx(depth, abs=100 / len(before + after))


def test_rows_of_two_depths_are_otherwise_the_same():
    for config in (CONFIGS[1], PASSKEY):
        first, last = (rows(config.replace(depth=depth)) for depth in (0, 100))
        np.testing.assert_array_equal(first["targets"], last["targets"])
        np.testing.assert_array_equal(np.sort(first["tokens"]), np.sort(last["tokens"]))


def test_without_a_depth_any_split_is_as_likely():
    config = NeedleConfig(length=24, num_examples=4000)
    places = [find(tokens, 1)[0] for tokens in rows(config)["tokens"]]
    counts = np.bincount(places, minlength=config.haystack_size + 1)
    assert len(counts) == config.haystack_size + 1 == 20
    assert (np.abs(counts - 200) < 5 * np.sqrt(200)).all()


def texts(config):
    batch = rows(config)
    assert (batch["tokens"][:, 0] == ByteTokenizer.bos).all()
    return [
        ByteTokenizer().decode([*tokens, targets[-1]])
        for tokens, targets in zip(batch["tokens"], batch["targets"], strict=True)
    ]


def filler(text):
    """What stands before and after the line of the needle."""
    lines = text.split("\n")
    [needle] = [i for i, line in enumerate(lines) if line.startswith("The pass key is")]
    return lines[needle - 1], lines[needle + 1]


@pytest.mark.parametrize("preamble", [True, False])
def test_passkey_rows(preamble):
    config = PASSKEY.replace(preamble=preamble)
    batch = rows(config)
    check_batch(batch, config.vocab_size)
    keys = []
    for i, text in enumerate(texts(config)):
        assert len(text) == 320
        assert text.startswith("There is an important info") == preamble
        answer = re.search(r"What is the pass key\? The pass key is (\d+)\.$", text)
        said = re.search(r"\nThe pass key is (\d+)\. Remember it\. (\d+) is the pass key\.\n", text)
        assert answer
        assert said
        assert said[1] == said[2] == answer[1]
        before, after = filler(text)
        for part in (before, after):
            assert ("The grass is green. The sky is blue. " * 4).startswith(part[:37])
        counted = batch["targets"][i][batch["weights"][i] > 0]
        assert ByteTokenizer().decode(counted) == f"{answer[1]}."
        keys.append(int(answer[1]))
    assert min(keys) >= 1
    assert 40_000 < max(keys) <= 50_000


def test_rows_depend_on_nothing_but_seed_split_and_index():
    for config in (CONFIGS[1], PASSKEY):
        whole, some = rows(config), np.array([299, 7, 7])
        for key, value in config.make().batch(some).items():
            np.testing.assert_array_equal(value, whole[key][some])
        for other in (config.replace(seed=1).make(), config.make("test")):
            again = other.batch(np.arange(300))["tokens"][:, None]
            assert not (again == whole["tokens"]).all(axis=2).any()
            assert other.fingerprint != config.make().fingerprint


def test_the_rows_of_a_seed_are_fixed():
    """A change here changes the data of every published run: it must be deliberate."""
    config = NeedleConfig(length=12, vocab_size=64, haystack="chain", num_values=2)
    batch = config.make().batch(np.array([0, 999]))
    assert batch["tokens"].tolist() == [
        [47, 59, 1, 7, 35, 24, 54, 61, 63, 2, 7, 35],
        [41, 63, 1, 13, 28, 20, 46, 45, 45, 2, 13, 28],
    ]
    text = texts(PASSKEY.replace(preamble=False, length=120, num_examples=1))
    assert text == [
        "The gras\nThe pass key is 5325. Remember it. 5325 is the pass key.\nThe grass \n"
        "What is the pass key? The pass key is 5325."
    ]


@pytest.mark.parametrize(
    ("config", "field", "value", "message"),
    [
        (CONFIGS[0], "depth", 101, "per cent, 0 to 100, or None"),
        (CONFIGS[0], "depth", -1, "per cent, 0 to 100, or None"),
        (CONFIGS[0], "length", 4, "at least 5"),
        (CONFIGS[0], "num_values", 0, "greater than 0"),
        (CONFIGS[0], "num_needles", 129, "at most the vocab_size // 4 = 128 keys"),
        (CONFIGS[0], "vocab_size", 45, "at least 46"),
        (CONFIGS[0], "seed", -1, "at least 0"),
        (PASSKEY, "length", 200, "at least 254"),
        (PASSKEY, "num_examples", 0, "greater than 0"),
    ],
)
def test_wrong_sizes_are_named(config, field, value, message):
    with pytest.raises(
        ValueError, match=rf"Config\.{field}: expected .*{message}.*, got .*{value}"
    ):
        config.replace(**{field: value})
