"""Times the kernels of the linear family at growing lengths: is their time linear in it?

    python -m benchmarks.linear_attention_growth --out benchmarks/h200/linear_attention_growth.json

Milliseconds of the kernels of one call (CUPTI, median of 9), forward, and forward and backward.
"""

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path

from benchmarks import kernels
from benchmarks.compiling import Workers
from benchmarks.gated_linear_attention_kernel import Case as Gated
from benchmarks.linear_attention_kernel import IDENTITY, TAYLOR, Case

LENGTHS = [2**n for n in range(11, 18)]


KINDS: Mapping[str, Callable[[int], kernels.Case]] = {
    "taylor": lambda T: Case(B=1, T=T, **TAYLOR),
    "identity": lambda T: Case(B=1, T=T, **IDENTITY),
    "gated": lambda T: Gated(B=1, T=T),
}


def main() -> None:
    """Measures every length and writes the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="JSON file, written anew after every length")
    arguments, rows = parser.parse_args(), []
    cases = [(name, T, kind(T)) for name, kind in KINDS.items() for T in LENGTHS]
    with Workers() as workers:
        programs = [
            [workers.compile(kernels.compile_for, case, "mosaic_gpu", backward=backward)
             for backward in (False, True)]
            for *_, case in cases
        ]  # fmt: skip
        inputs = [workers.run(kernels.inputs_program, case) for *_, case in cases]
    for (name, T, case), (forward, both), arrays in zip(cases, programs, inputs, strict=True):
        *given, g = arrays.result()(0)
        rows.append({
            "case": case.name, "feature_map": name, "T": T,
            "forward": kernels.times(forward.result(), *given)["kernel_ms"],
            "forward_backward": kernels.times(both.result(), *given, g)["kernel_ms"],
        })  # fmt: skip
        print(rows[-1], flush=True)
        kernels.save(arguments.out, "linear_attention_growth", rows=rows)


if __name__ == "__main__":
    main()
