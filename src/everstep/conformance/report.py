"""Report: the results for programs, as JSON, JUnit XML and an exit code."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from xml.etree import ElementTree

from everstep.conformance.verdicts import Result, Verdict

_NOT_XML = re.compile(r"[^\t\n\r -\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


@dataclass(frozen=True)
class Report:
    """All results of one service.

    Attributes:
        base_url: the service's address.
        model: the base model that was trained.
        results: one for each check that ran.
        noise: largest difference between two equal runs. 0 if they are identical, None if it was
            not measured.
    """

    base_url: str
    model: str
    results: Sequence[Result]
    noise: float | None = None

    @property
    def counts(self) -> dict[Verdict, int]:
        """Number of checks by verdict."""
        found = Counter(result.verdict for result in self.results)
        return {verdict: found[verdict] for verdict in Verdict}

    @property
    def exit_code(self) -> int:
        """0 if no check failed or ended in an error, else 1."""
        return int(any(result.bad for result in self.results))

    @property
    def seconds(self) -> float:
        """Duration of all checks."""
        return sum(result.seconds for result in self.results)

    def write_json(self, path: Path) -> None:
        """Write the report as JSON."""
        content = {
            "base_url": self.base_url,
            "model": self.model,
            "noise": self.noise,
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "counts": {str(verdict): count for verdict, count in self.counts.items()},
            "exit_code": self.exit_code,
            "checks": [asdict(result) for result in self.results],
        }
        path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    def write_junit(self, path: Path) -> None:
        """Write the report as JUnit XML. Checks that are not supported count as skipped."""
        counts = self.counts
        numbers = {
            "tests": str(len(self.results)),
            "failures": str(counts[Verdict.FAIL]),
            "errors": str(counts[Verdict.ERROR]),
            "skipped": str(counts[Verdict.NOT_SUPPORTED]),
            "time": f"{self.seconds:.3f}",
        }
        suites = ElementTree.Element("testsuites", {"name": "everstep conformance", **numbers})
        suite = ElementTree.SubElement(suites, "testsuite", {"name": self.base_url, **numbers})
        for result in self.results:
            _add_case(suite, result)
        ElementTree.indent(suites)
        tree = ElementTree.ElementTree(suites)
        tree.write(path, encoding="utf-8", xml_declaration=True)


_ELEMENTS = {
    Verdict.FAIL: "failure",
    Verdict.ERROR: "error",
    Verdict.NOT_SUPPORTED: "skipped",
}


def _add_case(suite: ElementTree.Element, result: Result) -> None:
    attributes = {
        "classname": "everstep.conformance",
        "name": result.name,
        "time": f"{result.seconds:.3f}",
    }
    case = ElementTree.SubElement(suite, "testcase", attributes)
    element = _ELEMENTS.get(result.verdict)
    if element is None:
        return
    end = ElementTree.SubElement(case, element, {"message": _xml(result.detail)})
    if result.bad:
        lines = [result.promise, f"sent: {result.sent}", f"came back: {result.came_back}"]
        end.text = _xml("\n".join(lines))


def _xml(text: str) -> str:
    """Replace characters that XML can't contain."""
    return _NOT_XML.sub("�", text)
