"""The shared test suite of attention mechanisms; anyone can hand it one of their own.

Describe an op by its axes and a loop over tokens that says what it means, and run the checks with
any test runner::

    from lcattn.testing import conformance

    def decayed_mean(q, k, v, *, causal=True, segment_ids=None, implementation=None): ...

    def loop(inputs, segment_ids, *, causal):  # float64 NumPy in and out
        ...

    case = conformance.OpCase(name="decayed_mean", op=decayed_mean, oracle=loop,
                              implementations=(None,))

    @pytest.mark.parametrize(("name", "check"), conformance.op_checks(case))
    def test_decayed_mean(name, check):
        check()

An op whose steps JAX cannot shard by itself on explicit axes is decorated with
`lcattn.ops.sharding.partitioned`, as the library's own are.

A mixer (`lcattn.nn.Mixer`) brings its own description: its traits say what it promises, and
`mixer_checks(MixerCase(name=..., config=...))` yields a check of each promise.

What is checked of an op: values against the oracle and gradients against the plainest
implementation (and of that, against finite differences of the oracle), in float64, at lengths
around a chunk; causality by gradient and by perturbation; packing and padding; the state between
calls; grouped queries; ragged lengths and head sizes, an empty batch; narrow dtypes and extreme
inputs; `jit`, `vmap`, `checkpoint`, `scan`, `shard_map`, meshes with explicit axes, x64, no second
trace and no host transfer.

Of a mixer: the law of streaming over random cuts, under `jit` and `scan`; causality; packing and
positions; the state's size, structure and limits; memory that grows with T and not T²; bfloat16;
and Flax Linen through `nnx.bridge`.

Programs are compiled once and shared by the checks of a case, so run those in one process.
"""

from lcattn.testing.conformance.cases import MixerCase, OpCase
from lcattn.testing.conformance.mixers import mixer_checks
from lcattn.testing.conformance.ops import op_checks

__all__ = ["MixerCase", "OpCase", "mixer_checks", "op_checks"]
