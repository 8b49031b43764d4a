"""Induction heads and in-context classification, end to end on the smallest of models."""

import json

import jax
import numpy as np
import pytest

from experiments import cli, in_context_classification, induction_heads, reporting

INDUCTION = """
induction_heads.models = {"1 layer": @LMConfig()}
induction_heads.problem = @InductionProblem()
induction_heads.training = @SeedsConfig()
LMConfig:
  vocab_size = 8
  width = 8
  num_layers = 1
  pattern = ("attention",)
  mixers = {"attention": @SoftmaxAttentionConfig()}
  mlp_width = 0
SoftmaxAttentionConfig.num_heads = 2
InductionProblem:
  model = @LMConfig()
  data = @RepeatedTokensConfig()
  period = 3
  copies = 2
  batch_size = 2
  eval_rows = 2
  num_token_losses = 6
RepeatedTokensConfig:
  vocab_size = 8
  length = 10
  min_period = 2
  max_period = 4
SeedsConfig:
  num_steps = 4
  eval_every = 2
  num_seeds = 2
  optimizer = @SGDConfig()
"""

CLASSIFICATION = """
in_context_classification.problem = @ItemLabelProblem()
in_context_classification.training = @SeedsConfig()
in_context_classification.two_parameter = @ItemLabelProblem()
in_context_classification.two_parameter_training = @SeedsConfig()
in_context_classification.sweep = @ItemLabelProblem()
in_context_classification.sweep_training = @SeedsConfig()
in_context_classification.sweeps = {"num_classes": (4,)}
ItemLabelConfig:
  num_classes = 4
  num_labels = 4
  content_size = 3
  num_items = 2
  max_items = 2
ItemLabelProblem:
  data = @ItemLabelConfig()
  network = @TwoParameterNetwork()
  batch_size = 2
  eval_size = 4
SeedsConfig:
  num_steps = 2
  eval_every = 1
  num_seeds = 2
  optimizer = @SGDConfig()
"""


@pytest.fixture
def argv(tmp_path, monkeypatch):
    # Runs of one config then share their programs.
    monkeypatch.setattr(jax, "clear_caches", lambda: None)

    def write(config, *bindings):
        (tmp_path / "tiny.gin").write_text(config)
        return [f"--gin_file={tmp_path / 'tiny.gin'}", f"--run_dir={tmp_path / 'run'}", *bindings]

    return write


def _results(tmp_path):
    return json.loads((tmp_path / "run/results.json").read_text())


def test_induction_heads(argv, tmp_path):
    assert cli.main(induction_heads.induction_heads, argv(INDUCTION)) == 0
    results = _results(tmp_path)
    [run] = results["models"].values()
    assert run["steps"] == [0, 2, 4]
    assert np.shape(run["heads"]["prefix_matching"]["0"]) == (3, 2, 2)  # steps, seeds, heads
    assert np.shape(run["occlusion"]) == (6, 7)
    text = (tmp_path / "run/report.md").read_text()
    # Its name is that of a model of the quoted run, so that figures stand side by side.
    loss = np.mean(run["curves"]["repeat_loss"][-1])
    row = next(line for line in text.splitlines() if line.startswith("| 1 layer | repeat loss"))
    assert "| 3.39 |" in row
    assert f"{loss:.3g} ±" in row
    assert f"| {loss - 3.39:+.2g} |" in row
    for name in ("learning", "phase_1_layer", "copying", "occlusion", "slopes", "paths"):
        assert (tmp_path / f"run/{name}.png").exists()


def test_in_context_classification(argv, tmp_path):
    run = in_context_classification.in_context_classification
    assert cli.main(run, argv(CLASSIFICATION)) == 0
    results = _results(tmp_path)
    assert list(results["sweeps"]["num_classes"]) == ["4"]
    assert np.shape(results["full"]["metrics"]["ic/accuracy"]) == (3, 2)
    assert "beta1" in results["two_parameter"]["metrics"]
    text = (tmp_path / "run/report.md").read_text()
    row = "three logits, L = 32 | loss at step 100 | 3.05 | 3.05 | +0.002 | 3.05 | reconstruction"
    assert f"| {row} |" in text
    assert "256 classes" not in text  # was not run
    reporting.regenerate(tmp_path / "run")
    assert (tmp_path / "run/report.md").read_text() == text


def test_halfway():
    assert in_context_classification.halfway_step([0, 10, 20], np.array([0.0, 0.2, 1.0])) == 13.75
    assert in_context_classification.halfway_step([0, 10, 20], np.array([3.0, 1.0, 1.0])) == 5


@pytest.mark.parametrize(
    ("run", "config", "binding", "message"),
    [
        (
            induction_heads.induction_heads, INDUCTION, "induction_heads.models={}",
            "models: expected at least one",
        ),
        (
            induction_heads.induction_heads, INDUCTION, "LMConfig.vocab_size=7",
            "InductionProblem.model: expected a vocabulary of at least 8 tokens",
        ),
        (
            in_context_classification.in_context_classification, CLASSIFICATION,
            "in_context_classification.sweeps={'colour': (1,)}", "sweeps: expected fields of",
        ),
    ],
)  # fmt: skip
def test_mistakes_are_one_line_and_train_nothing(
    argv, run, config, binding, message, tmp_path, capsys
):
    assert cli.main(run, argv(config, f"--gin.{binding}")) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not list((tmp_path / "run").rglob("checkpoints"))
