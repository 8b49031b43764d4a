"""Trained short, judged long, end to end on models of a few hundred parameters."""

import json

import pytest

from experiments import cli, reporting
from experiments.length_extrapolation import length_extrapolation

CONFIG = """
length_extrapolation.models = {
    "softmax + RoPE": @softmax/LMConfig(),
    "convolution": @convolution/LMConfig(),
}
length_extrapolation.task = @ExtrapolationTaskConfig()
length_extrapolation.training = @TrainConfig()
LMConfig:
  vocab_size = 257
  width = 8
  num_layers = 1
  pattern = ("mixer",)
  mlp_width = 0
softmax/LMConfig.mixers = {"mixer": @SoftmaxAttentionConfig()}
convolution/LMConfig.mixers = {"mixer": @ShortConvolutionConfig()}
SoftmaxAttentionConfig.num_heads = 1
ExtrapolationTaskConfig:
  corpus = @TextFolderConfig()
  length = 16
  factors = (1, 4)
  eval_batch_size = 32
  data = @DataConfig()
TextFolderConfig.path = "FOLDER"
DataConfig.batch_size = 8
TrainConfig:
  num_steps = 2
  log_every = 1
  tensorboard = False
"""


@pytest.fixture
def argv(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(20):
        (folder / f"{i}.txt").write_text(f"abc {i} " * 40)
    (tmp_path / "tiny.gin").write_text(CONFIG.replace("FOLDER", str(folder)))
    return [f"--gin_file={tmp_path / 'tiny.gin'}", f"--run_dir={tmp_path / 'run'}"]


def test_end_to_end_and_again(argv, tmp_path):
    assert cli.main(length_extrapolation, argv) == 0
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert results["judged_bytes"] == 64 * results["judged_documents"] > 0
    text = (tmp_path / "run/report.md").read_text()
    for run in results["models"].values():
        short, long = (run["metrics"][f"length_{length}/loss"] for length in (16, 64))
        assert f"| {reporting.show(short)} | {reporting.show(long)} |" in text
        assert f"| {reporting.show(long - short)} |" in text
    assert "quoted from arXiv 2501.13428" in text
    assert (tmp_path / "run/length.png").exists()

    lines = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("metrics.jsonl")}
    assert cli.main(length_extrapolation, argv) == 0
    assert {path: path.stat().st_mtime_ns for path in lines} == lines
    again = json.loads((tmp_path / "run/results.json").read_text())
    assert again["models"] == results["models"]


@pytest.mark.parametrize(
    ("binding", "message"),
    [
        ("ExtrapolationTaskConfig.factors=(3, 4)", "factors: expected divisors of the largest"),
        ("ExtrapolationTaskConfig.length=512", "a held-out document of length * 4 = 2048 bytes"),
        ("LMConfig.vocab_size=256", "LMConfig.vocab_size: expected at least the task's 257"),
        ("length_extrapolation.models={}", "models: expected at least one"),
    ],
)
def test_mistakes_are_one_line_and_train_nothing(argv, binding, message, tmp_path, capsys):
    assert cli.main(length_extrapolation, [*argv, f"--gin.{binding}"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not list((tmp_path / "run").rglob("metrics.jsonl"))
