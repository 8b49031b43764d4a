"""In-context languages and length generalisation, end to end on models of a few hundred weights."""

import json

import numpy as np
import pytest

from experiments import cli, forgetting, languages, length_generalization, reporting

MODEL = """
LMConfig:
  vocab_size = 24
  width = 8
  num_layers = 1
  pattern = ("mixer",)
  mlp_width = 0
  mixers = {"mixer": @NGramHeadsConfig()}
SeedsConfig:
  num_steps = 2
  num_seeds = 2
  optimizer = @OptimizerConfig()
OptimizerConfig.learning_rate = 1e-2
"""

LANGUAGES = """
languages.models = {"softmax": @LMConfig()}
languages.data = @LanguagesConfig()
languages.training = @SeedsConfig()
languages.batch_size = 4
LanguagesConfig:
  automata = @AutomataConfig()
  length = 24
  min_strings = 2
  max_strings = 3
  max_length = 6
  num_train = 8
  num_test = 6
AutomataConfig:
  num_letters = 5
  min_states = 3
  max_states = 4
  max_letters = 5
"""

LENGTHS = """
LMConfig.vocab_size = 26
length_generalization.tasks = {"sort": @AlgorithmicConfig(), "hint": @hint/AlgorithmicConfig()}
length_generalization.models = {"NoPE": @LMConfig()}
length_generalization.only = {"hint": ()}
length_generalization.training = @SeedsConfig()
length_generalization.batch_size = 4
AlgorithmicConfig:
  task = "sort"
  num_values = 10
  train_length = 2
  test_lengths = (2, 10)
  num_train = 8
  num_test = 4
hint/AlgorithmicConfig.hint = "successor"
"""

FORGETTING = """
forgetting.model = @LMConfig()
forgetting.data = @RolesConfig()
forgetting.schedules = {"active": @ResetConfig()}
forgetting.training = @SeedsConfig()
forgetting.batch_size = 4
ResetConfig.every = 1
RolesConfig.num_words = 20
"""


def run(script, config, tmp_path):
    (tmp_path / "tiny.gin").write_text(MODEL + config)
    argv = [f"--gin_file={tmp_path / 'tiny.gin'}", f"--run_dir={tmp_path / 'run'}"]
    assert cli.main(script, argv) == 0
    results = json.loads((tmp_path / "run/results.json").read_text())
    text = (tmp_path / "run/report.md").read_text()
    reporting.regenerate(tmp_path / "run")
    assert (tmp_path / "run/report.md").read_text() == text
    return results, text


def test_languages_end_to_end(tmp_path):
    results, text = run(languages.languages, LANGUAGES, tmp_path)
    runs = results["models"]["softmax"]
    last = {key: np.asarray(v) for key, v in runs["8"].items() if key.endswith("_at")}
    accuracy = last["accuracy_at"].sum(axis=-1) / last["letters_at"].sum(axis=-1)
    np.testing.assert_allclose(accuracy, runs["8"]["accuracy"][-1])
    tables = languages.reference_table(results).rows
    assert {row[0] for row in tables} == {"softmax", "2-gram", "3-gram", "4-gram"}
    [ours] = [row[3] for row in tables if row[:2] == ("softmax", "accuracy")]
    assert ours.mean == pytest.approx(accuracy.mean())
    assert reporting.show(ours) in text
    # With runs on several numbers of rows, these are a figure of their own, and the first one.
    runs["4"] = runs["8"]
    languages.report(results).save(tmp_path)
    for name in ("run/languages", "run/positions", "instances"):
        assert (tmp_path / f"{name}.png").exists()


def test_length_generalization_end_to_end(tmp_path):
    results, text = run(length_generalization.length_generalization, LENGTHS, tmp_path)
    assert {name: list(task["models"]) for name, task in results["tasks"].items()} == {
        "sort": ["NoPE"],
        "hint": [],
    }
    rows = length_generalization.published_table(results["tasks"]).rows
    [(task, _, _, published, _, ours, difference)] = rows
    assert (task, published, difference) == ("sort", 0.01, float(ours.mean) - 0.01)
    assert "| sort | NoPE | 5× | 0.01 | 5× |" in text
    results["tasks"]["sort"]["test_lengths"] = [2, 4]  # too far from the published one to compare
    [(*_, difference)] = length_generalization.published_table(results["tasks"]).rows
    assert difference is None
    assert (tmp_path / "run/lengths.png").exists()


def test_forgetting_end_to_end(tmp_path):
    results, text = run(forgetting.forgetting, FORGETTING, tmp_path)
    run_ = results["schedules"]["active"]
    ours = np.asarray(run_["held_out"])
    [(name, _, _, best, step, last, _)] = forgetting.published_table(results["schedules"]).rows
    assert (name, best.mean, last.mean) == ("active", ours.mean(axis=1).max(), ours[-1].mean())
    assert step in run_["steps"]
    assert "| active | 1 | the end |" in text
    assert (tmp_path / "run/forgetting.png").exists()


def test_mistakes_are_one_line(tmp_path, capsys):
    for script, config, binding, message in (
        (languages.languages, LANGUAGES, "LMConfig.vocab_size=6", "a vocab_size of at least 7"),
        (languages.languages, LANGUAGES, "languages.instances=(9,)", "at most num_train=8"),
        (length_generalization.length_generalization, LENGTHS,
         "length_generalization.only={'none': ('NoPE',)}", "only: expected names of tasks"),
    ):  # fmt: skip
        (tmp_path / "tiny.gin").write_text(MODEL + config + binding + "\n")
        argv = [f"--gin_file={tmp_path / 'tiny.gin'}", f"--run_dir={tmp_path / 'run'}"]
        assert cli.main(script, argv) == 2
        assert message in capsys.readouterr().err
