"""Record kill_midway.py as an animated SVG, the picture at the top of the README.

Runs the program for real, notes when each line appears, and draws the terminal with rich. A line
becomes visible at its own time; pauses are shortened. Readers who prefer reduced motion, and
programs that do not animate SVG, see the whole text.

Usage: python docs/recording/record.py   writes docs/recording/kill_midway.svg
"""

from __future__ import annotations

import io
import re
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.text import Text

HERE = Path(__file__).parent
PROGRAM = HERE / "kill_midway.py"
MAX_PAUSE = 1.1  # seconds
END_PAUSE = 8.0
WIDTH = 84
STYLES = (("#", "dim"), ("$", "bold red"), ("adapter", "bold green"), ("  step", ""))


def record() -> list[tuple[float, str]]:
    """Run the program; return when each line appeared, in seconds with pauses shortened."""
    command = [sys.executable, "-u", str(PROGRAM)]
    lines = [(0.0, f"$ python {PROGRAM.name}")]
    at, last = 0.6, time.monotonic()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            now = time.monotonic()
            at += min(now - last, MAX_PAUSE)
            last = now
            lines.append((at, line.rstrip("\n")))
    if process.returncode:
        raise SystemExit(f"{PROGRAM.name} failed with exit code {process.returncode}")
    return lines


def draw(lines: list[tuple[float, str]]) -> str:
    """Return the SVG: the terminal as rich draws it, with an animation for each line."""
    console = Console(record=True, width=WIDTH, file=io.StringIO(), highlight=False)
    for number, (_, line) in enumerate(lines):
        style = next((style for prefix, style in STYLES if line.startswith(prefix)), "")
        console.print(Text(line, "bold" if number == 0 else style))
    svg = console.export_svg(title="kill -9", unique_id="everstep")
    total = lines[-1][0] + END_PAUSE
    rules = [
        "@media (prefers-reduced-motion: no-preference) {",
        *(_rule(number, begin, total) for number, (begin, _) in enumerate(lines)),
        "}",
    ]
    svg = re.sub(r"@font-face \{[^}]*\}\s*", "", svg)  # a picture that fetches nothing
    svg = svg.replace("Fira Code, monospace", "ui-monospace, Menlo, Consolas, monospace")
    svg = svg.replace("</style>", "\n".join(rules) + "\n</style>", 1)
    return re.sub(
        r'<text class="([^"]*)"([^>]*clip-path="url\(#everstep-line-(\d+)\)")',
        r'<text class="\1 at-\3"\2',
        svg,
    )


def _rule(number: int, begin: float, total: float) -> str:
    share = 100 * begin / total
    return (
        f".at-{number} {{ animation: appear-{number} {total:.2f}s step-end infinite }} "
        f"@keyframes appear-{number} {{ 0% {{ opacity: {1 if begin == 0 else 0} }} "
        f"{share:.2f}% {{ opacity: 1 }} }}"
    )


def main() -> None:
    """Record and write the picture."""
    target = PROGRAM.with_suffix(".svg")
    target.write_text(draw(record()), encoding="utf-8")
    print(f"wrote {target}")


if __name__ == "__main__":
    main()
