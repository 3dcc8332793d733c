"""The quickstart's comparison of A, B, K and C: its verdicts, its table and its plot."""

from __future__ import annotations

import io
import struct
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from everstep.cli.quickstart.report import Comparison, Continuation, comparison_table, plot

A = Continuation(losses=(2.0, 1.5, 1.0), adapter="aa" * 32, optimizer="00" * 32)
C = Continuation(losses=(2.0, 1.7, 1.4), adapter="cc" * 32, optimizer="11" * 32)


def test_equal_runs_and_different_cold_run_have_no_problems() -> None:
    comparison = Comparison(A, replace(A), replace(A), C)

    assert comparison.exact
    assert comparison.survived
    assert comparison.cold_differs
    assert comparison.problems() == []


@pytest.mark.parametrize(
    ("other", "part"),
    [
        (replace(A, losses=(2.0, 1.5, 1.0000000000000002)), "losses"),
        (replace(A, adapter="ab" * 32), "adapters"),
        (replace(A, optimizer="01" * 32), "optimizer states"),
    ],
)
def test_one_bit_of_difference_is_reported(other: Continuation, part: str) -> None:
    restored, killed = Comparison(A, other, A, C), Comparison(A, A, other, C)

    [problem] = restored.problems()
    assert problem.startswith(f"B is not A: {part} differ. The restored run")
    assert not restored.exact and restored.survived
    [problem] = killed.problems()
    assert problem.startswith(f"K is not A: {part} differ. The killed run")
    assert killed.exact and not killed.survived


def test_equal_cold_run_is_reported() -> None:
    [problem] = Comparison(A, A, A, replace(A)).problems()

    assert problem.startswith("C is A")


def shown(comparison: Comparison, width: int) -> tuple[str, list[list[str]]]:
    """The printed table, and the cells of its rows."""
    out = io.StringIO()
    Console(file=out, width=width).print(comparison_table(comparison, 151, width))
    lines = out.getvalue().splitlines()
    assert max(len(line) for line in lines) <= width
    return out.getvalue(), [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines]


@pytest.mark.parametrize("width", [80, 100])
def test_table_shows_each_step_and_hash(width: int) -> None:
    _, rows = shown(Comparison(A, A, A, C), width)

    assert ["152", "1.5", "1.5", "1.5", "1.7"] in rows
    assert ["adapter", "aa" * 6, "aa" * 6, "aa" * 6, "cc" * 6] in rows
    assert ["optimizer", "00" * 6, "00" * 6, "00" * 6, "11" * 6] in rows


def test_wide_table_shows_all_digits_of_a_loss() -> None:
    run = replace(A, losses=(0.1 + 0.2,) * 3)
    comparison = Comparison(run, run, run, C)

    assert shown(comparison, 100)[0].count("0.30000000000000004") == 9
    assert "…" not in shown(comparison, 80)[0]


def test_differing_values_with_equal_text_have_another_colour() -> None:
    near = replace(A, losses=(2.0000000000000004, 1.5, 1.0), adapter="aa" * 31 + "ab")
    table = comparison_table(Comparison(A, A, near, C), 151, 80)

    styles = [[getattr(cell, "style", None) for cell in column.cells] for column in table.columns]
    assert styles[2] == ["green"] * 5
    assert styles[3] == ["yellow", "green", "green", "yellow", "green"]


def test_plot_is_written_as_png(tmp_path: Path) -> None:
    path = tmp_path / "new" / "loss.png"

    plot(path, [5.0, 3.0], Comparison(A, A, A, C), "a model, a text")

    head = path.read_bytes()[:24]
    width, height = struct.unpack(">II", head[16:])
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    assert width > height > 400
