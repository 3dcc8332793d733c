"""What ``everstep checkpoint diff`` does: fetches two adapters, compares, and prints."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import typer

from everstep.cli import listing, output
from everstep.cli.download_work import fetch
from everstep.cli.errors import Code, NotFound, Refused
from everstep.cli.target import Service, Target
from everstep.cli.tensor_diff import TensorDifference, compare, total
from everstep.client._errors import APIStatusError
from everstep.wire.inspection import CheckpointDetailsResponse
from everstep.wire.paths import SCHEME

ADAPTER = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
_FARTHEST = 100
"""Checkpoints back to where the descent is followed."""


@dataclass(frozen=True)
class Side:
    """One of the two.

    Attributes:
        name: as it was given.
        directory: where its files lie.
        facts: what is known of it, by what people call that.
        parents: paths of the checkpoints that it was made from.
        ancestors: paths of all that it descends from, as far as they are there; the nearest first.
    """

    name: str
    directory: Path
    facts: dict[str, str]
    parents: list[str] = field(default_factory=list)
    ancestors: list[str] = field(default_factory=list)


def diff(target: Target, a: str, b: str, limit: int) -> None:
    """Compare two adapters, and print how they differ; see the command.

    Raises:
        NotFound: one is not there.
        typer.Exit: with 1, when a tensor differs.
    """
    with contextlib.ExitStack() as stack:
        remote = any(each.startswith(SCHEME) for each in (a, b))
        service = stack.enter_context(target.service()) if remote else None
        sides = [stack.enter_context(_side(service, each, target)) for each in (a, b)]
        found = compare(*(side.directory / ADAPTER for side in sides))
    whole = total(found)
    if target.as_json:
        output.print_json(_json(sides, found, whole))
    else:
        _print(sides, found, whole, limit)
    if whole.status != "same":
        raise typer.Exit(Code.FAILED)


@contextlib.contextmanager
def _side(service: Service | None, name: str, target: Target) -> Iterator[Side]:
    if service is None or not name.startswith(SCHEME):
        yield _local(name)
        return
    checkpoint = listing.one(service.rest, name)
    details = service.details(name)
    with tempfile.TemporaryDirectory(prefix="everstep-diff-") as temporary:
        directory = Path(temporary) / "files"
        fetch(service, name, directory, quiet=target.as_json)
        facts = {"saved": f"{output.time_text(checkpoint.time)} UTC"}
        facts |= _configuration(directory) | _made(details)
        own = output.own_metadata(checkpoint.user_metadata)
        facts |= {f"· {key}": value for key, value in own.items()}
        if details is None:
            yield Side(name, directory, facts)
        else:
            yield Side(name, directory, facts, details.parents, _ancestors(service, details))


def _ancestors(service: Service, details: CheckpointDetailsResponse) -> list[str]:
    """What a checkpoint descends from, from parent to parent."""
    found: dict[str, None] = {}
    waiting = list(details.parents)
    while waiting and len(found) < _FARTHEST:
        path = waiting.pop(0)
        if path in found:
            continue
        found[path] = None
        if path.startswith(SCHEME):
            with contextlib.suppress(APIStatusError):  # it was deleted, or is another service's
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
    """What PEFT's file says of an adapter."""
    path = directory / CONFIG
    if not path.exists():
        return {}
    try:
        config = json.loads(path.read_text())
        facts = {
            "base model": config.get("base_model_name_or_path"),
            "rank": config.get("r"),
            "alpha": config.get("lora_alpha"),
            "modules": _modules(config.get("target_modules")),
        }
    except (ValueError, AttributeError) as error:
        raise Refused(f"{path} is no adapter's configuration: {error}") from error
    return {key: str(value) for key, value in facts.items() if value is not None}


def _modules(value: Any) -> str | None:
    return ", ".join(sorted(map(str, value))) if isinstance(value, list) else value


def _made(details: CheckpointDetailsResponse | None) -> dict[str, str]:
    if details is None:
        return {}
    return {
        "step": str(details.step),
        "seed": str(details.lora.get("seed", "–")),
        "optimizer": "none" if details.optimizer is None else str(details.optimizer["type"]),
        "base": details.base_fingerprint[:16],
    }


def _related(a: Side, b: Side) -> str | None:
    """How one descends from the other, as far as that is told."""
    if a.name in b.ancestors:
        return "B descends from A"
    if b.name in a.ancestors:
        return "A descends from B"
    common = [each for each in a.ancestors if each in b.ancestors]
    return f"both descend from {common[0]}" if common else None


def _json(
    sides: Sequence[Side], found: Sequence[TensorDifference], whole: TensorDifference
) -> dict[str, Any]:
    a, b = ({"path": e.name, "facts": e.facts, "parents": e.parents} for e in sides)
    return {
        "same": whole.status == "same",
        "a": a,
        "b": b,
        "lineage": _related(*sides),
        "all": whole.to_json(),
        "tensors": [each.to_json() for each in found],
    }


def _print(
    sides: Sequence[Side], found: Sequence[TensorDifference], whole: TensorDifference, limit: int
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
        out.print(f"All {output.counted(len(found), 'tensor')} are the same, bit for bit.")
        return
    shown = differing[: limit or None]
    output.print_rows(
        ("|B-A|/|A|", "|A|", "|B|", "max|B-A|", "cosine", "", "tensor"),
        [_row(each) for each in [whole, *shown]],
    )
    same = len(found) - len(differing)
    out.print(
        f"{len(differing)} of {output.counted(len(found), 'tensor')} differ, {same} are the same, "
        f"bit for bit." + (f" {len(shown)} are shown." if len(shown) < len(differing) else "")
    )


def _print_facts(a: Side, b: Side) -> None:
    """Print what is known of both side by side; where the terminal is too narrow, below another."""
    keys = [*a.facts, *(key for key in b.facts if key not in a.facts)]
    both = [(key, a.facts.get(key, "–"), b.facts.get(key, "–")) for key in keys]
    beside = [
        ("", key, left, "=") if left == right else ("≠", key, left, right)
        for key, left, right in both
    ]
    if output.fits(beside):
        output.print_columns(("", "", "A", "B"), beside)
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
