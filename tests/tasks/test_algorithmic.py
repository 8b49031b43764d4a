"""Algorithmic tasks: programs that are right at every length, and rows that ask what they say."""

import numpy as np
import pytest

from lcattn.tasks.algorithmic import PROGRAMS, AlgorithmicConfig, run
from lcattn.tasks.algorithmic.rows import HINTS, hint_question, question


@pytest.mark.parametrize(("task", "hint"), PROGRAMS, ids=lambda name: name or "plain")
def test_the_program_is_exact_at_every_length(task, hint):
    config = AlgorithmicConfig(task=task, hint=hint, num_values=256, test_lengths=(200,))
    for length in (*range(1, 9), 31):
        asked, answer = question(config, np.random.default_rng(length), length)
        assert run(config, asked, limit=2 * length + 4) == answer, length
    # A program is causal, so one look at a whole row says what it would answer token by token.
    asked, answer = question(config, np.random.default_rng(200), 200)
    row = np.array([config.bos, *asked, config.sep, *answer])
    said = PROGRAMS[task, hint](config, row)[-len(answer) - 1 :]
    assert said.tolist() == [*answer, config.eos]


@pytest.mark.parametrize("task", ["copy", "copy_repeated", "reverse", "sort", "mode", "count"])
def test_rows_hold_question_and_answer(task):
    config = AlgorithmicConfig(task=task, num_values=16, train_length=5, test_lengths=(5, 9),
                               num_train=40, num_test=3)  # fmt: skip
    rows = config.make()
    answers = {
        "copy": list, "copy_repeated": list, "sort": sorted, "reverse": lambda s: s[::-1],
        "mode": lambda s: [max(set(s), key=s.count)], "count": lambda s: range(s[0], s[1] + 1),
    }  # fmt: skip
    for tokens, targets, weights in zip(*rows.tests[9], strict=True):
        start = tokens.tolist().index(config.sep)
        asked = tokens[1:start].tolist()
        assert len(asked) == (2 if task == "count" else 9)
        assert targets[weights > 0].tolist() == [*answers[task](asked), config.eos]
        assert tokens[start + 1 :].tolist() == targets[weights > 0][:-1].tolist()
        assert not targets[weights == 0].any()
    lengths = rows.train.weights.sum(axis=1) - 1
    assert lengths.max() == (1 if task == "mode" else 5)
    assert rows.train.tokens.max() < config.vocab_size


def test_addition_with_and_without_its_hint():
    for hint in (None, "index"):
        config = AlgorithmicConfig(task="addition", hint=hint)
        asked, answer = question(config, np.random.default_rng(0), 7)
        a, b = asked[: asked.index(config.ask)], asked[asked.index(config.ask) + 1 :]
        if hint:
            assert a[::2] == b[::2] == answer[::2] == list(range(a[0], a[0] + 8))
            a, b, answer = a[1::2][::-1], b[1::2][::-1], answer[1::2][::-1]
        number = lambda digits: int("".join(map(str, digits)))  # noqa: E731
        assert number(a) + number(b) == number(answer)


@pytest.mark.parametrize("hint", HINTS["sort"])
def test_hints_to_sorting(hint):
    config = AlgorithmicConfig(task="sort", hint=hint, train_length=6, num_train=20, num_test=1)
    for seed in range(20):
        asked, answer = hint_question(config, np.random.default_rng(seed), 6)
        ordered, rest = sorted(asked[:6]), asked[7:]
        assert asked[6] == config.ask
        if hint == "fill":
            assert sorted([*rest, *answer])[:6] == ordered
            continue
        rank = ordered.index(rest[0])
        expected = {
            "successor": ordered[rank + 1 : rank + 2],
            "predecessor": ordered[max(rank - 1, 0) : rank],
            "parity": [rank % 2],
        }
        assert answer == expected[hint]
    is_hint = (config.make().train.tokens == config.ask).any(axis=1)
    assert is_hint.tolist() == [False, True] * 10  # Every other row.
    assert not (config.make().tests[20].tokens == config.ask).any()


def test_refusals():
    with pytest.raises(ValueError, match=r"hint: expected None or one of \('index',\) for add"):
        AlgorithmicConfig(task="addition", hint="scratchpad")
    with pytest.raises(ValueError, match="num_values: expected at least 40"):
        AlgorithmicConfig(task="sort", num_values=39)
