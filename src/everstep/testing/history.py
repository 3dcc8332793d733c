"""History: the acknowledgements of a program, and the states that they allow after its death.

A program reports its changes, one line of JSON each: that it begins to change things, and that the
change was acknowledged, or failed. A thing has a name and a value: a JSON object, or None if the
thing does not exist. From this follows the possible state of each thing after a crash:

- An acknowledged change is there, with every bit of its value (for example a hash of the bytes).
- A change without an acknowledgement is there or absent, whole: the old value or the new one.
- Changes that were begun together are all there or all absent.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

Value = dict[str, Any] | None
_write = os.write  # faulty calls are for the program, not for its reports


@dataclass(frozen=True)
class Violation:
    """A broken invariant.

    Attributes:
        rule: the invariant, in a few words.
        thing: the affected thing.
        detail: the value that was found, and the expected one.
    """

    rule: str
    thing: str
    detail: str

    def __str__(self) -> str:
        return f"{self.rule}: {self.thing}: {self.detail}"


class Reporter:
    """Reports the changes of a program.

    Args:
        sink: a pipe or file, where one write is one line, or a function that receives the lines.
        pause_after: hang after this many acknowledgements.
        pause_on: count only acknowledgements of things whose names begin like this.
    """

    def __init__(
        self,
        sink: int | Callable[[bytes], object],
        pause_after: int | None = None,
        pause_on: str = "",
    ) -> None:
        self._sink = sink
        self._pause_after = pause_after
        self._pause_on = pause_on
        self._count = 0
        self._acknowledged = 0

    def report(self, **line: Any) -> None:
        """Report anything."""
        data = json.dumps(line).encode() + b"\n"
        if isinstance(self._sink, int):
            _write(self._sink, data)
        else:
            self._sink(data)

    @contextmanager
    def doing(self, changes: Mapping[str, Value]) -> Iterator[dict[str, Value]]:
        """Report that changes begin, and how they end.

        Args:
            changes: the new value of each thing.

        Yields:
            A copy of the changes, to which values may be added that are only known afterwards.
        """
        self._count += 1
        number = self._count
        after = dict(changes)
        self.report(begin=number, changes=after)
        try:
            yield after
        except Exception as error:
            self.report(failed=number, error=repr(error))
            raise
        self.report(end=number, changes=after)
        self._acknowledged += any(thing.startswith(self._pause_on) for thing in after)
        if self._acknowledged == self._pause_after:
            self.hang()

    def hang(self) -> None:
        """Report a pause, and hang."""
        self.report(paused=True)
        while True:
            os.read(self._never(), 1)

    def _never(self) -> int:
        """Return the end of a pipe into which nobody writes."""
        ours, self._other_end = os.pipe()
        return ours


@dataclass
class History:
    """All reports of a program, and their meaning.

    Attributes:
        known: each thing's last certain value.
        pending: changes without an end, by number.
        failures: changes that failed, as text.
        broken: invariants that the program itself found broken.
        acknowledged: number of acknowledged changes.
        paused: whether the program hangs.
        done: whether the program ended.
    """

    known: dict[str, Value] = field(default_factory=dict)
    pending: dict[int, dict[str, Value]] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    acknowledged: int = 0
    paused: bool = False
    done: bool = False

    def feed(self, lines: Iterable[bytes | str], *, heard: bool = True) -> None:
        """Add reports.

        Args:
            lines: lines of JSON.
            heard: whether anyone could have received them. During a power cut a kernel may still
                report a write as durable, although on a real machine nobody would receive that.
                Of reports that were not heard, only the beginnings of changes count.
        """
        for each in lines:
            line = json.loads(each)
            if heard or "begin" in line:
                self._take(line)

    def _take(self, line: dict[str, Any]) -> None:
        if "begin" in line:
            self.pending[line["begin"]] = line["changes"]
        elif "end" in line:
            del self.pending[line["end"]]
            self.known.update(line["changes"])
            self.acknowledged += 1
            # an older change of the same thing that failed can no more come to be
            for changes in self.pending.values():
                for thing in line["changes"]:
                    changes.pop(thing, None)
        elif "failed" in line:
            self.failures.append(line["error"])
        elif "broken" in line:
            self.broken.append(line["broken"])
        self.paused |= "paused" in line
        self.done |= "done" in line

    def allowed(self, thing: str) -> list[Value]:
        """Return a thing's possible values: the last certain one and those of pending changes."""
        begun = [each[thing] for each in self.pending.values() if thing in each]
        return [self.known.get(thing), *begun]

    def judge(self, found: Mapping[str, Value]) -> list[Violation]:
        """Compare the history with a state that was found.

        Args:
            found: every thing that exists. One that can't be read is ``{"damaged": why}``.
        """
        things = {*self.known, *found}.union(*self.pending.values())
        wrong = [v for thing in sorted(things) for v in self._wrong(thing, found.get(thing))]
        wrong += [Violation("the program found it broken", "", each) for each in self.broken]
        for number, changes in self.pending.items():
            later = {t for n, each in self.pending.items() if n > number for t in each}
            last = {thing: value for thing, value in changes.items() if thing not in later}
            wrong += _torn(last, self.known, found)
        return wrong

    def restart_from(self, found: Mapping[str, Value]) -> None:
        """Take a state that was found after a restart as the certain one."""
        self.known = dict(found)
        self.pending.clear()
        self.failures.clear()
        self.paused = self.done = False

    def _wrong(self, thing: str, value: Value) -> Iterator[Violation]:
        allowed = self.allowed(thing)
        if any(fits(each, value) for each in allowed):
            return
        detail = f"found {value}, should be one of {allowed}"
        if value is None and len(allowed) > 1:
            yield Violation("neither the old nor the new is there", thing, detail)
        elif value is None:
            yield Violation("acknowledged and lost", thing, detail)
        elif "damaged" in value:
            yield Violation("damaged", thing, detail)
        elif allowed == [None]:
            yield Violation("there, and should not be", thing, detail)
        else:
            yield Violation("not what was written", thing, detail)


def fits(expected: Value, found: Value) -> bool:
    """Return whether a found value has everything that was expected, and maybe more."""
    if expected is None or found is None:
        return expected is found
    return all(name in found and found[name] == value for name, value in expected.items())


def _torn(
    changes: Mapping[str, Value], known: Mapping[str, Value], found: Mapping[str, Value]
) -> Iterator[Violation]:
    """Whether changes that were begun as one are there in part."""
    sides: dict[str, str] = {}
    for thing, new in changes.items():
        is_old = fits(known.get(thing), found.get(thing))
        is_new = fits(new, found.get(thing))
        if is_old != is_new:
            sides[thing] = "new" if is_new else "old"
    if len(set(sides.values())) > 1:
        yield Violation("half of one change", ", ".join(sides), str(sides))
