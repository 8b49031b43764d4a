"""What only HyperAttention must hold, and what the published code gets wrong."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import ops
from jax.sharding import AxisType, PartitionSpec

from lcattn.ops import dispatch, hyper_attention
from lcattn.ops.checks import check_heads
from lcattn.ops.hyper_attention import api, dense, draws
from lcattn.ops.hyper_attention.groups import causal_groups, document_groups
from lcattn.ops.hyper_attention.hashing import gray_rank, ranks
from lcattn.ops.hyper_attention.plan import Options
from lcattn.testing.conformance import oracles

KEY = jax.random.key(3)
SMALL = {"num_projections": 3, "block_size": 4, "sample_size": 3, "min_seq_len": 8}


@functools.partial(jax.jit, static_argnames=("causal", "strict", "sample_size", "implementation"))
def attend(q, k, v, rng=KEY, **options):
    """The output and the log-sum-exp, at small sizes."""
    return ops.hyper_attention(q, k, v, rng=rng, return_lse=True, **SMALL | options)


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def _draw(T=23, *, B=1, N=2, K=1, H=4, seed=0):
    rng = np.random.default_rng(seed)
    return tuple(jnp.asarray(rng.standard_normal((B, T, heads, H))) for heads in (N, K, K))


def _each_key_once(key, draw_id, population, count):
    """In the place of `draws.sample`, with sample_size = S."""
    del key, draw_id, population
    return jnp.arange(count, dtype=jnp.int32)


def test_ranks_follow_the_gray_sequence():
    for bits in (1, 3, 7, 10):
        codes = np.argsort(gray_rank(jnp.arange(2**bits)))
        steps = codes[1:] ^ codes[:-1]
        assert {int(step).bit_count() for step in steps} == {1}


def test_the_published_order_jumps():
    """It applies the map forward: a rank's code is then its inverse."""
    codes = np.asarray(gray_rank(jnp.arange(128)))
    jumps = [int(step).bit_count() for step in codes[1:] ^ codes[:-1]]
    assert max(jumps) > 1
    assert np.mean(np.array(jumps) > 1) == pytest.approx(0.24, abs=0.01)


def test_the_hash_knows_directions_only():
    x, planes = jnp.asarray(np.random.default_rng(0).standard_normal((2, 50, 6)))
    np.testing.assert_array_equal(ranks(3.7 * x, planes[:6]), ranks(x, planes[:6]))
    np.testing.assert_array_equal(ranks(0 * x, planes[:6]), 0)


def test_the_hash_asks_no_gpu_for_what_older_ones_lack(monkeypatch):
    """XLA compiles products of bfloat16 parts from Ampere on only."""

    def is_in_parts():
        x = jax.ShapeDtypeStruct((8, 6), jnp.float32)
        return "BF16_BF16_F32_X6" in str(jax.make_jaxpr(lambda x: ranks(x, x.T))(x))

    monkeypatch.setattr(dispatch, "default_platform", lambda: "gpu")
    assert not is_in_parts()
    monkeypatch.setattr(dispatch, "on_hopper", lambda: True)
    assert is_in_parts()


def test_short_rows_are_exact_and_need_no_rng():
    """Published: to the token s with causality, to the one before without."""
    for T, causal in ((7, True), (8, True), (8, False)):
        q, k, v = _draw(T)
        out = ops.hyper_attention(q, k, v, causal=causal, **SMALL)
        np.testing.assert_array_equal(out, ops.softmax_attention(q, k, v, causal=causal))


@pytest.mark.parametrize("T", [14, 23])
def test_each_key_sampled_once_is_exact(monkeypatch, T):
    """No key of a block counts twice, and places that fill up a block count as no key.

    Published float32 and CUDA paths do both. 14 keys make three blocks and a half. Half of them
    weigh next to nothing beside the others, so that most blocks do too: published, the sampled
    part is capped at 1/epsilon of the block's.
    """
    monkeypatch.setattr(draws, "sample", _each_key_once)
    q, k, v = _draw(T)[0], *_draw(14)[1:]
    q, k = q.at[..., 0].set(8.0), k.at[:, ::2, :, 0].multiply(50.0)
    options = SMALL | {"sample_size": 14, "causal": False, "return_lse": True}
    found = jax.jit(functools.partial(hyper_attention, rng=KEY, **options))(q, k, v)
    expected = ops.softmax_attention(
        q, k, v, causal=False, return_lse=True, implementation="reference"
    )
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-10, atol=1e-10)


def test_blocks_as_long_as_leaves_are_exact():
    """Two leaves, and between them one block that holds all keys; samples from it are dropped."""
    q, k, v = _draw(16)
    out = jax.jit(functools.partial(ops.hyper_attention, rng=KEY, **SMALL | {"block_size": 8}))
    expected = ops.softmax_attention(q, k, v, implementation="reference")
    np.testing.assert_allclose(out(q, k, v), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("causal", [True, False])
def test_the_published_form_follows_its_definition(causal):
    inputs = _draw(B=2)
    segment_ids = jnp.asarray([[0] * 23, [0] * 4 + [-1] + [2] * 10 + [5] * 8], jnp.int32)
    drawn = draws.draw(KEY, None, sizes=check_heads(*inputs), num_projections=3)
    expected = oracles.hyper_attention(
        dict(zip("qkv", map(np.asarray, inputs), strict=True))
        | {"seeds": np.arange(4).reshape(2, 2)},
        np.asarray(segment_ids),
        causal=causal,
        planes=lambda size: np.asarray(drawn.planes),
        sample=lambda seed, *args: np.asarray(draws.sample(drawn.keys.reshape(-1)[seed], *args, 3)),
        block_size=4,
        min_seq_len=8,
        strict=False,
    )
    cotangent = jnp.asarray(np.random.default_rng(1).standard_normal(expected.shape))
    gradients = []
    for implementation in ("reference", "xla"):
        out, pull_back = jax.vjp(
            lambda *x, implementation=implementation: attend(
                *x, causal=causal, strict=False, segment_ids=segment_ids,
                implementation=implementation,
            )[0],
            *inputs,
        )  # fmt: skip
        np.testing.assert_allclose(out, expected, rtol=1e-9, atol=1e-11)
        gradients.append(pull_back(cotangent))
    for plain, blocks in zip(*gradients, strict=True):
        np.testing.assert_allclose(blocks, plain, rtol=1e-8, atol=1e-10)


def test_only_the_strict_form_is_causal():
    """Published: where a query stands among all queries of its half decides which block it reads.

    32 tokens, leaves of 8. Token 30 shares a second half with tokens 24 to 31 (level 0) and 16 to
    31 (level 1), which it may move to other blocks.
    """
    inputs = _draw(32, seed=1)
    changed = [x.at[:, 30:].multiply(-2) for x in inputs]
    for strict in (True, False):
        before, after = (attend(*x, strict=strict)[0] for x in (inputs, changed))
        moved = np.any(np.asarray(before != after), axis=(0, 2, 3))
        assert np.all(moved[30:])
        assert not np.any(moved[:16])
        assert np.any(moved[16:30]) != strict


def test_a_prefix_gives_the_same():
    """Published: halves of another length are cut elsewhere."""
    q, k, v = _draw(32, seed=1)
    part, _ = attend(q[:, :23], k[:, :23], v[:, :23])
    np.testing.assert_allclose(part, attend(q, k, v)[0][:, :23], rtol=1e-10, atol=1e-12)


def test_draws_are_of_the_key_the_row_and_the_head():
    inputs = [jnp.tile(x[:, :, :1], (2, 1, 2, 1)) for x in _draw()]
    out, _ = attend(*inputs)
    np.testing.assert_array_equal(attend(*inputs)[0], out)
    for other in (out[1, :, 0], out[0, :, 1], attend(*inputs, jax.random.key(4))[0][0, :, 0]):
        assert np.abs(other - out[0, :, 0]).max() > 1e-3
    few, many = (check_heads(*(x[:b] for x in inputs)) for b in (1, 2))
    few, many = (draws.draw(KEY, None, sizes=sizes, num_projections=3) for sizes in (few, many))
    assert jnp.all(few.keys == many.keys[:1])
    old = draws.draw(jax.random.PRNGKey(3), None, sizes=check_heads(*inputs), num_projections=3)
    np.testing.assert_array_equal(old.planes, many.planes)


def test_numerator_and_denominator_are_unbiased():
    """1,024 samples of one query-key problem, as rows and heads.

    A sample of m keys gives Z with a variance of at most S/m · sum of exp(2 s_j), which bounds
    the error of each query's mean; the mean over queries is held to its own standard error.
    """
    S, m, count = 48, 8, 1024
    q, k, v = (jnp.tile(x, (32, 1, 32, 1)) for x in _draw(S, N=1, H=3))
    out, lse = ops.hyper_attention(
        q, k, v, rng=KEY, causal=False, num_projections=3, sample_size=m, block_size=8,
        min_seq_len=8, return_lse=True, implementation="reference",
    )  # fmt: skip
    weights = np.exp(np.asarray(q[0, :, 0] @ k[0, :, 0].T) / np.sqrt(3))  # [T,S]
    denominators = np.exp(np.asarray(lse)).transpose(0, 2, 1).reshape(count, S)
    numerators = denominators * np.asarray(out[..., 0]).transpose(0, 2, 1).reshape(count, S)
    values = np.asarray(v[0, :, 0, 0])
    for found, terms in ((denominators, weights), (numerators, weights * values)):
        error = found.mean(axis=0) - terms.sum(axis=1)
        largest = np.sqrt(S / m * np.sum(terms**2, axis=1) / count)
        assert np.all(np.abs(error) < 4.5 * largest)
        sums = np.sum(found / weights.sum(axis=1), axis=1)  # one number a draw
        expected = np.sum(terms.sum(axis=1) / weights.sum(axis=1))
        standard_error = sums.std() / np.sqrt(count)
        assert abs(sums.mean() - expected) < 4 * standard_error
        # Without the mask of the own block, or with (S - b)/m as the weight, a sixth is off.
        assert 4 * standard_error < S / 12


def test_errors_fall_with_the_root_of_the_sample_size():
    """Times 4 samples, half the error; heads give 64 draws."""
    q, k, v = (jnp.tile(x, (1, 1, 64, 1)) for x in _draw(96, N=1, H=8))
    exact = ops.softmax_attention(q, k, v, causal=False, implementation="reference")

    def error(sample_size):
        out, _ = attend(q, k, v, causal=False, sample_size=sample_size, implementation="reference")
        return float(jnp.sqrt(jnp.mean(jnp.square(out - exact))))

    few, many = error(32), error(128)
    assert few / many == pytest.approx(2, rel=0.25)


def test_blocks_catch_what_is_alike():
    """Keys in 8 clusters: a query's block, one key in 8, has most of the weight."""
    rng = np.random.default_rng(0)
    centers = 3 * rng.standard_normal((8, 16))
    keys = np.repeat(centers, 16, axis=0) + 0.1 * rng.standard_normal((128, 16))
    keys = rng.permutation(keys)
    queries, keys = (jnp.asarray(x) for x in (rng.permutation(keys), keys))
    planes = jnp.asarray(rng.standard_normal((16, 10)))
    group = jnp.zeros(128, jnp.int32)
    for strict in (True, False):
        times = dense.estimated_times(
            ranks(queries, planes), ranks(keys, planes), KEY, group, group, group[:1],
            Options(1.0, 16, 1, strict),
        )  # fmt: skip
        weights = np.exp(queries @ keys.T / 4 - 10)
        caught = np.sum(weights * (np.asarray(times) == 1)) / np.sum(weights)
        assert caught > 0.5


def test_gradients_go_through_the_merge(monkeypatch):
    """Published 16-bit path: the weights of the parts are constants to it. That is far off."""
    inputs, merge = _draw(), api.merge

    def gradients():
        return jax.jit(jax.grad(lambda *x: jnp.sum(jnp.sin(run(*x))), (0, 1, 2)))(*inputs)

    run = functools.partial(hyper_attention, rng=KEY, **SMALL)
    right = gradients()

    def merge_detached(*parts):
        return merge(*((out, jax.lax.stop_gradient(lse)) for out, lse in parts))

    monkeypatch.setattr(api, "merge", merge_detached)
    for wrong, gradient in zip(gradients()[:2], right[:2], strict=True):
        assert np.abs(wrong - gradient).max() > 0.05 * np.abs(gradient).max()


def test_tokens_that_are_all_alike():
    q, k, v = (jnp.ones_like(x) for x in _draw())
    for inputs in ((q, k, v), (0 * q, 0 * k, v)):
        out, gradients = jax.jit(jax.value_and_grad(lambda *x: attend(*x)[0].sum(), (0, 1, 2)))(
            *inputs
        )
        np.testing.assert_allclose(out, q.size, rtol=1e-12)
        assert all(np.all(np.isfinite(g)) for g in gradients)


def test_what_is_exact_lies_close_together():
    """Lists of blocks have room for that, and for no more."""
    ids = jnp.asarray(np.repeat([[0, 1, 2, 3]], [7, 20, 8, 5], axis=1))
    for build, lengths in ((causal_groups, (40,)), (document_groups, (40, 40))):
        groups, bounds = build(*lengths, ids, min_seq_len=8, block_size=4)
        seen = np.asarray(groups.exact.mask()[0])
        spans = []
        for first in range(40 - 3):
            keys = np.flatnonzero(seen[first : first + 4].any(axis=0))
            spans.append(np.ptp(keys) + 1 if keys.size else 0)
        assert max(spans) <= bounds.num_exact + 3 <= 2 * max(spans)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rng": None}, "rng: expected a JAX key, since some row may exceed min_seq_len, got None"),
        ({"rng": jnp.ones(3, "int32")}, r"rng: expected a JAX key, got int32\[3\]"),
        ({"rng": jax.random.split(KEY, 3)}, r"rng: expected shape \[\] or \[B,N\] = \(1, 2\)"),
        ({"rng": jax.random.split(KEY, (1, 2))}, "planes: expected .* rng has a key a head"),
        ({"planes": jnp.zeros((5, 3))}, r"planes: expected \[F=4,r\], got shape \(5, 3\)"),
        ({"rng": 3}, "rng: expected a JAX key, got 3"),
        ({"num_projections": 0}, "num_projections: expected a whole number of at least 1"),
        ({"num_projections": 8}, "num_projections: expected at most 7, by min_seq_len=8, got 8"),
        ({"block_size": 0}, "block_size: expected a whole number of at least 1, got 0"),
        ({"block_size": 9}, "block_size: expected at most min_seq_len=8, got 9"),
        ({"sample_size": 0}, "sample_size: expected a whole number of at least 1, got 0"),
        ({"min_seq_len": 0}, "min_seq_len: expected a whole number of at least 1, got 0"),
    ],
)
def test_bad_options(no_type_hook, options, message):
    with pytest.raises(ValueError, match=message):
        ops.hyper_attention(*_draw(), **{"rng": KEY} | SMALL | options)


def test_causal_queries_are_the_keys():
    q, k, v = _draw()
    with pytest.raises(ValueError, match="q: expected T=23 queries, as many as keys, when causal"):
        attend(q[:, :9], k, v)


def test_axes_of_a_mesh_may_be_explicit():
    """With one key for all, where the suite has one for each row and head; and as a plan."""
    mesh = jax.make_mesh((2,), ("data",), (AxisType.Explicit,), devices=jax.devices()[:2])
    rows = jax.NamedSharding(mesh, PartitionSpec("data"))
    x = jax.ShapeDtypeStruct((2, 20, 2, 4), jnp.float32, sharding=rows)
    ids = jax.ShapeDtypeStruct((2, 20), jnp.int32, sharding=rows)
    rng = jax.ShapeDtypeStruct((2,), jnp.uint32)

    def call(x, ids, rng):
        options = SMALL | {"return_lse": True, "implementation": "block_sparse"}
        return hyper_attention(x, x, x, segment_ids=ids, rng=rng, **options)

    with jax.set_mesh(mesh):
        for found in jax.eval_shape(call, x, ids, rng):
            assert found.sharding.spec[0] == "data"
