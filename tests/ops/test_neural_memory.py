"""Neural memory: what it reduces to, what published code gets wrong, stability, windows, errors."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import ops

from lcattn.ops import neural_memory
from lcattn.ops.neural_memory.windows import lay_out
from lcattn.testing.conformance.compare import assert_close, assert_finite

GATES = ("learning_rate", "momentum", "decay")


def inputs(T, *, B=2, N=2, F=4, H=4, hidden=(), seed=0):
    """Unit queries and keys, mild gates, a random network; float64 NumPy."""
    rng = np.random.default_rng(seed)
    q, k, v = (rng.standard_normal((B, T, N, size)) for size in (F, F, H))
    q, k = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
    sizes = (F, *hidden, H)
    return {
        "q": q, "k": k, "v": v,
        "learning_rate": 0.1 * rng.uniform(size=(B, T, N)),
        "momentum": rng.uniform(size=(B, T, N)),
        "decay": 0.2 * rng.uniform(size=(B, T, N)),
        "weights": [rng.standard_normal((N, i, o)) / i for i, o in itertools.pairwise(sizes)],
    }  # fmt: skip


@functools.partial(jax.jit, static_argnames=("chunk_size", "implementation", "return_state"))
def run(arguments, initial_state=None, segment_ids=None, **options):
    with jax.default_matmul_precision("highest"):
        return ops.neural_memory(
            **arguments, initial_state=initial_state, segment_ids=segment_ids, **options
        )


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def test_four_layers_equal_the_definition():
    """Values, final state and all gradients, over chunks and a rest."""
    arguments = inputs(11, N=1, hidden=(3, 5, 3))

    @functools.partial(jax.jit, static_argnames="implementation")
    def differentiate(arguments, implementation):
        def loss(arguments):
            out, state = run(
                arguments, chunk_size=4, return_state=True, implementation=implementation
            )
            return sum(jnp.sum(jnp.sin(x)) for x in (out, *state.weights, *state.momentum)), state

        return jax.value_and_grad(loss, has_aux=True)(arguments)

    (value, state), gradients = differentiate(arguments, "xla")
    (expected, expected_state), expected_gradients = differentiate(arguments, "reference")
    assert_close("(loss, state)", (value, state), (expected, expected_state), 1e-12)
    assert_close("gradient of ", gradients, expected_gradients, 1e-10)


def test_the_delta_rule():
    """One layer, chunks of one, no momentum: beta = 2 theta, on a state that has decayed."""
    arguments = inputs(9) | {"momentum": np.zeros((2, 9, 2))}
    arguments["weights"] = [np.zeros((2, 4, 4))]
    keep = 1 - arguments["decay"]
    beta = 2 * arguments["learning_rate"]
    out = run(arguments, chunk_size=1)
    expected = ops.gated_delta_rule(
        *(jnp.asarray(arguments[x]) for x in "qk"), jnp.asarray(arguments["v"] * keep[..., None]),
        jnp.log(keep), jnp.asarray(beta / keep), scale=1.0,
    )  # fmt: skip
    assert_close("output", out, expected, 1e-12)


def test_linear_attention():
    """One layer from zero, one chunk, neither momentum nor decay."""
    arguments = inputs(9) | dict.fromkeys(("momentum", "decay"), np.zeros((2, 9, 2)))
    arguments["weights"] = [np.zeros((2, 4, 4))]
    values = 2 * arguments["learning_rate"][..., None] * arguments["v"]
    expected = ops.linear_attention(
        *(jnp.asarray(x) for x in (arguments["q"], arguments["k"], values)),
        feature_map="identity", normalize=False, scale=1.0,
    )  # fmt: skip
    assert_close("output", run(arguments, chunk_size=16), expected, 1e-12)


def test_gradients_move_on_with_every_chunk():
    """Published code takes them all at the start of the sequence unless told otherwise."""
    arguments = inputs(8, hidden=(5,))
    whole, chunks = run(arguments, chunk_size=8), run(arguments, chunk_size=4)
    assert_close("first chunk", chunks[:, :4], whole[:, :4], 1e-12)
    assert np.max(np.abs(chunks[:, 4:] - whole[:, 4:])) > 1e-4


def test_a_token_reads_what_it_wrote():
    """Published code reads before it writes."""
    arguments = inputs(1, H=4) | {"momentum": np.zeros((2, 1, 2)), "decay": np.zeros((2, 1, 2))}
    arguments["learning_rate"] = np.full((2, 1, 2), 0.5)
    arguments["q"] = arguments["k"]
    assert_close("recalled value", run(arguments), arguments["v"], 1e-12)


def test_the_state_decays_once_a_token():
    """Also where T is no multiple of C, whose padding decays a published state once more."""
    arguments = inputs(5) | {"learning_rate": np.zeros((2, 5, 2)), "decay": np.full((2, 5, 2), 0.5)}
    for T in (3, 5):
        cut = {name: x if name == "weights" else x[:, :T] for name, x in arguments.items()}
        _, state = run(cut, chunk_size=4, return_state=True)
        assert_close("weights", state.weights[0][0], 0.5**T * arguments["weights"][0], 1e-12)
        assert np.array_equal(state.position, [T % 4, T % 4])


def test_momentum_is_part_of_the_state():
    """Published code returns none, so that no stream can be resumed."""
    arguments = inputs(9, hidden=(5,))
    whole, final = run(arguments, chunk_size=4, return_state=True)
    state, outs = None, []
    for start, end in ((0, 4), (4, 5), (5, 9)):
        piece = {n: x if n == "weights" else x[:, start:end] for n, x in arguments.items()}
        out, state = run(piece, state, chunk_size=4, return_state=True)
        outs.append(out)
    assert_close("(output, state)", (jnp.concatenate(outs, 1), state), (whole, final), 1e-12)
    assert any(np.any(np.abs(s) > 1e-3) for s in final.momentum)


def test_shut_and_open_gates_are_exact():
    """Decay and momentum of exactly 0 and 1, where sums of logs give NaN."""
    rng = np.random.default_rng(3)
    arguments = inputs(11, N=1, hidden=(5,))
    for gate in ("momentum", "decay"):
        arguments[gate] = rng.integers(0, 2, (2, 11, 1)).astype(float)

    @functools.partial(jax.jit, static_argnames="implementation")
    def differentiate(arguments, implementation):
        loss = lambda a: jnp.sum(jnp.sin(run(a, chunk_size=4, implementation=implementation)))  # noqa: E731
        return jax.value_and_grad(loss)(arguments)

    found, expected = (differentiate(arguments, name) for name in ("xla", "reference"))
    assert_finite("(loss, gradients)", found)
    assert_close("(loss, gradients)", found, expected, 1e-10)


@pytest.mark.parametrize(("step", "converges"), [(0.9, True), (1.1, False)])
def test_chunks_of_one_key_are_one_step(step, converges):
    """2 theta C below 2 converges, above it diverges; momentum divides by 1 - eta."""
    C, T = 8, 8 * 40
    arguments = inputs(T, B=1, N=1)
    arguments = {
        n: x if n == "weights" else np.repeat(x[:, :1], T, 1) for n, x in arguments.items()
    }
    arguments |= {name: np.zeros((1, T, 1)) for name in GATES}
    arguments["learning_rate"] += step / C
    arguments["q"] = arguments["k"]
    error = np.abs(run(arguments, chunk_size=C) - arguments["v"]).max(axis=(0, 2, 3))
    assert (error[-1] < 1e-2 * error[0]) == converges
    assert (error[-1] > 1e2 * error[0]) != converges


def test_hidden_units_have_no_order():
    arguments = inputs(9, hidden=(5,))
    w0, w1 = arguments["weights"]
    order = np.random.default_rng(1).permutation(5)
    shuffled = arguments | {"weights": [w0[:, :, order], w1[:, order]]}
    assert_close("output", run(shuffled, chunk_size=4), run(arguments, chunk_size=4), 1e-12)


def test_no_weights_of_single_tokens():
    """A gradient's memory is far below one weight matrix a token."""
    T, N, F, E = 2048, 1, 16, 128
    shapes = jax.eval_shape(
        lambda: jax.tree.map(jnp.float32, inputs(T, B=1, N=N, F=F, H=F, hidden=(E,)))
    )
    gradient = jax.jit(jax.grad(lambda a: jnp.sum(ops.neural_memory(**a, chunk_size=32))))
    held = gradient.lower(shapes).compile().memory_analysis().temp_size_in_bytes
    one_a_token = 4 * T * 2 * F * E
    assert held < one_a_token / 4


@pytest.mark.parametrize("chunk", [1, 3, 8])
def test_windows_hold_every_token_once(chunk):
    """For random documents, padding and chunks under way; there are always enough windows."""
    rng = np.random.default_rng(chunk)
    B, T = 200, 24
    ids = np.cumsum(rng.uniform(size=(B, T)) < rng.uniform(size=(B, 1)), axis=1)
    ids[rng.uniform(size=(B, T)) < 0.3 * rng.integers(0, 2, (B, 1))] = -1
    position = rng.integers(0, chunk, B)
    windows = jax.jit(lay_out, static_argnames=("shape", "chunk"))(
        jnp.asarray(ids, jnp.int32), jnp.asarray(position, jnp.int32), shape=(B, T), chunk=chunk
    )
    tokens = np.asarray(windows.tokens).reshape(B, -1, min(chunk, T))
    for b in range(B):
        held = [[t for t in window if t < T] for window in tokens[b]]
        assert list(itertools.chain(*held)) == [t for t in range(T) if ids[b, t] >= 0]
        document, count = next((i for i in ids[b] if i >= 0), -1), position[b]
        for i, window in enumerate(held):
            if not window:
                continue
            assert bool(windows.starts_document[i, b]) == (ids[b, window[0]] != document)
            if ids[b, window[0]] == document:  # goes on: that document alone, to its chunk's end
                assert len(set(ids[b, window])) == 1
                assert bool(windows.starts_chunk[i, b]) == (count % chunk == 0)
                count += len(window)
                assert (count - 1) // chunk == (count - len(window)) // chunk
            else:
                assert bool(windows.starts_chunk[i, b])
                document = ids[b, window[-1]]
                count = int(np.sum(ids[b, window] == document))
        assert windows.position[b] == count % chunk


@pytest.mark.usefixtures("no_type_hook")
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"learning_rate": -0.1}, r"learning_rate: expected finite values >= 0, got -0.1"),
        ({"learning_rate": np.nan}, r"learning_rate: expected finite values >= 0, got nan"),
        ({"momentum": 1.5}, r"momentum: expected values in \[0, 1\], got 1.5"),
        ({"decay": -1.0}, r"decay: expected values in \[0, 1\], got -1.0"),
        ({"decay": np.zeros((2, 3, 3))}, r"decay: expected shape \[B,T,M\] with .* the same"),
        ({"momentum": np.zeros((2, 3, 2), int)}, "momentum: expected a floating-point dtype"),
        ({"weights": []}, "weights: expected a list of 1 to 4 layers, got 0"),
        ({"weights": [np.zeros((2, 4, 4))] * 5}, "weights: expected a list of 1 to 4 layers, g"),
        ({"weights": np.zeros((2, 4, 4))}, "weights: expected a list of 1 to 4 layers, got"),
        ({"weights": [np.zeros((2, 4, 5))]}, r"weights\[0\]: expected shape \[M,in,out\] = \("),
        ({"weights": [np.zeros((1, 4, 4))]}, r"weights\[0\]: expected shape"),
        ({"weights": [np.zeros((2, 4, 3)), np.zeros((2, 4, 4))]}, r"weights\[1\]: expected shape"),
        ({"chunk_size": 0}, "chunk_size: expected a whole number of at least 1, got 0"),
        ({"activation": "swish"}, "activation: expected a function, or one of"),
        ({"causal": False}, "causal: expected True"),
        ({"implementation": "mosaic"}, "implementation: expected None or one of"),
    ],
    ids=lambda x: None if isinstance(x, str) else "-".join(x),
)  # fmt: skip
def test_bad_input(change, words):
    arguments = inputs(3)
    for name, value in change.items():
        if isinstance(value, float):
            change = {name: np.full((2, 3, 2), value)}
    with pytest.raises(ValueError, match=words):
        neural_memory(**jax.tree.map(jnp.asarray, arguments) | change)


@pytest.mark.usefixtures("no_type_hook")
def test_a_batch_may_be_empty():
    """Long chunks too, whose gates are multiplied block by block."""
    out = jax.eval_shape(run, inputs(65, B=0), segment_ids=jnp.zeros((0, 65), jnp.int32))
    assert out.shape == (0, 65, 2, 4)


def test_a_state_that_does_not_fit():
    arguments = jax.tree.map(jnp.asarray, inputs(3))
    for weights, batch, words in (
        ([jnp.zeros((2, 4, 4))] * 2, 2, r"initial_state.weights: expected 1 layers"),
        ([jnp.zeros((2, 4, 4))], 3, r"initial_state.weights\[0\]: expected shape \[B,M,in,out\]"),
    ):
        with pytest.raises(ValueError, match=words):
            ops.neural_memory(**arguments, initial_state=ops.neural_memory_state(weights, batch))
