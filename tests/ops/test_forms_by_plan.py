"""Mechanisms as plans of blocks: each equals its definition, in values and every gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcattn import ops
from lcattn.ops import dispatch
from lcattn.ops.block_sparse_attention import visible
from lcattn.ops.checks import Sizes
from lcattn.ops.hyper_attention import block_sparse
from lcattn.testing.conformance import oracles

T = 30
# Documents with padding before, between and within a block of them; a row that is all padding.
IDS = np.asarray([[-1] * 2 + [0] * 13 + [-1] * 3 + [1] + [4] * 10 + [-1], [-1] * T], np.int32)
HYPER = {
    "rng": jax.random.key(1), "num_projections": 3, "block_size": 4, "sample_size": 6,
    "min_seq_len": 8, "return_lse": True,
}  # fmt: skip
CASES = {
    # name: op, options, the form that it is held against
    "window with sinks": (
        "softmax_attention", {"window": 9, "sinks": 2, "return_lse": True}, "reference",
    ),
    "hyper": ("hyper_attention", HYPER, "xla"),
    "cores": ("core_context_attention", {"group_size": 3, "window": 7}, "reference"),
    "routing": ("routing_attention", {"cluster_size": 5}, "xla"),
}  # fmt: skip


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Blocks of 8 tokens, so that short lists have several."""
    monkeypatch.setattr(visible, "_BLOCK", {"cpu": 8})


def arrays(op, dtype):
    """Four query heads to two key heads; NumPy arrays, so that float64 is kept."""
    rng = np.random.default_rng(0)
    shapes = [(2, T, 4, 4), (2, T, 2, 4), (2, T, 2, 4)]
    q, k, v = (rng.standard_normal(shape).astype(jnp.dtype(dtype)) for shape in shapes)
    return (q, v) if op == "routing_attention" else (q, k, v)


@functools.partial(jax.jit, static_argnums=(0, 1))
def values_and_gradients(name, implementation, arrays):
    op, options, _ = CASES[name]
    ids = jnp.asarray(IDS[: len(arrays[0])])
    call = functools.partial(
        getattr(ops, op), **options, segment_ids=ids, implementation=implementation
    )
    if op == "routing_attention":
        centroids = jax.random.normal(jax.random.key(0), (4, 3, 4))
        call = functools.partial(_routed, call, centroids)
    values, pull = jax.vjp(call, *arrays)
    seen = jax.tree.map(lambda x: jnp.where(jnp.isneginf(x), 0, x), values)
    return values, pull(jax.tree.map(lambda x: jnp.cos(x) + x, seen))


def _routed(call, centroids, q, v):
    return call(q, v, centroids)


@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, "float64") for name in CASES), ("hyper", "bfloat16")]
)
def test_they_are_what_they_mean(name, dtype):
    op, _, plain = CASES[name]
    inputs = arrays(op, dtype)
    with jax.enable_x64(True):
        found = values_and_gradients(name, "block_sparse", inputs)
        assert {str(x.dtype) for x in found[1]} == {dtype}
        expected = values_and_gradients(name, plain, [x.astype(float) for x in inputs])
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        np.testing.assert_array_equal(np.isfinite(x), np.isfinite(y))
        x, y = (np.where(np.isfinite(z), z, 0) for z in (x, y))
        tolerance = 1e-12 if dtype == "float64" else 1e-2
        assert np.linalg.norm(x - y) <= tolerance * np.linalg.norm(y)
        assert not np.any(x[IDS < 0])


@pytest.mark.parametrize("name", CASES)
def test_a_batch_may_be_empty(name):
    empty = [x[:0] for x in arrays(CASES[name][0], "float32")]
    found = jax.eval_shape(functools.partial(values_and_gradients, name, "block_sparse"), empty)
    assert {len(x) for x in jax.tree.leaves(found)} == {0}


@pytest.mark.parametrize("implementation", ["xla", "block_sparse"])
def test_windows_with_sinks_are_what_they_say(implementation):
    inputs = dict(zip("qkv", arrays("softmax_attention", "float64"), strict=True))
    options = {"window": 9, "sinks": 2}
    attend = functools.partial(ops.softmax_attention, **options, implementation=implementation)
    with jax.enable_x64(True):
        out = jax.jit(attend)(**inputs, segment_ids=jnp.asarray(IDS))
    np.testing.assert_allclose(out, oracles.softmax_attention(inputs, IDS, **options), atol=1e-12)


def test_streams_of_cores():
    """Cores and recent tokens of a state, some of which do not exist yet, bound the lists too."""
    q, k, v = map(jnp.asarray, arrays("core_context_attention", "float32"))
    options = {"group_size": 3, "window": 7, "share_cores": True}
    attend = functools.partial(ops.core_context_attention, **options)

    @jax.jit
    def stream(state):
        streamed = functools.partial(attend, return_state=True, implementation="block_sparse")
        first, state = streamed(q[:, :11], k[:, :11], v[:, :11], initial_state=state)
        second, _ = streamed(q[:, 11:], k[:, 11:], v[:, 11:], initial_state=state)
        return jnp.concatenate([first, second], axis=1)

    state = ops.core_context_attention_state(2, T, 4, 2, 4, 4, **options)
    expected = jax.jit(functools.partial(attend, implementation="reference"))(q, k, v)
    np.testing.assert_allclose(stream(state), expected, atol=1e-5)


def test_all_levels_are_one_call(monkeypatch):
    """No recursion of launches: the leaves side by side, and everything else."""
    calls = []

    def counted(q, k, v, plan, **options):
        calls.append(plan)
        return run(q, k, v, plan, **options)

    run = block_sparse.block_sparse_part
    for module in (visible, block_sparse):
        monkeypatch.setattr(module, "block_sparse_part", counted)
    x = jax.ShapeDtypeStruct((1, 8 * 2**4, 2, 4), jnp.float32)
    attend = functools.partial(ops.hyper_attention, **HYPER, implementation="block_sparse")
    jax.eval_shape(attend, x, x, x)
    leaves, levels = calls
    assert leaves.blocks.shape[:2] == (1, 1)  # one list for all heads and leaves
    # Of 4 keys each: the own block, and six samples, also where some are of the own block.
    assert levels.blocks.shape[-1] == 1 + 2


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_long_hyper_attention_is_a_plan_unasked_where_kernels_for_hopper_are(monkeypatch, dtype):
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    call = {
        "sizes": Sizes(B=1, T=16_384, S=16_384, N=1, K=1, F=64, H=64), "dtype": jnp.dtype(dtype),
        "query_block": 128, "key_block": 128,
    }  # fmt: skip
    table = dispatch.OPS["hyper_attention"]
    assert next(iter(table)) == "block_sparse"
    assert not table["block_sparse"].is_best(**call)
    monkeypatch.setattr(dispatch, "on_hopper", lambda: True)
    assert table["block_sparse"].is_best(**call) is (dtype == "bfloat16")
    short = call | {"sizes": Sizes(B=1, T=16_383, S=16_383, N=1, K=1, F=64, H=64)}
    assert not table["block_sparse"].is_best(**short)


@pytest.mark.parametrize(
    ("op", "options"),
    [
        ("softmax_attention", {"window": 64, "sinks": 2}),
        ("softmax_attention", {"segment_ids": jnp.zeros((1, 4096), jnp.int32)}),
        ("core_context_attention", {"group_size": 16, "window": 64}),
        ("routing_attention", {"cluster_size": 64}),
    ],
    ids=["window", "packed", "cores", "routing"],
)
def test_what_was_timed_is_a_plan_unasked_where_kernels_for_hopper_are(monkeypatch, op, options):
    monkeypatch.setattr(visible, "_BLOCK", {"cpu": 128, "gpu": 128})
    monkeypatch.setattr(jax, "device_count", lambda: 1)

    def takes_kernels(T=4096, dtype=jnp.bfloat16, **more):
        x = jax.ShapeDtypeStruct((1, T, 1, 64), dtype)
        call = functools.partial(getattr(ops, op), **options, **more)
        if op == "routing_attention":
            call = functools.partial(_routed, call, jnp.ones((1, 4, 64)))
        inputs = (x, x) if op == "routing_attention" else (x, x, x)
        return "block_sparse_attention_forward" in str(jax.make_jaxpr(call)(*inputs))

    assert not takes_kernels()
    monkeypatch.setattr(dispatch, "on_hopper", lambda: True)
    assert takes_kernels()
    assert not takes_kernels(dtype=jnp.float32)
    if "segment_ids" not in options:
        assert not takes_kernels(T=4095)
    if op == "routing_attention":
        assert not takes_kernels(strict=False)


def test_a_plan_takes_no_slopes():
    q, k, v = map(jnp.asarray, arrays("softmax_attention", "float32"))
    with pytest.raises(ops.UnsupportedImplementationError, match="takes no alibi_slopes"):
        ops.softmax_attention(
            q, k, v, alibi_slopes=ops.alibi_slopes(4), implementation="block_sparse"
        )


def test_bad_sinks(no_type_hook):
    q, k, v = map(jnp.asarray, arrays("softmax_attention", "float32"))
    with pytest.raises(ValueError, match="sinks: expected a whole number of at least 0, got -1"):
        ops.softmax_attention(q, k, v, window=3, sinks=-1)
