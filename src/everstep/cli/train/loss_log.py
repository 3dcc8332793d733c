"""Loss log: the losses of a run as JSON lines, and their plot.

    losses.jsonl    {"step": 1, "epoch": 0, "loss": 2.5}, …, with floats exact to the last bit
    loss.png        drawn at the end

A run that resumes drops the lines after its checkpoint, as those steps are repeated.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

LOSSES = "losses.jsonl"
PICTURE = "loss.png"


class LossLog:
    """Writes a run's losses. Use as a context manager.

    Args:
        directory: directory of the files. Created if absent.

    Attributes:
        losses: path of the log.
        picture: path of the plot.
    """

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.losses = directory / LOSSES
        self.picture = directory / PICTURE
        self._file = self.losses.open("a", encoding="utf-8")

    def __enter__(self) -> LossLog:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def begin(self, step: int) -> None:
        """Begin after a step: drop the losses of all later steps."""
        kept = "".join(json.dumps(line) + "\n" for line in self.lines() if line["step"] <= step)
        self._file.close()
        temporary = self.losses.with_name(f".{LOSSES}")
        temporary.write_text(kept, encoding="utf-8")
        temporary.replace(self.losses)
        self._file = self.losses.open("a", encoding="utf-8")

    def add(self, step: int, epoch: int, loss: float) -> None:
        """Write the loss of a step, counted from 1."""
        self._file.write(json.dumps({"step": step, "epoch": epoch, "loss": loss}) + "\n")
        self._file.flush()

    def lines(self) -> Iterator[dict[str, Any]]:
        """Read the lines, up to the first truncated one."""
        for line in self.losses.read_text(encoding="utf-8").splitlines():
            try:
                yield json.loads(line)
            except ValueError:
                return

    def draw(self, title: str) -> None:
        """Plot the losses."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        lines = list(self.lines())
        figure = Figure(figsize=(8, 4), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        axes.plot([line["step"] for line in lines], [line["loss"] for line in lines], lw=1.5)
        axes.set_xlabel("step")
        axes.set_ylabel("loss per token (nats)")
        axes.set_title(title, fontsize=10, loc="left")
        axes.grid(alpha=0.25)
        figure.savefig(self.picture, dpi=150)
