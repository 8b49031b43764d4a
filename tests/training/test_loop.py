import fcntl
import signal

import jax
import numpy as np
import pytest
from flax import nnx
from toy import Batches, ToyConfig, ToyTask

from lcattn.training import (
    ConfigMismatchError,
    MeshConfig,
    NonFiniteLossError,
    OptimizerConfig,
    RunLockedError,
    TrainConfig,
    read_jsonl,
    train,
)
from lcattn.training.run_dir import Interrupt

CONFIG = TrainConfig(
    num_steps=12,
    log_every=4,
    checkpoint_every=5,
    optimizer=OptimizerConfig(learning_rate=2e-2),
    mesh=MeshConfig(data=-1),
    tensorboard=False,
)


class Recorder:
    def __init__(self):
        self.records, self.closed = [], False

    def write(self, step, metrics):
        self.records.append((step, set(metrics)))

    def close(self):
        self.closed = True


TRAIN = {"train/loss", "train/accuracy", "train/grad_norm", "train/learning_rate"}
EVALUATION = {f"{s}/{m}" for s in ("short", "long") for m in ("loss", "accuracy")}


def test_a_run_learns_records_and_is_not_repeated(tmp_path):
    recorder = Recorder()
    config = CONFIG.replace(tensorboard=True)
    result = train(ToyTask(), ToyConfig(), config, tmp_path, writers=[recorder])
    assert recorder.records == [(4, TRAIN), (8, TRAIN), (12, TRAIN), (12, EVALUATION)]
    assert recorder.closed
    lines = read_jsonl(result.metrics_path)
    assert [line["step"] for line in lines] == [4, 8, 12, 12]
    assert lines[2]["train/loss"] < lines[0]["train/loss"]
    assert result.steps == 12
    assert result.metrics == {k: v for x in lines for k, v in x.items() if k != "step"}
    assert result.tokens_per_second > 0
    assert list((tmp_path / "tensorboard").iterdir())
    assert {"step", "tokens_per_second"} == set(read_jsonl(tmp_path / "timing.jsonl")[-1])

    class NoBatches(ToyTask):
        def train(self):
            return iter_nothing()

    again = train(NoBatches(), ToyConfig(), config, tmp_path)
    assert (again.steps, again.metrics) == (result.steps, result.metrics)
    np.testing.assert_array_equal(again.model.head[...], result.model.head[...])
    assert read_jsonl(result.metrics_path) == lines


def iter_nothing():
    class Nothing(Batches):
        def __next__(self):
            raise AssertionError("trains again")

    return Nothing()


def test_a_run_starts_from_a_given_model(tmp_path):
    model = ToyConfig(dropout=0.1)  # which keeps a random key beside its parameters
    first = jax.device_put(model.make(nnx.Rngs(7)), jax.devices()[0])  # the run is on all
    head = np.asarray(first.head[...])
    config = CONFIG.replace(num_steps=1, optimizer=OptimizerConfig(learning_rate=1e-6))
    result = train(ToyTask(), model, config, tmp_path / "run", initial=first)
    np.testing.assert_allclose(result.model.head[...], head, atol=1e-5)
    np.testing.assert_array_equal(first.head[...], head)

    again = train(ToyTask(), model, config, tmp_path / "run", initial=first)
    np.testing.assert_array_equal(again.model.head[...], result.model.head[...])
    for other in (None, result.model):
        with pytest.raises(ConfigMismatchError, match="initial: checkpoint '"):
            train(ToyTask(), model, config, tmp_path / "run", initial=other)
    wide = model.replace(width=32).make(nnx.Rngs(7))
    with pytest.raises(
        ValueError, match=r"initial.*: expected float32\[.*16.*\], got float32\[.*32"
    ):
        train(ToyTask(), model, config, tmp_path / "other", initial=wide)


def test_stops_when_all_thresholds_are_met(tmp_path):
    config = CONFIG.replace(
        num_steps=200, eval_every=4, stop_when={"short/accuracy": 0.9, "long/loss": 2.2}
    )
    result = train(ToyTask(), ToyConfig(), config, tmp_path)
    assert 4 <= result.steps < 200
    assert result.steps % 4 == 0
    assert result.metrics["short/accuracy"] >= 0.9
    assert result.metrics["long/loss"] <= 2.2
    earlier = [x for x in read_jsonl(result.metrics_path) if "long/loss" in x][:-1]
    assert all(x["short/accuracy"] < 0.9 or x["long/loss"] > 2.2 for x in earlier)
    assert train(ToyTask(), ToyConfig(), config, tmp_path).steps == result.steps


@pytest.mark.parametrize(
    "stop_when", [{"short/bits_per_byte": 1.0}, {"tall/accuracy": 0.9}, {"train/loss": 1.0}]
)
def test_stop_when_names_what_does_not_exist(tmp_path, stop_when):
    with pytest.raises(ValueError, match=r"stop_when: expected keys among short/loss, short/acc"):
        train(ToyTask(), ToyConfig(), CONFIG.replace(stop_when=stop_when), tmp_path)


@pytest.mark.parametrize("index", [7, 9])  # 9 makes step 10, which would save a checkpoint.
def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, index):
    with pytest.raises(NonFiniteLossError) as error:
        train(ToyTask(spoil_at=index), ToyConfig(), CONFIG, tmp_path)
    assert error.value.step == index + 1
    assert error.value.example_ids == list(range(8 * index, 8 * index + 8))
    assert error.value.checkpoint == tmp_path / "checkpoints" / "5"
    text = str(error.value)
    assert f"step {index + 1}: loss nan" in text
    assert f"examples of the batch: {8 * index}, {8 * index + 1}, " in text
    assert text.endswith(f"last good checkpoint: {tmp_path / 'checkpoints' / '5'}")
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["5"]
    # The data is mended, and the run goes on.
    assert train(ToyTask(), ToyConfig(), CONFIG, tmp_path).steps == 12


def test_not_finite_before_the_first_checkpoint(tmp_path):
    with pytest.raises(NonFiniteLossError, match=r"step 1: .* checkpoint: none was saved"):
        train(ToyTask(spoil_at=0), ToyConfig(), CONFIG, tmp_path)


def test_another_config_does_not_continue_but_another_mesh_does(tmp_path):
    train(ToyTask(), ToyConfig(), CONFIG, tmp_path)
    changed = CONFIG.replace(num_steps=20, keep=1, mesh=MeshConfig(data=4, fsdp=2))
    with pytest.raises(ConfigMismatchError, match=r"lines|num_steps: checkpoint 12, now 20$"):
        train(ToyTask(), ToyConfig(), changed, tmp_path)
    result = train(ToyTask(), ToyConfig(), changed.replace(num_steps=12), tmp_path)
    assert result.model.head[...].sharding.mesh.shape == {"data": 4, "fsdp": 2}


def test_one_process_per_folder(tmp_path):
    with (tmp_path / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(RunLockedError, match=str(tmp_path)):
            train(ToyTask(), ToyConfig(), CONFIG, tmp_path)


class ShortTask(ToyTask):
    def __init__(self, batches):
        self.batches = batches

    def train(self):
        return self.batches


def test_a_task_that_ends_too_early_is_named(tmp_path):
    class Few(Batches):
        def __next__(self):
            if self.index == 2:
                raise StopIteration
            return super().__next__()

    with pytest.raises(ValueError, match=r"task.train\(\): expected batches for 12 steps, got 2"):
        train(ShortTask(Few()), ToyConfig(), CONFIG, tmp_path)


def test_rows_that_do_not_divide_are_named(tmp_path):
    devices = len(jax.devices())
    config = CONFIG.replace(num_microbatches=2)
    with pytest.raises(ValueError, match=rf"batch: expected a multiple of {2 * devices} rows"):
        train(ShortTask(Batches(batch_size=2 * devices - 1)), ToyConfig(), config, tmp_path)


def test_the_second_signal_takes_its_default_course():
    # A shell that starts the tests in the background lets them ignore Ctrl-C.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with Interrupt() as interrupt:
        assert interrupt.signum is None
        signal.raise_signal(signal.SIGTERM)
        assert interrupt.signum == signal.SIGTERM
        assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    signal.signal(signal.SIGINT, before)
