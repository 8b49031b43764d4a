"""The library's own ops as cases of the suite."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from lcattn import ops
from lcattn.nn.layers import unit_norm
from lcattn.ops.hyper_attention import draws
from lcattn.testing.conformance import oracles
from lcattn.testing.conformance.cases import OpCase

_FEW = {"B": 2, "N": 2, "K": 1, "H": 4}  # sizes for lengths of several blocks
_QKV = {"q": "B T N H", "k": "B T K H", "v": "B T K H"}


def _softmax_case(name: str, *, alibi: bool = False, **fields) -> OpCase:
    options = fields.pop("options", {})
    return OpCase(
        name=f"softmax_attention[{name}]",
        op=ops.softmax_attention,
        oracle=functools.partial(oracles.softmax_attention, **options),
        inputs=_QKV | ({"alibi_slopes": "N"} if alibi else {}),
        draw={"alibi_slopes": lambda rng, shape: rng.uniform(0.05, 1, shape)},
        options=options,
        bidirectional="window" not in options,
        **fields,
    )


def _joined(out, lse):
    """An output with its log-sum-exp as one more channel (0 where nothing is seen)."""
    lse = jnp.where(jnp.isneginf(lse), 0, lse)
    return jnp.concatenate([out, lse[..., None].astype(out.dtype)], axis=-1)


def _with_log_sum_exp(q, k, v, **options):
    return _joined(*ops.softmax_attention(q, k, v, return_lse=True, **options))


def _blocks_case(name: str, **fields) -> OpCase:
    """With the log-sum-exp, "xla" runs block by block, 256 tokens each."""
    case = _softmax_case(name, chunk=256, **fields)
    oracle = functools.partial(case.oracle, return_lse=True)
    return dataclasses.replace(case, op=_with_log_sum_exp, oracle=oracle, sizes=_FEW)


def _planned(plan, q, k, v, **options):
    return _joined(*ops.block_sparse_attention(q, k, v, plan, return_lse=True, **options))


def _window_in_blocks(q, k, v, *, window, sinks, segment_ids=None, **options):
    plan = ops.sliding_window_plan(
        q.shape[1], window, sinks=sinks, segment_ids=segment_ids, query_block=4, key_block=4
    )
    return _planned(plan, q, k, v, **options)


def _documents_in_blocks(q, k, v, *, causal=True, segment_ids=None, **options):
    if segment_ids is None:
        segment_ids = jnp.zeros(q.shape[:2], jnp.int32)
    plan = ops.document_plan(segment_ids, causal=causal, query_block=8, key_block=4)
    return _planned(plan, q, k, v, **options)


def _block_sparse_case(name: str, op, **fields) -> OpCase:
    options = fields.pop("options", {})
    return OpCase(
        name=f"block_sparse_attention[{name}]",
        op=op,
        oracle=functools.partial(oracles.softmax_attention, return_lse=True, **options),
        inputs=_QKV,
        options=options,
        **fields,
    )


def _linear_case(
    name: str,
    weight,
    *,
    normalize: bool = True,
    bidirectional: bool = False,
    is_variant: bool = False,
    **options,
) -> OpCase:
    return OpCase(
        name=f"linear_attention[{name}]",
        op=ops.linear_attention,
        oracle=functools.partial(oracles.linear_attention, weight=weight, normalize=normalize),
        inputs={"q": "B T N F", "k": "B T K F", "v": "B T K H"},
        sizes={"F": 4},
        options={"normalize": normalize, **options},
        bidirectional=bidirectional,
        stateful=True,
        is_variant=is_variant,
    )


# Gradients of gates are sums over channels of differences, in bfloat16 hence coarser.
_GATE_GRADIENTS = {"float64": 1e-10, "float32": 1e-4, "bfloat16": 2e-2, "float16": 2e-3}


def _negative(rng, shape):
    """Log decays from next to none to nearly all."""
    return -rng.exponential(size=shape) * rng.choice([0.01, 1, 20], size=shape)


def _gated_case(axes: str, *, is_variant: bool = False) -> OpCase:
    return OpCase(
        name=f"gated_linear_attention[log_decay={axes.replace(' ', '')}]",
        op=ops.gated_linear_attention,
        oracle=oracles.gated_linear_attention,
        inputs={"q": "B T N F", "k": "B T K F", "v": "B T K H", "log_decay": axes},
        draw={"log_decay": _negative},
        sizes={"F": 4},
        options={"chunk_size": 8},
        stateful=True,
        is_variant=is_variant,
        gradient_tolerance=_GATE_GRADIENTS,
    )


def _stable(rule):
    """The delta rule on keys of norm 1 and strengths in (0, 2), outside of which it diverges."""

    def stable(q, k, v, beta, log_decay=None, **options):
        k, beta = unit_norm(k), 2 * jax.nn.sigmoid(beta)
        return rule(q, k, v, log_decay, beta, **options)

    return stable


def _stable_oracle(inputs, segment_ids, *, causal=True):
    k = inputs["k"]
    k = k / np.sqrt(np.sum(k**2, axis=-1, keepdims=True) + 1e-6)
    inputs = {**inputs, "k": k, "beta": 2 / (1 + np.exp(-inputs["beta"]))}
    return oracles.gated_delta_rule(inputs, segment_ids, causal=causal)


def _delta_case(name: str, gates: str, *, decay: bool = True, is_variant: bool = False) -> OpCase:
    inputs = {"q": "B T N F", "k": "B T K F", "v": "B T K H", "beta": gates}
    return OpCase(
        name=f"gated_delta_rule[{name}]",
        op=_stable(ops.gated_delta_rule),
        oracle=_stable_oracle,
        inputs=inputs | ({"log_decay": gates} if decay else {}),
        draw={"log_decay": _negative},
        sizes={"F": 4},
        options={"chunk_size": 8},
        stateful=True,
        is_variant=is_variant,
        value_tolerance={"float64": 1e-12, "float32": 1e-5, "bfloat16": 8e-3, "float16": 1e-3},
        gradient_tolerance=_GATE_GRADIENTS,
    )


def _memory_case(name: str, layers: list[str], gates: str, **fields) -> OpCase:
    weights = {f"w{i}": axes for i, axes in enumerate(layers)}
    gated = dict.fromkeys(("learning_rate", "momentum", "decay"), gates)
    return OpCase(
        name=f"neural_memory[{name}]",
        op=_tame_memory,
        oracle=_tame_memory_oracle,
        inputs={"q": "B T N F", "k": "B T K F", "v": "B T K H"} | gated | weights,
        sizes={"F": 4, "E": 5},
        options={"chunk_size": 8},
        stateful=True,
        gradient_tolerance=_GATE_GRADIENTS,
        **fields,
    )


def _tame_memory(q, k, v, learning_rate, momentum, decay, *, w0, w1=None, **options):
    """Keys, values and network of norm 1 and small steps, outside of which the memory diverges."""
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    rate, momentum, decay = (
        jax.nn.sigmoid(gate.astype(dtype)) for gate in (learning_rate, momentum, decay)
    )
    weights = [w.astype(dtype) for w in (w0, w1) if w is not None]
    weights = [w / jnp.sqrt(1 + jnp.sum(w**2, axis=(1, 2), keepdims=True)) for w in weights]
    return ops.neural_memory(
        q, unit_norm(k), unit_norm(v), rate / 16, momentum, decay / 4, weights, **options
    )


def _tame_memory_oracle(inputs, segment_ids, *, causal=True):
    inputs = dict(inputs)
    for name, x in inputs.items():
        if name in ("k", "v"):
            inputs[name] = x / np.sqrt(np.sum(x**2, axis=-1, keepdims=True) + 1e-6)
        if name in (sizes := {"learning_rate": 16, "momentum": 1, "decay": 4}):
            inputs[name] = 1 / (1 + np.exp(-x)) / sizes[name]
        if name.startswith("w"):
            inputs[name] = x / np.sqrt(1 + np.sum(x**2, axis=(1, 2), keepdims=True))
    return oracles.neural_memory(inputs, segment_ids, causal=causal, chunk_size=8)


def _convolution_case(taps: int, *, is_variant: bool = False) -> OpCase:
    return OpCase(
        name=f"short_convolution[taps={taps}]",
        op=ops.short_convolution,
        oracle=oracles.short_convolution,
        inputs={"x": "B T D", "weight": "D W"},
        output="B T D",
        sizes={"W": taps},
        stateful=True,
        is_variant=is_variant,
    )


def _ngram_attention(x, tokens, **options):
    """With tokens among the inputs, so that they are changed and cut like `x`."""
    return ops.ngram_attention(x, tokens.astype(jnp.int32), **options)


def _ngram_case(**options) -> OpCase:
    return OpCase(
        name=f"ngram_attention{options or ''}",
        op=_ngram_attention,
        oracle=functools.partial(oracles.ngram_attention, **options),
        inputs={"x": "B T D", "tokens": "B T"},
        output="B T O D",
        options=options,
        draw={"tokens": lambda rng, shape: rng.integers(0, 3, shape) + 0.5},
        is_variant=bool(options),
    )


def _agent_case(name: str, inputs=None, **fields) -> OpCase:
    return OpCase(
        name="agent_attention" + name,
        op=ops.agent_attention,
        oracle=oracles.agent_attention,
        inputs=_QKV | {"agents": "M N H"} | (inputs or {}),
        sizes={"M": 3},
        **fields,
    )


def _core_context_case(
    group_size: int, window: int, *, share_cores: bool = False, chunk: int | None = None, **fields
) -> OpCase:
    options = {"group_size": group_size, "window": window, "share_cores": share_cores}
    return OpCase(
        name=f"core_context_attention[group_size={group_size},window={window}"
        + (",share_cores]" if share_cores else "]"),
        op=ops.core_context_attention,
        oracle=functools.partial(oracles.core_context_attention, **options),
        inputs=_QKV,
        options=options,
        chunk=chunk or group_size + window,
        **fields,
    )


def _routing_case(strict: bool, **fields) -> OpCase:
    options = {"cluster_size": 4, "strict": strict}
    return OpCase(
        name=f"routing_attention[{'strict' if strict else 'published'}]",
        op=ops.routing_attention,
        oracle=functools.partial(oracles.routing_attention, **options),
        inputs={"q": "B T N F", "v": "B T K H", "centroids": "N C F"},
        sizes={"C": 3, "F": 8},
        options=options,
        is_causal=strict,
        bidirectional=not strict,
        **fields,
    )


_HYPER = {"block_size": 4, "min_seq_len": 8}
_SAMPLES = 3


@functools.cache
def _planes(size: int) -> np.ndarray:
    # No token lies so near to one of these that a finite difference takes it across.
    return np.random.default_rng(size + 1).standard_normal((size, 3)).astype(np.float32)


@functools.cache
def _sample(seed: float, draw_id: int, population: int) -> np.ndarray:
    drawn = draws.sample(jax.random.key(int(seed)), draw_id, population, _SAMPLES)
    return np.asarray(drawn)


def _seeded_hyper_attention(q, k, v, seeds, **options):
    """With a key for each row and head, which a mesh then spreads as it does queries."""
    keys = jax.vmap(jax.vmap(jax.random.key))(seeds.astype(jnp.int32))
    return ops.hyper_attention(
        q, k, v, jnp.asarray(_planes(q.shape[-1])), rng=keys, sample_size=_SAMPLES, **options
    )


def _temperatures(rng, shape):
    return rng.uniform(0.2, 3, shape)


def _softplus_case(power: float | None, **fields) -> OpCase:
    # Errors of the excess over the mean grow p-fold.
    loose = {"float32": 1e-4, "bfloat16": 6e-2, "float16": 1e-2}
    return OpCase(
        name="softplus_attention" + (f"[power={power}]" if power else ""),
        op=ops.softplus_attention,
        oracle=functools.partial(oracles.softplus_attention, power=power),
        inputs=_QKV,
        options={"power": power},
        bidirectional=True,
        value_tolerance={"float64": 1e-12} | loose,
        gradient_tolerance={"float64": 1e-10} | loose,
        **fields,
    )


def _square_plus(x):
    return x * x + 0.1


_elu = oracles.feature_weight(oracles.elu_plus_one)
_identity = oracles.feature_weight(lambda x: x)
_square = oracles.feature_weight(_square_plus)

OPS: tuple[OpCase, ...] = (
    _softmax_case("full"),
    _softmax_case("window=5", options={"window": 5}, is_variant=True),
    _softmax_case("alibi", alibi=True, is_variant=True),
    _blocks_case("lse"),
    _blocks_case("lse,window=100,alibi", alibi=True, options={"window": 100}, is_variant=True),
    # Held against "reference", gradients included, plan by plan in tests/ops.
    _block_sparse_case(
        "window=5,sinks=2", _window_in_blocks,
        options={"window": 5, "sinks": 2}, implementations=("xla",),
    ),
    _block_sparse_case(
        "documents", _documents_in_blocks,
        bidirectional=True, implementations=("xla",), is_variant=True,
    ),
    _linear_case("taylor", oracles.taylor, is_variant=True),
    _linear_case("taylor,chunk=8", oracles.taylor, chunk_size=8, bidirectional=True),
    _linear_case(
        "taylor,sums,chunk=8", oracles.taylor, chunk_size=8, normalize=False, is_variant=True
    ),
    _linear_case(
        "elu,chunk=8", _elu, feature_map="elu", chunk_size=8, bidirectional=True, is_variant=True
    ),
    _linear_case(
        "identity,chunk=8", _identity,
        feature_map="identity", chunk_size=8, normalize=False, is_variant=True,
    ),
    _linear_case(
        "callable,chunk=8", _square, feature_map=_square_plus, chunk_size=8, is_variant=True
    ),
    _gated_case("B T K", is_variant=True),
    _gated_case("B T N F"),
    _delta_case("log_decay=BTN", "B T N"),
    _delta_case("log_decay=None", "B T K", decay=False, is_variant=True),
    _memory_case("layers=2", ["N F E", "N E H"], "B T N"),
    _memory_case("layers=1,grouped", ["K F H"], "B T K", is_variant=True),
    _convolution_case(1, is_variant=True),
    _convolution_case(4),
    _agent_case("", options={"chunk_size": 8}, bidirectional=True, stateful=True),
    _core_context_case(3, 5),
    _core_context_case(4, 2, is_variant=True),
    _core_context_case(3, 100, chunk=256, sizes=_FEW, is_variant=True),
    _core_context_case(3, 5, share_cores=True, is_variant=True),
    _routing_case(strict=True),
    _routing_case(strict=False, is_variant=True),
    OpCase(
        name="hyper_attention",
        op=_seeded_hyper_attention,
        oracle=functools.partial(
            oracles.hyper_attention, planes=_planes, sample=_sample, **_HYPER
        ),
        inputs=_QKV | {"seeds": "B N"},
        draw={"seeds": lambda rng, shape: rng.integers(0, 100, shape) + 0.5},
        options=_HYPER,
        bidirectional=True,
    ),
    _ngram_case(),
    _ngram_case(orders=(3, 1), include_self=False),
    OpCase(
        name="selective_attention",
        op=ops.selective_attention,
        oracle=oracles.selective_attention,
        inputs=_QKV | {"query_temperature": "B T N", "value_temperature": "B T K"},
        draw={"query_temperature": _temperatures, "value_temperature": _temperatures},
        bidirectional=True,
    ),
    _softplus_case(None, chunk=256, sizes=_FEW, is_variant=True),
    _softplus_case(2.5, is_variant=True),
    _softplus_case(15.0),
    _softplus_case(3.0, chunk=256, sizes=_FEW, is_variant=True),
)  # fmt: skip
