"""The comparison of the quickstart's continuations, as a table and a plot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table
from rich.text import Text

_HASH_DIGITS = 12
_ALL_DIGITS = 17
_FEW_DIGITS = 12
_WIDE = 100
KILLED = "K: the same, service killed"


@dataclass(frozen=True)
class Continuation:
    """A number of training steps after a checkpoint.

    Attributes:
        losses: mean loss per learnt token of each step, before its update.
        adapter: hash of the adapter's file after the last step.
        optimizer: hash of the optimizer's file after the last step.
    """

    losses: tuple[float, ...]
    adapter: str
    optimizer: str


@dataclass(frozen=True)
class Comparison:
    """The same steps after a checkpoint, four times.

    Attributes:
        a: on the client that saved it, never interrupted.
        b: on a new client, restored with the optimizer state.
        k: like b, with the service killed in the middle of the steps.
        c: on a new client, restored without the optimizer state.
    """

    a: Continuation
    b: Continuation
    k: Continuation
    c: Continuation

    @property
    def exact(self) -> bool:
        """Whether B equals A: every loss, the adapter and the optimizer state, bit for bit."""
        return self.a == self.b

    @property
    def survived(self) -> bool:
        """Whether K equals A in the same way."""
        return self.a == self.k

    @property
    def cold_differs(self) -> bool:
        """Whether C differs from A, in its losses and in its adapter."""
        return self.a.losses != self.c.losses and self.a.adapter != self.c.adapter

    def problems(self) -> list[str]:
        """List the broken promises."""
        found = []
        for name, run, label in (("B", self.b, "restored run"), ("K", self.k, "killed run")):
            differ = ", ".join(part for part, a, other in _parts(self.a, run) if a != other)
            if differ:
                found.append(f"{name} is not A: {differ} differ. The {label} is not the same run.")
        if not self.cold_differs:
            found.append("C is A: the optimizer state made no difference, so this proves nothing.")
        return found


def _parts(a: Continuation, b: Continuation) -> list[tuple[str, object, object]]:
    return [
        ("losses", a.losses, b.losses),
        ("adapters", a.adapter, b.adapter),
        ("optimizer states", a.optimizer, b.optimizer),
    ]


def comparison_table(comparison: Comparison, first_step: int, width: int) -> Table:
    """Build a table with a row for each step and each hash.

    Args:
        comparison: the continuations.
        first_step: number of their first step.
        width: columns of the terminal. In a narrow one losses are shown with fewer digits.
    """
    table = Table(title="The same steps four times, from one checkpoint", title_justify="left")
    table.add_column("step", justify="right")
    for header in ("A\nuninterrupted", "B\nrestored", "K\nkilled midway", "C\nno optimizer"):
        table.add_column(header, justify="right", no_wrap=True)
    runs = (comparison.a, comparison.b, comparison.k, comparison.c)
    digits = _ALL_DIGITS if width >= _WIDE else _FEW_DIGITS
    for offset, losses in enumerate(zip(*(run.losses for run in runs), strict=True)):
        _add(table, f"{first_step + offset}", [_shown(loss, digits) for loss in losses], losses)
    table.add_section()
    for name, hashes in (
        ("adapter", [run.adapter for run in runs]),
        ("optimizer", [run.optimizer for run in runs]),
    ):
        _add(table, name, [each[:_HASH_DIGITS] for each in hashes], hashes)
    return table


def _shown(loss: float, digits: int) -> str:
    return repr(loss) if digits == _ALL_DIGITS else f"{loss:.{digits}g}"


def _add(table: Table, name: str, shown: Sequence[str], values: Sequence[object]) -> None:
    """Add a row. Values are green if they equal the first one to the last bit, else yellow."""
    rest = [
        Text(text, style="green" if value == values[0] else "yellow")
        for text, value in zip(shown[1:], values[1:], strict=True)
    ]
    table.add_row(name, shown[0], *rest)


def plot(path: Path, training: Sequence[float], comparison: Comparison, title: str) -> None:
    """Plot the loss: all steps on the left, the continuations on the right.

    Args:
        path: the PNG to write.
        training: loss of each step before the checkpoint.
        comparison: the steps after it.
        title: the model and the data.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    whole, zoom = figure.subplots(1, 2, width_ratios=(3, 2))
    saved = len(training)
    whole.plot(range(1, saved + 1), training, color="0.35", lw=1.5, label="training")
    for axes in (whole, zoom):
        for run, style in _styles(comparison):
            axes.plot(range(saved + 1, saved + 1 + len(run.losses)), run.losses, **style)
        axes.set_xlabel("step")
        axes.grid(alpha=0.25)
    whole.axvline(saved + 0.5, color="0.6", lw=1, ls=":")
    whole.annotate("save_state ", (saved + 0.5, max(training)), ha="right", va="top", color="0.4")
    whole.set_ylabel("loss per token (nats)")
    whole.set_title(title, fontsize=10, loc="left", parse_math=False)
    zoom.set_title("after the checkpoint", fontsize=10, loc="left")
    zoom.xaxis.get_major_locator().set_params(integer=True)
    zoom.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _styles(comparison: Comparison) -> list[tuple[Continuation, dict[str, object]]]:
    return [
        (comparison.a, {"color": "#9ecae1", "lw": 6, "label": "A: never interrupted"}),
        (
            comparison.b,
            {"color": "#08519c", "lw": 1.5, "ls": "--", "label": "B: restored with optimizer"},
        ),
        (comparison.k, {"color": "#111111", "lw": 0, "marker": "x", "ms": 4, "label": KILLED}),
        (comparison.c, {"color": "#d94801", "lw": 1.5, "label": "C: restored without optimizer"}),
    ]
