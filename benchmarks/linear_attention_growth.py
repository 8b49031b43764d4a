"""Times the linear-attention kernels at growing lengths: is their time linear in it?

    python -m benchmarks.linear_attention_growth --out benchmarks/h200/linear_attention_growth.json

Milliseconds of the kernels of one call (CUPTI, median of 9), forward, and forward and backward.
"""

import argparse
import functools
from pathlib import Path

from benchmarks import kernels
from benchmarks.linear_attention_kernel import IDENTITY, TAYLOR, Case

LENGTHS = [2**n for n in range(11, 18)]


def main() -> None:
    """Measures every length and writes the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="JSON file, written anew after every length")
    arguments, rows = parser.parse_args(), []
    cases = [Case(B=1, T=T, **kind) for kind in (TAYLOR, IDENTITY) for T in LENGTHS]
    programs = kernels.compile_all({
        (case, backward): functools.partial(
            kernels.compile_for, case, case.ours, backward=backward
        )
        for case in cases for backward in (False, True)
    })  # fmt: skip
    for case in cases:
        *arrays, g = case.inputs(seed=0)
        rows.append({
            "case": case.name, "feature_map": case.feature_map, "T": case.T,
            "forward": kernels.times(programs[case, False], *arrays)["kernel_ms"],
            "forward_backward": kernels.times(programs[case, True], *arrays, g)["kernel_ms"],
        })  # fmt: skip
        print(rows[-1], flush=True)
        kernels.save(arguments.out, "linear_attention_growth", rows=rows)


if __name__ == "__main__":
    main()
