"""Launch parameters of the kernels, and the heuristic that picks them."""

import dataclasses
from collections.abc import Sequence

from pallas_kernels.tpu import LANES, SUBLANES

VMEM_LIMIT = 32 * 2**20
"""Bytes of VMEM that a kernel may take. A core of a v5e or v6e has 128 MiB, one of a v5p 64."""

VMEM = VMEM_LIMIT - 4 * 2**20
"""Bytes that it is planned to take, by an estimate."""


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


def tpu_heuristic(
    *,
    rows: int,
    memories: int,
    groups: int,
    number: int,
    chunk: int,
    sizes: Sequence[int],
    itemsize: int,
) -> TpuLaunchConfig:
    """The launch parameters for a shape: as much a step as VMEM holds, up to 512 slots a memory.

    Programs are left for both cores of a chip that has two. Nothing was timed on a TPU.

    Args:
      rows: of the batch.
      memories: of one row.
      groups: query heads that read one memory.
      number: chunks of a row.
      chunk: slots of a chunk.
      sizes: of the layers of the network: of keys, of hidden units, of values.
      itemsize: bytes of an element of q.
    """
    fitting = [
        TpuLaunchConfig(heads=heads, chunks=chunks)
        for heads in (1, 2, 4)
        for chunks in (1, 2, 4, 8)
        if memories % heads == 0
        and (heads == 1 or rows * memories >= 2 * heads)
        and (chunks == 1 or (chunks * chunk <= 512 and chunks < 2 * number))
        and vmem_bytes(heads, chunks, groups, chunk, sizes, itemsize) <= VMEM
    ]
    return max(fitting, key=lambda x: (x.heads * x.chunks, x.heads), default=TpuLaunchConfig())


def vmem_bytes(
    heads: int, chunks: int, groups: int, chunk: int, sizes: Sequence[int], itemsize: int
) -> int:
    """What the gradient's kernel takes, from above: fitted to what the compiler says of shapes."""
    wide = [size + -size % LANES for size in sizes]
    network = 4 * sum(
        (size + -size % SUBLANES) * out for size, out in zip(sizes[:-1], wide[1:], strict=True)
    )
    # Memories before each chunk, the anchor, the four parts of the gradient, and two blocks of
    # memories before a step. Three times the bytes, in products of float32: they are split.
    state = heads * network * (2 * chunks + 9) + (itemsize == 4) * 16 * network
    # q, k, v, and gradients of these and of answers, twice as one block is loaded behind another.
    tokens = (2 * groups + 2) * wide[0] + (groups + 2) * wide[-1]
    blocks = 2 * heads * chunks * chunk * tokens * itemsize
    scores, hidden = chunk * max(chunk, LANES), chunk * sum(wide[1:])
    values = 4 * (12 * scores + (4 + 10 * groups) * hidden)
    return state + blocks + values
