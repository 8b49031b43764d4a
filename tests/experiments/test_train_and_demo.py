"""The training scripts, end to end on models of a few hundred parameters."""

import json

import pytest

from experiments import cli, reporting
from experiments.demo import demo
from experiments.train import curves, train


@pytest.fixture
def texts(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(20):
        (folder / f"{i}.txt").write_text(f"abc {i} " * 40)
    return folder


def test_train_reports_and_continues(tmp_path, capsys):
    (tmp_path / "tiny.gin").write_text("""
train.task = @MQARTaskConfig()
train.model = @LMConfig()
train.training = @TrainConfig()
MQARTaskConfig.train = (@MQARConfig(),)
MQARTaskConfig.evaluation = (@MQARConfig(),)
MQARTaskConfig.data = @DataConfig()
DataConfig.batch_size = 8
MQARConfig.length = 16
MQARConfig.num_pairs = 2
MQARConfig.num_examples = 16
MQARConfig.vocab_size = 32
LMConfig.vocab_size = %VOCAB
LMConfig.width = 8
LMConfig.num_layers = 1
LMConfig.pattern = ("convolution",)
LMConfig.mixers = {"convolution": @ShortConvolutionConfig()}
LMConfig.mlp_width = 0
TrainConfig.num_steps = 4
TrainConfig.log_every = 1
TrainConfig.tensorboard = False
VOCAB = 32
""")
    argv = [f"--gin_file={tmp_path / 'tiny.gin'}", f"--run_dir={tmp_path / 'run'}"]
    assert cli.main(train, argv) == 0
    first = json.loads((tmp_path / "run/results.json").read_text())
    assert first["run"]["steps"] == 4
    assert len(first["run"]["curves"]["train/loss"]) == 4
    assert (tmp_path / "run/curves.png").exists()
    # The finished run is read back, not trained again.
    assert cli.main(train, argv) == 0
    second = json.loads((tmp_path / "run/results.json").read_text())
    assert second["run"] == first["run"]
    capsys.readouterr()

    assert cli.main(train, [*argv, "--gin.VOCAB=33"]) == 2  # another model than the folder's
    assert capsys.readouterr().err.count("\n") == 1
    assert cli.main(train, [*argv, "--gin.VOCAB=31", f"--run_dir={tmp_path / 'other'}"]) == 2
    assert "LMConfig.vocab_size: expected at least the task's 32, got 31" in capsys.readouterr().err


def test_demo(tmp_path, texts, capsys):
    (tmp_path / "small.gin").write_text(f"""
include "demo.gin"
demo.text_models = {{"one": @text/hybrid/LMConfig()}}
demo.recall_models = {{"one": @recall/hybrid/LMConfig()}}
demo.sample_bytes = 4
demo.prompt = "abc"
HYBRID = ("convolution",)
LMConfig.width = 8
LMConfig.num_layers = 1
TextTaskConfig.corpus = @TextFolderConfig()
TextTaskConfig.length = 16
TextFolderConfig.path = "{texts}"
TrainConfig.log_every = 1
TEXT_STEPS = 2
RECALL_STEPS = 2
""")
    argv = [f"--gin_file={tmp_path / 'small.gin'}", f"--run_dir={tmp_path / 'run'}"]
    assert cli.main(demo, argv) == 0
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert set(results["models"]) == {"one"}
    text = (tmp_path / "run/report.md").read_text()
    bits = results["models"]["one"]["text"]["metrics"]["heldout/bits_per_byte"]
    assert reporting.show(bits) in text
    assert reporting.show(results["baselines"]["bigram counts"]) in text
    assert results["sample"]["text"].startswith("abc")
    assert (tmp_path / "run/recall.png").exists()
    reporting.regenerate(tmp_path / "run")
    assert (tmp_path / "run/report.md").read_text() == text
    assert "report:" in capsys.readouterr().out


def test_curves_are_thinned():
    lines = [{"step": step, "train/loss": float(step)} for step in range(1200)]
    points = curves(lines)["train/loss"]
    assert len(points) == 400
    assert points[1] == (3, 3.0)
