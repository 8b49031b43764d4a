"""Tables of launch parameters, and the search that writes them."""

import json
from concurrent.futures import Future
from types import SimpleNamespace

import pytest

from benchmarks import tune
from pallas_kernels import tuned
from pallas_kernels.linear_attention.config import LaunchConfig, heuristic

SHAPE = {"B": 2, "T": 3000, "N": 8, "F": 48, "H": 64}  # no table has such features


def test_a_trial_answers_lookups_of_its_kernel_alone():
    with tuned.trial("linear_attention", {"groups": 8, "stages": 1}) as asked:
        assert heuristic(**SHAPE) == LaunchConfig(groups=8, stages=1)
        assert tuned.lookup("another", T=3) == {}
    assert asked == [{"sequences": 16, "T": 3000, "F": 48, "H": 64}]
    assert heuristic(**SHAPE).stages == 2


def test_groups_are_no_more_than_chunks_and_rather_divide_them():
    with tuned.trial("linear_attention", {"groups": 64}):
        assert heuristic(**SHAPE | {"T": 130}).groups == 3
    with tuned.trial("linear_attention", {"groups": 8}):
        assert heuristic(**SHAPE | {"T": 64 * 15}).groups == 5


def test_sizes_are_rounded_to_powers_of_two():
    assert tuned.rounded({"T": 3000, "H": 64}) == (("H", 64), ("T", 4096))
    assert tuned.rounded({"T": 2890, "B": 1}) == (("B", 1), ("T", 2048))


def test_a_table_is_read_where_it_lies(monkeypatch, tmp_path):
    (tmp_path / "tables").mkdir()
    sizes = {"sequences": 16, "T": 4096, "F": 48, "H": 64}
    found = {"entries": [{"sizes": sizes, "config": {"groups": 8, "gradient_stages": 3}}]}
    (tmp_path / "tables" / "linear_attention.json").write_text(json.dumps(found))
    monkeypatch.setattr(tuned.resources, "files", lambda package: tmp_path)
    tuned._table.cache_clear()
    try:
        assert heuristic(**SHAPE) == LaunchConfig(groups=8, gradient_stages=3)
        assert heuristic(**SHAPE | {"T": 8192}).gradient_stages == 2
    finally:
        tuned._table.cache_clear()


@pytest.mark.parametrize(
    ("ms", "expected"),
    [
        # Each helps, and both together more.
        ({"a": 0.8, "b": 0.9, "a b": 0.7}, {"a": 2, "b": 3}),
        # Each helps alone.
        ({"a": 0.8, "b": 0.9, "a b": 1.2}, {"a": 2}),
        # Noise.
        ({"a": 0.99, "b": 1.3, "a b": 0.1}, {}),
        # One cannot be compiled.
        ({"a": None, "b": 0.9, "a b": 0.1}, {"b": 3}),
    ],
)
def test_search_takes_what_helps(monkeypatch, ms, expected):
    def compile_for(case, form, *, backward):
        fields = tuned.lookup("kernel", T=100)
        ms_of_it = ms[" ".join(fields)] if fields else 1.0
        if ms_of_it is None:
            raise ValueError("too large")
        return ms_of_it

    def compile_(build, *arguments):
        future = Future()
        try:
            future.set_result(build(*arguments))
        except ValueError as error:
            future.set_exception(error)
        return future

    monkeypatch.setattr(tune.kernels, "compile_for", compile_for)
    monkeypatch.setattr(tune.kernels, "times", lambda compiled: {"kernel_ms": compiled})
    case = SimpleNamespace(name="shape", inputs=lambda seed: ())

    def formula(case):
        tuned.lookup("kernel", T=100)
        return SimpleNamespace(groups=1, a=1, b=1)

    kernel = tune.Search([(case, (1,))], {"a": (1, 2), "b": (3,)}, formula)
    monkeypatch.setitem(tune.SEARCHES, "kernel", kernel)
    entry = tune.search("kernel", tune.Trials.of("kernel", case, (1,), compile_))
    assert entry["config"] == expected
    assert entry["sizes"] == {"T": 100}
    assert {"groups": 1} not in [trial["config"] for trial in entry["tried"]]  # the formula's


def test_a_table_keeps_the_entries_of_other_shapes(tmp_path):
    def entry(T, groups):
        return {"sizes": {"T": T}, "config": {"groups": groups}}

    def found(*entries):
        return {tuned.rounded(entry["sizes"]): entry for entry in entries}

    path = tmp_path / "table.json"
    tune._write(path, found(entry(64, 1), entry(1024, 2)))
    tune._write(path, found(entry(1000, 3)))
    assert json.loads(path.read_text())["entries"] == [entry(64, 1), entry(1000, 3)]
