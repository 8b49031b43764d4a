"""Plans of block-sparse attention that no mechanism would make."""

import jax.numpy as jnp
import numpy as np

from lcattn.ops import BlockPlan
from lcattn.ops.visibility import Visibility


def random_plan(
    B: int,
    T: int,
    S: int,
    heads: int,
    *,
    query_block: int = 128,
    key_block: int = 128,
    seed: int = 1,
) -> BlockPlan:
    """Lists of random blocks with weights, some of them empty, under a random rule.

    Args:
      B, T, S: rows, queries and keys.
      heads: K or N; each has lists and a rule of its own.
      query_block, key_block: sizes of blocks, such that there are at least two of queries.
      seed: what to draw from.
    """
    draw = np.random.default_rng(seed)
    m, n = -(-T // query_block), -(-S // key_block)
    chosen = draw.random((B, heads, m, n)) < 0.6
    chosen[:, 0, 0], chosen[:, :, 1, 0] = False, True
    blocks, count = np.argsort(~chosen, axis=-1, kind="stable"), chosen.sum(axis=-1)
    blocks[np.arange(n) >= count[..., None]] = 10**6  # past the end of the lists
    begin = draw.integers(-5, T // 2, (1, heads, S))
    # Some end before they begin.
    end = begin + draw.integers(-T // 4, T, (1, heads, S))
    seen = np.arange(T).reshape(1, 1, T), begin, end
    seen[1][..., :key_block], seen[2][..., :key_block] = 0, T  # whole entries
    return BlockPlan(
        blocks=jnp.asarray(blocks, jnp.int32), count=jnp.asarray(count, jnp.int32),
        log_weight=jnp.asarray(draw.normal(size=chosen.shape), jnp.float32),
        seen=Visibility(*(jnp.asarray(x, jnp.int32) for x in seen)),
        query_block=query_block, key_block=key_block,
    )  # fmt: skip
