"""Launch parameters of the kernels, and the heuristic that picks them."""

import dataclasses
from collections.abc import Sequence

from pallas_kernels.launch import check_fields
from pallas_kernels.tpu import LANES, SUBLANES

VMEM_LIMIT = 32 * 2**20
"""Bytes of VMEM that a kernel may take. A core of a v5e or v6e has 128 MiB, one of a v5p 64."""

VMEM = VMEM_LIMIT - 4 * 2**20
"""Bytes that it is planned to take, by an estimate."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TpuLaunchConfig:
    """How a call of the TPU kernels is cut up.

    Attributes:
      chunks: chunks of a step. The gradient keeps the memory before each chunk of a step in VMEM,
        and the memory before each step in HBM.

    Raises:
      ValueError: for numbers that do not fit.
    """

    chunks: int = 4

    def __post_init__(self) -> None:
        check_fields(self, chunks=range(1, 33))


def tpu_heuristic(
    *, number: int, groups: int, chunk: int, sizes: Sequence[int], itemsize: int
) -> TpuLaunchConfig:
    """The launch parameters for a shape: steps of up to 512 slots, where VMEM holds that many.

    Programs of several memories were tried: the compiler's schedule of two took as long as twice
    that of one. Nothing was timed on a TPU.

    Args:
      number: chunks of a row.
      groups: query heads that read one memory.
      chunk: slots of a chunk.
      sizes: of the layers of the network: of keys, of hidden units, of values.
      itemsize: bytes of an element of q.
    """
    fitting = (
        chunks
        for chunks in (16, 8, 4, 2)
        if chunks * chunk <= 512
        and chunks < 2 * number
        and vmem_bytes(chunks, groups, chunk, sizes, itemsize) <= VMEM
    )
    return TpuLaunchConfig(chunks=next(fitting, 1))


def vmem_bytes(chunks: int, groups: int, chunk: int, sizes: Sequence[int], itemsize: int) -> int:
    """What the gradient's kernel takes, from above: fitted to what the compiler says of shapes."""
    wide = [size + -size % LANES for size in sizes]
    network = 4 * sum(
        (size + -size % SUBLANES) * out for size, out in zip(sizes[:-1], wide[1:], strict=True)
    )
    # Memories before each chunk, the anchor, the four parts of the gradient, and two blocks of
    # memories before a step. Three times the bytes, in products of float32: they are split.
    state = network * (2 * chunks + 9) + (itemsize == 4) * 16 * network
    # q, k, v, and gradients of these and of answers, twice as one block is loaded behind another.
    tokens = (2 * groups + 2) * wide[0] + (groups + 2) * wide[-1]
    blocks = 2 * chunks * chunk * tokens * itemsize
    scores, hidden = chunk * max(chunk, LANES), chunk * sum(wide[1:])
    values = 4 * (12 * scores + (4 + 10 * groups) * hidden)
    return state + blocks + values
