"""Training data: files of texts or rows as examples."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from everstep.cli.train.examples import DataError, Example, Text
from everstep.cli.train.rows import RowReader
from everstep.cli.train.stdlib import docstrings
from everstep.text_files import BYTE_ORDER_MARK, TextFileError, decode_text

_ADVICE = {
    ".json": "; for a list of rows, 'jq -c .[] FILE.json > FILE.jsonl' makes one",
    ".parquet": "; with the package datasets, Dataset.from_parquet(FILE).to_json(…) makes one",
    ".csv": "; with the package datasets, Dataset.from_csv(FILE).to_json(…) makes one",
}


@dataclass(frozen=True)
class Source:
    """The examples of a file.

    Attributes:
        examples: at least one.
        digest: SHA-256 of the file, empty for the standard library.
        ignored: how often each field of rows and messages was ignored.
    """

    examples: list[Example]
    digest: str = ""
    ignored: Mapping[str, int] = field(default_factory=dict)


def read_examples(path: Path | None, ignore: Collection[str] = ()) -> Source:
    """Read the examples of a file, in UTF-8 with or without a byte order mark.

    Args:
        path: a ``.txt`` of plain text, or a ``.jsonl`` of rows (see `everstep.cli.train.rows`), or
            None for the docstrings of the standard library, each with its signature as the prompt.
        ignore: fields of rows and messages to ignore.

    Raises:
        DataError: the file can't be read, or a row can't be trained on as it is meant.
    """
    if path is None:
        return Source(list(docstrings()))
    if path.suffix not in (".txt", ".jsonl"):
        raise DataError(f"{path}: give a .txt or a .jsonl file{_ADVICE.get(path.suffix, '')}")
    try:
        data = path.read_bytes()
        text = decode_text(data, str(path))
    except OSError as error:
        raise DataError(f"{path}: can't be read: {error.strerror or error}") from error
    except TextFileError as error:
        raise DataError(str(error)) from error
    if not text.strip():
        raise DataError(f"{path}: is empty; there is nothing to train on")
    digest = hashlib.sha256(data).hexdigest()
    if path.suffix == ".txt":
        return Source([Text(str(path), text.replace("\r\n", "\n"))], digest)
    rows = RowReader(ignore)
    examples = [
        rows.read(f"{path}:{number}", line)
        for number, line in enumerate(map(_stripped, text.split("\n")), 1)
        if line
    ]
    return Source(examples, digest, {key: count for key, count in rows.ignored.items() if count})


def _stripped(line: str) -> str:
    """Strip a line, also of the byte order mark where files were put together."""
    return line.strip().removeprefix(BYTE_ORDER_MARK)
