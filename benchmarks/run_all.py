"""Run every benchmark that yields figures, and print one table.

    python benchmarks/run_all.py [--full] [NAME ...]

Each runs as a process of its own, one after the other, with ``--quick`` unless ``--full`` is given.
A benchmark that fails is named at the end, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from figures import Figure, table

HERE = Path(__file__).parent
_IMPORT = re.compile(r"^from figures import .*\brun$", re.MULTILINE)


def benchmarks() -> list[Path]:
    """Return the scripts that yield figures."""
    others = (each for each in sorted(HERE.glob("*.py")) if each.name != Path(__file__).name)
    return [each for each in others if _IMPORT.search(each.read_text())]


def figures_of(script: Path, *, full: bool) -> list[Figure]:
    """Run a benchmark and return its figures.

    Raises:
        subprocess.CalledProcessError: it failed.
    """
    with tempfile.TemporaryDirectory() as directory:
        written = Path(directory) / "figures.json"
        command = [sys.executable, str(script), "--json", str(written)]
        quick = [] if full else ["--quick"]
        subprocess.run([*command, *quick], check=True, stdout=subprocess.DEVNULL)
        return [Figure(**each) for each in json.loads(written.read_text())]


def main() -> int:
    """Run the benchmarks. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="only these, as in `steps`")
    parser.add_argument("--full", action="store_true", help="measure as each does by itself")
    arguments = parser.parse_args()
    scripts = {each.stem: each for each in benchmarks()}
    unknown = set(arguments.names) - set(scripts)
    if unknown:
        parser.error(f"no benchmark {', '.join(sorted(unknown))}: there are {', '.join(scripts)}")
    figures, failed = [], []
    for number, name in enumerate(chosen := arguments.names or list(scripts), 1):
        print(f"[{number}/{len(chosen)}] {name}", file=sys.stderr, flush=True)
        try:
            figures += figures_of(scripts[name], full=arguments.full)
        except subprocess.CalledProcessError:
            failed.append(name)
    print(table(figures))
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
