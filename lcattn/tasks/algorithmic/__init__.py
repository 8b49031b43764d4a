"""Tasks of any length, to train on short ones and be judged on long ones."""

from lcattn.tasks.algorithmic.programs import PROGRAMS, run
from lcattn.tasks.algorithmic.rows import AlgorithmicConfig, AlgorithmicRows, Rows

__all__ = ["PROGRAMS", "AlgorithmicConfig", "AlgorithmicRows", "Rows", "run"]
