"""The same bytes at every length."""

import numpy as np
import pytest

from lcattn.tasks import (
    DataConfig,
    ExtrapolationTaskConfig,
    Task,
    TextFolderConfig,
    check_batch,
)


@pytest.fixture
def config(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(40):
        (tmp_path / f"{i}.txt").write_bytes(rng.bytes(40 + 5 * i))
    return ExtrapolationTaskConfig(
        corpus=TextFolderConfig(path=str(tmp_path), heldout_fraction=0.4),
        length=16,
        factors=(1, 2, 8),
        data=DataConfig(batch_size=8),
    )


def test_every_length_is_judged_by_the_same_bytes(config):
    task = config.make()
    assert isinstance(task, Task)
    assert task.slices["length_128"] == {"length": 128, "factor": 8}
    judged = task.judged_documents
    long = [text[:128] for text in task.heldout_documents if len(text) >= 128]
    assert 0 < len(long) < len(task.heldout_documents)
    np.testing.assert_array_equal(judged.data, np.concatenate(long))

    for name, batches in task.evaluation().items():
        targets = []
        for batch in batches:
            check_batch(batch, task.vocab_size)
            assert batch["tokens"].shape[1] == task.slices[name]["length"]
            assert batch["tokens"].size == 8 * 16  # the same memory at every length
            targets.append(batch["targets"][batch["weights"] > 0])
        np.testing.assert_array_equal(np.concatenate(targets), judged.data)


def test_a_sample_of_documents_is_the_same_at_every_length(config):
    everything = config.make().judged_documents
    task = config.replace(max_eval_batches=2).make()
    assert len(task.judged_documents) == 2 < len(everything)
    assert set(task.judged_documents.names) < set(everything.names)
    assert [len(batches) for batches in task.evaluation().values()] == [2, 2, 2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"factors": ()}, "factors: expected different whole numbers of at least 1"),
        ({"factors": (0, 2)}, "factors: expected different whole numbers of at least 1"),
        ({"factors": (2, 2)}, "factors: expected different whole numbers of at least 1"),
        ({"factors": (3, 4)}, "factors: expected divisors of the largest"),
        ({"eval_batch_size": 4}, "eval_batch_size: expected a multiple of the largest factor, 8"),
    ],
)
def test_factors_that_do_not_fit(config, change, message):
    with pytest.raises(ValueError, match=message):
        config.replace(**change)


def test_documents_that_are_too_short(config):
    with pytest.raises(ValueError, match=r"bytes, got \d+ bytes at most"):
        config.replace(length=64).make()
