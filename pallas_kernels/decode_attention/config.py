"""Launch parameters of the decoding kernels, and the heuristic that picks them."""

import dataclasses

# CTAs that an H100 or H200 holds at once: 132 multiprocessors, two each.
_RESIDENT_CTAS = 264


@dataclasses.dataclass(frozen=True, kw_only=True)
class LaunchConfig:
    """How a cache is cut up.

    Attributes:
      splits: parts of each row's keys, each walked by a CTA of its own.
      width: keys a step.
      stages: steps in flight from global to shared memory.

    Raises:
      ValueError: for numbers that do not fit.
    """

    splits: int = 1
    width: int = 64
    stages: int = 3

    def __post_init__(self) -> None:
        for name, values in (
            ("splits", range(1, 1025)), ("width", (64, 128)), ("stages", range(1, 9)),
        ):  # fmt: skip
            if (value := getattr(self, name)) not in values:
                raise ValueError(
                    f"LaunchConfig.{name}: expected one of {values}, got {value!r}"
                )


def heuristic(*, B: int, S: int, K: int, H: int) -> LaunchConfig:
    """The launch parameters for a shape: splits that fill the chip in whole waves.

    The fewest of them that leave at most a twentieth of the last wave empty; a CTA of fewer than 8
    steps would spend its time on filling its pipeline.
    """
    width = 64

    def filled(splits: int) -> float:
        waves = B * K * splits / _RESIDENT_CTAS
        return waves / -(-waves // 1)

    most = max(1, min(-(-S // width) // 8, 1024))
    good = (n for n in range(1, most + 1) if filled(n) >= 0.95)
    return LaunchConfig(splits=next(good, None) or max(range(1, most + 1), key=filled), width=width)
