import pytest

from lcattn.training import JsonlWriter, MetricWriter, TensorBoardWriter, read_jsonl


def write(path, steps, start=0):
    writer = JsonlWriter(path, start)
    for step in steps:
        writer.write(step, {"loss": step / 3})
    writer.close()


def test_lines_are_read_back_exactly(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, [1, 2])
    assert read_jsonl(path) == [{"step": 1, "loss": 1 / 3}, {"step": 2, "loss": 2 / 3}]


@pytest.mark.parametrize("kept", [0, 3, 4, 9])
def test_a_continued_file_equals_an_unbroken_one(tmp_path, kept):
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    write(unbroken, range(1, 10))
    write(broken, range(1, 8))
    with broken.open("a") as file:
        file.write('{"step": 8, "lo')  # Killed in the middle of a line.
    write(broken, range(min(kept, 7) + 1, 10), start=min(kept, 7))
    assert broken.read_bytes() == unbroken.read_bytes()
    assert {p.name for p in tmp_path.iterdir()} == {"unbroken", "broken"}


def test_writers_keep_the_protocol(tmp_path):
    writers = [JsonlWriter(tmp_path / "a.jsonl"), TensorBoardWriter(tmp_path / "events")]
    for writer in writers:
        assert isinstance(writer, MetricWriter)
        writer.write(3, {"train/loss": 0.25})
        writer.close()
    (events,) = (tmp_path / "events").iterdir()
    assert b"train/loss" in events.read_bytes()
