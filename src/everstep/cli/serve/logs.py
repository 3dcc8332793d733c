"""The log of services that run in the background: its last lines, and new ones as they come."""

from __future__ import annotations

import codecs
import contextlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from time import sleep
from typing import BinaryIO, NamedTuple

from everstep import service_home
from everstep.cli.common import service_file
from everstep.cli.common.errors import NotFound, Refused
from everstep.cli.common.output import messages, printable

_POLL_SECONDS = 0.2
_BLOCK_BYTES = 64 * 1024


def print_log(home: Path, lines: int | None, follow: bool) -> None:
    """Print the log of the service on a home, or of the last one that ran in the background.

    Args:
        home: the home.
        lines: number of last lines. None: all.
        follow: print new lines until no service runs.

    Raises:
        NotFound: no service has logged there.
        Refused: the service that runs logs to its terminal.
    """
    home = home.expanduser().resolve()
    path = service_home.log_path(home)
    record = service_home.living(home)
    if record is not None and record.process and not record.log:
        raise Refused(
            f"the service on {home} (process {record.process}) runs in the foreground: its log is "
            "its terminal, or where its output was sent. 'everstep serve --detach' keeps one."
        )
    used = service_file.is_used(home)
    write = _writer()
    with contextlib.ExitStack() as files:
        try:
            log = files.enter_context(path.open("rb"))
        except FileNotFoundError as error:
            raise NotFound(
                f"There is no log: no service has run in the background on {home}."
            ) from error
        log.seek(0 if lines is None else _start_of_last(log, lines))
        _copy(log, write)
        if not follow:
            return
        _follow(log, home, write, files)
    ended = "the service has ended" if used else f"no service runs on {home}"
    messages().print(f"everstep: {ended}")


def _follow(
    log: BinaryIO, home: Path, write: Callable[[bytes], None], files: contextlib.ExitStack
) -> None:
    """Print what is added to a log until no service runs. The log may be put aside or emptied."""
    path, former = service_home.log_path(home), service_home.former_log_path(home)
    known = _stamp(former)
    while True:
        # Both before the log is read: what was written until then is printed.
        used, replaced = service_file.is_used(home), _was_replaced(log, path)
        position, size = log.tell(), os.fstat(log.fileno()).st_size
        stamp = _stamp(former)
        copied = stamp is not None and stamp != known and size < stamp.size
        if copied:
            with former.open("rb") as copy:
                copy.seek(position)
                _copy(copy, write)
        if copied or size < position:  # emptied in place
            log.seek(0)
            known = stamp
        _copy(log, write)
        if replaced:
            known = _stamp(former)
            log.close()
            log = files.enter_context(path.open("rb"))
        elif used:
            sleep(_POLL_SECONDS)
        else:
            return


def _was_replaced(log: BinaryIO, path: Path) -> bool:
    try:
        return not os.path.samestat(os.fstat(log.fileno()), path.stat())
    except FileNotFoundError:
        return False  # put aside, and not begun anew yet


class _Stamp(NamedTuple):
    """What changes when a file is written anew, and its size in bytes."""

    file: int
    written: int
    size: int


def _stamp(path: Path) -> _Stamp | None:
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return _Stamp(found.st_ino, found.st_mtime_ns, found.st_size)


def _copy(log: BinaryIO, write: Callable[[bytes], None]) -> None:
    while block := log.read(_BLOCK_BYTES):
        write(block)


def _writer() -> Callable[[bytes], None]:
    """Return a function that prints bytes as they are, or without control characters."""
    if not sys.stdout.isatty():
        output = sys.stdout.buffer

        def write(block: bytes) -> None:
            output.write(block)
            output.flush()

        return write
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def show(block: bytes) -> None:
        print(printable(decoder.decode(block)), end="", flush=True)

    return show


def _start_of_last(log: BinaryIO, lines: int) -> int:
    """Return where the last lines of a file begin. It is read backwards."""
    position = end = log.seek(0, os.SEEK_END)
    if lines == 0:
        return end
    missing = lines
    while position > 0:
        size = min(_BLOCK_BYTES, position)
        position -= size
        log.seek(position)
        block = log.read(size)
        found = len(block) - (position + size == end)  # the last line's own end doesn't count
        while (found := block.rfind(b"\n", 0, found)) >= 0:
            missing -= 1
            if missing == 0:
                return position + found + 1
    return 0
