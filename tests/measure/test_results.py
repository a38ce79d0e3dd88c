"""Files of results are JSON that a person can read, and that says the same."""

from __future__ import annotations

import json

import pytest

from efficient_densenet.measure.results import write_json

CONTENT = {
    "times": [1, 2.5e-7, None, True, "a [ 1 ] ] b, c\n  d"],
    "tables": [["a", "b"], ["c", {"d": [1]}], [], {}],
    "deep": [[["a"], ["b"]], [3, ["c [\n d"]]],
}


@pytest.mark.parametrize("content", [CONTENT, *({name: value} for name, value in CONTENT.items())])
def test_what_is_written_says_the_same(content, tmp_path):
    write_json(tmp_path / "results.json", content)
    assert json.loads((tmp_path / "results.json").read_text()) == content


def test_a_list_of_plain_values_takes_one_line(tmp_path):
    write_json(tmp_path / "results.json", {"times": [1, 2], "table": [["a", "b"], ["c", None]]})
    lines = [line.strip() for line in (tmp_path / "results.json").read_text().splitlines()]
    assert lines == ["{", '"times": [1, 2],', '"table": [', '["a", "b"],', '["c", null]', "]", "}"]
