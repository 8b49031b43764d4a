"""Tests of what tells whether the kernels repeat bit by bit; on a GPU it runs as a benchmark."""

import itertools
import json
import pickle

import jax.numpy as jnp
import pytest

from benchmarks import kernels, repeats
from experiments import records
from pallas_kernels import source


def test_counts_the_calls_that_change_an_output():
    calls = itertools.count()

    def run():
        odd = jnp.zeros(5).at[3].set(1e-30 * (next(calls) % 3 == 2))  # the least bit counts
        return {"a": jnp.ones(2), "b": (odd, jnp.arange(3))}

    assert kernels.changes(run(), run, ["a", "odd", "b"], 8) == {"odd": 3}


def test_takes_every_kernel_for_hopper_gpus():
    work = repeats.all_work()
    assert set(work) == set(source.digests("mosaic_gpu"))
    for of in work.values():
        names = [case.name for case in of.cases]
        assert sorted(set(names)) == sorted(names)
        # Shapes go to processes that compile them.
        pickle.loads(pickle.dumps((of.build, of.cases)))


@pytest.mark.parametrize(("changed", "shapes"), [({}, 0), ({"dq": 1}, 1)])
def test_the_page_says_how_many_shapes_changed(tmp_path, monkeypatch, changed, shapes):
    row = {"kernel": "linear_attention", "later_calls": 10}
    rows = [row | {"case": "a", "changed": {}}, row | {"case": "b", "changed": changed}]
    record = {"device": "a GPU", "jax": "0", "command": "do", "rows": rows}
    (tmp_path / "gpu").mkdir()
    (tmp_path / "gpu" / "repeats.json").write_text(json.dumps(record))
    monkeypatch.setattr(records, "RECORDS", tmp_path)
    assert f"| `linear_attention` | 2 | 20 | {shapes} | 0 |" in records.repeated()
    assert "earlier version" in records.repeated()  # it has no digests
