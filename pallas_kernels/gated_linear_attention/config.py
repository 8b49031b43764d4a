"""Launch parameters of the gated linear-attention kernels, and the heuristic that picks them."""

import dataclasses

from pallas_kernels.tiles import TILE

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
        for name, most in (("groups", 1024), ("stages", 4)):
            value = getattr(self, name)
            if not 1 <= value <= most:
                raise ValueError(
                    f"LaunchConfig.{name}: expected a whole number from 1 to {most}, got {value!r}"
                )


def heuristic(*, B: int, T: int, N: int, F: int, H: int) -> LaunchConfig:
    """The launch parameters for a shape: as many groups as fill the chip once.

    A number of groups that divides the chunks needs no padding, so one within half of the wanted
    number is preferred.
    """
    chunks = -(-T // TILE)
    # Shared memory of a multiprocessor holds one walk of size 128, or two of 64.
    resident = _MULTIPROCESSORS * (1 if max(F, H) > TILE else 2)
    wanted = max(1, min(resident // (B * N), chunks))
    fitting = [n for n in range(wanted, wanted // 2, -1) if chunks % n == 0]
    return LaunchConfig(groups=(fitting or [wanted])[0], stages=3)
