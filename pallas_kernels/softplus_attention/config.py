"""Launch parameters of the softplus-attention kernels.

The defaults were the fastest of those measured on an H200 at 32768 tokens, 16 heads, H = 128, in
milliseconds a forward call: width 128 with 2 stages 14.4, with 3 stages 14.7; width 64 with 4
stages 17.6. A gradient width of 128 does not fit the registers (800 bytes spilled at H = 64), and
more gradient stages change nothing. Shapes with fewer blocks than multiprocessors want no others:
a narrower block would only move more keys.
"""

import dataclasses

from pallas_kernels import tuned
from pallas_kernels.launch import check_fields


@dataclasses.dataclass(frozen=True, kw_only=True)
class LaunchConfig:
    """How a call is cut up.

    Attributes:
      warpgroups: blocks of 64 tokens that share what streams past them. With 2, a third warpgroup
        copies, and one multiplies matrices while the other computes weights. 1 is for simulators.
      width: keys a step in the forward kernels.
      stages: steps in flight from global to shared memory there.
      gradient_width: tokens a step in the gradient's kernels, whose registers hold two sums.
      gradient_stages: steps in flight there.

    Raises:
      ValueError: for numbers that do not fit.
    """

    warpgroups: int = 2
    width: int = 128
    stages: int = 2
    gradient_width: int = 64
    gradient_stages: int = 2

    def __post_init__(self) -> None:
        check_fields(
            self, warpgroups=(1, 2), width=(64, 128), stages=(2, 3, 4), gradient_width=(64, 128),
            gradient_stages=(2, 3, 4),
        )  # fmt: skip


def heuristic(*, B: int, T: int, N: int, H: int) -> LaunchConfig:
    """The launch parameters for a shape: measured ones, or the defaults."""
    return LaunchConfig(**tuned.lookup("softplus_attention", sequences=B * N, T=T, H=H))


@dataclasses.dataclass(frozen=True, kw_only=True)
class TpuLaunchConfig:
    """How a call of the TPU kernels is cut up.

    Attributes:
      block: queries, and keys, of a tile of scores. Tiles of 512 x 512 take a megabyte each of the
        16 of VMEM, and a kernel holds several; small ones leave a core waiting between steps.

    Raises:
      ValueError: for numbers that do not fit.
    """

    block: int = 512

    def __post_init__(self) -> None:
        check_fields(self, block=(128, 256, 512))


def tpu_heuristic(*, T: int) -> TpuLaunchConfig:
    """The launch parameters for a shape: no wider a block than the tokens fill."""
    fitting = [block for block in (128, 256) if block >= T]
    return TpuLaunchConfig(block=(fitting or [512])[0])
