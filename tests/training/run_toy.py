"""A run in a process of its own, for tests that kill it."""

import signal
import sys
import time

from toy import Batches, ToyConfig, ToyTask

from lcattn.training import OptimizerConfig, TrainConfig, train

MODEL = ToyConfig(dropout=0.1)
CONFIG = TrainConfig(
    num_steps=24,
    log_every=2,
    eval_every=9,
    checkpoint_every=6,
    optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=5),
    tensorboard=False,
)


class SlowBatches(Batches):
    """Gives no batch from `end` on before a signal came, however slow who sends it is."""

    def __init__(self, end):
        super().__init__()
        self.end = end

    def __next__(self):
        time.sleep(0.04)
        while self.index >= self.end and not was_told_to_stop():
            time.sleep(0.01)
        return super().__next__()


def was_told_to_stop():
    """Whether training has noted a signal: the next one takes its default course."""
    return signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


class SlowTask(ToyTask):
    def __init__(self, end):
        super().__init__()
        self.end = end

    def train(self):
        return SlowBatches(self.end)


class StepLog:
    def write(self, step, metrics):
        print("at step", step, file=sys.stderr, flush=True)

    def close(self):
        pass


if __name__ == "__main__":
    train(SlowTask(int(sys.argv[2])), MODEL, CONFIG, sys.argv[1], writers=[StepLog()])
