"""The benchmark driver: wrong results are found and not timed; what is derived is derived right."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import pytest

from experiments import benchmark as driver
from experiments import reporting
from experiments.benchmarks import (
    LinearAttentionBenchmark,
    ShortConvolutionBenchmark,
    SoftmaxAttentionBenchmark,
)
from experiments.benchmarks.base import Cost, Implementation, OpBenchmark, visible_pairs
from experiments.benchmarks.measure import Program, Rates, TimingConfig, interleaved

QUICK = TimingConfig(repetitions=3, min_sample_ms=0.01)


@jax.custom_jvp
def _wrong_gradient(x):
    return x**2


_wrong_gradient.defjvp(lambda primals, tangents: (primals[0] ** 2, 2.1 * primals[0] * tangents[0]))


def _raises(x):
    raise NotImplementedError("needs a device of another world\nand more")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SquareBenchmark(OpBenchmark):
    @property
    def op(self):
        return "square"

    def shapes(self, length):
        return {"x": (self.batch_size, length)}

    def reference(self, inputs):
        return inputs["x"] ** 2

    def implementations(self):
        return {
            "right": Implementation(lambda x: x * x),
            "short": Implementation(jnp.square, max_length=16),
            "wrong": Implementation(lambda x: x * x + 0.1),
            "wrong gradient": Implementation(_wrong_gradient),
            "nan": Implementation(lambda x: x * jnp.nan),
            "raises": Implementation(_raises),
        }

    def forward_cost(self, length):
        return Cost(float(length), self.element_bytes(2 * length))


class OwnReferenceBenchmark(SquareBenchmark):
    def implementations(self):
        return {
            "cube": Implementation(lambda x: x**3, reference=lambda x: x * x * x),
            "wrong cube": Implementation(lambda x: x**2, reference=lambda x: x * x * x),
        }


@pytest.fixture(scope="module")
def results():
    return driver.measure(SquareBenchmark(), (16, 32), driver.PASSES, 16, QUICK)


def _rows(results, name):
    return {(r["length"], r["pass"]): r for r in results["rows"] if r["implementation"] == name}


def test_right_results_are_timed(results):
    rows = _rows(results, "right")
    assert len(rows) == 4
    assert {row["status"] for (length, _), row in rows.items() if length == 16} == {"ok"}
    assert {row["status"] for (length, _), row in rows.items() if length == 32} == {"unchecked"}
    for row in rows.values():
        assert row["ms"]["min"] <= row["ms"]["median"] <= row["ms"]["max"]
        assert row["temp_bytes"] is not None
        assert row["device_ms"] is None  # no GPU here


@pytest.mark.parametrize(
    ("name", "kind", "status"),
    [
        ("wrong", "forward", "WRONG (out)"),
        ("wrong", "forward+backward", "WRONG (out)"),
        ("wrong gradient", "forward", "ok"),
        ("wrong gradient", "forward+backward", "WRONG (x)"),
        ("nan", "forward", "WRONG (out)"),
        ("raises", "forward", "failed: NotImplementedError: needs a device of another world"),
    ],
)
def test_wrong_results_are_not_timed(results, name, kind, status):
    row = _rows(results, name)[16, kind]
    assert row["status"] == status
    assert ("ms" in row) == (status == "ok")


def test_implementations_are_tried_up_to_their_length(results):
    assert {length for length, _ in _rows(results, "short")} == {16}


def test_derived_figures(results):
    row = _rows(results, "right")[32, "forward+backward"]
    cost = SquareBenchmark().cost(32, backward=True)
    assert row["gbps"] == pytest.approx(cost.bytes / row["ms"]["median"] / 1e6)
    floor = Rates(**results["rates"]).floor_ms(*cost)
    assert row["floor_share"] == pytest.approx(floor / row["ms"]["median"])


def test_floor_is_the_larger_of_arithmetic_and_traffic():
    rates = Rates(matrix=1e12, copy=1e9)
    assert rates.floor_ms(2e9, 1e6) == pytest.approx(2.0)
    assert rates.floor_ms(1e6, 2e6) == pytest.approx(2.0)


def _row(name, length, ms, **rest):
    return {
        "implementation": name, "length": length, "pass": "forward", "status": "ok",
        "ms": {"median": ms, "min": ms, "max": ms, "samples": 1}, "device_ms": None, **rest,
    }  # fmt: skip


def test_growth_and_crossover():
    rows = [_row("linear", T, T / 100) for T in (256, 512, 2048)]
    rows += [_row("quadratic", T, (T / 1024) ** 2 * 10.24) for T in (256, 512, 2048)]
    growth = driver._growth(rows)
    assert growth["linear", 2048] == pytest.approx(2.0)
    assert growth["quadratic", 2048] == pytest.approx(4.0)
    assert list(driver._crossovers(rows)) == [("forward", 1024, "linear", "quadratic")]


def test_a_crossover_holds_to_the_end_and_is_more_than_noise():
    slow = [_row("slow", T, 1.0) for T in (1, 2, 4)]
    back_and_forth = [_row("other", T, ms) for T, ms in ((1, 2.0), (2, 0.5), (4, 0.95))]
    assert list(driver._crossovers(slow + back_and_forth)) == []


def test_others_are_set_beside_the_baselines():
    exact = [_row("exact", T, 4.0 * T, temp_bytes=100 * T) for T in (16, 32)]
    dense = [_row("dense", 16, 2.0, temp_bytes=6400)]
    ours = [_row("ours", T, 1.0 * T, temp_bytes=200 * T) for T in (16, 32)]
    rows = exact + dense + ours
    assert driver.beside(rows, ("exact", "dense")).rows == [
        ["exact", "forward", 16, 1.0, 1.0, 32.0, 0.25],
        ["dense", "forward", 16, 2.0 / 64, 4.0, 1.0, 1.0],
        ["ours", "forward", 16, 0.25, 2.0, 8.0, 0.5],
    ]
    # Ahead of the first baseline all along: from the shortest length on. Others do not count.
    found = list(driver._crossovers(rows, ("exact", "dense")))
    assert found == [("forward", 16, "dense", "exact"), ("forward", 16, "ours", "exact")]


def test_a_mechanism_is_held_against_its_own_definition():
    operation = OwnReferenceBenchmark()
    rows = driver.measure(operation, (8,), ("forward",), 8, QUICK)["rows"]
    assert [row["status"] for row in rows] == ["ok", "WRONG (out)"]


def test_time_on_the_device_counts_where_it_is_known():
    curves = driver._curves([_row("a", 16, 5.0) | {"device_ms": 1.0}, _row("b", 16, 2.0)])
    assert curves == {"a": {16: 1.0}, "b": {16: 2.0}}


def test_samples_are_taken_in_turn():
    order = []
    programs = {
        name: Program(run=dict, call=lambda name=name: order.append(name), temp_bytes=0,
                      device_ms=lambda calls: None)
        for name in "ab"
    }  # fmt: skip
    samples = interleaved(programs, TimingConfig(repetitions=3, min_sample_ms=1e-9))
    assert "".join(order[4:]) == "ababab"  # after the warm-up
    assert {name: len(ms) for name, ms in samples.items()} == {"a": 3, "b": 3}


def test_visible_pairs():
    assert visible_pairs(5) == 15
    assert visible_pairs(5, window=2) == 1 + 4 * 2
    assert visible_pairs(5, window=9) == 15


@pytest.mark.parametrize(
    "operation",
    [
        SoftmaxAttentionBenchmark(num_heads=2, num_kv_heads=1, head_dim=8, window=8),
        LinearAttentionBenchmark(num_heads=2, head_dim=8, feature_dim=4),
        LinearAttentionBenchmark(num_heads=2, head_dim=8, feature_dim=4, feature_map="elu"),
        ShortConvolutionBenchmark(width=8),
    ],
    ids=["attention", "taylor", "elu", "convolution"],
)
def test_our_implementations_pass_the_check(operation):
    results = driver.measure(operation, (32,), ("forward",), 32, QUICK)
    status = {row["implementation"]: row["status"] for row in results["rows"]}
    assert "lcattn" in status
    assert set(status.values()) == {"ok"}, status


def test_costs_grow_as_they_should():
    attention, linear = SoftmaxAttentionBenchmark(), LinearAttentionBenchmark()
    assert attention.forward_cost(8192).flops == pytest.approx(
        4 * attention.forward_cost(4096).flops, rel=1e-3
    )
    assert linear.forward_cost(8192).flops == 2 * linear.forward_cost(4096).flops
    # BASED at F=16: 1 + 16 + 136 features.
    assert linear.num_features == 153


def test_report_is_made_from_the_recorded_numbers_alone(results, tmp_path):
    recorded = json.loads(json.dumps(results))
    recorded["rows"][0]["ms"]["median"] = 12345.0
    reporting.write_results(tmp_path, recorded)
    reporting.regenerate(tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "12,345" in text
    assert "WRONG (out)" in text
    assert {path.name for path in tmp_path.iterdir()} >= {"time.png", "report.md", "results.json"}
    reporting.regenerate(tmp_path)
    assert (tmp_path / "report.md").read_text() == text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lengths": ()}, "benchmark.lengths: expected ascending positive lengths"),
        ({"lengths": (64, 32)}, "benchmark.lengths: expected ascending positive lengths"),
        ({"passes": ("sideways",)}, "benchmark.passes: expected some of"),
    ],
)
def test_bad_settings(tmp_path, changes, message):
    settings = {"operation": SquareBenchmark(), "lengths": (16,), "run_dir": tmp_path}
    with pytest.raises(ValueError, match=message):
        driver.benchmark(**settings | changes)


def test_a_dtype_that_does_not_exist():
    with pytest.raises(ValueError, match=r"SquareBenchmark\.dtype: expected the name of a dtype"):
        SquareBenchmark(dtype="float31")


def test_relative_error_of_nan_is_never_small():
    assert math.isnan(driver.relative_error(jnp.array([jnp.nan]), jnp.array([1.0])))
