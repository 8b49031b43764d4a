"""Launch parameters of the gated linear-attention kernels, and the heuristic that picks them."""

import dataclasses

from pallas_kernels import tuned
from pallas_kernels.groups import whole_groups
from pallas_kernels.launch import check_fields
from pallas_kernels.tiles import TILE
from pallas_kernels.tpu import LANES

# Multiprocessors of an H100 or H200.
_MULTIPROCESSORS = 132


@dataclasses.dataclass(frozen=True, kw_only=True)
class LaunchConfig:
    """How a call is cut up.

    Attributes:
      groups: parts into which each sequence is split, each walked by a CTA of its own; more than
        one take a sweep first that finds the states they start from.
      stages: chunks that a sweep over states has in flight from global to shared memory.

    Raises:
      ValueError: for numbers that do not fit.
    """

    groups: int = 1
    stages: int = 2

    def __post_init__(self) -> None:
        check_fields(self, groups=range(1, 1025), stages=range(1, 5))


def heuristic(*, B: int, T: int, N: int, F: int, H: int) -> LaunchConfig:
    """The launch parameters for a shape: measured ones, or as many groups as fill the chip once."""
    found = dict(tuned.lookup("gated_linear_attention", sequences=B * N, T=T, F=F, H=H))
    # Shared memory of a multiprocessor holds one walk of size 128, or two of 64.
    resident = _MULTIPROCESSORS * (1 if max(F, H) > TILE else 2)
    groups = whole_groups(found.pop("groups", resident // (B * N)), T)
    return LaunchConfig(**({"groups": groups, "stages": 3} | found))


TPU_VMEM = 14 * 2**20
"""Bytes of VMEM that a TPU kernel is planned to take, by an estimate, of the 16 MiB it may."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TpuLaunchConfig:
    """How a call of the TPU kernels is cut up.

    Attributes:
      chunks: chunks of a step, of 128 tokens each. The gradient keeps the state before each chunk
        of a step in VMEM, and the state before each step in HBM.

    Raises:
      ValueError: for numbers that do not fit.
    """

    chunks: int = 4

    def __post_init__(self) -> None:
        check_fields(self, chunks=range(1, 17))


def tpu_heuristic(*, T: int, groups: int, F: int, H: int, itemsize: int) -> TpuLaunchConfig:
    """The launch parameters for a shape: steps of up to 512 tokens, where VMEM holds so many.

    Nor are steps so long that filling the last one takes an eighth more tokens than filling its
    last chunk. Nothing was timed on a TPU.

    Args:
      T: tokens.
      groups: query heads that share a state.
      F: the size of keys.
      H: the size of values.
      itemsize: bytes of an element of q.
    """
    needed = -(-T // LANES)
    fitting = (
        chunks
        for chunks in (4, 2)
        if 8 * (-needed % chunks) < needed
        and tpu_vmem_bytes(chunks, groups, F, H, itemsize) <= TPU_VMEM
    )
    return TpuLaunchConfig(chunks=next(fitting, 1))


def tpu_vmem_bytes(chunks: int, groups: int, F: int, H: int, itemsize: int) -> int:
    """What the gradient's kernel takes, from above: fitted to what the compiler says of shapes."""
    # q, k, v, and gradients of these and of outputs; log decays and their gradients; twice as one
    # block is loaded behind another.
    numbers = (2 * groups + 2) * F + (groups + 2) * H
    blocks = 2 * chunks * LANES * (numbers * itemsize + 2 * F * 4)
    states = 4 * F * (H + -H % LANES) * (chunks + 6)
    # Operands of float32 products are split.
    values = 4 * LANES * (20 * F + 6 * H + 8 * LANES) * (3 if itemsize == 4 else 2) // 2
    return blocks + states + values
