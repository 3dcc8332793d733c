"""What the checks found, for programs: JSON, JUnit XML, the exit code."""

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
        base_url: its address.
        model: the base model that was trained.
        results: one for each check that ran.
        noise: by how much two equal runs of it differ at most; 0 where they are bit-equal, None
            where that was not measured.
    """

    base_url: str
    model: str
    results: Sequence[Result]
    noise: float | None = None

    @property
    def counts(self) -> dict[Verdict, int]:
        """How many checks ended in which way."""
        found = Counter(result.verdict for result in self.results)
        return {verdict: found[verdict] for verdict in Verdict}

    @property
    def exit_code(self) -> int:
        """0 where nothing failed and every check could tell, else 1."""
        return int(any(result.bad for result in self.results))

    @property
    def seconds(self) -> float:
        """How long the checks took."""
        return sum(result.seconds for result in self.results)

    def write_json(self, path: Path) -> None:
        """Write it as JSON."""
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
        """Write it as JUnit XML; what is not supported is skipped."""
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
    """The text without what XML can't hold."""
    return _NOT_XML.sub("�", text)
