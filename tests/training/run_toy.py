"""A run in a process of its own, for tests that kill it."""

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
    def __next__(self):
        time.sleep(0.04)
        return super().__next__()


class SlowTask(ToyTask):
    def train(self):
        return SlowBatches()


class StepLog:
    def write(self, step, metrics):
        print("at step", step, file=sys.stderr, flush=True)

    def close(self):
        pass


if __name__ == "__main__":
    train(SlowTask(), MODEL, CONFIG, sys.argv[1], writers=[StepLog()])
