"""Comparison of two checkpoints' adapters, side by side."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import typer

from everstep.cli.checkpoint.download import fetch
from everstep.cli.checkpoint.tensor_diff import TensorDifference, compare, total
from everstep.cli.common import listing, names, output
from everstep.cli.common.errors import Code, NotFound, Refused
from everstep.cli.common.target import Service, Target
from everstep.client._transport.errors import APIStatusError
from everstep.text_files import read_text
from everstep.wire.messages.inspection import CheckpointDetailsResponse
from everstep.wire.paths import SCHEME

ADAPTER = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
MAX_ANCESTORS = 100
"""Number of checkpoints up to which a lineage is followed."""


@dataclass(frozen=True)
class Side:
    """One side of the comparison.

    Attributes:
        name: path or directory, as it was given.
        directory: directory of its files.
        facts: names and values to show.
        parents: paths of the checkpoints that it was made from.
        ancestors: paths of its parents, their parents and so on, the nearest first. Those that the
            service no longer has are the last of their line.
    """

    name: str
    directory: Path
    facts: dict[str, str]
    parents: list[str] = field(default_factory=list)
    ancestors: list[str] = field(default_factory=list)


def print_diff(target: Target, a: str, b: str, limit: int) -> None:
    """Compare two adapters and print the differences.

    Args:
        target: the service, which is not called if both are directories.
        a: path of a checkpoint, or a directory.
        b: the other one.
        limit: maximum number of tensors, or 0 for all.

    Raises:
        NotFound: one does not exist.
        typer.Exit: with 1, if a tensor differs.
    """
    with contextlib.ExitStack() as stack:
        remote = any(_is_checkpoint(each) for each in (a, b))
        service = stack.enter_context(target.service()) if remote else None
        sides = [stack.enter_context(_side(service, each, target)) for each in (a, b)]
        found = compare(*(side.directory / ADAPTER for side in sides))
    overall = total(found)
    if target.as_json:
        output.print_json(_json(sides, found, overall))
    else:
        _print(sides, found, overall, limit)
    if overall.status != "same":
        raise typer.Exit(Code.FAILED)


def _is_checkpoint(name: str) -> bool:
    """Whether a name is that of a checkpoint: with a colon, and not of a directory."""
    return name.startswith(SCHEME) or (":" in name and not Path(name).is_dir())


@contextlib.contextmanager
def _side(service: Service | None, name: str, target: Target) -> Iterator[Side]:
    if service is None or not _is_checkpoint(name):
        yield _local(name)
        return
    name = names.checkpoint_path(service.rest, name)
    checkpoint = listing.checkpoint(service.rest, name)
    details = service.details(name)
    with tempfile.TemporaryDirectory(prefix="everstep-diff-") as temporary:
        directory = Path(temporary) / "files"
        fetch(service, name, directory, quiet=target.as_json)
        facts = {"saved": output.when_text(checkpoint.time)}
        facts |= _configuration(directory) | _details_facts(details)
        own = output.own_metadata(checkpoint.user_metadata)
        facts |= {f"· {key}": value for key, value in own.items()}
        if details is None:
            yield Side(name, directory, facts)
        else:
            yield Side(name, directory, facts, details.parents, _ancestors(service, details))


def _ancestors(service: Service, details: CheckpointDetailsResponse) -> list[str]:
    """Follow the parents of a checkpoint, breadth first."""
    found: dict[str, None] = {}
    waiting = list(details.parents)
    while waiting and len(found) < MAX_ANCESTORS:
        path = waiting.pop(0)
        if path in found:
            continue
        found[path] = None
        if path.startswith(SCHEME):
            with contextlib.suppress(APIStatusError):  # deleted, or of another service
                above = service.details(path)
                waiting += [] if above is None else above.parents
    return list(found)


def _local(name: str) -> Side:
    directory = Path(name).expanduser()
    if not directory.is_dir():
        raise NotFound(f"There is no directory {name}; a checkpoint's path begins with {SCHEME}.")
    if not (directory / ADAPTER).exists():
        raise NotFound(f"{name} holds no {ADAPTER}.")
    return Side(name, directory, _configuration(directory))


def _configuration(directory: Path) -> dict[str, str]:
    """Read the facts in an adapter's PEFT configuration."""
    path = directory / CONFIG
    if not path.exists():
        return {}
    try:
        config = json.loads(read_text(path))
        facts = {
            "base model": config.get("base_model_name_or_path"),
            "rank": config.get("r"),
            "alpha": config.get("lora_alpha"),
            "modules": _modules(config.get("target_modules"), config.get("target_parameters")),
        }
    except (ValueError, AttributeError) as error:
        raise Refused(f"{path} is not an adapter's configuration: {error}") from error
    return {key: str(value) for key, value in facts.items() if value is not None}


def _modules(modules: Any, parameters: Any) -> str | None:
    if not isinstance(modules, list):
        return None if modules is None else str(modules)
    named = [str(each).removesuffix(".weight") for each in parameters or ()]
    return ", ".join(sorted([*map(str, modules), *named]))


def _details_facts(details: CheckpointDetailsResponse | None) -> dict[str, str]:
    if details is None:
        return {}
    return {
        "step": str(details.step),
        "seed": str(details.lora.get("seed", "–")),
        "optimizer": "none" if details.optimizer is None else str(details.optimizer["type"]),
        "base": details.base_fingerprint[:16],
    }


def _related(a: Side, b: Side) -> str | None:
    """Describe how the two are related, or None if their lineages don't meet."""
    if a.name in b.ancestors:
        return "B descends from A"
    if b.name in a.ancestors:
        return "A descends from B"
    common = [each for each in a.ancestors if each in b.ancestors]
    return f"both descend from {common[0]}" if common else None


def _json(
    sides: Sequence[Side], found: Sequence[TensorDifference], overall: TensorDifference
) -> dict[str, Any]:
    a, b = ({"path": e.name, "facts": e.facts, "parents": e.parents} for e in sides)
    return {
        "same": overall.status == "same",
        "a": a,
        "b": b,
        "lineage": _related(*sides),
        "all": overall.to_json(),
        "tensors": [each.to_json() for each in found],
    }


def _print(
    sides: Sequence[Side], found: Sequence[TensorDifference], overall: TensorDifference, limit: int
) -> None:
    out = output.console()
    a, b = sides
    for letter, side in (("A", a), ("B", b)):
        out.print(f"{letter}  {side.name}")
        for each in side.parents:
            out.print(f"   from {each}")
    if related := _related(a, b):
        out.print(f"   {related}")
    out.print()
    _print_facts(a, b)
    out.print()
    differing = [each for each in found if each.status != "same"]
    if not differing:
        out.print(f"All {output.counted(len(found), 'tensor')} are equal, bit for bit.")
        return
    shown = differing[: limit or None]
    output.print_rows(
        ("|B-A|/|A|", "|A|", "|B|", "max|B-A|", "cosine", "", "tensor"),
        [_row(each) for each in [overall, *shown]],
    )
    same = len(found) - len(differing)
    out.print(
        f"{len(differing)} of {output.counted(len(found), 'tensor')} differ, {same} are equal, "
        f"bit for bit." + (f" {len(shown)} are shown." if len(shown) < len(differing) else "")
    )


def _print_facts(a: Side, b: Side) -> None:
    """Print the facts side by side, or one below the other in a narrow terminal."""
    keys = [*a.facts, *(key for key in b.facts if key not in a.facts)]
    both = [(key, a.facts.get(key, "–"), b.facts.get(key, "–")) for key in keys]
    columns = [
        ("", key, left, "=") if left == right else ("≠", key, left, right)
        for key, left, right in both
    ]
    if output.fits(columns):
        output.print_columns(("", "", "A", "B"), columns)
        return
    below = [("", key, left) for key, left, right in both if left == right]
    for key, left, right in both:
        if left != right:
            below += [("≠ A", key, left), ("≠ B", key, right)]
    output.print_columns(("", "", "A and B"), below)


def _row(each: TensorDifference) -> tuple[str, ...]:
    numbers = (each.relative, each.norm_a, each.norm_b, each.max_abs)
    cells = ["" if number is None else f"{number:.3g}" for number in numbers]
    cosine = "" if each.cosine is None else f"{each.cosine:.6f}"
    status = "" if each.status == "changed" else each.status
    return (*cells, cosine, status, each.name)
