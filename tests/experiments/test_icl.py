"""The experiments on in-context regression: from a config to the report, models left untrained.

Training is `train_seeds`, which has tests of its own, as have the problems it is given.
"""

import json

import jax
import numpy as np
import pytest

from experiments import cli, icl_algorithms, icl_gd, icl_mixers, regression, sweep
from lcattn.training import SeedsResult

SHARED = """
SeedsConfig:
  num_steps = 2
  num_seeds = 2
  optimizer = @OptimizerConfig()
LinearRegressionConfig:
  dim = 2
  num_examples = 3
"""

GD = (
    SHARED
    + """
icl_gd.studies = {
    "1 layer": @one/DescentStudy(),
    "2 layers": @two/DescentStudy(),
    "optimum": @OptimumStudy(),
    "network": @RepresentationStudy(),
}
DescentStudy:
  training = @SeedsConfig()
  task = @uniform/LinearRegressionConfig()
  batch_size = 4
  eval_size = 8
  final_size = 16
  fit_steps = 2
one/DescentStudy:
  model = @one/LSAConfig()
  probe = True
  scales = (1.0, 2.0)
  teacher_scales = (1.0, 2.0)
  corrupted = (0, 1)
  published = {"loss": 0.2047, "GD, 1 step/cos": 1.0}
  source = "a paper"
two/DescentStudy.model = @two/LSAConfig()
LSAConfig.token_size = 3
two/LSAConfig:
  num_layers = 2
  tied = True
OptimumStudy:
  training = @SeedsConfig()
  task = @normal/LinearRegressionConfig()
  batch_size = 4
  eval_size = 16
  final_size = 16
normal/LinearRegressionConfig:
  law = "normal"
  covariance = @random_covariance()
random_covariance.dim = 2
RepresentationStudy:
  training = @SeedsConfig()
  task = @NetworkRegressionConfig()
  width = 4
  hidden = 4
  batch_size = 4
  eval_size = 8
NetworkRegressionConfig:
  dim = 2
  num_examples = 3
"""
)

MIXERS = (
    SHARED
    + """
icl_mixers.study = @MechanismStudy()
MechanismStudy:
  training = @SeedsConfig()
  task = @LinearRegressionConfig()
  mechanisms = {"linear": @LinearAttentionConfig(), "convolution": @ShortConvolutionConfig()}
  width = 4
  descents = {"GD, 2 steps": @DescentConfig()}
  batch_size = 4
  eval_size = 8
LinearAttentionConfig:
  num_heads = 1
  feature_dim = 4
  feature_map = "identity"
  output_norm = False
DescentConfig.rates = (1.0, 1.0)
"""
)

ALGORITHMS = (
    SHARED
    + """
icl_algorithms.studies = {"1 block": @AlgorithmStudy()}
AlgorithmStudy:
  training = @SeedsConfig()
  task = @LinearRegressionConfig()
  model = @StreamRegressorConfig()
  batch_size = 4
  eval_size = 8
LinearRegressionConfig.label_noise = 0.5
StreamRegressorConfig:
  token_size = 3
  num_layers = 1
  width = 4
  mlp_width = 4
  mixer = @SoftmaxAttentionConfig()
SoftmaxAttentionConfig.num_heads = 1
"""
)


def untrained(problem, config, run_dir):
    """Numbers of the shapes that `train_seeds` would give; compiles nothing."""
    run_dir.mkdir(parents=True)

    def start(key):
        params, model_state = problem.init(key)
        return params, model_state, problem.evaluate(params, model_state)

    shapes = jax.eval_shape(jax.vmap(start), jax.random.split(jax.random.key(0), config.num_seeds))
    rng = np.random.default_rng(len(run_dir.name))
    params, state, metrics = jax.tree.map(
        lambda a: rng.uniform(0.1, 1, a.shape).astype("f"), shapes
    )
    steps = np.array([0, config.num_steps])
    return SeedsResult(params, state, steps, {k: np.stack([v, v]) for k, v in metrics.items()},
                       np.ones((1, config.num_seeds)))  # fmt: skip


@pytest.fixture(autouse=True)
def no_training(monkeypatch):
    rooms = [sweep] + [
        getattr(regression, name) for name in ("descent", "optimum", "representation", "algorithms")
    ]
    for room in rooms:
        monkeypatch.setattr(room, "train_seeds", untrained)


def run(script, text, tmp_path):
    (tmp_path / "tiny.gin").write_text(text)
    argv = [f"--gin_file={tmp_path / 'tiny.gin'}", f"--run_dir={tmp_path / 'run'}"]
    return cli.main(script, argv)


def results(tmp_path):
    return json.loads((tmp_path / "run/results.json").read_text())


def test_descent_end_to_end(tmp_path):
    assert run(icl_gd.icl_gd, GD, tmp_path) == 0
    recorded = results(tmp_path)
    one = recorded["studies"]["1 layer"]
    assert len(one["measured"]["loss"]) == 2
    assert one["curves"]["steps"] == [0, 2]
    assert list(recorded["studies"]["2 layers"]["steps"]) == [
        "GD, 1 step", "GD, 2 steps", "GD++, 2 steps"
    ]  # fmt: skip
    # On the task of training, a shift by a factor of 1 is none.
    same = one["shifts"]["scale of inputs"]
    assert [line[0] for line in same["trained"]] == pytest.approx(one["measured"]["loss"], rel=1e-4)
    assert same["GD, 1 step"][0] == pytest.approx(one["measured"]["GD, 1 step/loss"][0], rel=1e-4)

    text = (tmp_path / "run/report.md").read_text()
    ours = sum(one["measured"]["loss"]) / 2
    assert f"| 1 layer | loss | 0.205 | {ours:.3g} ±" in text
    seeds = ", ".join(f"{loss:.3g}" for loss in one["measured"]["loss"])
    assert f"| {ours - 0.2047:+.2g} | {seeds} | a paper |" in text
    pictures = {path.stem for path in (tmp_path / "run").glob("*.png")}
    assert pictures == {
        "learning", "weights", "shifts_1_layer", "roll_out_1_layer", "optimum", "representation"
    }  # fmt: skip


def test_mechanisms_end_to_end(tmp_path):
    assert run(icl_mixers.icl_mixers, MIXERS, tmp_path) == 0
    study = results(tmp_path)["study"]
    assert study["mechanisms"] == ["linear", "convolution"]
    assert set(study["references"]) == {"GD", "GD, 2 steps"}
    text = (tmp_path / "run/report.md").read_text()
    first, second = icl_mixers.ordered(study)
    assert text.index(f"| {first} |") < text.index(f"| {second} |")
    assert (tmp_path / "run/mechanisms.png").exists()


@pytest.mark.parametrize(
    ("loss", "cosine", "words"),
    [
        (0.2062, 0.999, "a step of GD (cosine ≥ 0.99)"),
        (0.15, 0.93, "better than a step of GD"),
        (0.23, 0.95, "near a step of GD (cosine ≥ 0.9)"),
        (0.3, 0.7, "part of a step of GD"),
        (0.41, 0.05, "nothing of it (cosine < 0.1)"),
    ],
)
def test_verdicts(loss, cosine, words):
    measured = {"a/loss": [loss], "a/GD/cos": [cosine], "a/GD/loss": [0.2062]}
    assert icl_mixers.verdict(measured, "a") == words


def test_algorithms_end_to_end(tmp_path):
    assert run(icl_algorithms.icl_algorithms, ALGORITHMS, tmp_path) == 0
    study = results(tmp_path)["studies"]["1 block"]
    assert len(study["by_count"]["spd/ols"][0]) == 4
    assert len(study["decoded"]["w"][0]) == 2
    assert all(value >= 0 for value in study["measured"]["ILWD, ols"])
    pictures = {path.stem for path in (tmp_path / "run").glob("*.png")}
    assert pictures == {"algorithms", "noise"}


@pytest.mark.parametrize(
    ("script", "text", "binding", "message"),
    [
        (icl_gd.icl_gd, GD, "two/DescentStudy.probe=True", "probe: expected False for any model"),
        (icl_gd.icl_gd, GD, "LSAConfig.token_size=4", "model: expected token_size=3"),
        (
            icl_gd.icl_gd,
            GD,
            "icl_gd.studies={'a': 3}",
            "icl_gd.studies: expected",
        ),
        (icl_mixers.icl_mixers, MIXERS, "MechanismStudy.mechanisms={}", "mechanisms: expected"),
    ],
)
def test_mistakes_are_one_line_and_train_nothing(script, text, binding, message, tmp_path, capsys):
    assert run(script, f"{text}\n{binding}\n", tmp_path) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not list((tmp_path / "run").glob("*/"))
