import json
import subprocess
import sys

import numpy as np
import pytest

from lcattn.config import Config
from lcattn.tasks import (
    DataConfig,
    MQARConfig,
    MQARTaskConfig,
    NeedleConfig,
    NeedleTaskConfig,
    Task,
    TextFolderConfig,
    TextTaskConfig,
    check_batch,
)

TINY = MQARTaskConfig(
    train=(
        MQARConfig(length=16, num_pairs=2, num_examples=40, vocab_size=64),
        MQARConfig(length=32, num_pairs=4, num_examples=16, vocab_size=64),
    ),
    evaluation=(
        MQARConfig(length=16, num_pairs=2, num_examples=10, vocab_size=64),
        MQARConfig(length=16, num_pairs=4, num_examples=10, vocab_size=64),
    ),
    data=DataConfig(batch_size=8),
    eval_batch_size=4,
)


@pytest.fixture
def text_config(tmp_path):
    for i in range(30):
        (tmp_path / f"{i}.txt").write_text(f"file number {i}. " * (i + 1))
    folder = TextFolderConfig(path=str(tmp_path), heldout_fraction=0.3)
    return TextTaskConfig(corpus=folder, length=32, data=DataConfig(batch_size=4))


def test_mqar_task():
    task = TINY.make()
    assert isinstance(task, Task)
    assert task.vocab_size == 64
    assert task.metrics == ("loss", "accuracy")
    iterator = task.train()
    for _ in range(10):
        check_batch(next(iterator), task.vocab_size)
    iterator.close()
    evaluation = task.evaluation()
    assert task.slices == {
        "length_16_pairs_2": {"length": 16, "num_pairs": 2},
        "length_16_pairs_4": {"length": 16, "num_pairs": 4},
    }
    assert set(evaluation) == set(task.slices)
    for name, batches in evaluation.items():
        assert len(batches) == 3  # 4 + 4 + 2 rows
        ids = [i for batch in batches for i in batch["example_ids"].tolist()]
        assert ids == [*range(10), -1, -1]
        queries = batches[0]["weights"].sum(axis=1)
        assert (queries == task.slices[name]["num_pairs"]).all()


def test_mqar_never_tests_on_training_rows():
    same = MQARConfig(length=16, num_pairs=2, num_examples=32, vocab_size=64)
    task = TINY.replace(train=(same,), evaluation=(same,)).make()
    train = np.concatenate([next(task.train())["tokens"] for _ in range(1)])
    test = np.concatenate([b["tokens"] for b in task.evaluation()["length_16_pairs_2"]])
    assert not (train[:, None] == test).all(axis=2).any()


def test_the_published_task_runs_from_easy_to_hard():
    task = MQARTaskConfig().make()
    batch = next(task.train())
    assert batch["tokens"].shape == (256, 64)
    assert list(task.slices)[-1] == "length_1024_pairs_256"


def test_needle_task():
    config = NeedleTaskConfig(
        train=(NeedleConfig(length=16, num_examples=32), NeedleConfig(length=24, num_examples=32)),
        lengths=(16, 32), depths=(0, 100), eval_examples=10, data=DataConfig(batch_size=8),
    )  # fmt: skip
    task = config.make()
    assert isinstance(task, Task)
    assert task.metrics == ("loss", "accuracy", "exact_match")
    iterator = task.train()
    lengths = {next(iterator)["tokens"].shape[1] for _ in range(8)}
    iterator.close()
    assert lengths == {16, 24}
    evaluation = task.evaluation()
    assert set(evaluation) == set(task.slices)
    assert task.slices["length_32_depth_100"] == {"length": 32, "depth": 100}
    for name, batches in evaluation.items():
        assert batches[0]["tokens"].shape == (8, task.slices[name]["length"])
        # The needle stands first or directly before the question.
        places = np.argmax(batches[0]["tokens"] == 1, axis=1)
        assert set(places) == {0 if task.slices[name]["depth"] == 0 else places[0]}
        check_batch(batches[0], task.vocab_size)
    with pytest.raises(ValueError, match=r"NeedleTaskConfig\.train: expected at least one"):
        config.replace(train=())
    with pytest.raises(ValueError, match=r"NeedleTaskConfig\.train: expected one vocab_size"):
        config.replace(train=(*config.train, NeedleConfig(length=16, vocab_size=64)))


def test_text_task(text_config):
    task = text_config.make()
    assert isinstance(task, Task)
    assert task.vocab_size == 257
    assert "bits_per_byte" in task.metrics
    check_batch(next(task.train()), 257)
    evaluation = task.evaluation()["heldout"]
    targets = sum(batch["weights"].sum() for batch in evaluation)
    assert targets == task.heldout_documents.data.size  # every held-out byte counts once
    assert set(task.train_documents.names).isdisjoint(task.heldout_documents.names)

    few = text_config.replace(max_eval_batches=2).make().evaluation()["heldout"]
    assert len(few) == 2
    for batch, expected in zip(few, evaluation, strict=False):
        np.testing.assert_array_equal(batch["tokens"], expected["tokens"])


def test_a_changed_text_folder_does_not_resume(text_config, tmp_path):
    state = text_config.make().train().get_state()
    (tmp_path / "new.txt").write_text("another file")
    (tmp_path / "newer.txt").write_text("another file")
    (tmp_path / "0.txt").write_text("changed")
    with pytest.raises(ValueError, match=r"state\['data'\]"):
        text_config.make().train().set_state(state)


def test_configs_survive_json(text_config, no_type_hook):
    # JSON has no tuples: `Config` makes the tuple of the list, which the hook would not let in.
    for config in (TINY, MQARTaskConfig(), text_config):
        assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"train": ()}, "train: expected at least one"),
        ({"evaluation": (MQARConfig(length=16, num_pairs=2),)}, "train: expected one vocab_size"),
        ({"evaluation": TINY.evaluation[:1] * 2}, "evaluation: expected no two configs"),
        ({"eval_batch_size": 0}, "eval_batch_size: .*greater than 0"),
    ],
)
def test_wrong_fields_are_named(fields, message):
    with pytest.raises(ValueError, match=f"MQARTaskConfig.{message}"):
        TINY.replace(**fields)


def test_wrong_text_fields_are_named(text_config):
    with pytest.raises(ValueError, match=r"TextTaskConfig.length: .*greater than 0, got 0"):
        text_config.replace(length=0)


def test_importing_tasks_is_light():
    program = (
        "import sys, lcattn.tasks; "
        "print([m for m in ('grain', 'tensorflow_datasets', 'tensorflow') if m in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"
