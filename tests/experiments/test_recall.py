"""Recall against state bytes, end to end on models of a few hundred parameters."""

import json

import pytest

from experiments import cli, recall, reporting

CONFIG = """
recall.model = @LMConfig()
recall.mechanisms = {
    "window": (@small/SoftmaxAttentionConfig(), @large/SoftmaxAttentionConfig()),
    "convolution": (@ShortConvolutionConfig(),),
}
recall.task = @MQARTaskConfig()
recall.training = @TrainConfig()
LMConfig:
  vocab_size = 32
  width = 8
  num_layers = 1
  pattern = ("mixer",)
  mixers = {"mixer": @ShortConvolutionConfig()}
  mlp_width = 0
SoftmaxAttentionConfig.num_heads = 1
small/SoftmaxAttentionConfig.window = 2
large/SoftmaxAttentionConfig.window = 4
MQARTaskConfig:
  train = (@MQARConfig(),)
  evaluation = (@one/MQARConfig(), @two/MQARConfig())
  data = @DataConfig()
DataConfig.batch_size = 8
MQARConfig:
  length = 16
  num_pairs = 2
  num_examples = 16
  vocab_size = 32
one/MQARConfig.num_pairs = 1
TrainConfig:
  num_steps = 2
  optimizer = @OptimizerConfig()
  log_every = 1
  tensorboard = False
OptimizerConfig.learning_rate = 1e-2
"""


@pytest.fixture
def argv(tmp_path):
    (tmp_path / "tiny.gin").write_text(CONFIG)
    return [f"--gin_file={tmp_path / 'tiny.gin'}", f"--run_dir={tmp_path / 'run'}"]


def test_end_to_end_and_again(argv, tmp_path):
    assert cli.main(recall.recall, argv) == 0
    results = json.loads((tmp_path / "run/results.json").read_text())
    runs = results["mechanisms"]["window"]
    assert list(runs) == ["window, window=2", "window, window=4"]
    small, large = (run["state_bytes"] for run in runs.values())
    assert large - small == 2 * 2 * 8 * 4  # two more keys and values of 8 float32
    assert list(results["mechanisms"]["convolution"]) == ["convolution"]

    text = (tmp_path / "run/report.md").read_text()
    for run in runs.values():
        accuracies = [run["metrics"][f"length_16_pairs_{pairs}/accuracy"] for pairs in (1, 2)]
        assert recall.mean_accuracy(run) == pytest.approx(sum(accuracies) / 2)
        assert reporting.show(recall.mean_accuracy(run)) in text
    assert (tmp_path / "run/recall.png").exists()

    # What is finished is read back.
    lines = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("metrics.jsonl")}
    assert len(lines) == 3
    assert cli.main(recall.recall, argv) == 0
    assert {path: path.stat().st_mtime_ns for path in lines} == lines
    again = json.loads((tmp_path / "run/results.json").read_text())
    assert again["mechanisms"] == results["mechanisms"]


def test_the_best_learning_rate_is_reported(argv, tmp_path, monkeypatch):
    accuracy = {1e-3: 0.1, 1e-2: 0.9, 1e-1: 0.2}

    def train_each(models, task, training, run_dir):
        for name in models:
            yield name, None, {
                "state_bytes": 512, "state_length": 16, "steps": 2, "num_steps": 2,
                "num_parameters": 10, "slices": task.slices,
                "metrics": {
                    f"{slice_}/accuracy": accuracy[training.optimizer.learning_rate]
                    for slice_ in task.slices
                },
            }  # fmt: skip

    monkeypatch.setattr(recall, "train_each", train_each)
    assert cli.main(recall.recall, [*argv, f"--gin.recall.learning_rates={(*accuracy,)}"]) == 0
    results = json.loads((tmp_path / "run/results.json").read_text())
    runs = [run for runs in results["mechanisms"].values() for run in runs.values()]
    assert [run["learning_rate"] for run in runs] == [1e-2] * 3
    assert [recall.mean_accuracy(run) for run in runs] == [0.9] * 3
    text = (tmp_path / "run/report.md").read_text()
    assert "| convolution | 512 B | 0.9 | 0.9 | 0.9 | 0.01 |" in text
    reporting.regenerate(tmp_path / "run")
    assert (tmp_path / "run/report.md").read_text() == text


@pytest.mark.parametrize(
    ("binding", "message"),
    [
        ("LMConfig.vocab_size=16", "LMConfig.vocab_size: expected at least the task's 32, got 16"),
        ("small/SoftmaxAttentionConfig.window=0", "window: expected a value greater than 0"),
        (
            "small/SoftmaxAttentionConfig.window=4",
            "recall.mechanisms: expected for 'window' configs that differ in some field",
        ),
        ("recall.mechanisms={'a': (3,)}", "recall.mechanisms: expected"),
        ("recall.mechanisms={}", "models: expected at least one"),
        ("recall.mechanisms={'a': ()}", "expected for 'a' configs that differ in some field"),
        (
            "LMConfig.mixers={'other': @ShortConvolutionConfig()}\nLMConfig.pattern=('other',)",
            "recall.model: expected 'mixer' in its pattern",
        ),
    ],
)
def test_mistakes_are_one_line_and_train_nothing(argv, binding, message, tmp_path, capsys):
    with (tmp_path / "tiny.gin").open("a") as file:
        file.write(binding + "\n")
    assert cli.main(recall.recall, argv) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not list((tmp_path / "run").rglob("metrics.jsonl"))
