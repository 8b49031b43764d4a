"""The suite itself: a sound mechanism passes, and each way to be wrong fails the check for it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from lcattn.nn import Mixer, MixerConfig
from lcattn.nn.mixer import check_stream, default_positions
from lcattn.ops.sharding import partitioned
from lcattn.testing import conformance
from lcattn.traits import Traits


@partitioned
def gated_sum(q, k, v, *, causal=True, segment_ids=None, implementation=None):
    """`sigmoid(sum(q_t)) * sum over s <= t of tanh(sum(k_s)) v_s`, within a document."""
    assert causal
    assert implementation is None
    group, wide = q.shape[2] // k.shape[2], jnp.promote_types(v.dtype, jnp.float32)
    ids = jnp.zeros(q.shape[:2], jnp.int32) if segment_ids is None else segment_ids
    sees = jnp.tril(ids[:, :, None] == ids[:, None]) & (ids >= 0)[:, None]
    gate, weight = (jnp.sum(x.astype(wide), axis=-1, keepdims=True) for x in (q, k))
    written = jnp.repeat(jnp.tanh(weight) * v.astype(wide), group, axis=2)
    out = jax.nn.sigmoid(gate) * jnp.einsum("bts,bsnh->btnh", sees.astype(wide), written)
    return out.astype(v.dtype)


def loop(inputs, segment_ids, *, causal):
    """The same, token by token."""
    assert causal
    q, k, v = (inputs[name] for name in "qkv")
    out = np.zeros_like(q)
    for b, t, n in np.ndindex(*q.shape[:3]):
        head = n // (q.shape[2] // k.shape[2])
        gate = 1 / (1 + np.exp(-q[b, t, n].sum()))
        for s in range(t + 1):
            if segment_ids is None or segment_ids[b, s] == segment_ids[b, t] >= 0:
                out[b, t, n] += gate * np.tanh(k[b, s, head].sum()) * v[b, s, head]
    return out


def _sees_the_next_token(q, k, v, **options):
    return gated_sum(q, jnp.roll(k, -1, 1), jnp.roll(v, -1, 1), **options)


def _crosses_documents(q, k, v, *, segment_ids=None, **options):
    ids = None if segment_ids is None else jnp.minimum(segment_ids, 0)
    return gated_sum(q, k, v, segment_ids=ids, **options)


def _writes_to_padding(q, k, v, *, segment_ids=None, **options):
    out = gated_sum(q, k, v, segment_ids=segment_ids, **options)
    return out if segment_ids is None else jnp.where((segment_ids < 0)[..., None, None], 1, out)


def _confuses_heads(q, k, v, **options):
    tiled = (jnp.tile(x, (1, 1, q.shape[2] // x.shape[2], 1)) for x in (k, v))
    return gated_sum(q, *tiled, **options)


def _overflows(q, k, v, **options):
    return gated_sum(q, k, v, **options) + 0 * jnp.exp(jnp.sum(k.astype(jnp.float32) ** 2))


def _adds_a_wide_constant(q, k, v, **options):
    return gated_sum(q, k, v, **options) + jnp.zeros(1, jax.dtypes.canonicalize_dtype(float))


def _makes_up_a_row(q, k, v, **options):
    return gated_sum(q, k, v, **options) if len(q) else jnp.zeros((1, *q.shape[1:]), q.dtype)


def _gathers(q, k, v, **options):
    out = gated_sum(q, k, v, **options)
    return jax.sharding.reshard(out, PartitionSpec()) if jax.typeof(out).sharding.spec[0] else out


FAULTS = {
    "values": lambda *inputs, **options: 1.001 * gated_sum(*inputs, **options),
    "gradients": lambda q, *kv, **options: gated_sum(jax.lax.stop_gradient(q), *kv, **options),
    "causality": _sees_the_next_token,
    "packing": _crosses_documents,
    "gradients-packed": _crosses_documents,
    "padding": _writes_to_padding,
    "grouped-queries": _confuses_heads,
    "sizes": lambda q, *kv, **options: gated_sum(q, *kv, **options) * (1 if len(q[0]) < 999 else 2),
    "empty-batch": _makes_up_a_row,
    "bfloat16": lambda *inputs, **options: gated_sum(*inputs, **options).astype(jnp.float32),
    "extremes": _overflows,
    "explicit-axes": _gathers,
    "x64": _adds_a_wide_constant,
}


def _op_checks(op):
    case = conformance.OpCase(
        name="gated_sum", op=op, oracle=loop, implementations=(None,), chunk=4
    )  # fmt: skip
    return list(conformance.op_checks(case))


SOUND = _op_checks(gated_sum)


@pytest.mark.parametrize("check", [pytest.param(check, id=name) for name, check in SOUND])
@pytest.mark.xdist_group("gated_sum")
def test_a_sound_op_passes(check):
    check()


@pytest.mark.parametrize("kind", FAULTS)
def test_a_wrong_op_fails(kind):
    *_, check = [check for name, check in _op_checks(FAULTS[kind]) if name.split("/")[2] == kind]
    with pytest.raises(AssertionError):
        check()


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunningSumConfig(MixerConfig):
    """`y_t = W (x_1 + ... + x_t)`, and what is wrong with it.

    Attributes:
      fault: the check that must notice. None: nothing is wrong.
    """

    fault: str | None = None

    def make(self, rngs):
        """Builds the mixer."""
        return RunningSum(self, rngs)


class RunningSum(Mixer):
    """A mixer as small as they get."""

    op = "none"

    def __init__(self, config, rngs):
        """Args: `config`; `rngs`, for the parameters."""
        self.config, self.fault = config, config.fault
        width = config.require_width()
        weight = jax.random.normal(rngs.params(), (width, width)) / width
        axes = () if self.fault == "parameter-axes" else ("embed", "embed")
        self.weight = nnx.Param(weight, axes=axes)

    @property
    def traits(self):
        """Causal, streaming, linear in the length."""
        return Traits(causal=True, streaming=True, subquadratic=True)

    def __call__(self, x, segment_ids=None, positions=None):
        """Mixes whole sequences."""
        ids = jnp.zeros(x.shape[:2], jnp.int32) if segment_ids is None else segment_ids
        if self.fault == "packing":
            ids = jnp.minimum(ids, 0)
        total = jnp.cumsum(jnp.where((ids >= 0)[..., None], x, 0), axis=1)
        if segment_ids is not None and self.fault != "packing":
            start = jnp.arange(x.shape[1]) - default_positions(x, ids)
            before = jnp.take_along_axis(total - x, start[..., None], axis=1)
            total = total - jnp.where((ids >= 0)[..., None], before, 0)
        if self.fault == "causality":
            total = total[:, -1:] - total
        if self.fault == "memory":
            total = jnp.tanh(jnp.tanh(x @ x.mT) @ total)
        if self.fault == "positions" and positions is not None:
            total = total * (1 + positions[..., None])
        return self._out(total)

    def _out(self, total):
        dtype = "float32" if self.fault == "low-precision" else self.config.dtype or "float32"
        return (total @ self.weight[...]).astype(dtype)

    def init_state(self, batch_size, max_length, dtype=None):
        """Zeros."""
        del max_length, dtype
        return jnp.zeros((batch_size, self.config.require_width()))

    def extend(self, x, state):
        """Continues each stream."""
        if self.fault != "foreign-state":
            check_stream(x, state)
        total = jnp.cumsum(x, axis=1) + state[: len(x), None]
        if self.fault == "streaming":
            state = jnp.zeros_like(state)
            return self._out(total), state
        after = total[:, -1]
        return self._out(total), after.astype(jnp.float16) if self.fault == "scan" else after

    def state_bytes(self, length, dtype=None):
        """Bytes of state of one stream."""
        return super().state_bytes(length, dtype) + (self.fault == "state")


MIXER_FAULTS = [
    "packing", "causality", "memory", "positions", "low-precision", "streaming", "foreign-state",
    "state", "scan", "parameter-axes",
]  # fmt: skip


def _mixer_checks(fault=None):
    config = RunningSumConfig(width=4, fault=fault)
    case = conformance.MixerCase(name=f"RunningSum[{fault}]", config=config, chunk=3)
    return list(conformance.mixer_checks(case))


@pytest.mark.parametrize(
    "check", [pytest.param(check, id=name) for name, check in _mixer_checks()]
)  # fmt: skip
@pytest.mark.xdist_group("RunningSum")
def test_a_sound_mixer_passes(check):
    check()


@pytest.mark.parametrize("kind", MIXER_FAULTS)
def test_a_wrong_mixer_fails(kind):
    [check] = [check for name, check in _mixer_checks(kind) if name.split("/")[1] == kind]
    with pytest.raises((AssertionError, TypeError)):
        check()
