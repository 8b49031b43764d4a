"""The TPU kernels without a TPU: simulated, against the XLA form, lowered, and compiled."""

import functools

import compiled_for_tpu
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcattn.ops import block_sparse_attention, dispatch, sliding_window_plan
from lcattn.testing.plans import random_plan
from pallas_kernels.block_sparse_attention import items, mosaic_tpu
from pallas_kernels.block_sparse_attention.config import TpuLaunchConfig, tpu_heuristic

IDS = np.asarray([[-1] * 3 + [0] * 200 + [2] * 60 + [-1] * 10 + [3] + [4] * 26], np.int32)


@pytest.fixture(autouse=True)
def simulated(monkeypatch):
    """Makes the op run the kernels in the TPU simulator."""
    run = functools.partial(mosaic_tpu.block_sparse_attention, interpret=True)
    monkeypatch.setattr(mosaic_tpu, "block_sparse_attention", run)
    monkeypatch.setattr(dispatch, "default_platform", lambda: "tpu")


CASES = {
    # name: (B, T, S, N, K, F, H), plan, dtype
    "lists and rules of each head, weighted, ragged, float32": (
        (1, 300, 200, 2, 1, 16, 24), lambda: random_plan(1, 300, 200, 2), jnp.float32,
    ),
    "a window with sinks, packed, grouped queries, bfloat16": (
        (1, 300, 300, 2, 1, 16, 16),
        lambda: sliding_window_plan(
            300, 40, sinks=3, segment_ids=jnp.asarray(IDS), key_block=256
        ),
        jnp.bfloat16,
    ),
}  # fmt: skip


@functools.partial(jax.jit, static_argnums=0)
def values_and_gradients(implementation, q, k, v, plan, g):
    attend = functools.partial(
        block_sparse_attention, plan=plan, return_lse=True, implementation=implementation
    )
    (out, lse), pull = jax.vjp(attend, q, k, v)
    return out, jnp.where(jnp.isneginf(lse), 0, lse), *pull((g, jnp.cos(lse)))


@functools.cache
def both(name):
    """What the kernels give, and what the XLA form gives in float32."""
    (B, T, S, N, K, F, H), plan, dtype = CASES[name]
    draw = np.random.default_rng(0)
    shapes = (B, T, N, F), (B, S, K, F), (B, S, K, H), (B, T, N, H)
    q, k, v, g = (jnp.asarray(draw.normal(size=shape), dtype) for shape in shapes)
    plan = plan()
    got = values_and_gradients("mosaic_tpu", q, k, v, plan, g)
    wide = (x.astype(jnp.float32) for x in (q, k, v))
    return got, values_and_gradients("xla", *wide, plan, g.astype(jnp.float32)), plan


@pytest.mark.parametrize("name", CASES)
def test_values_and_every_gradient_agree_with_the_xla_form(name):
    got, want, _ = both(name)
    dtype = CASES[name][2]
    assert got[0].dtype == dtype
    for a, b in zip(got, want, strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        tolerance = 1e-5 if dtype == jnp.float32 else 1e-2
        assert np.linalg.norm(a - b) <= tolerance * np.linalg.norm(b)


def test_queries_that_see_nothing_give_zeros():
    got, _, _ = both("lists and rules of each head, weighted, ragged, float32")
    assert not np.any(got[0][:, :128, 0])
    assert not np.any(got[2][:, :128, 0])
    got, _, _ = both("a window with sinks, packed, grouped queries, bfloat16")
    assert not any(np.any(x[IDS < 0]) for x in (got[0], *got[2:]))


def test_items_hold_every_entry_once_in_both_orders():
    plan = random_plan(1, 300, 200, 2).cleared()
    kinds = np.asarray(plan.kinds())
    assert set(np.unique(kinds)) == {items.SKIPPED, items.PARTIAL, items.FULL}
    lists = items.Lists(plan.blocks, plan.kinds(), plan.log_weight, *plan.transposed())
    for n in range(2):
        expected = sorted(
            (m, int(plan.blocks[0, n, m, i]), kinds[0, n, m, i])
            for m, i in zip(*np.nonzero(kinds[0, n]), strict=True)
        )
        for order, swap in ((items.by_queries, False), (items.by_keys, True)):
            stay, stream, kind = map(np.asarray, items.unpack(order(lists).packed[0, n]))
            assert np.all(np.diff(stay) >= 0)
            assert set(stay) == set(range(2 if swap else 3))
            found = zip(*((stream, stay) if swap else (stay, stream)), kind, strict=True)
            assert sorted(item for item in found if item[2]) == expected


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"dtype": jnp.float16}, "take bfloat16 or float32, not float16"),
        ({"F": 12}, "not F=12"),
        ({"key_block": 64}, "not key_block=64"),
        ({"members": 32}, "take up to 2048 queries a block, not 32 heads of 128"),
        ({"blocks": 20000}, "take up to 16384 blocks"),
        ({"items": 100_001}, "take lists of up to 100000 blocks in all"),
    ],
)
def test_objections(sizes, message):
    fitting = {
        "dtype": jnp.bfloat16, "F": 64, "H": 64, "query_block": 128, "key_block": 128,
        "members": 1, "blocks": 8, "items": 8, "weighted": True,
    }  # fmt: skip
    assert mosaic_tpu.objection(**fitting) is None
    assert message in mosaic_tpu.objection(**(fitting | sizes))


def test_launch_parameters():
    assert tpu_heuristic(H=128, key_block=384).strip == 128
    with pytest.raises(ValueError, match=r"TpuLaunchConfig.strip: expected one of"):
        TpuLaunchConfig(strip=64)


def test_gradients_lower_for_tpu(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(dispatch, "default_platform", lambda: "tpu")

    def loss(q, k, v):
        plan = sliding_window_plan(4096, 1024, sinks=4)
        out = block_sparse_attention(q, k, v, plan, implementation="mosaic_tpu")
        return jnp.square(out.astype(jnp.float32)).sum()

    q, k = (jax.ShapeDtypeStruct((1, 4096, heads, 128), jnp.bfloat16) for heads in (16, 4))
    gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
    text = gradient.trace(q, k, k).lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("tpu_custom_call") == 3


def test_they_compile_for_every_tpu_as_recorded():
    compiled_for_tpu.check("block_sparse_attention")
