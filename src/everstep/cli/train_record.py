"""The losses of a run, a line each, and their picture.

    losses.jsonl    {"step": 1, "epoch": 0, "loss": 2.5}, …; floats as they were, to the last bit
    loss.png        drawn at the end

A run that goes on drops the lines after its checkpoint: those steps are made again.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

LOSSES = "losses.jsonl"
PICTURE = "loss.png"


class Record:
    """Writes a run's losses. Use as a context manager.

    Args:
        directory: of the files; made when it isn't there.
    """

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.losses = directory / LOSSES
        self.picture = directory / PICTURE
        self._file = self.losses.open("a", encoding="utf-8")

    def __enter__(self) -> Record:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()

    def begin(self, step: int) -> None:
        """Keep the losses of the first so many steps, and drop the others."""
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
        """What was written; without a last line that was cut."""
        for line in self.losses.read_text(encoding="utf-8").splitlines():
            try:
                yield json.loads(line)
            except ValueError:
                return

    def draw(self, title: str) -> None:
        """Draw the losses."""
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
