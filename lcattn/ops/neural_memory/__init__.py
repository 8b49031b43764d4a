"""Titans neural memory: a small network, trained on the sequence while it is read."""

from lcattn.ops.neural_memory.api import neural_memory
from lcattn.ops.neural_memory.state import NeuralMemoryState, neural_memory_state

__all__ = ["NeuralMemoryState", "neural_memory", "neural_memory_state"]
