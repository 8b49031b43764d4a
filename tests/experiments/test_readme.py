"""The README says what the code declares and the records hold."""

import re

import pytest

from experiments import readme


@pytest.mark.parametrize("name", sorted(set(readme.PARTS) - {"example"}))
def test_generated_part_is_in_step(name):
    text = readme.README.read_text()
    begin, end = f"<!-- begin: {name} -->\n", f"\n<!-- end: {name} -->"
    part = text.partition(begin)[2].partition(end)[0]
    assert part == readme.PARTS[name](), "run: make docs"


def test_example_runs_as_printed():
    code, _, printed = readme.example().partition("```\n```\n")
    assert code.removeprefix("```python") in readme.README.read_text()
    assert printed.startswith("(1, 4096, 8, 16) (1, 4096, 8, 16) state: (1, 8, 153, 16)")


def test_pages_of_records_are_in_step():
    stale = [path for path, text in readme.pages().items() if path.read_text() != text]
    assert not stale, "run: make docs"


def test_every_figure_and_page_that_is_linked_exists():
    for path, text in {readme.README: readme.README.read_text(), **readme.pages()}.items():
        links = re.findall(r"\]\(([^)#:]+)\)", text)
        assert links
        assert not [link for link in links if not (path.parent / link).exists()], path


def test_a_missing_marker_is_named():
    with pytest.raises(ValueError, match="begin: example"):
        readme.render("no markers here")
