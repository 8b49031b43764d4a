import numpy as np
import pytest

from lcattn.tasks import Documents, MQARConfig, PackedText, accuracy, check_batch


@pytest.fixture
def batch():
    text = PackedText(Documents(["abc", "defgh", "ij"]), 6)
    return text.batch(np.arange(len(text)))


def test_batches_of_every_source_pass(batch):
    check_batch(batch, 257)
    check_batch(MQARConfig(length=32, num_pairs=4).make().batch(np.arange(5)), 8192)


@pytest.mark.parametrize(
    ("key", "change", "message"),
    [
        ("segment_ids", lambda x: x[:, ::-1], r"batch\['segment_ids'\].*do not decrease.*after"),
        ("segment_ids", lambda x: x[:, :-1], r"segment_ids.*shaped like the tokens \(2, 6\)"),
        ("segment_ids", lambda x: x.astype(np.float32), "segment_ids.*integer, .* got float32"),
        ("segment_ids", lambda x: x * 0 - 1, "weights.*0 on padding"),
        ("tokens", lambda x: x + 1, r"tokens.*ids in \[0, 257\), got 98\.\.257"),
        ("tokens", lambda x: x[:0], "tokens.*non-empty"),
        ("targets", lambda x: x - 1000, "targets.*ids in"),
        ("targets", lambda x: x + 1, "targets.*0 where the weight is 0"),
        ("weights", lambda x: x * np.nan, "weights.*finite"),
        ("weights", lambda x: x[0], r"weights.*\[B, T\].*got float32\[6\]"),
        ("example_ids", lambda x: x[:1], "example_ids.*shaped like"),
    ],
)
def test_a_wrong_array_is_named(batch, key, change, message):
    with pytest.raises(ValueError, match=message):
        check_batch({**batch, key: change(batch[key])}, 257)


def test_missing_and_unknown_keys_are_named(batch):
    with pytest.raises(ValueError, match=r"'weights'.*got 'tokens', 'targets'$"):
        check_batch({key: batch[key] for key in ("tokens", "targets")})
    with pytest.raises(ValueError, match="'labels'"):
        check_batch({**batch, "labels": batch["targets"]})


def test_padding_may_stand_anywhere(batch):
    segment_ids = np.array([[-1, 0, 0, -1, 1, -1], [0, 0, 1, 1, 2, 2]], np.int32)
    weights = (segment_ids >= 0).astype(np.float32)
    targets = batch["targets"] * (weights > 0)
    check_batch({**batch, "targets": targets, "segment_ids": segment_ids, "weights": weights})


def test_accuracy_is_averaged_per_row_and_ignores_filler_rows():
    batch = {
        "targets": np.array([[1, 2, 3, 4], [5, 6, 7, 8], [9, 9, 9, 9]]),
        "weights": np.array([[1, 1, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0]], np.float32),
    }
    predictions = np.array([[1, 0, 0, 0], [5, 0, 0, 0], [9, 9, 9, 9]])
    assert accuracy(predictions, batch) == (1 / 4 + 1) / 2
    with pytest.raises(ValueError, match=r"predictions: expected shape \(3, 4\), got \(3,\)"):
        accuracy(predictions[:, 0], batch)
    with pytest.raises(ValueError, match="weights"):
        accuracy(predictions, {**batch, "weights": np.zeros((3, 4), np.float32)})
