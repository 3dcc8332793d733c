"""The comparison of A, B and C: what it calls equal, what it shows."""

import io
import struct
from dataclasses import replace

import pytest
from rich.console import Console

from everstep.cli.report import Comparison, Continuation, comparison_table, plot

A = Continuation(losses=(2.0, 1.5, 1.0), adapter="aa" * 32, optimizer="00" * 32)
C = Continuation(losses=(2.0, 1.7, 1.4), adapter="cc" * 32, optimizer="11" * 32)


def test_equal_runs_with_a_different_cold_one_are_as_promised():
    comparison = Comparison(A, replace(A), C)

    assert comparison.exact
    assert comparison.cold_differs
    assert comparison.problems() == []


@pytest.mark.parametrize(
    ("b", "what"),
    [
        (replace(A, losses=(2.0, 1.5, 1.0000000000000002)), "losses"),
        (replace(A, adapter="ab" * 32), "adapters"),
        (replace(A, optimizer="01" * 32), "optimizer states"),
    ],
)
def test_one_bit_of_difference_is_told(b, what):
    [problem] = Comparison(A, b, C).problems()

    assert problem.startswith(f"B is not A: {what} differ")


def test_a_cold_run_that_is_the_same_is_told():
    [problem] = Comparison(A, replace(A), replace(A)).problems()

    assert problem.startswith("C is A")


def test_the_table_shows_each_step_and_hash_in_eighty_columns():
    out = io.StringIO()

    Console(file=out, width=80).print(comparison_table(Comparison(A, A, C), 151))

    rows = [line.split() for line in out.getvalue().splitlines()]
    assert ["│", "152", "│", "1.5", "│", "1.5", "│", "1.7", "│"] in rows
    assert ["│", "adapter", "│", "aa" * 8, "│", "aa" * 8, "│", "cc" * 8, "│"] in rows


def test_the_table_shows_all_digits_of_a_loss():
    out = io.StringIO()
    run = replace(A, losses=(0.1 + 0.2,) * 3)

    Console(file=out, width=80).print(comparison_table(Comparison(run, run, C), 151))

    assert out.getvalue().count("0.30000000000000004") == 6


def test_the_plot_is_a_png_at_the_stated_path(tmp_path):
    path = tmp_path / "new" / "loss.png"

    plot(path, [5.0, 3.0], Comparison(A, A, C), "a model, a text")

    head = path.read_bytes()[:24]
    width, height = struct.unpack(">II", head[16:])
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    assert width > height > 400
