"""What only HyperAttention must hold, and what the published code gets wrong."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcattn import ops
from lcattn.ops.checks import check_heads
from lcattn.ops.hyper_attention import api, dense, draws
from lcattn.ops.hyper_attention.hashing import gray_rank, ranks
from lcattn.ops.hyper_attention.plan import Options
from lcattn.testing.conformance import oracles

KEY = jax.random.key(3)
SMALL = {"num_projections": 3, "block_size": 4, "sample_size": 3, "min_seq_len": 8}
attend = functools.partial(ops.hyper_attention, rng=KEY, **SMALL)


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
    x, planes = np.random.default_rng(0).standard_normal((2, 50, 6))
    np.testing.assert_array_equal(ranks(3.7 * x, planes[:6]), ranks(x, planes[:6]))
    np.testing.assert_array_equal(ranks(np.zeros((4, 6)), planes[:6]), 0)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize(("T", "S"), [(14, 14), (23, 14), (9, 14)])
def test_each_key_sampled_once_is_exact(monkeypatch, implementation, T, S):
    """No key of a block counts twice, and places that fill up a block count as no key.

    Published float32 and CUDA paths do both. 14 keys make three blocks and a half.
    """
    monkeypatch.setattr(draws, "sample", _each_key_once)
    q, k, v = _draw(T)[0], *_draw(S)[1:]
    options = SMALL | {"sample_size": S}
    out, lse = attend(
        q, k, 30 * v, causal=False, return_lse=True, implementation=implementation, **options
    )
    expected, expected_lse = ops.softmax_attention(
        q, k, 30 * v, causal=False, return_lse=True, implementation="reference"
    )
    np.testing.assert_allclose(out, expected, rtol=1e-11, atol=1e-11)
    np.testing.assert_allclose(lse, expected_lse, rtol=1e-12)


@pytest.mark.parametrize("strict", [True, False])
def test_blocks_as_long_as_leaves_are_exact(strict):
    """Two leaves, and between them one block that holds all keys; samples from it are dropped."""
    q, k, v = _draw(16)
    out = attend(q, k, v, **SMALL | {"block_size": 8}, strict=strict)
    expected = ops.softmax_attention(q, k, v, implementation="reference")
    np.testing.assert_allclose(out, expected, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("causal", [True, False])
def test_short_rows_are_exact_and_need_no_rng(causal):
    for T in (7, 8, 9):
        q, k, v = _draw(T)
        expected = ops.softmax_attention(q, k, v, causal=causal)
        if T <= 8:
            out = ops.hyper_attention(q, k, v, causal=causal, **SMALL)
            np.testing.assert_array_equal(out, expected)
        else:
            assert np.abs(attend(q, k, v, causal=causal) - expected)[:, 8:].max() > 1e-3


def _published(inputs, causal, segment_ids=None):
    """The oracle, with the draws of KEY."""
    q = inputs[0]
    drawn = draws.draw(KEY, None, sizes=check_heads(*map(jnp.asarray, inputs)), num_projections=3)
    seeds = np.arange(q.shape[0] * q.shape[2]).reshape(q.shape[0], q.shape[2])
    return oracles.hyper_attention(
        {"q": q, "k": inputs[1], "v": inputs[2], "seeds": seeds},
        segment_ids,
        causal=causal,
        planes=lambda size: np.asarray(drawn.planes),
        sample=lambda seed, *args: np.asarray(draws.sample(drawn.keys.reshape(-1)[seed], *args, 3)),
        block_size=4,
        min_seq_len=8,
        strict=False,
    )


@pytest.mark.parametrize("causal", [True, False])
def test_the_published_form_follows_its_definition(causal):
    inputs = _draw(B=2)
    ids = jnp.asarray([[0] * 4 + [-1] + [2] * 10 + [5] * 8, [-1] * 3 + [1] * 20], jnp.int32)
    for segment_ids in (None, ids):
        expected = _published([np.asarray(x) for x in inputs], causal, segment_ids)
        results = [
            jax.vjp(
                functools.partial(
                    attend, causal=causal, strict=False, segment_ids=segment_ids,
                    implementation=implementation,
                ),
                *inputs,
            )
            for implementation in ("reference", "xla")
        ]  # fmt: skip
        for out, _ in results:
            np.testing.assert_allclose(out, expected, rtol=1e-9, atol=1e-11)
        cotangent = jnp.asarray(np.random.default_rng(1).standard_normal(expected.shape))
        plain, blocks = (pull_back(cotangent) for _, pull_back in results)
        for found, gradient in zip(blocks, plain, strict=True):
            np.testing.assert_allclose(found, gradient, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_only_the_strict_form_is_causal(implementation):
    """Published: where a query stands among all queries of its half decides which block it reads.

    32 tokens, leaves of 8. Token 30 shares a second half with tokens 24 to 31 (level 0) and 16 to
    31 (level 1), which it may move to other blocks.
    """
    inputs = _draw(32, seed=1)
    changed = [x.at[:, 30:].multiply(-2) for x in inputs]
    for strict in (True, False):
        run = jax.jit(functools.partial(attend, strict=strict, implementation=implementation))
        before, after = run(*inputs), run(*changed)
        moved = np.any(np.asarray(before != after), axis=(0, 2, 3))
        assert np.all(moved[30:])
        assert not np.any(moved[:16])
        assert np.any(moved[16:30]) != strict


def test_a_prefix_gives_the_same():
    """Published: halves of another length are cut elsewhere."""
    q, k, v = _draw(40)
    whole = attend(q, k, v)
    for T in (9, 16, 25, 33):
        np.testing.assert_allclose(
            attend(q[:, :T], k[:, :T], v[:, :T]), whole[:, :T], rtol=1e-10, atol=1e-12
        )


def test_draws_are_of_the_key_the_row_and_the_head():
    q, k, v = _draw(B=1, N=1, K=1)
    two = [jnp.tile(x, (2, 1, 2, 1)) for x in (q, k, v)]
    out = attend(*two)
    np.testing.assert_allclose(out[:1, :, :1], attend(q, k, v), rtol=1e-10)
    for other in (out[1, :, 0], out[0, :, 1], attend(q, k, v, rng=jax.random.key(4))[0, :, 0]):
        assert np.abs(other - out[0, :, 0]).max() > 1e-3
    np.testing.assert_array_equal(attend(q, k, v, rng=jax.random.PRNGKey(3)), attend(q, k, v))


def test_numerator_and_denominator_are_unbiased():
    """1,024 samples of one query-key problem, as rows and heads.

    A sample of m keys gives Z with a variance of at most S/m · sum of exp(2 s_j), which bounds
    the error of each query's mean; the mean over queries is held to its own standard error.
    """
    S, m, count = 48, 8, 1024
    q, k, v = (jnp.tile(x, (32, 1, 32, 1)) for x in _draw(S, N=1, H=3))
    out, lse = attend(
        q, k, v, causal=False, num_projections=3, sample_size=m, block_size=8, min_seq_len=8,
        return_lse=True,
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
        out = attend(q, k, v, causal=False, **SMALL | {"sample_size": sample_size})
        return float(jnp.sqrt(jnp.mean(jnp.square(out - exact))))

    few, many = error(32), error(128)
    assert few / many == pytest.approx(2, rel=0.25)


def test_blocks_catch_what_is_alike():
    """Keys in 8 clusters: a query's block, one key in 8, has most of the weight."""
    rng = np.random.default_rng(0)
    centers = 3 * rng.standard_normal((8, 16))
    keys = np.repeat(centers, 16, axis=0) + 0.1 * rng.standard_normal((128, 16))
    keys = rng.permutation(keys)
    queries = rng.permutation(keys)
    planes = rng.standard_normal((16, 10))
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
    inputs = _draw()

    def gradients():
        return jax.grad(lambda *x: jnp.sum(jnp.sin(attend(*x))), (0, 1, 2))(*inputs)

    right, merge = gradients(), api.merge

    def merge_detached(*parts):
        return merge(*((out, jax.lax.stop_gradient(lse)) for out, lse in parts))

    monkeypatch.setattr(api, "merge", merge_detached)
    for wrong, gradient in zip(gradients()[:2], right, strict=False):
        assert np.abs(wrong - gradient).max() > 0.05 * np.abs(gradient).max()


def test_parts_of_very_different_weight(monkeypatch):
    """Published: the sampled part is capped at 1/epsilon of the block's."""
    monkeypatch.setattr(draws, "sample", _each_key_once)
    q, k, v = _draw(12)
    q, k = q.at[..., 0].set(8.0), k.at[:, ::2, :, 0].multiply(50.0)
    out, lse = attend(q, k, v, causal=False, return_lse=True, **SMALL | {"sample_size": 12})
    expected, expected_lse = ops.softmax_attention(
        q, k, v, causal=False, return_lse=True, implementation="reference"
    )
    np.testing.assert_allclose(out, expected, rtol=1e-9, atol=1e-11)
    np.testing.assert_allclose(lse, expected_lse, rtol=1e-12)


def test_tokens_that_are_all_alike():
    x = jnp.ones((1, 20, 1, 4))
    for inputs in ((x, x, x), (0 * x, 0 * x, x)):
        out, pull_back = jax.vjp(attend, *inputs)
        np.testing.assert_allclose(out, 1, rtol=1e-12)
        assert all(np.all(np.isfinite(g)) for g in pull_back(out))


def test_recomputed_to_the_bit():
    inputs = _draw()

    def loss(*x):
        return jnp.sum(attend(*x) ** 2)

    plain, remat = (jax.jit(jax.grad(f))(*inputs) for f in (loss, jax.checkpoint(loss)))
    np.testing.assert_array_equal(plain, remat)


@pytest.mark.parametrize("strict", [True, False])
def test_memory_of_a_gradient_grows_with_the_length_only(strict):
    def gradient_memory(T):
        x = jax.ShapeDtypeStruct((1, T, 1, 16), jnp.float32)

        def loss(*x):
            return jnp.sum(
                ops.hyper_attention(
                    *x, rng=KEY, block_size=64, sample_size=64, min_seq_len=512, strict=strict
                )
            )

        compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(x, x, x).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    # Longer sequences have more levels.
    assert gradient_memory(16384) < 2.8 * gradient_memory(8192)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rng": None}, "rng: expected a JAX key, since some row may exceed min_seq_len, got None"),
        ({"rng": jnp.zeros(3)}, r"rng: expected a JAX key, got float64\[3\]"),
        ({"rng": jax.random.split(KEY, 3)}, r"rng: expected shape \[\] or \[B,N\] = \(1, 2\)"),
        ({"rng": jax.random.split(KEY, (1, 2))}, "planes: expected .* rng has a key a head"),
        ({"planes": jnp.zeros((5, 3))}, r"planes: expected \[F=4,r\], got shape \(5, 3\)"),
        ({"planes": jnp.zeros((4, 7))}, "num_projections: expected None or 7, got 3"),
        ({"num_projections": 0}, "num_projections: expected a whole number of at least 1"),
        ({"num_projections": 17}, "num_projections: expected at most 16 here, got 17"),
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
