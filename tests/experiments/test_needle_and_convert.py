"""The scripts on retrieval and conversion, end to end on models of a few hundred parameters."""

import json
import re

import pytest

from experiments import cli, reporting
from experiments.convert import CONTROL, convert
from experiments.needle import mastered, needle

NEEDLE = """
include "needle/quick.gin"
needle.models = {"softmax, RoPE": @softmax/rope/LMConfig(), "BASED": @based/LMConfig()}
LMConfig.width = 8
LMConfig.num_layers = 1
NUM_STEPS = 2
TrainConfig.log_every = 1
OptimizerConfig.warmup_steps = 0
DataConfig.batch_size = 8
NeedleTaskConfig.eval_batch_size = 8
NeedleTaskConfig.eval_examples = 8
NeedleTaskConfig.depths = (0, 100)
needle/NeedleTaskConfig.lengths = (16, 24)
passkey/NeedleTaskConfig.lengths = (130, 140)
NeedleConfig.length = 16
PasskeyConfig.length = 130
"""

CONVERT = """
include "convert/quick.gin"
convert.mixers = {"SSA": @SelectiveAttentionConfig(), "LSSA": @lssa/SoftplusAttentionConfig()}
TextTaskConfig.corpus = @TextFolderConfig()
TextTaskConfig.length = 16
TextTaskConfig.max_eval_batches = 1
DataConfig.batch_size = 8
LMConfig.width = 8
LMConfig.num_layers = 1
LMConfig.mlp_width = 0
TrainConfig.log_every = 1
TRAIN_STEPS = 2
TUNING_STEPS = 2
tune/TrainConfig.eval_every = 1
OptimizerConfig.warmup_steps = 0
train/OptimizerConfig.warmup_steps = 0
tune/OptimizerConfig.warmup_steps = 0
"""


@pytest.fixture
def small(tmp_path):
    """Writes a config and gives the arguments of a run of it."""

    def write(text, name="small"):
        (tmp_path / f"{name}.gin").write_text(text)
        return [f"--gin_file={tmp_path / f'{name}.gin'}", f"--run_dir={tmp_path / name}"]

    return write


@pytest.fixture
def converts(small, tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(20):
        (folder / f"{i}.txt").write_text(f"abc {i} " * 40)
    return small(f'{CONVERT}\nTextFolderConfig.path = "{folder}"')


def test_needle(small, tmp_path):
    argv = small(NEEDLE)
    assert cli.main(needle, argv) == 0
    results = json.loads((tmp_path / "small/results.json").read_text())
    assert list(results["tasks"]) == ["S-NIAH", "passkey"]
    for name, task in results["tasks"].items():
        assert list(task["models"]) == ["softmax, RoPE", "BASED"]
        for run in task["models"].values():
            assert len(run["slices"]) == 4
        assert (tmp_path / f"small/needle_{name}.png").exists()
    text = (tmp_path / "small/report.md").read_text()
    metrics = results["tasks"]["passkey"]["models"]["BASED"]["metrics"]
    mean = sum(metrics[f"length_140_depth_{depth}/exact_match"] for depth in (0, 100)) / 2
    [line] = [row for row in text.split("## passkey")[1].splitlines() if row.startswith("| BASED")]
    assert line.split(" | ")[2] == reporting.show(mean)
    reporting.regenerate(tmp_path / "small")
    assert (tmp_path / "small/report.md").read_text() == text

    assert cli.main(needle, argv) == 0  # read back, not trained again
    again = json.loads((tmp_path / "small/results.json").read_text())
    assert again["tasks"] == results["tasks"]


def test_the_length_that_is_mastered():
    assert mastered([64, 256, 128], [1.0, 0.9, 0.86]) == 256
    assert mastered([64, 128, 256], [1.0, 0.8, 0.9]) == 64
    assert mastered([64, 128], [0.5, 0.9]) is None


@pytest.mark.parametrize(
    ("binding", "message"),
    [
        ("NeedleTaskConfig.depths=(0,120)", "NeedleConfig.depth: expected per cent, .* got 120"),
        (
            "needle/NeedleTaskConfig.lengths=(4,)",
            "NeedleConfig.length: expected at least 11, .* got 4",
        ),
        (
            "needle/NeedleTaskConfig.lengths=()",
            "NeedleTaskConfig.lengths: expected at least one value",
        ),
        ("NeedleTaskConfig.depths=(5,5)", "NeedleTaskConfig.depths: .* none of them twice"),
        ("LMConfig.vocab_size=100", "LMConfig.vocab_size: expected at least the task's 512"),
        ("needle.models={}", "models: expected at least one, got none"),
    ],
)
def test_mistakes_in_a_needle_config(small, capsys, binding, message):
    argv = small(NEEDLE)
    assert cli.main(needle, [*argv, f"--gin.{binding}"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(message, error)


def test_convert(converts, tmp_path, capsys):
    assert cli.main(convert, converts) == 0
    results = json.loads((tmp_path / "small/results.json").read_text())
    mechanisms = results["mechanisms"]
    assert list(mechanisms) == [CONTROL, "SSA", "LSSA"]
    at = {name: m["at_conversion"]["heldout/loss"] for name, m in mechanisms.items()}
    assert at["SSA"] == pytest.approx(at[CONTROL], rel=1e-6)
    assert at["LSSA"] != at[CONTROL]
    assert len(mechanisms["LSSA"]["run"]["curves"]["heldout/loss"]) == 2
    text = (tmp_path / "small/report.md").read_text()
    assert reporting.show(mechanisms["LSSA"]["run"]["metrics"]["heldout/loss"]) in text
    assert (tmp_path / "small/convert.png").exists()

    assert cli.main(convert, converts) == 0  # read back, not trained again
    again = json.loads((tmp_path / "small/results.json").read_text())
    assert again["mechanisms"] == mechanisms

    # From a checkpoint, to another folder: the same start.
    options = [
        "--gin.convert.model=None", "--gin.convert.training=None",
        f"--gin.convert.checkpoint={tmp_path / 'small/softmax'}", f"--run_dir={tmp_path / 'other'}",
    ]  # fmt: skip
    assert cli.main(convert, [*converts, *options]) == 0
    other = json.loads((tmp_path / "other/results.json").read_text())
    for name, mechanism in other["mechanisms"].items():
        assert mechanism["at_conversion"]["heldout/loss"] == pytest.approx(at[name], rel=1e-5)
    assert "from a checkpoint" in (tmp_path / "other/report.md").read_text()
    capsys.readouterr()

    assert cli.main(convert, [*converts, *options[2:]]) == 2
    assert "either a checkpoint, or a model and its training" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("binding", "message"),
    [
        ("convert.layers=(3,)", r"layers: expected numbers in \[0, 1\), got 3"),
        ("convert.training=None", "either a checkpoint, or a model and its training"),
        ('convert.mixers={"a": @LinearAttentionConfig()}', "expected a parameter key.kernel"),
        ('convert.mixers={"a b": @SelectiveAttentionConfig(), "a_b": @SelectiveAttentionConfig()}',
         "convert.mixers: expected names that differ"),
        ("LMConfig.vocab_size=100", "LMConfig.vocab_size: expected at least the task's 257"),
    ],
)  # fmt: skip
def test_mistakes_in_a_convert_config_show_before_the_training(
    converts, tmp_path, capsys, binding, message
):
    assert cli.main(convert, [*converts, f"--gin.{binding}"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(message, error)
    assert not (tmp_path / "small/softmax").exists()
