"""Launch parameters of the kernels. What a block is, the plan of a call says."""

import dataclasses
from typing import NamedTuple

from pallas_kernels.launch import check_fields


@dataclasses.dataclass(frozen=True, kw_only=True)
class LaunchConfig:
    """How the Hopper kernels cut up a block that streams.

    Attributes:
      blocks: blocks of queries that a CTA works through, one after another.
      key_blocks: blocks of keys, in the kernel of d k and d v.
      warpgroups: the most that compute side by side, 64 tokens of a block each.
      width: keys a step in the forward kernel.
      stages: steps in flight from global to shared memory there.
      takes_turns: whether one of two computing warpgroups multiplies matrices there while the other
        takes exponentials.
      query_gradient_width: keys a step in the kernel of d q.
      query_gradient_stages: steps in flight there.
      key_gradient_width: queries a step in the kernel of d k and d v, whose registers hold two
        sums.
      key_gradient_stages: steps in flight there.

    Raises:
      ValueError: for numbers that do not fit.
    """

    blocks: int = 1
    key_blocks: int = 1
    warpgroups: int = 2
    width: int = 128
    stages: int = 2
    takes_turns: bool = True
    query_gradient_width: int = 64
    query_gradient_stages: int = 2
    key_gradient_width: int = 64
    key_gradient_stages: int = 2

    def __post_init__(self) -> None:
        blocks, widths, stages = (1, 2, 4, 8, 16), (64, 128), (2, 3, 4)
        check_fields(
            self, blocks=blocks, key_blocks=blocks, warpgroups=(1, 2, 3, 4),
            width=widths, stages=stages,
            query_gradient_width=widths, query_gradient_stages=stages,
            key_gradient_width=widths, key_gradient_stages=stages,
        )  # fmt: skip


class Walks(NamedTuple):
    """The lists of one kernel.

    Attributes:
      count: how many there are, of all rows and heads.
      length: entries of one, at most or on average.
    """

    count: int
    length: float

    @property
    def a_cta(self) -> int:
        """How many to give to a CTA: more than one if they are short, and enough for all SMs."""
        return next(
            n for n in (4, 2, 1) if n == 1 or (n * self.length <= 64 and self.count >= 1024 * n)
        )


def heuristic(
    *, H: int, query_block: int, key_block: int, readers: Walks, keys: Walks
) -> LaunchConfig:
    """The launch parameters for a plan.

    Steps are the widest that divide blocks; those of 128 spill in the gradients' kernels at
    H = 128. In trials on an H200, at H = 128 with long lists no other widths and stages were faster
    by more than 1 %; at H = 64 with causal lists of up to 32, wide steps took 6 % off the kernel of
    d k and d v and 12 % off that of d q, more stages 4 % off the forward kernel. Several short
    lists a CTA there took 4 %.

    Args:
      H: size of heads.
      query_block, key_block: sizes of blocks.
      readers: the lists of blocks of queries.
      keys: those of blocks of keys.
    """
    wide_keys, wide_queries = (128 if x % 128 == 0 else 64 for x in (key_block, query_block))
    narrow = H == 64
    stages = 4 if narrow else 2
    return LaunchConfig(
        blocks=readers.a_cta,
        key_blocks=keys.a_cta,
        width=wide_keys,
        stages=stages,
        query_gradient_width=wide_keys if narrow else 64,
        query_gradient_stages=stages,
        key_gradient_width=wide_queries if narrow else 64,
        key_gradient_stages=min(stages, 3) if wide_queries == 128 else stages,
    )


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
        check_fields(self, strip=(128, 256, 512))


def tpu_heuristic(*, H: int, key_block: int) -> TpuLaunchConfig:
    """The launch parameters for a shape: scaling `[H,r]` sums must not outweigh `[strip,r]` scores.

    Not measured: no TPU was at hand.
    """
    wide = 256 if H > 64 else 128
    return TpuLaunchConfig(strip=wide if key_block % wide == 0 else 128)
