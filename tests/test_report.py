"""The table in its three forms, and CSV files that survive a kill and read back exactly."""

import csv
import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from treesurgeon.search import report
from treesurgeon.search.report import Line

LINES = [
    Line("dense", 1_200_000, 40_000_000, 0.99, 0.90, 0.895),
    Line("v|1", 600_000, 20_000_000, 0.95, 0.89),
    Line("selected", 999, 4_000_000, 0.93, 0.895, 0.8912, selected=True),
]


def test_plain_text_is_aligned():
    assert (
        report.text(LINES)
        == """\
variant           params            MACs   train  search    test    gap
--------  --------------  --------------  ------  ------  ------  -----
dense      1.20 M (100%)  40.00 M (100%)  99.00%  90.00%  89.50%  +9.00
v|1       600.00 k (50%)   20.00 M (50%)  95.00%  89.00%       –  +6.00
selected        999 (0%)    4.00 M (10%)  93.00%  89.50%  89.12%  +3.50"""
    )


def test_markdown_has_a_cell_a_column_and_the_selected_in_bold():
    head, rule, *rows = report.markdown(LINES).splitlines()
    assert head == "| variant | params | MACs | train | search | test | gap |"
    assert rule == "| --- | ---: | ---: | ---: | ---: | ---: | ---: |"
    assert rows[0] == "| dense | 1.20 M (100%) | 40.00 M (100%) | 99.00% | 90.00% | 89.50% | +9.00 |"
    assert rows[1].startswith(r"| v\|1 |")
    assert rows[2].startswith("| **selected** | **999 (0%)** |")


def test_a_terminal_gets_a_drawn_table_and_anything_else_plain_text():
    terminal, pipe = io.StringIO(), io.StringIO()
    report.show(LINES, Console(file=terminal, force_terminal=True, width=120), title="result")
    report.show(LINES, Console(file=pipe, width=20), title="result")
    assert "\x1b[" in terminal.getvalue()
    assert "│" in terminal.getvalue()
    assert pipe.getvalue() == "result\n" + report.text(LINES) + "\n"  # not folded to 20 columns


def test_without_a_console_it_goes_to_stdout(capsys):
    report.show(LINES)
    assert capsys.readouterr().out == report.text(LINES) + "\n"


def test_a_gap_needs_both_accuracies():
    assert Line("a", 1, 1, None, 0.5).gap is None
    assert Line("a", 1, 1, 0.75, 0.5).gap == 0.25
    assert report.text([Line("a", 1, 0, None, None)]).splitlines()[2].split().count("–") == 4


# --- csv --------------------------------------------------------------------------------------------------


def read(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def generation(number, count=3):
    rng = np.random.default_rng(number)
    return [
        {
            "loss": rng.random(dtype=np.float32),
            "error": rng.random(),
            "params": np.int64(10 * i),
            "macs": 5 * i,
            "genome": rng.integers(0, 9, 4),
        }
        for i in range(count)
    ]


@given(st.floats(allow_nan=False), st.text(st.characters(exclude_categories=["Cs", "Cc"])))
def test_what_is_written_reads_back(tmp_path_factory, value, words):
    path = tmp_path_factory.mktemp("csv") / "deep" / "front.csv"
    report.write_front(path, [{"variant": words, "gap": value, "genome": (1, 0, 2), "selected": True}])
    (row,) = read(path)
    assert row["variant"] == words
    assert float(row["gap"]) == value
    assert row["genome"] == "1 0 2"
    assert row["selected"] == "True"
    assert row["reason"] == ""
    assert tuple(row) == report.FRONT_COLUMNS


def test_generations_add_up(tmp_path):
    path = tmp_path / "candidates.csv"
    for number in range(3):
        report.write_generation(path, number, generation(number))
    rows = read(path)
    assert tuple(rows[0]) == report.CANDIDATE_COLUMNS
    assert [(row["generation"], row["candidate"]) for row in rows] == [
        (str(g), str(c)) for g in range(3) for c in range(3)
    ]
    last = generation(2)[1]
    assert np.float32(rows[7]["loss"]) == last["loss"]
    assert float(rows[7]["error"]) == last["error"]
    assert rows[7]["genome"].split() == [str(x) for x in last["genome"]]
    assert rows[7]["violation"] == ""


def test_a_generation_that_is_written_again_after_a_kill_leaves_the_same_file(tmp_path):
    once, twice = tmp_path / "once.csv", tmp_path / "twice.csv"
    for number in (0, 1, 2):
        report.write_generation(once, number, generation(number))
    for number in (0, 1, 2, 1, 2):
        report.write_generation(twice, number, generation(number))
    assert once.read_bytes() == twice.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["once.csv", "twice.csv"]


def test_errors(tmp_path):
    with pytest.raises(report.ReportError, match="no column for speed; there are variant, selected"):
        report.write_front(tmp_path / "front.csv", [{"speed": 1}])
    path = tmp_path / "candidates.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(report.ReportError, match=r"not a candidates.csv of this version .*'a', 'b'"):
        report.write_generation(path, 0, generation(0))
    assert path.read_text() == "a,b\n1,2\n"
