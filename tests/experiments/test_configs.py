"""Every shipped .gin file is parsed, its configs are built, and its models are traced."""

import importlib
import math
import re

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from experiments import cli, gin_config, recall, registry
from experiments.benchmarks import OpBenchmark
from lcattn.models import LMConfig

FILES = sorted(str(p.relative_to(gin_config.CONFIGS)) for p in gin_config.CONFIGS.rglob("*.gin"))


def _prepare(file):
    registry.register_all()
    text = (gin_config.CONFIGS / file).read_text()
    # The command in the header is the one that runs the file.
    script = re.search(rf"^#   python -m experiments\.(\w+) --gin_file={file}", text, re.MULTILINE)
    assert script, f"{file} does not open with its command"
    run = getattr(importlib.import_module(f"experiments.{script[1]}"), script[1])
    return gin_config.prepare(run, [file], [])


def _models(arguments):
    if "mechanisms" in arguments:
        arguments = {"models": recall.fill(arguments["model"], arguments["mechanisms"])}
    for value in arguments.values():
        if isinstance(value, LMConfig):
            yield value
        elif isinstance(value, dict):
            yield from _models(value)


def _num_parameters(config):
    model = nnx.eval_shape(lambda: config.make(nnx.Rngs(0)))
    return sum(math.prod(p.shape) for p in jax.tree.leaves(nnx.state(model, nnx.Param)))


def _trace(config, length=64):
    def logits(tokens):
        return config.make(nnx.Rngs(0))(tokens)

    return jax.eval_shape(logits, jax.ShapeDtypeStruct((2, length), jnp.int32))


@pytest.mark.parametrize("file", FILES)
def test_a_shipped_config_builds_what_its_script_needs(file):
    prepared = _prepare(file)
    for model in _models(prepared.arguments):
        assert _trace(model).shape == (2, 64, model.vocab_size)
    for value in prepared.arguments.values():
        if isinstance(value, OpBenchmark):
            out = jax.eval_shape(value.reference, value.inputs(8))
            for implementation in value.implementations().values():
                assert (
                    jax.eval_shape(lambda i, f=implementation: f.run(**i), value.inputs(8)) == out
                )


@pytest.mark.parametrize("file", FILES)
def test_no_binding_of_a_shipped_config_is_without_effect(file):
    prepared = _prepare(file)
    used = {gin_config._key(s) for s in gin_config._bindings(prepared.operative)}
    given = {gin_config._key(s) for s in gin_config._bindings(prepared.config)}
    assert {
        key for key in given
        if not any(key[1:] == u[1:] and gin_config._covers(key[0], u[0]) for u in used)
    } == set()  # fmt: skip


@pytest.mark.parametrize("file", FILES)
def test_a_header_says_what_to_expect(file):
    text = (gin_config.CONFIGS / file).read_text()
    header = text[: text.index("\n\n")]
    assert "Not run here" in header or re.search(r"\d+ (minutes|seconds)", header)
    assert "TODO" not in text


def test_based_360m_has_the_published_layers_and_size():
    [model] = _models(_prepare("lm/based_360m.gin").arguments)
    kinds = [model.pattern[i % len(model.pattern)] for i in range(model.num_layers)]
    assert [i for i, kind in enumerate(kinds) if kind == "linear"] == [1, 6, 11, 16, 21]
    assert [i for i, kind in enumerate(kinds) if kind == "sliding"] == [2, 7, 12, 17, 22]
    assert _num_parameters(model) == pytest.approx(363e6, rel=5e-3)


def test_base_has_the_size_of_gpt2_small():
    [model] = _models(_prepare("lm/base_124m.gin").arguments)
    assert _num_parameters(model) == pytest.approx(124e6, rel=2e-2)


@pytest.mark.parametrize("file", ["mqar/paper.gin", "lm/based_360m.gin"])
def test_a_run_is_called_with_what_is_stored(file, request):
    """To store anew after a change that is meant: run the script and copy its arguments.json."""
    golden = request.path.parent / "golden" / file.replace("/", "_").replace(".gin", ".json")
    assert cli.arguments_json(_prepare(file).arguments) == golden.read_text()
