"""Several models, one after another, each in its folder."""

import pytest

from experiments import sweep
from lcattn.models import LMConfig
from lcattn.nn import ShortConvolutionConfig
from lcattn.tasks import DataConfig, MQARConfig, MQARTaskConfig
from lcattn.training import TrainConfig

ROWS = MQARConfig(length=16, num_pairs=2, num_examples=16, vocab_size=32)
TASK = MQARTaskConfig(train=(ROWS,), evaluation=(ROWS,), data=DataConfig(batch_size=8))
TRAINING = TrainConfig(num_steps=2, log_every=1, tensorboard=False)
MODEL = LMConfig(
    vocab_size=32, width=8, num_layers=1, pattern=("convolution",), mlp_width=0,
    mixers={"convolution": ShortConvolutionConfig()},
)  # fmt: skip


def test_each_model_is_trained_once(tmp_path):
    models = {"one p=3": MODEL, "two": MODEL.replace(width=4)}
    first = {n: r for n, _, r in sweep.train_each(models, TASK.make(), TRAINING, tmp_path)}
    assert list(first) == ["one p=3", "two"]
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("metrics.jsonl")}
    assert {p.parent.name for p in before} == {"one_p=3", "two"}
    again = {n: r for n, _, r in sweep.train_each(models, TASK.make(), TRAINING, tmp_path)}
    assert again == first
    assert {p: p.stat().st_mtime_ns for p in before} == before


def test_mistakes_are_found_before_anything_is_trained(tmp_path):
    def run(models):
        list(sweep.train_each(models, TASK.make(), TRAINING, tmp_path))

    with pytest.raises(ValueError, match="models: expected names that differ"):
        run({"a b": MODEL, "a_b": MODEL})
    with pytest.raises(ValueError, match=r"LMConfig\.vocab_size: expected at least .* 32"):
        run({"good": MODEL, "bad": MODEL.replace(vocab_size=8)})
    assert not list(tmp_path.iterdir())
