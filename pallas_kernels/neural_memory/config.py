"""Launch parameters of the kernels, and the heuristic that picks them."""

import dataclasses
import math
from collections.abc import Sequence

from pallas_kernels.tpu import LANES, SUBLANES


@dataclasses.dataclass(frozen=True, kw_only=True)
class TpuLaunchConfig:
    """How a call of the TPU kernels is cut up.

    Attributes:
      heads: memories that a program walks side by side; divides the number of memories. Products of
        one wait for one another; those of several do not.
      chunks: chunks of a step. The gradient keeps the memory before each in VMEM, and that before
        each step in HBM.

    Raises:
      ValueError: for numbers that do not fit.
    """

    heads: int = 1
    chunks: int = 4

    def __post_init__(self) -> None:
        for name, most in (("heads", 8), ("chunks", 32)):
            value = getattr(self, name)
            if not 1 <= value <= most:
                raise ValueError(
                    f"TpuLaunchConfig.{name}: expected a whole number from 1 to {most},"
                    f" got {value!r}"
                )


def tpu_heuristic(*, memories: int, number: int, chunk: int, sizes: Sequence[int]) -> TpuLaunchConfig:
    """The launch parameters for a shape.

    Args:
      memories: of one row of a batch.
      number: chunks of a row.
      chunk: slots of a chunk.
      sizes: of the network's layers: of keys, hidden units, values.
    """
    del number, chunk, sizes, memories
    return TpuLaunchConfig()
