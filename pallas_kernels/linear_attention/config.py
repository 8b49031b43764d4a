"""Launch parameters of the linear-attention kernels, and the heuristic that picks them."""

import dataclasses

from pallas_kernels import tuned
from pallas_kernels.groups import whole_groups
from pallas_kernels.launch import check_fields
from pallas_kernels.tiles import TILE

# CTAs that fill an H100 or H200 once: 132 multiprocessors hold two each, since a state of
# 192 x 64 float32 numbers leaves a warpgroup no more than 255 registers a thread.
_RESIDENT_CTAS = 264


@dataclasses.dataclass(frozen=True, kw_only=True)
class LaunchConfig:
    """How a call is cut up.

    Attributes:
      groups: parts into which each sequence is split; 1 walks it in one pass.
      stages: chunks in flight from global to shared memory. More hide latency, until shared
        memory holds only one CTA a multiprocessor.
      gradient_stages: the same in the gradient's own kernel, which has more to hold.

    Raises:
      ValueError: for numbers that do not fit.
    """

    groups: int = 1
    stages: int = 2
    gradient_stages: int = 2

    def __post_init__(self) -> None:
        stages = range(1, 5)
        check_fields(self, groups=range(1, 1025), stages=stages, gradient_stages=stages)


def heuristic(*, B: int, T: int, N: int, F: int, H: int) -> LaunchConfig:
    """The launch parameters for a shape: measured ones, or as many groups as fill the chip once.

    Three stages of wide q and k would leave room for one CTA alone.
    """
    found = dict(tuned.lookup("linear_attention", sequences=B * N, T=T, F=F, H=H))
    walkers = B * N * -(-H // TILE)
    groups = whole_groups(found.pop("groups", _RESIDENT_CTAS // walkers), T)
    return LaunchConfig(**({"groups": groups, "stages": 3 if F <= 16 else 2} | found))


@dataclasses.dataclass(frozen=True, kw_only=True)
class TpuLaunchConfig:
    """How a call of the TPU kernels is cut up.

    Attributes:
      chunk: tokens a step: a multiple of 128. Work inside a chunk grows with it, steps and updates
        of the state become fewer.

    Raises:
      ValueError: for numbers that do not fit.
    """

    chunk: int = 256

    def __post_init__(self) -> None:
        check_fields(self, chunk=(128, 256, 512))


def tpu_heuristic(*, T: int, feature_map: str, F: int) -> TpuLaunchConfig:
    """The launch parameters for a shape: 256 tokens, where so many features of them fit in VMEM.

    That many fill the matrix unit of every TPU, 256 x 256 at most. Nothing was timed on a TPU.
    """
    wide = feature_map == "taylor" and F > 16
    return TpuLaunchConfig(chunk=128 if T <= 128 or wide else 256)
