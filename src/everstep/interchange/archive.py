"""An adapter's files as a tar: packed from a directory, unpacked as what anybody may have sent.

Of an archive only the files below are taken, from its root or from one directory in it. What could
lead out of the place where it is unpacked, or take it over (links, devices, ``..``, absolute
names, a name twice), refuses the whole of it; other files in it are passed over.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from everstep.interchange.errors import AdapterRefused, Unreadable
from everstep.interchange.peft_config import ADAPTER, ADAPTER_CONFIG, PICKLED

OPTIMIZER = "optimizer.safetensors"
GRADIENTS = "gradients.safetensors"
MANIFEST = "manifest.json"
TAKEN = (ADAPTER_CONFIG, ADAPTER, OPTIMIZER, GRADIENTS, MANIFEST)
"""Files that make a checkpoint; the hosted service's archive has a checkpoint_complete as well."""
_SMALL = {ADAPTER_CONFIG: 1 << 20, MANIFEST: 4 << 20}
_BLOCK = tarfile.BLOCKSIZE
_PIECE = 1 << 20
_LONGEST_HEADER = 64 << 10
_PLAIN = (tarfile.REGTYPE, tarfile.AREGTYPE)
_HEADERS = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME)


def files_of(directory: Path) -> dict[str, Path]:
    """The files of a directory that an archive of it holds.

    Raises:
        AdapterRefused: its weights are a pickle.
        Unreadable: one that there has to be isn't there.
    """
    found = {name: directory / name for name in TAKEN if (directory / name).is_file()}
    if ADAPTER not in found and (directory / PICKLED).exists():
        raise pickled()
    for name in (ADAPTER_CONFIG, ADAPTER):
        if name not in found:
            raise Unreadable(f"{directory} holds no {name}: it is no adapter in PEFT's format.")
    return found


def pickled() -> AdapterRefused:
    """The refusal of an adapter whose weights are a pickle."""
    return AdapterRefused(
        PICKLED,
        "a pickle, which can run code when it is read. Load the adapter with PEFT where you trust "
        "it, and save it with save_pretrained(directory, safe_serialization=True).",
    )


def pack(files: Mapping[str, Path]) -> Iterator[bytes]:
    """A tar of files, one bounded piece after the other; the same bytes for the same content."""
    for name, path in files.items():
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            member = tarfile.TarInfo(name)
            member.size = size
            yield member.tobuf(tarfile.PAX_FORMAT)
            left = size
            while left:
                piece = file.read(min(_PIECE, left))
                if not piece:
                    raise Unreadable(f"{path} became shorter while it was read.")
                left -= len(piece)
                yield piece
            yield bytes(-size % _BLOCK)
    yield bytes(2 * _BLOCK)


def unpack(archive: Path, directory: Path) -> None:
    """Unpack an adapter's files into an empty directory.

    Raises:
        AdapterRefused: its weights are a pickle.
        Unreadable: it is no tar, a broken one, or one that is not to be trusted.
    """
    seen: set[str] = set()
    with archive.open("rb") as file:
        for member in _members(file):
            name = _name(member.name)
            if name in seen:
                raise Unreadable(f"The archive holds {name} more than once.")
            seen.add(name)
            if name not in TAKEN:
                continue
            if member.size > _SMALL.get(name, member.size):
                raise Unreadable(f"{name} has {member.size} bytes; it has {_SMALL[name]} at most.")
            with (directory / name).open("xb") as target:
                for piece in _content(file, member.size):
                    target.write(piece)
    if ADAPTER not in seen and PICKLED in seen:
        raise pickled()
    for name in (ADAPTER_CONFIG, ADAPTER):
        if name not in seen:
            raise Unreadable(f"The archive holds no {name}: it is no adapter in PEFT's format.")


@dataclass
class _Member:
    """A regular file of an archive; its content is where the file stands."""

    name: str
    size: int


def _members(file: BinaryIO) -> Iterator[_Member]:
    """The regular files of a tar; after each the next is found, however much of it was read."""
    said: dict[str, str] = {}
    while (block := file.read(_BLOCK)) != bytes(_BLOCK):
        try:
            header = tarfile.TarInfo.frombuf(block, "utf-8", "strict")
        except (tarfile.HeaderError, UnicodeDecodeError) as error:
            raise Unreadable(f"The archive is no tar, or broken: {error}") from error
        if header.type in _HEADERS:
            said |= _extended(file, header)
            continue
        if header.type not in (*_PLAIN, tarfile.DIRTYPE) or "GNU.sparse.major" in said:
            raise Unreadable(
                f"The archive holds {header.name!r:.200}, which is neither file nor directory."
            )
        name, size = said.get("path", header.name), _size(said, header)
        said = {}
        begin = file.tell()
        if header.type == tarfile.DIRTYPE:
            _name(f"{name.rstrip('/')}/x")
        else:
            yield _Member(name, size)
        file.seek(begin + size + -size % _BLOCK)


def _extended(file: BinaryIO, header: tarfile.TarInfo) -> dict[str, str]:
    """What a header says of the member after it: of names and sizes that don't fit into its own."""
    if header.size > _LONGEST_HEADER:
        raise Unreadable(
            f"The archive has a header of {header.size} bytes; it is not to be trusted."
        )
    data = b"".join(_content(file, header.size + -header.size % _BLOCK))[: header.size]
    try:
        if header.type == tarfile.GNUTYPE_LONGNAME:
            return {"path": data.rstrip(b"\0").decode()}
        said = {}
        while data:
            length = int(data.partition(b" ")[0])
            key, equals, value = data[:length].partition(b" ")[2].partition(b"=")
            if length < 1 or not equals or not value.endswith(b"\n"):
                raise ValueError("a record of it is malformed")
            said[key.decode()] = value[:-1].decode()
            data = data[length:]
    except ValueError as error:
        raise Unreadable(f"The archive has a header that can't be read: {error}") from error
    return said if header.type == tarfile.XHDTYPE else {}


def _size(said: Mapping[str, str], header: tarfile.TarInfo) -> int:
    text = said.get("size", str(header.size))
    if not text.isdecimal():
        raise Unreadable(f"The archive says that a file has {text:.50} bytes.")
    return int(text)


def _name(text: str) -> str:
    """The file's own name; raises `Unreadable` for one that could lead anywhere else."""
    path = PurePosixPath(text)
    if path.is_absolute() or ".." in path.parts or "\\" in text or not text.isprintable():
        raise Unreadable(f"The archive holds {text!r:.200}, which leads out of it.")
    return path.name if len(path.parts) <= 2 else str(path)


def _content(file: BinaryIO, size: int) -> Iterator[bytes]:
    while size:
        piece = file.read(min(_PIECE, size))
        if not piece:
            raise Unreadable("The archive ends in the middle; it was cut off.")
        size -= len(piece)
        yield piece
