"""Launch parameters of the kernels. What a block is, the plan of a call says."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class TpuLaunchConfig:
    """How a step of the TPU kernels, one entry of a list, is cut up.

    Attributes:
      strip: keys of a block that are worked on at a time. Every strip scales the running sums of
        outputs once more; wide ones spill scores from registers.

    Raises:
      ValueError: for numbers that do not fit.
    """

    strip: int = 128

    def __post_init__(self) -> None:
        if self.strip not in (128, 256, 512):
            raise ValueError(
                f"TpuLaunchConfig.strip: expected one of (128, 256, 512), got {self.strip!r}"
            )


def tpu_heuristic(*, H: int, key_block: int) -> TpuLaunchConfig:
    """The launch parameters for a shape: scaling `[H,r]` sums must not outweigh `[strip,r]` scores.

    Not measured: no TPU was at hand.
    """
    wide = 256 if H > 64 else 128
    return TpuLaunchConfig(strip=wide if key_block % wide == 0 else 128)
