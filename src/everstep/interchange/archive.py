"""Adapter archives: packs an adapter's files into a tar, and unpacks untrusted tars.

Unpacking takes the files listed below from the archive's root or from one directory in it, and
skips other files. Entries that could escape from the target directory (links, devices, ``..``,
absolute names) or replace another entry (a name twice) reject the whole archive.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from everstep.integers import parse_natural
from everstep.interchange.errors import UnreadableFile, UnsupportedAdapter
from everstep.interchange.peft_config import ADAPTER, ADAPTER_CONFIG, PICKLED

OPTIMIZER = "optimizer.safetensors"
GRADIENTS = "gradients.safetensors"
MANIFEST = "manifest.json"
ARCHIVE_FILES = (ADAPTER_CONFIG, ADAPTER, OPTIMIZER, GRADIENTS, MANIFEST)
"""Files of a checkpoint. The hosted service's archives hold a checkpoint_complete as well."""
_COMPLETE = "checkpoint_complete"
_MAX_SIZES = {ADAPTER_CONFIG: 1 << 20, MANIFEST: 4 << 20}
_MAX_NAMED = 10
_BLOCK = tarfile.BLOCKSIZE
_CHUNK = 1 << 20
MAX_HEADER_BYTES = 64 << 10
_REGULAR = (tarfile.REGTYPE, tarfile.AREGTYPE)
_HEADERS = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME)


def adapter_files(directory: Path) -> dict[str, Path]:
    """Return the files of a directory that belong into its archive.

    Raises:
        UnsupportedAdapter: its weights are a pickle.
        UnreadableFile: a required file is missing.
    """
    found = {name: directory / name for name in ARCHIVE_FILES if (directory / name).is_file()}
    if ADAPTER not in found and (directory / PICKLED).exists():
        raise pickled_weights()
    for name in (ADAPTER_CONFIG, ADAPTER):
        if name not in found:
            raise UnreadableFile(f"{directory} holds no {name}: it is not a PEFT adapter.")
    return found


def other_files(directory: Path) -> list[str]:
    """Return the names in a directory that do not belong into its archive."""
    return sorted({each.name for each in directory.iterdir()} - {*ARCHIVE_FILES, _COMPLETE})


def left_out_note(names: Sequence[str]) -> list[str]:
    """Return a note that files were not imported, nothing if there are none."""
    named = ", ".join(f"{name:.100}" for name in names[:_MAX_NAMED])
    more = f" and {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else ""
    return [f"Not imported, as a checkpoint has no such files: {named}{more}."] if names else []


def pickled_weights() -> UnsupportedAdapter:
    """Return the error for an adapter whose weights are a pickle."""
    return UnsupportedAdapter(
        PICKLED,
        "a pickle, which can run code when it is read. Load the adapter with PEFT where you trust "
        "it, and save it with save_pretrained(directory, safe_serialization=True).",
    )


def pack(files: Mapping[str, Path]) -> Iterator[bytes]:
    """Pack files into a tar, in bounded chunks. The same content gives the same bytes."""
    for name, path in files.items():
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            member = tarfile.TarInfo(name)
            member.size = size
            yield member.tobuf(tarfile.PAX_FORMAT)
            remaining = size
            while remaining:
                chunk = file.read(min(_CHUNK, remaining))
                if not chunk:
                    raise UnreadableFile(f"{path} became shorter while it was read.")
                remaining -= len(chunk)
                yield chunk
            yield bytes(-size % _BLOCK)
    yield bytes(2 * _BLOCK)


def unpack(archive: Path, directory: Path) -> list[str]:
    """Unpack an adapter's files into an empty directory.

    Returns:
        The names of the files that were left out.

    Raises:
        UnsupportedAdapter: its weights are a pickle.
        UnreadableFile: it is not a tar, is damaged, or holds a forbidden entry.
    """
    seen: set[str] = set()
    with archive.open("rb") as file:
        for member in _members(file):
            name = _name(member.name)
            if name in seen:
                raise UnreadableFile(f"The archive holds {name} more than once.")
            seen.add(name)
            if name not in ARCHIVE_FILES:
                continue
            if member.size > _MAX_SIZES.get(name, member.size):
                raise UnreadableFile(
                    f"{name} has {member.size} bytes; it may have at most {_MAX_SIZES[name]}."
                )
            with (directory / name).open("xb") as target:
                for chunk in _content(file, member.size):
                    target.write(chunk)
    if ADAPTER not in seen and PICKLED in seen:
        raise pickled_weights()
    for name in (ADAPTER_CONFIG, ADAPTER):
        if name not in seen:
            raise UnreadableFile(f"The archive holds no {name}: it is not a PEFT adapter.")
    return sorted(seen - {*ARCHIVE_FILES, _COMPLETE})


@dataclass
class _Member:
    """A regular file of an archive. The archive is positioned at its content."""

    name: str
    size: int


def _members(file: BinaryIO) -> Iterator[_Member]:
    """Iterate over a tar's regular files. A consumer may read any part of each one's content."""
    extended: dict[str, str] = {}
    end = os.fstat(file.fileno()).st_size
    while (block := file.read(_BLOCK)) != bytes(_BLOCK):
        try:
            header = tarfile.TarInfo.frombuf(block, "utf-8", "strict")
        except (tarfile.HeaderError, UnicodeDecodeError) as error:
            raise UnreadableFile(f"The archive is not a tar, or damaged: {error}") from error
        if header.type in _HEADERS:
            extended |= _read_extended_header(file, header)
            continue
        if header.type not in (*_REGULAR, tarfile.DIRTYPE) or "GNU.sparse.major" in extended:
            raise UnreadableFile(
                f"The archive holds {header.name!r:.200}, which is neither file nor directory."
            )
        name, size = extended.get("path", header.name), _size(extended, header)
        extended = {}
        begin = file.tell()
        if size > end - begin:
            raise _cut_off()
        if header.type == tarfile.DIRTYPE:
            _name(f"{name.rstrip('/')}/x")
        else:
            yield _Member(name, size)
        file.seek(begin + size + -size % _BLOCK)


def _read_extended_header(file: BinaryIO, header: tarfile.TarInfo) -> dict[str, str]:
    """Read the names and sizes that do not fit into the next member's own header."""
    if not 0 <= header.size <= MAX_HEADER_BYTES:
        raise UnreadableFile(
            f"The archive has a header of {header.size} bytes; the maximum is {MAX_HEADER_BYTES}."
        )
    data = b"".join(_content(file, header.size + -header.size % _BLOCK))[: header.size]
    try:
        if header.type == tarfile.GNUTYPE_LONGNAME:
            return {"path": data.rstrip(b"\0").decode()}
        records = {}
        while data:
            digits = data.partition(b" ")[0].decode()
            length = parse_natural(digits, MAX_HEADER_BYTES) or 0
            key, equals, value = data[:length].partition(b" ")[2].partition(b"=")
            if length < 1 or not equals or not value.endswith(b"\n"):
                raise ValueError("a record is malformed")
            records[key.decode()] = value[:-1].decode()
            data = data[length:]
    except ValueError as error:
        raise UnreadableFile(f"The archive has a header that can't be read: {error}") from error
    return records if header.type == tarfile.XHDTYPE else {}


def _size(extended: Mapping[str, str], header: tarfile.TarInfo) -> int:
    text = extended.get("size", str(header.size))
    size = parse_natural(text)
    if size is None:
        raise UnreadableFile(f"The archive gives {text:.50} as the size of a file.")
    return size


def _name(text: str) -> str:
    """Return the file's own name. Raises `UnreadableFile` for a path that could escape."""
    path = PurePosixPath(text)
    if path.is_absolute() or ".." in path.parts or "\\" in text or not text.isprintable():
        raise UnreadableFile(f"The archive holds {text!r:.200}, which leads out of it.")
    return path.name if len(path.parts) <= 2 else str(path)


def _content(file: BinaryIO, size: int) -> Iterator[bytes]:
    while size:
        chunk = file.read(min(_CHUNK, size))
        if not chunk:
            raise _cut_off()
        size -= len(chunk)
        yield chunk


def _cut_off() -> UnreadableFile:
    return UnreadableFile("The archive ends in the middle; it was cut off.")
