"""Rotary positions, ALiBi slopes and positions of packed tokens."""

import jax.numpy as jnp
import numpy as np
import pytest
from compiled import ops

from lcattn.testing.conformance.compare import assert_close

T, H = 16, 64


def draw(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def at(start, length=T):
    return start + jnp.arange(length, dtype=jnp.int32)[None]


@pytest.mark.parametrize("shift", [1, 1000, 131_072])
def test_inner_products_depend_on_relative_positions_only(shift):
    q, k = draw(0, 1, T, 1, H), draw(1, 1, T, 1, H)

    def logits(start):
        q_turned, k_turned = (ops.rotary(x, at(start)) for x in (q, k))
        return H**-0.5 * jnp.einsum("btnh,bsnh->bts", q_turned, k_turned, precision="highest")

    error = jnp.abs(logits(shift) - logits(0)).max()
    assert error <= 2e-4 * (1 + shift / 4096)


def test_rotations_keep_norms_add_up_and_invert():
    x = draw(0, 1, T, 2, H)
    turned = ops.rotary(x, at(5))
    norms = [jnp.linalg.norm(a, axis=-1) for a in (turned, x)]
    assert_close("norm", *norms, 1e-6)
    np.testing.assert_array_equal(ops.rotary(x, jnp.zeros((1, T), jnp.int32)), x)
    assert_close("R_5 R_t", ops.rotary(ops.rotary(x, at(0)), jnp.full((1, T), 5)), turned, 1e-5)
    assert_close("inverse", ops.rotary(turned, -at(5)), x, 1e-6)


def test_the_rotation_is_that_of_complex_numbers():
    x = draw(0, 1, T, 1, H)
    half = np.asarray(x, np.float64)
    z = half[..., : H // 2] + 1j * half[..., H // 2 :]
    angle = np.arange(T)[:, None] * 10_000.0 ** (-2 * np.arange(H // 2) / H)
    z = z * np.exp(1j * angle)[None, :, None]
    assert_close("rotary", ops.rotary(x, at(0)), np.concatenate([z.real, z.imag], -1), 1e-6)


def test_partial_rotation_passes_the_other_channels():
    x = draw(0, 1, T, 1, H)
    turned = ops.rotary(x, at(3), size=16)
    np.testing.assert_array_equal(turned[..., 16:], x[..., 16:])
    np.testing.assert_array_equal(turned[..., :16], ops.rotary(x[..., :16], at(3)))


def test_bfloat16_inputs_are_turned_in_float32():
    x = draw(0, 1, T, 1, H).astype(jnp.bfloat16)
    turned = ops.rotary(x, at(100_000))
    assert turned.dtype == jnp.bfloat16
    exact = ops.rotary(x.astype(jnp.float32), at(100_000))
    np.testing.assert_array_equal(turned, exact.astype(jnp.bfloat16))


def test_rotary_names_bad_arguments(no_type_hook):
    x = draw(0, 1, T, 1, 7)
    with pytest.raises(ValueError, match="size: expected an even number from 2 to H=7, got 7"):
        ops.rotary(x, at(0))
    with pytest.raises(ValueError, match=r"size: expected an even number .*, got 8"):
        ops.rotary(x, at(0), size=8)
    with pytest.raises(ValueError, match="positions: expected shape"):
        ops.rotary(x, at(0, 3), size=2)


def test_alibi_slopes():
    eight = [2.0**-i for i in range(1, 9)]
    np.testing.assert_allclose(ops.alibi_slopes(8), eight)
    twelve = [*eight, *(2.0**-i for i in (0.5, 1.5, 2.5, 3.5))]
    np.testing.assert_allclose(ops.alibi_slopes(12), twelve, rtol=1e-6)
    with pytest.raises(ValueError, match="num_heads: expected a whole number"):
        ops.alibi_slopes(0)


def test_packed_tokens_count_from_zero_in_their_document():
    ids = jnp.asarray([[0, 0, 0, 1, 2, 2, -1], [-1, -1, 4, 4, 7, 7, 7]], jnp.int32)
    expected = [[0, 1, 2, 0, 0, 1, 0], [0, 0, 0, 1, 0, 1, 2]]
    np.testing.assert_array_equal(ops.segment_positions(ids), expected)
