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
        assert result.steps == 40
        return outcome(Path(folder))


def outcome(run_dir):
    params, model_state = ModelDef.split(load_model(run_dir))
    model_state["dropout"]["rngs"]["key"] = jax.random.key_data(model_state["dropout"]["rngs"]["key"])
    weights = {
        jax.tree_util.keystr(path): np.asarray(leaf).tobytes()
        for path, leaf in jax.tree_util.tree_leaves_with_path((params, model_state))
    }
    return (run_dir / "metrics.jsonl").read_bytes(), weights


def start(run_dir):
    # The typing hook of the test session does not reach the child; the flags of XLA do.
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{HERE}", "JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(
        [sys.executable, HERE / "run_toy.py", str(run_dir)], env=environment, stderr=subprocess.PIPE
    )


def wait_for_line(run_dir, count, process):
    path = run_dir / "metrics.jsonl"
    while process.poll() is None:
        if path.exists() and path.read_bytes().count(b"\n") >= count:
            return
        time.sleep(0.002)
    raise AssertionError(process.stderr.read().decode())


def finish(run_dir):
    with start(run_dir) as process:
        _, errors = process.communicate()
    assert process.returncode == 0, errors.decode()


def test_killed_at_any_moment(tmp_path):
    rng = random.Random(0)
    for lines in (4, 12, 18):  # Of 24: the second and third time in a run that was continued.
        with start(tmp_path) as process:
            wait_for_line(tmp_path, lines, process)
            time.sleep(rng.uniform(0, 0.15))  # Somewhere in the five steps between checkpoints.
            process.kill()
            process.wait()
            process.stderr.close()
        assert not (tmp_path / "checkpoints" / "40").exists()
    finish(tmp_path)
    assert outcome(tmp_path) == unbroken()


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_signals_save_and_end_in_order(tmp_path, signum):
    with start(tmp_path) as process:
        wait_for_line(tmp_path, 10, process)
        process.send_signal(signum)
        _, errors = process.communicate()
    assert process.returncode == 128 + signum
    assert b"interrupted after step" in errors
    assert b"Traceback" not in errors
    saved = sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir())
    assert f"/checkpoints/{saved[-1]}".encode() in errors
    train(ToyTask(), MODEL, CONFIG, tmp_path)
    assert outcome(tmp_path) == unbroken()


@pytest.mark.parametrize("step", [1, 9, 15, 39])
def test_interrupted_at_a_given_step(tmp_path, step):
    """In this process: the first step, one that evaluates, one that saves, the last but one."""

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


def test_damage_costs_time_but_changes_nothing(tmp_path):
    train(ToyTask(), MODEL, CONFIG, tmp_path)
    (tmp_path / "checkpoints" / "40" / "meta" / "metadata").unlink()
    with pytest.warns(RuntimeWarning, match="from step 35 instead of step 40"):
        train(ToyTask(), MODEL, CONFIG, tmp_path)
    assert outcome(tmp_path) == unbroken()
