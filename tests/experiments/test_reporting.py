"""Tables, figures and the record of where numbers come from."""

import dataclasses
import io
import itertools
import json

import numpy as np
import pytest
from rich.console import Console

from experiments import figures, reporting
from experiments.estimates import Estimate, curve
from experiments.figures import MARKERS, PALETTE, Figure, HeatMap, Panel, Series
from experiments.reporting import Report, Table, show, show_bytes


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"), (0.123456, "0.123"), (1234.5, "1,234"), (1e-7, "1e-07"), (12345, "12,345"),
        (True, "True"), ("a", "a"),
    ],
)  # fmt: skip
def test_cells(value, text):
    assert show(value) == text


@pytest.mark.parametrize(
    ("count", "text"), [(512, "512 B"), (5.6e6, "5.34 MiB"), (3 * 2**40, "3.07e+03 GiB")]
)
def test_bytes(count, text):
    assert show_bytes(count) == text


def test_table():
    table = Table(title="Recall", header=("model", "accuracy"), rows=[("a|b", 0.5), ("[c]", None)])
    assert table.markdown().splitlines() == [
        "**Recall**", "", "| model | accuracy |", "| --- | --- |", r"| a\|b | 0.5 |", "| [c] | – |",
    ]  # fmt: skip
    console = Console(width=60, file=io.StringIO())
    console.print(table.rich())
    assert "[c]" in console.file.getvalue()  # no markup


def test_report_with_a_figure(tmp_path):
    series = [
        Series(label=f"model {i}", x=[1, 10, 100], y=[1.0, None, 3.0 + i], line="")
        for i in range(9)
    ]
    panel = Panel(xlabel="state (bytes)", ylabel="recall", series=series, xscale="log2")
    figure = Figure(name="recall", caption="Recall against state.", panels=[panel])
    Report(title="Test", blocks=["Words.", figure]).save(tmp_path)
    assert (tmp_path / "report.md").read_text() == (
        "# Test\n\nWords.\n\n![Recall against state.](recall.png)\n\nRecall against state.\n"
    )
    assert (tmp_path / "recall.png").stat().st_size > 1000


def test_no_two_curves_look_alike():
    looks = list(figures._looks())
    assert len(set(looks)) == len(looks) == len(PALETTE) * len(MARKERS)


def test_curves_named_at_their_ends(tmp_path):
    series = [Series(label=f"model {i}", x=[1, 2], y=[0.1, None if i else 0.9]) for i in range(20)]
    empty = Series(label="nothing", x=[1], y=[None])
    panel = Panel(
        xlabel="x", ylabel="y", series=[*series, empty], xscale="log2", direct_labels=True
    )
    assert Figure(name="ends", caption="", panels=[panel]).save(tmp_path).stat().st_size > 1000


def test_names_keep_their_order_and_distance():
    placed = figures._spread({"a": 0.5, "b": 0.52, "c": 0.99, "d": 1.0, "e": 0.0}, gap=0.1)
    assert sorted(placed, key=placed.__getitem__) == ["e", "a", "b", "c", "d"]
    heights = sorted(placed.values())
    assert min(b - a for a, b in itertools.pairwise(heights)) == pytest.approx(0.1)
    assert heights[0] >= 0
    assert heights[-1] <= 1


def test_heat_maps(tmp_path):
    panels = [
        HeatMap(xlabel="length", ylabel="depth", columns="ab", rows="c", values=[[0.1, None]])
        for _ in range(3)
    ]
    figure = Figure(name="grid", caption="", panels=panels, max_columns=2)
    assert figure.save(tmp_path).stat().st_size > 1000
    other = dataclasses.replace(panels[0], limits=(0, 2))
    with pytest.raises(ValueError, match="panels: expected heat maps of one label"):
        dataclasses.replace(figure, panels=[*panels, other]).save(tmp_path)


def test_environment_is_json_and_names_the_device():
    record = json.loads(json.dumps(reporting.environment()))
    assert record["platform"] == "cpu"
    text = reporting.describe_environment(record)
    assert record["device"] in text
    assert record["versions"]["jax"] in text


def test_results_are_written_whole(tmp_path):
    reporting.write_results(tmp_path / "run", {"script": "x", "value": 1})
    with pytest.raises(ValueError, match="Out of range float"):
        reporting.write_results(tmp_path / "run", {"script": "x", "value": float("nan")})
    assert json.loads((tmp_path / "run/results.json").read_text())["value"] == 1


@pytest.mark.parametrize("text", [None, "{", "{}", '{"script": "../secrets"}'])
def test_folders_without_results_of_ours(tmp_path, text):
    if text is not None:
        (tmp_path / "results.json").write_text(text)
    with pytest.raises(ValueError, match=f"{tmp_path}: "):
        reporting.regenerate(tmp_path)


def test_estimates_over_seeds():
    values = np.array([[1.0, 5.0], [2.0, 5.0], [3.0, 5.0]])
    estimate = Estimate.of(values)
    # The 0.975 quantile of t with 2 degrees of freedom is 4.3027 (any table of it).
    np.testing.assert_allclose(estimate.margin, [4.3027 / 3**0.5, 0], rtol=1e-4)
    line = curve("x", [0, 1], values)
    assert (line.y, line.high[1]) == ([2, 5], 5)
    assert line.low[0] == pytest.approx(2 - 4.3027 / 3**0.5, rel=1e-4)
    assert str(Estimate.of([2.0])) == "2"
    assert str(Estimate.of([1.0, 2.0, 3.0])) == "2 ± 2"


def test_a_band_is_drawn(tmp_path):
    panel = Panel(
        xlabel="step", ylabel="loss (nats)", series=[curve("x", [0, 1], [[1, 2], [3, 4]])]
    )
    assert Figure(name="band", caption="", panels=[panel]).save(tmp_path).stat().st_size > 1000
