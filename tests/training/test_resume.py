"""However a run is stopped, the same call ends bit for bit as if it had not been."""

import functools
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from run_toy import CONFIG, MODEL
from toy import ToyTask

from lcattn.training import TrainingInterrupted, load_model, train
from lcattn.training.state import ModelDef

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


@functools.cache
def unbroken():
    """The metrics file and the weights of a run that nobody stops."""
    with tempfile.TemporaryDirectory() as folder:
        result = train(ToyTask(), MODEL, CONFIG, folder)
        assert result.steps == CONFIG.num_steps
        return outcome(Path(folder))


def outcome(run_dir):
    params, model_state = ModelDef.split(load_model(run_dir))
    model_state["dropout"]["rngs"]["key"] = jax.random.key_data(
        model_state["dropout"]["rngs"]["key"]
    )
    weights = {
        jax.tree_util.keystr(path): np.asarray(leaf).tobytes()
        for path, leaf in jax.tree_util.tree_leaves_with_path((params, model_state))
    }
    return (run_dir / "metrics.jsonl").read_bytes(), weights


def start(run_dir, end):
    # The typing hook of the test session does not reach the child; the flags of XLA do.
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{HERE}", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, HERE / "run_toy.py", str(run_dir), str(end)]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE)


def wait_for_step(process, step):
    """Reads the child's log up to the first step at or after this one; it logs each second step."""
    log = b""
    for line in process.stderr:
        log += line
        if line.startswith(b"at step") and int(line.split()[2]) >= step:
            return
    raise AssertionError(log.decode())


def test_killed_interrupted_and_terminated(tmp_path):
    """One run, stopped in three ways by turns, each time somewhere between a step and an end."""
    rng = random.Random(0)
    stops = ((signal.SIGKILL, 8, 12), (signal.SIGINT, 9, 16), (signal.SIGTERM, 15, 21))
    for signum, step, end in stops:
        with start(tmp_path, end) as process:
            wait_for_step(process, step)
            time.sleep(rng.uniform(0, 0.1))
            process.send_signal(signum)
            _, errors = process.communicate()
        assert not (tmp_path / "checkpoints" / f"{CONFIG.num_steps}").exists()
        if signum == signal.SIGKILL:
            assert process.returncode == -signum
            continue
        newest = max(int(p.name) for p in (tmp_path / "checkpoints").iterdir())
        assert process.returncode == 128 + signum
        assert f"after step {newest}; saved {tmp_path}/checkpoints/{newest}" in errors.decode()
        assert "Traceback" not in errors.decode()
    train(ToyTask(), MODEL, CONFIG, tmp_path)
    assert outcome(tmp_path) == unbroken()


@pytest.mark.parametrize("step", [9, 12])
def test_interrupted_at_a_given_step(tmp_path, step):
    """In this process: at a step that evaluates, and at one that saves."""

    class InterruptingTask(ToyTask):
        def train(self):
            batches = super().train()
            take = type(batches).__next__

            class Batches(type(batches)):
                def __next__(self):
                    if self.index == step - 1:
                        signal.raise_signal(signal.SIGINT)
                    return take(self)

            batches.__class__ = Batches
            return batches

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(TrainingInterrupted) as stop:
        train(InterruptingTask(), MODEL, CONFIG, tmp_path)
    assert signal.getsignal(signal.SIGINT) is before
    assert stop.value.code == 128 + signal.SIGINT
    assert stop.value.step == step
    assert stop.value.checkpoint == tmp_path / "checkpoints" / str(step)
    train(ToyTask(), MODEL, CONFIG, tmp_path)
    assert outcome(tmp_path) == unbroken()


@pytest.mark.usefixtures("leftovers")
def test_damage_costs_time_but_changes_nothing(tmp_path):
    train(ToyTask(), MODEL, CONFIG, tmp_path)
    (tmp_path / "checkpoints" / "24" / "meta" / "metadata").unlink()
    with pytest.warns(RuntimeWarning, match="from step 18 instead of step 24"):
        train(ToyTask(), MODEL, CONFIG, tmp_path)
    assert outcome(tmp_path) == unbroken()
