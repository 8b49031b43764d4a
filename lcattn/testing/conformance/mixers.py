"""The checks of a mixer, one for each promise of its traits."""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from lcattn.nn.mixer import Mixer, TokenMixer
from lcattn.testing.conformance.cases import MixerCase
from lcattn.testing.conformance.compare import (
    assert_close,
    assert_identical,
    assert_raises,
    assert_zero,
)
from lcattn.testing.conformance.execution import documents


def mixer_checks(case: MixerCase) -> Iterator[tuple[str, Callable[[], None]]]:
    """Every check that the mixer's traits call for, as (id, function without arguments)."""
    # Shapes alone tell the traits; collecting tests must not initialise parameters.
    traits = nnx.eval_shape(lambda: case.config.make(nnx.Rngs(0))).traits
    checks: list[Callable[[MixerCase], None]] = [check_packing, check_parameter_axes]
    if traits.causal:
        checks += [check_causality]
    if traits.streaming:
        checks += [check_streaming, check_state, check_foreign_state]
    if not traits.stochastic:
        checks += [check_deterministic]
    if not case.is_variant:
        checks += [check_positions, check_low_precision, check_linen]
        checks += [check_scan, check_end] if traits.streaming else []
        checks += [check_memory] if traits.subquadratic else []
    for check in checks:
        name = check.__name__.removeprefix("check_").replace("_", "-")
        yield f"{case.name}/{name}/D{case.width}", functools.partial(check, case)


def check_causality(case: MixerCase) -> None:
    """Outputs before a token do not change with it by a bit, and have no gradient towards it."""
    built, x = _build(case), case.make_input(_length(case))
    cotangent = jnp.asarray(np.random.default_rng(1).standard_normal(x.shape), jnp.float32)
    before, _ = built.gradient(x, cotangent)
    for t in (1, case.chunk, x.shape[1] - 1):
        after, gradient = built.gradient(x.at[:, t:].multiply(-3), cotangent.at[:, t:].set(0))
        assert_identical(f"outputs before token {t}", after[:, :t], before[:, :t])
        assert_zero(f"gradient from token {t} on", gradient[:, t:])
        if not np.any(gradient[:, :t]):
            raise AssertionError("no gradient at all")


def check_packing(case: MixerCase) -> None:
    """Documents in one row equal the documents run apart; padding is inert."""
    built, x = _build(case), case.make_input(_length(case))
    *lengths, padding = _documents(case)
    ids = documents([*lengths, padding], {"B": len(x)})
    ids[:, -padding:] = -1
    packed = built.call(x, jnp.asarray(ids, jnp.int32))
    end = 0
    for length in lengths:
        start, end = end, end + length
        if built.mixer.traits.causal:  # what follows does not matter, and spares a program
            apart = built.call(jnp.roll(x, -start, axis=1))[:, :length]
        else:
            apart = built.call(x[:, start:end])
        assert_close(f"tokens {start}..{end - 1}", packed[:, start:end], apart, case.tolerance)
    changed = built.call(x.at[:, end:].set(100.0), jnp.asarray(ids, jnp.int32))
    assert_identical("outputs after padding changed", changed[:, :end], packed[:, :end])


def check_positions(case: MixerCase) -> None:
    """Positions default to 0, 1, ... in each document."""
    built, lengths = _build(case), _documents(case)
    x = case.make_input(_length(case))
    ids = jnp.asarray(documents(lengths, {"B": len(x)}), jnp.int32)
    positions = np.concatenate([np.arange(n) for n in lengths])
    positions = jnp.asarray(np.broadcast_to(positions, ids.shape), jnp.int32)
    explicit = built.call(x, ids, positions)
    assert_close("output", explicit, built.call(x, ids), case.tolerance)


def check_streaming(case: MixerCase) -> None:
    """However the tokens are cut into calls of `extend`, the outputs equal one call."""
    built, x = _build(case), case.make_input(_length(case))
    expected = built.call(x)
    for lengths in _partitions(case, x.shape[1]):
        state, out, start = built.init_state(x), [], 0
        for length in lengths:
            y, state = built.extend(x[:, start : start + length], state)
            out.append(y)
            start += length
        assert_close(
            f"cut into {lengths}: output", jnp.concatenate(out, 1), expected, case.tolerance
        )


def check_scan(case: MixerCase) -> None:
    """`extend` token by token in a `scan`, which also demands a state of constant structure."""
    built, x = _build(case), case.make_input(_length(case))

    @jax.jit
    def run(parameters, x, state):
        def step(state, token):
            y, state = built.jitted_extend(parameters, token[:, None], state)
            return state, y[:, 0]

        return lax.scan(step, state, x.swapaxes(0, 1))[1].swapaxes(0, 1)

    out = run(built.parameters, x, built.init_state(x))
    assert_close("output", out, built.call(x), case.tolerance)


def check_state(case: MixerCase) -> None:
    """`state_bytes` counts the real state, whose shapes and dtypes no call changes."""
    built, x = _build(case), case.make_input(_length(case))
    state = built.init_state(x)
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(built.mixer.init_state(1, x.shape[1])))
    counted = built.mixer.state_bytes(x.shape[1])
    if counted != held:
        raise AssertionError(f"state_bytes says {counted}, the state of one stream holds {held}")
    kinds = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), state)
    for length in (1, case.chunk + 1):
        _, after = jax.eval_shape(built.jitted_extend, built.parameters, x[:, :length], state)
        found = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), after)
        if found != kinds:
            raise AssertionError(f"after {length} tokens the state is {found}, it was {kinds}")


def check_foreign_state(case: MixerCase) -> None:
    """A state of another batch raises an error that names it."""
    built, x = _build(case), case.make_input(1)
    state = built.mixer.init_state(3, 4)
    assert_raises("extend", "state: expected B=2", lambda: built.extend(x, state))


def check_end(case: MixerCase) -> None:
    """A state that grows with its length refuses more tokens; under `jit` they give NaN."""
    built, x = _build(case), case.make_input(2)
    if built.mixer.state_bytes(4) == built.mixer.state_bytes(8):
        return
    _, full = built.extend(x, built.init_state(x))
    more = x[:, :1]
    refused = functools.partial(built.mixer.extend, more, full, **_tokens(built.mixer, more))
    assert_raises("extend", "state: expected room", refused)
    beyond, _ = built.extend(x[:, :1], full)
    if not np.all(np.isnan(beyond)):
        raise AssertionError("under jit, outputs past the end are not NaN")


def check_memory(case: MixerCase) -> None:
    """Memory of a gradient grows with T, not T² (compiled for two lengths, not run)."""
    built = _build(case)
    held = {}
    for length in (2048, 8192):
        x = jax.ShapeDtypeStruct((1, length, case.width), jnp.float32)
        analysis = built.jitted_gradient.lower(built.parameters, x, x).compile().memory_analysis()
        held[length] = analysis.temp_size_in_bytes
    growth = held[8192] / held[2048]
    if growth > 6:
        raise AssertionError(f"{growth:.1f} times the memory for 4 times the tokens: {held}")


def check_deterministic(case: MixerCase) -> None:
    """The same call gives the same bits."""
    built, x = _build(case), case.make_input(_length(case))
    assert_identical("output of a second call", built.call(x), built.call(x))


def check_low_precision(case: MixerCase) -> None:
    """In bfloat16, one call and streaming are close to float32; outputs are bfloat16."""
    built, narrow = _build(case), _build(case, "bfloat16")
    x = case.make_input(_length(case))
    expected, out = built.call(x), narrow.call(x)
    if out.dtype != jnp.bfloat16:
        raise AssertionError(f"output dtype {out.dtype}, expected bfloat16")
    assert_close("output", out, expected, case.low_precision_tolerance)
    if narrow.mixer.traits.streaming:
        first, state = narrow.extend(x[:, : case.chunk + 1], narrow.init_state(x))
        rest, _ = narrow.extend(x[:, case.chunk + 1 :], state)
        streamed = jnp.concatenate([first, rest], axis=1)
        assert_close("streamed output", streamed, expected, case.low_precision_tolerance)


def check_linen(case: MixerCase) -> None:
    """`nnx.bridge.to_linen` makes a Linen module of it that computes the same."""
    built, x = _build(case), case.make_input(_length(case))
    module = nnx.bridge.to_linen(type(built.mixer), case.config)
    out = jax.jit(module.apply)(
        {"params": nnx.to_pure_dict(built.parameters)}, x, **_tokens(built.mixer, x)
    )
    assert_close("output", out, built.call(x), case.tolerance)


def check_parameter_axes(case: MixerCase) -> None:
    """Every parameter names its axes, so that a mesh can spread it."""
    for path, parameter in nnx.to_flat_state(nnx.state(_build(case).mixer, nnx.Param)):
        axes = parameter.get_metadata("axes")
        if not isinstance(axes, tuple) or len(axes) != parameter.ndim:
            raise AssertionError(f"{path}: axes {axes} of a parameter of shape {parameter.shape}")


class _Built(NamedTuple):
    """A mixer and its compiled calls, shared by the checks of a case."""

    mixer: Mixer
    parameters: Any
    merge: Callable[[Any], Mixer]
    jitted_call: Any
    jitted_gradient: Any
    jitted_extend: Any

    def call(self, x, segment_ids=None, positions=None) -> jax.Array:
        return self.jitted_call(self.parameters, x, segment_ids, positions)

    def gradient(self, x, cotangent) -> tuple[jax.Array, jax.Array]:
        """The output, and the gradient of `sum(output * cotangent)` with respect to x."""
        return self.jitted_gradient(self.parameters, x, cotangent)[:2]

    def extend(self, x, state) -> tuple[jax.Array, Any]:
        return self.jitted_extend(self.parameters, x, state)

    def init_state(self, x) -> Any:
        return self.mixer.init_state(x.shape[0], x.shape[1])


@functools.cache
def _build(case: MixerCase, dtype: str | None = None) -> _Built:
    config = case.config if dtype is None else case.config.replace(dtype=dtype)
    graph, parameters = nnx.split(config.make(nnx.Rngs(0)))
    # Large enough that attention weights and gates leave their linear range.
    parameters = jax.tree.map(lambda p: 10 * p if p.ndim == 2 else p, parameters)
    merge = functools.partial(nnx.merge, graph)

    @jax.jit
    def call(parameters, x, segment_ids=None, positions=None):
        mixer = merge(parameters)
        return mixer(x, segment_ids, positions, **_tokens(mixer, x))

    @jax.jit
    def gradient(parameters, x, cotangent):
        out, pull_back = jax.vjp(call, parameters, x)
        d_parameters, d_x = pull_back(cotangent.astype(out.dtype))
        return out, d_x, d_parameters

    @jax.jit
    def extend(parameters, x, state):
        mixer = merge(parameters)
        return mixer.extend(x, state, **_tokens(mixer, x))

    return _Built(merge(parameters), parameters, merge, call, gradient, extend)


def _tokens(mixer: Mixer, x: jax.Array) -> dict[str, jax.Array]:
    """For a mixer that reads tokens, two kinds of them that change with the input."""
    return {"tokens": (x[..., 0] > 0).astype(jnp.int32)} if isinstance(mixer, TokenMixer) else {}


def _length(case: MixerCase) -> int:
    return 3 * case.chunk + 2


def _documents(case: MixerCase) -> list[int]:
    """Lengths of the documents of a packed row, around the chunk length."""
    C = case.chunk
    return [1, C + 1, C - 1, C + 1]


def _partitions(case: MixerCase, length: int) -> Iterator[list[int]]:
    """The whole, and random cuts into pieces around the chunk length."""
    yield [length]
    C = case.chunk
    choices = np.unique([1, C + 1] if case.is_variant else [1, 2, C - 1, C, C + 1])
    rng = np.random.default_rng(0)
    for _ in range(4):
        pieces: list[int] = []
        while (left := length - sum(pieces)) > 0:
            pieces.append(int(rng.choice(choices[choices <= left])))
        yield pieces
