import functools
import os
import resource
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy import ToyConfig

from lcattn.training import (
    CheckpointError,
    ConfigMismatchError,
    MeshConfig,
    OptimizerConfig,
    load_model,
)
from lcattn.training.checkpoint import Checkpointer, differences, digests
from lcattn.training.state import abstract_model, abstract_state, init_state

CONFIG = ToyConfig(dropout=0.1, width=64)
CONFIGS = {"model": CONFIG.to_dict(), "train": {"seed": 0}}
META = {"finished": False, "latest": {"loss": 1 / 3}, "data": {"index": 2**60}}


@functools.cache
def target_on(**axes):
    mesh = MeshConfig(**axes).make(jax.devices()[: 8 if axes else 1])
    optimizer, _ = OptimizerConfig().make(10)
    _, params, model_state = abstract_model(CONFIG, mesh)
    return optimizer, abstract_state(params, model_state, optimizer, mesh)


@functools.cache
def state_at(step, **axes):
    optimizer, target = target_on(**axes)
    return init_state(CONFIG, optimizer, step, target)


def save(run_dir, *steps, keep=3, **axes):
    checkpointer = Checkpointer(run_dir, CONFIGS, keep)
    for step in steps:
        checkpointer.save(step, state_at(step, **axes), META)
    checkpointer.close()


def restore(run_dir, configs=CONFIGS, **axes):
    checkpointer = Checkpointer(run_dir, configs)
    try:
        return checkpointer.restore(target_on(**axes)[1])
    finally:
        checkpointer.close()


def assert_same(state, expected):
    assert jax.tree.structure(state) == jax.tree.structure(expected)
    assert digests(state) == digests(expected)
    np.testing.assert_array_equal(state.params["head"], expected.params["head"])


def test_everything_comes_back_and_the_newest_are_kept(tmp_path):
    assert restore(tmp_path) is None
    save(tmp_path, 1, 2, 3, keep=2)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["2", "3"]
    found = restore(tmp_path)
    assert found.step == 3
    assert_same(found.state, state_at(3))
    assert {key: found.meta[key] for key in META} == META


@pytest.mark.parametrize("axes", [{"data": 4, "fsdp": 2}, {"fsdp": 8}])
def test_another_mesh_restores_the_same_values_to_its_own_places(tmp_path, axes):
    save(tmp_path, 1, data=2, fsdp=4)
    found = restore(tmp_path, **axes)
    assert_same(found.state, state_at(1))
    moment = found.state.opt_state[1][0].mu["head"]
    assert moment.sharding.shard_shape(moment.shape) == (64 // axes["fsdp"], 11)


def test_model_is_rebuilt_from_the_checkpoint_alone(tmp_path):
    save(tmp_path, 1, 2)
    for step, model in ((2, load_model(tmp_path)), (1, load_model(str(tmp_path), step=1))):
        np.testing.assert_array_equal(model.head[...], state_at(step).params["head"])
        assert model(jnp.zeros((1, 3), jnp.int32)).shape == (1, 3, 11)


@pytest.mark.parametrize("step", [None, 7])
def test_missing_checkpoint_is_named(tmp_path, step):
    with pytest.raises(ValueError, match="run_dir: expected a folder with a checkpoint"):
        load_model(tmp_path, step=step)


def test_state_that_is_overwritten_while_it_is_being_written_is_saved_as_it_was(tmp_path):
    bump = jax.jit(lambda params: jax.tree.map(lambda x: x + 1, params), donate_argnums=0)
    optimizer, target = target_on()
    state = init_state(CONFIG, optimizer, 1, target)
    checkpointer = Checkpointer(tmp_path, CONFIGS)
    checkpointer.save(1, state, META)
    params = state.params
    for _ in range(3):
        params = bump(params)
    checkpointer.close()
    assert_same(restore(tmp_path).state, state_at(1))


def test_another_config_is_one_error_that_lists_the_fields(tmp_path):
    save(tmp_path, 1)
    other = {"model": ToyConfig(width=32, dropout=0.1).to_dict(), "train": {"seed": 1}}
    with pytest.raises(ConfigMismatchError) as error:
        restore(tmp_path, other)
    text = str(error.value)
    assert str(tmp_path / "checkpoints" / "1") in text
    assert "model.width: checkpoint 64, now 32" in text
    assert "train.seed: checkpoint 0, now 1" in text
    assert "dropout" not in text
    assert restore(tmp_path).step == 1  # And nothing was touched.


def test_differences_name_the_path():
    saved, now = {"a": {"b": [1], "c": 2}, "d": 3}, {"a": {"b": [1, 2], "c": 2}}
    assert differences(saved, now) == [
        "a.b: checkpoint [1], now [1, 2]",
        "d: checkpoint 3, now None",
    ]


def truncate(file):
    os.truncate(file, file.stat().st_size // 2)


def flip_a_bit(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data))


def largest_file(folder):
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


DAMAGE = {
    "meta-missing": lambda step: (step / "meta" / "metadata").unlink(),
    "meta-cut": lambda step: truncate(step / "meta" / "metadata"),
    "model-missing": lambda step: shutil.rmtree(step / "model"),
    "model-manifest-missing": lambda step: (step / "model" / "manifest.ocdbt").unlink(),
    "model-values-missing": lambda step: largest_file(step / "model").unlink(),
    "training-values-cut": lambda step: truncate(largest_file(step / "training")),
    "model-values-flipped": lambda step: flip_a_bit(largest_file(step / "model")),
    "empty": lambda step: [shutil.rmtree(p) if p.is_dir() else p.unlink() for p in step.iterdir()],
}


# What TensorStore and Orbax leave behind in their own threads when a file is broken.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.usefixtures("leftovers")
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over_and_said_so(tmp_path, damage):
    save(tmp_path, 1, 2)
    folder = tmp_path / "checkpoints"
    DAMAGE[damage](folder / "2")
    with pytest.warns(RuntimeWarning, match=r"/2 is damaged .*from step 1 instead of step 2"):
        found = restore(tmp_path)
    assert found.step == 1
    assert_same(found.state, state_at(1))
    assert (folder / "2.damaged").is_dir()
    save(tmp_path, 2)  # The run comes to this step again.
    assert restore(tmp_path).step == 2


@pytest.mark.usefixtures("leftovers")
def test_where_none_is_whole_nothing_is_set_aside(tmp_path):
    save(tmp_path, 1, 2)
    for step in "12":
        (tmp_path / "checkpoints" / step / "meta" / "metadata").unlink()
    with pytest.raises(CheckpointError, match=r"(?s)no checkpoint in .* step 2: .* step 1: "):
        restore(tmp_path)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["1", "2"]


def test_a_checkpoint_that_was_being_written_is_ignored_and_removed(tmp_path):
    save(tmp_path, 1)
    folder = tmp_path / "checkpoints"
    shutil.copytree(folder / "1", folder / "2.orbax-checkpoint-tmp")
    assert restore(tmp_path).step == 1
    assert [p.name for p in folder.iterdir()] == ["1"]


def save_and_wait(checkpointer, state):
    checkpointer.save(2, state, META)
    checkpointer.wait()  # The error may come up in either.


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.usefixtures("leftovers")
def test_a_full_disk_is_one_error_and_the_last_checkpoint_stays(tmp_path):
    save(tmp_path, 1)
    state = state_at(2)  # Made now: what JAX compiles goes to files as well.
    checkpointer = Checkpointer(tmp_path, CONFIGS, keep=1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))  # The system refuses larger files.
    try:
        with pytest.raises(CheckpointError) as error:
            save_and_wait(checkpointer, state)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        checkpointer.close()
    text = str(error.value)
    assert f"cannot write a checkpoint under {tmp_path / 'checkpoints'}" in text
    assert f"{tmp_path / 'checkpoints' / '1'} is untouched" in text
    assert "\n" not in text
    found = restore(tmp_path)
    assert found.step == 1
    assert_same(found.state, state_at(1))


def test_digests_see_every_kind_of_change():
    tree = {"a": jnp.arange(4.0), "b": jnp.array([True, False]), "c": jnp.ones(3, jnp.bfloat16)}
    before = digests(tree)
    assert before == digests(dict(tree))
    assert before != digests({**tree, "a": tree["a"].at[2].add(1e-6)})
    assert before != digests({**tree, "b": ~tree["b"]})
    assert before != digests({**tree, "c": -tree["c"]})
    assert digests({"k": jax.random.key(0)}) != digests({"k": jax.random.key(1)})
