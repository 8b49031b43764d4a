"""The Hopper kernels without a GPU: simulated, against the definition, and lowered for CUDA."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcattn.ops import (
    block_mask_plan,
    block_sparse_attention,
    causal_plan,
    dispatch,
    sliding_window_plan,
)
from lcattn.ops.block_sparse_attention.entries import entries
from lcattn.ops.checks import Sizes
from lcattn.testing.plans import random_plan
from pallas_kernels.block_sparse_attention import mosaic_gpu, phases
from pallas_kernels.block_sparse_attention.config import LaunchConfig, Walks, heuristic
from pallas_kernels.block_sparse_attention.items import FULL, SKIPPED

IDS = np.asarray([[-1] * 3 + [0] * 200 + [2] * 60 + [-1] * 10 + [3] + [4] * 26], np.int32)

CASES = {
    # name: (B, T, S, N, K), plan, config, scale, dtype
    "lists and rules of each head, weighted, ragged, small blocks of keys, float16": (
        (1, 300, 200, 2, 1), lambda: random_plan(1, 300, 200, 2, key_block=64),
        None, -0.1, jnp.float16,
    ),
    "a window with sinks, packed, grouped queries, large blocks of keys, bfloat16": (
        (1, 300, 300, 2, 1),
        lambda: sliding_window_plan(
            300, 40, sinks=3, segment_ids=jnp.asarray(IDS), key_block=256
        ),
        None, None, jnp.bfloat16,
    ),
    "one list of several in a CTA, the others empty, whose warpgroups still take turns": (
        (1, 512, 512, 1, 1),
        lambda: block_mask_plan(jnp.zeros((1, 1, 4, 4), bool).at[..., 1, :2].set(True), 512),
        LaunchConfig(blocks=4, key_blocks=4), None, jnp.bfloat16,
    ),
}  # fmt: skip


@pytest.fixture
def on_hopper(monkeypatch):
    monkeypatch.setattr(dispatch, "on_hopper", lambda: True)


@functools.partial(jax.jit, static_argnums=(0, 1))
def values_and_gradients(implementation, scale, q, k, v, plan, g):
    attend = functools.partial(
        block_sparse_attention, plan=plan, scale=scale, return_lse=True,
        implementation=implementation,
    )  # fmt: skip
    (out, lse), pull = jax.vjp(attend, q, k, v)
    return out, jnp.where(jnp.isneginf(lse), 0, lse), *pull((g, jnp.cos(lse)))


@functools.cache
def both(name):
    """What the kernels give, copying warpgroup and all, and what the definition does in float32."""
    (B, T, S, N, K), plan, config, scale, dtype = CASES[name]
    draw = np.random.default_rng(0)
    shapes = (B, T, N, 64), (B, S, K, 64), (B, S, K, 64), (B, T, N, 64)
    q, k, v, g = (jnp.asarray(draw.normal(size=shape), dtype) for shape in shapes)
    plan = plan()
    with pytest.MonkeyPatch.context() as patch:
        run = functools.partial(mosaic_gpu.block_sparse_attention, interpret=True, config=config)
        patch.setattr(mosaic_gpu, "block_sparse_attention", run)
        patch.setattr(dispatch, "on_hopper", lambda: True)
        got = values_and_gradients("mosaic_gpu", scale, q, k, v, plan, g)
    wide = (x.astype(jnp.float32) for x in (q, k, v))
    want = values_and_gradients("reference", scale, *wide, plan, g.astype(jnp.float32))
    return got, want


@pytest.mark.parametrize("name", CASES)
def test_values_and_every_gradient_agree_with_the_definition(name):
    got, want = both(name)
    dtype = CASES[name][-1]
    assert got[0].dtype == dtype
    for a, b in zip(got, want, strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        tolerance = 1e-3 if dtype == jnp.float16 else 5e-3
        assert np.linalg.norm(a - b) <= tolerance * np.linalg.norm(b)


def test_queries_that_see_nothing_give_zeros():
    lists, window, one = (both(name)[0] for name in CASES)
    assert np.array_equal(np.any(one[0] != 0, axis=(0, 2, 3)), np.arange(512) // 128 == 1)
    assert not np.any(lists[0][:, :128, 0])
    assert not np.any(lists[2][:, :128, 0])
    assert not any(np.any(x[IDS < 0]) for x in (window[0], *window[2:]))


def test_phases_hold_every_entry_once_in_both_orders():
    lists = entries(random_plan(1, 300, 200, 2).cleared())
    kinds = np.asarray(lists.kinds[0])
    for n in range(2):
        for order, swap, blocks in ((phases.by_queries, False, 3), (phases.by_keys, True, 2)):
            stream, edges, longest, weight = (np.asarray(x[0, n]) for x in order(lists))
            assert sorted(longest) == list(range(blocks))
            assert np.all(np.diff((edges[:, 2] - edges[:, 0])[longest]) <= 0)
            found = []
            for stay, (begin, middle, end) in enumerate(edges):
                for place in range(begin, end):
                    pair = (stream[place], stay) if swap else (stay, stream[place])
                    found.append((*pair, place < middle, weight[place]))
            expected = [
                (m, lists.blocks[0, n, m, i], kinds[n, m, i] == FULL, lists.log_weight[0, n, m, i])
                for m, i in zip(*np.nonzero(kinds[n] != SKIPPED), strict=True)
            ]
            np.testing.assert_allclose(
                sorted((*pair, np.log(2) * w) for *pair, w in found), sorted(expected), rtol=1e-6
            )


@pytest.mark.parametrize(
    ("T", "K", "H", "plan"),
    [
        (32768, 16, 128, functools.partial(causal_plan, 32768)),
        (1000, 4, 64, functools.partial(sliding_window_plan, 1000, 300, query_block=64)),
    ],
    ids=["causal", "window"],
)
def test_gradients_lower_for_cuda(T, K, H, plan, on_hopper):
    def loss(q, k, v):
        out = block_sparse_attention(q, k, v, plan(), implementation="mosaic_gpu")
        return out.astype(jnp.float32).sum()

    arrays = [jax.ShapeDtypeStruct((1, T, heads, H), jnp.bfloat16) for heads in (16, K, K)]
    gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
    text = gradient.trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("mosaic_gpu") >= 3


@pytest.mark.parametrize(
    ("dtype", "H", "block", "message"),
    [
        (jnp.float32, 64, 128, "take bfloat16 or float16, not float32"),
        (jnp.bfloat16, 96, 128, "keys and values of one size, 64 or 128, not F=96, H=96"),
        (jnp.bfloat16, 64, 32, "take blocks of multiples of 64, not query_block=32"),
    ],
)
def test_a_call_that_is_not_served_is_told_why(dtype, H, block, message, on_hopper):
    q = jnp.ones((1, 64, 1, H), dtype)
    plan = causal_plan(64, query_block=block)
    with pytest.raises(ValueError, match=message):
        block_sparse_attention(q, q, q, plan, implementation="mosaic_gpu")


def test_they_are_chosen_on_a_hopper_gpu_and_need_one(on_hopper, monkeypatch):
    q = jnp.ones((1, 64, 1, 64), jnp.bfloat16)
    table = dispatch.OPS["block_sparse_attention"]
    call = {"sizes": Sizes(B=1, T=64, S=64, N=1, K=1, F=64, H=64), "dtype": q.dtype}
    call["plan"] = causal_plan(64)
    assert table["mosaic_gpu"].refusal(**call) is None
    for devices in (1, 2):
        monkeypatch.setattr(jax, "device_count", lambda: devices)  # noqa: B023
        assert table["mosaic_gpu"].is_best(**call) == (devices == 1)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="'mosaic_gpu' needs a Hopper GPU"):
        block_sparse_attention(q, q, q, causal_plan(64), implementation="mosaic_gpu")


def test_launch_parameters():
    assert (
        heuristic(H=64, query_block=64, key_block=64, readers=Walks(1, 1), keys=Walks(1, 1)).width
        == 64
    )
    with pytest.raises(ValueError, match=r"LaunchConfig.stages: expected one of \(2, 3, 4\)"):
        LaunchConfig(stages=5)
    q = jnp.ones((1, 64, 1, 64), jnp.bfloat16)
    plan = causal_plan(64, key_block=64)
    with pytest.raises(ValueError, match=r"config\.width to divide blocks of 64, got 128"):
        mosaic_gpu.block_sparse_attention(
            q, q, q, entries(plan), tuple(plan.seen),
            query_block=128, key_block=64, scale=1.0, config=LaunchConfig(),
        )  # fmt: skip
