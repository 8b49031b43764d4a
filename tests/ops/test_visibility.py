"""Counting keys by position equals counting them in the mask."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcattn.ops.visibility import visibility

T = S = 6


@functools.partial(jax.jit, static_argnames=("causal", "window"))
def counts(segment_ids, query_position, key_position, *, causal, window):
    seen = visibility(
        T, S, causal=causal, window=window, segment_ids=segment_ids,
        query_position=query_position, key_position=key_position,
    )  # fmt: skip
    return seen.num_keys(), seen.mask().sum(axis=-1)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 2])
def test_numbers_of_keys(causal, window):
    for places in ((0, 0), (100, 98), (3, -3)):  # the last: a cache that is not yet full
        found, expected = counts(None, *places, causal=causal, window=window)
        np.testing.assert_array_equal(found, expected)
    for ids in (
        [[0, 0, 1, 1, 1, 2], [-1] * 6],
        [[-1, 0, 0, -1, 2, 2], [0, 0, 0, -1, -1, -1]],
        [[-1, -1, -1, -1, 5, 5], [7] * 6],
    ):
        found, expected = counts(jnp.asarray(ids), 0, 0, causal=causal, window=window)
        np.testing.assert_array_equal(found, expected)
