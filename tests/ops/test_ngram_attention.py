"""N-gram attention: the matching matrix, the published off-by-one, the layer in a model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lcattn import nn, ops
from lcattn.models import LMConfig

run = jax.jit(
    ops.ngram_attention, static_argnames=("orders", "include_self", "implementation")
)  # fmt: skip


def attention_matrix(text, order, **options):
    """A(n) of a string: the op on one-hot positions."""
    tokens = jnp.asarray([[ord(letter) for letter in text]], jnp.int32)
    out = run(jnp.eye(len(text))[None], tokens, orders=(order,), **options)
    return np.asarray(out[0, :, 0])


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_rows_attend_to_what_followed(implementation):
    matrix = attention_matrix("abab", 1, implementation=implementation)
    np.testing.assert_array_equal(matrix, [[0] * 4, [0] * 4, [0, 1, 0, 0], [0, 0, 1, 0]])
    # After "b": "a" twice, then "c" once.
    np.testing.assert_allclose(
        attention_matrix("babacb", 1, implementation=implementation)[5], [0, 1 / 2, 0, 1 / 2, 0, 0]
    )
    two = attention_matrix("abcab", 2, implementation=implementation)
    assert not two[:4].any()  # No pair has come twice, and the first token ends none.
    np.testing.assert_array_equal(two[4], [0, 0, 1, 0, 0])


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_the_published_code_overlooks_the_newest_token(implementation):
    """It masks j >= i after the shift, so a repeat is noticed one token late."""
    ours, published = (
        attention_matrix("aaa", 1, implementation=implementation, include_self=include_self)
        for include_self in (True, False)
    )
    np.testing.assert_allclose(ours, [[0, 0, 0], [0, 1, 0], [0, 1 / 2, 1 / 2]])
    np.testing.assert_allclose(published, [[0, 0, 0], [0, 0, 0], [0, 1, 0]])


def test_orders_in_any_order_and_a_separator_that_matches_nothing():
    tokens = jnp.asarray([[1, 2, 1, 2, 1, -1, -1, 2]], jnp.int32)
    x = jnp.eye(8)[None]
    two_one = run(x, tokens, orders=(2, 1))
    np.testing.assert_array_equal(two_one[:, :, ::-1], run(x, tokens))
    assert not two_one[0, 5:7].any()


def test_refusals(no_type_hook):
    x, tokens = jnp.zeros((1, 4, 2)), jnp.zeros((1, 4), jnp.int32)
    for message, arguments, options in (
        ("x: expected 3 axes", (x[0], tokens), {}),
        ("tokens: expected shape", (x, tokens[:, 1:]), {}),
        ("tokens: expected an integer dtype", (x, tokens * 1.0), {}),
        ("orders: expected at least one", (x, tokens), {"orders": ()}),
        ("orders: expected a whole number", (x, tokens), {"orders": (0,)}),
        ("num_queries: expected", (x, tokens), {"query_position": 1}),
        ("'xla' gives outputs for whole rows", (x, tokens),
         {"num_queries": 1, "implementation": "xla"}),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            ops.ngram_attention(*arguments, **options)
    with pytest.raises(ValueError, match=r"NGramHeadsConfig\.orders: expected different"):
        nn.NGramHeadsConfig(orders=(1, 1))
    with pytest.raises(ValueError, match="tokens: expected ids"):
        nn.NGramHeadsConfig(width=2).make(nnx.Rngs(0))(x)


def test_a_model_passes_its_tokens():
    """Both when it reads a row at once and when it reads on."""
    config = LMConfig(
        vocab_size=5, width=8, num_layers=2, pattern=("local", "ngram"), mlp_width=0, init_std=1.0,
        mixers={
            "local": nn.ShortConvolutionConfig(), "ngram": nn.NGramHeadsConfig(orders=(1, 2)),
        },
    )  # fmt: skip
    model = config.make(nnx.Rngs(0))
    tokens = jax.random.randint(jax.random.key(0), (2, 9), 0, 5)

    @jax.jit
    def streamed(tokens):
        first, state = model.extend(tokens[:, :4], model.init_state(2, 9))
        return jnp.concatenate([first, model.extend(tokens[:, 4:], state)[0]], axis=1)

    np.testing.assert_allclose(streamed(tokens), jax.jit(model)(tokens), atol=1e-5)
