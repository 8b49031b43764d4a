"""Prefix linear attention against its explicit weights, and what the published code gets wrong."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import ops

from lcattn.testing.conformance.compare import assert_close, assert_zero

B, T, M, N, K, F, H = 2, 21, 9, 4, 2, 4, 6


def draw(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape)


@pytest.fixture
def inputs():
    keys = {"k": T, "prefix_k": M}
    values = {"v": T, "prefix_v": M}
    return {
        "q": draw(0, B, T, N, F),
        **{name: draw(1 + i, B, n, K, F) for i, (name, n) in enumerate(keys.items())},
        **{name: draw(3 + i, B, n, K, H) for i, (name, n) in enumerate(values.items())},
    }


def explicit(inputs, seen_prefix, seen):
    """Means of `[prefix_v, v]` under Taylor weights of the visible `[B,T,M]` and `[B,T,T]`."""
    q, k, v = (
        inputs["q"],
        *(
            np.repeat(np.concatenate([inputs["prefix_" + x], inputs[x]], axis=1), N // K, axis=2)
            for x in "kv"
        ),
    )
    x = np.einsum("btnf,bsnf->bnts", q, k) / np.sqrt(F)
    visible = np.concatenate([seen_prefix, seen], axis=2)[:, None]
    weights = np.where(visible, 1 + x + x**2 / 2, 0)
    total = weights.sum(-1, keepdims=True)
    return np.einsum("bnts,bsnh->btnh", weights / np.where(total == 0, 1, total), v)


causal = np.broadcast_to(np.tri(T, dtype=bool), (B, T, T))


def run(inputs, implementation="xla", **options):
    with jax.enable_x64(True):
        arrays = {name: jnp.asarray(x) for name, x in inputs.items()}
        return jax.jit(
            lambda arrays: ops.prefix_linear_attention(
                **arrays, chunk_size=8, implementation=implementation, **options
            )
        )(arrays)


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_every_token_sees_the_whole_prefix_and_its_past(inputs, implementation):
    everything = np.ones((B, T, M), bool)
    out = run(inputs, implementation)
    assert_close("output", out, explicit(inputs, everything, causal), 1e-12)


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_padding_is_no_key_in_either_stream(inputs, implementation):
    """Rows padded on the left by 4 and by everything; the published code keeps phi(0) of each."""
    ids = np.zeros((B, T), np.int32)
    ids[0, :4] = -1
    ids[1] = -1
    real = ids >= 0
    inputs["prefix_mask"] = real[:, :M]
    out = run(inputs, implementation, segment_ids=jnp.asarray(ids))
    prefix = real[:, :, None] & real[:, None, :M]
    expected = explicit(inputs, prefix, causal & real[:, :, None] & real[:, None])
    assert_close("output", out, expected, 1e-12)
    assert_zero("padding", np.asarray(out)[~real])

    del inputs["prefix_mask"]
    alone = {name: x[:1, 4:] for name, x in inputs.items()}
    assert_close("the row without its padding", out[:1, 4:], run(alone, implementation), 1e-12)


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_packed_documents_each_have_their_prefix(inputs, implementation):
    """Documents of 3, 1 and 17 tokens; prefixes of at most 2."""
    lengths, prefix = [3, 1, 17], 2
    ids = np.repeat(np.arange(3, dtype=np.int32), lengths)[None].repeat(B, 0)
    for name, size in (("prefix_k", F), ("prefix_v", H)):
        inputs[name] = draw(7, B, T, K, size)
    place = np.concatenate([np.arange(n) for n in lengths])
    mask = np.broadcast_to(place < prefix, (B, T))
    out, state = run(
        inputs | {"prefix_mask": mask}, implementation, segment_ids=jnp.asarray(ids),
        return_state=True,
    )  # fmt: skip
    end = 0
    for length in lengths:
        start, end = end, end + length
        piece = {name: x[:, start:end] for name, x in inputs.items()}
        for name in ("prefix_k", "prefix_v"):
            piece[name] = piece[name][:, :prefix]
        apart, last = run(piece, implementation, return_state=True)
        assert_close(f"document at {start}", out[:, start:end], apart, 1e-12)
    assert_close("state of the last document", state, last, 1e-12)


def test_equal_weights_count_the_past_twice_and_the_future_once(inputs):
    """With one set of weights and M = T the weights are 2 up to the diagonal and 1 above it."""
    inputs |= {"prefix_k": inputs["k"], "prefix_v": inputs["v"]}
    q, k, v = inputs["q"], *(np.repeat(inputs[x], N // K, axis=2) for x in "kv")
    x = np.einsum("btnf,bsnf->bnts", q, k) / np.sqrt(F)
    weights = (1 + x + x**2 / 2) * (1 + np.tri(T))
    expected = np.einsum("bnts,bsnh->btnh", weights / weights.sum(-1, keepdims=True), v)
    assert_close("output", run(inputs), expected, 1e-12)


def test_no_prefix_is_linear_attention(inputs):
    out = run(inputs | {"prefix_mask": np.zeros((B, M), bool)})
    q, k, v = (jnp.float32(inputs[name]) for name in "qkv")
    assert_close("output", out, ops.linear_attention(q, k, v), 1e-6)


def test_decoding_is_linear_attention_from_the_state(inputs):
    whole = run(inputs)
    first = {name: x[:, :13] if x.shape[1] == T else x for name, x in inputs.items()}
    out, state = run(first, return_state=True)
    with jax.enable_x64(True):
        rest = [jnp.asarray(inputs[name][:, 13:]) for name in "qkv"]
        rest = ops.linear_attention(*rest, initial_state=state)
    assert_close("output", np.concatenate([out, rest], axis=1), whole, 1e-12)


def test_only_the_prefix_is_seen_from_before(inputs):
    """Dependence on later tokens: on all of the prefix, on none after it, exactly."""

    def output(t):
        def at(arrays):
            out = ops.prefix_linear_attention(**arrays, chunk_size=8)
            return (out[:, t] ** 2).sum()

        arrays = {name: jnp.float32(x) for name, x in inputs.items()}
        return jax.jit(jax.grad(at))(arrays)

    for t in (3, 14):
        gradients = output(t)
        assert np.all(np.any(np.asarray(gradients["prefix_k"]) != 0, axis=(2, 3)))
        assert_zero("later keys", gradients["k"][:, t + 1 :])
        assert_zero("later values", gradients["v"][:, t + 1 :])


def test_gradients_are_those_of_the_reference(inputs):
    cotangent = draw(9, B, T, N, H)

    def gradients(implementation):
        with jax.enable_x64(True):
            arrays = {name: jnp.asarray(x) for name, x in inputs.items()}
            return jax.jit(
                jax.grad(
                    lambda arrays: jnp.sum(
                        cotangent
                        * ops.prefix_linear_attention(
                            **arrays, chunk_size=8, implementation=implementation
                        )
                    )
                )
            )(arrays)

    assert_close("gradient of ", gradients("xla"), gradients("reference"), 1e-10)


@pytest.mark.usefixtures("no_type_hook")
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"prefix_k": np.zeros((B, T + 1, K, F))}, "prefix_k: expected shape .* M from 1 to T=21"),
        ({"prefix_k": np.zeros((B, M, N, F))}, "prefix_k: expected shape"),
        ({"prefix_v": np.zeros((B, M + 1, K, H))}, "prefix_v: expected shape"),
        ({"prefix_v": np.zeros((B, M, K, H), np.float16)}, "prefix_v: expected the dtype of k"),
        ({"prefix_mask": np.ones((B, T), bool)}, "prefix_mask: expected shape"),
        ({"causal": False}, "causal: expected True"),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value.replace(":", ""),
)
def test_what_does_not_fit_is_named(inputs, change, words):
    arrays = {name: np.float32(x) for name, x in inputs.items()}
    change = {
        name: np.float32(x) if getattr(x, "dtype", None) == np.float64 else x
        for name, x in change.items()
    }
    arrays = {
        name: jnp.asarray(x) if isinstance(x, np.ndarray) else x
        for name, x in (arrays | change).items()
    }
    with pytest.raises(ValueError, match=words):
        ops.prefix_linear_attention(**arrays)
