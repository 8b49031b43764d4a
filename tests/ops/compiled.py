"""The ops, each compiled whole: a test that calls one as it is compiles every operation in it."""

import functools
from typing import Any

import jax
import numpy as np

import lcattn.ops
from lcattn.ops import dispatch


def _is_traced(option: Any) -> bool:
    leaves = jax.tree.leaves(option)
    return bool(leaves) and all(isinstance(leaf, jax.Array | np.ndarray) for leaf in leaves)


@functools.cache
def _compiled(name: str, fixed: tuple) -> Any:
    return jax.jit(functools.partial(getattr(lcattn.ops, name), **dict(fixed)))


def _call(name: str, *arrays: Any, **options: Any) -> Any:
    traced = {key: option for key, option in options.items() if _is_traced(option)}
    fixed = {key: option for key, option in options.items() if key not in traced}
    return _compiled(name, tuple(fixed.items()))(*arrays, **traced)


class _Ops:
    def __getattr__(self, name: str) -> Any:
        found = getattr(lcattn.ops, name)
        return functools.partial(_call, name) if name in dispatch.OPS else found


ops = _Ops()
