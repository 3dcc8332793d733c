"""Tables and JSON of checkpoints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from everstep.cli.common import output
from everstep.cli.common.outcomes import Outcome
from everstep.wire.messages.adapted_modules import AdaptedModules
from everstep.wire.messages.inspection import CheckpointDetailsResponse, VerifyCheckpointResponse
from everstep.wire.messages.responses import Checkpoint, WeightsInfoResponse

_HEADERS = ("saved", "size", "expires", "", "path")


def print_list(shown: Sequence[Checkpoint], total: int) -> None:
    """Print a row for each checkpoint.

    Args:
        shown: the checkpoints to print.
        total: number of checkpoints in the list.
    """
    rows = [
        (
            output.ago_text(each.time),
            output.size_text(each.size_bytes),
            output.expiry_text(each.expires_at),
            "public" if each.public else "",
            each.tinker_path,
        )
        for each in shown
    ]
    output.print_listing(_HEADERS, rows, total, "checkpoint")


def total_size(found: Sequence[Checkpoint]) -> str:
    """Return the number of checkpoints and their total size."""
    size = sum(each.size_bytes or 0 for each in found)
    return f"{output.counted(len(found), 'checkpoint')}, {output.size_text(size)}"


def info_json(
    checkpoint: Checkpoint,
    info: WeightsInfoResponse | None,
    details: CheckpointDetailsResponse | None,
) -> dict[str, Any]:
    """Build the JSON of a checkpoint. ``details`` is null if the service does not offer them."""
    return {
        **checkpoint.model_dump(mode="json"),
        "weights_info": None if info is None else info.model_dump(mode="json"),
        "details": None if details is None else details.model_dump(mode="json"),
    }


def print_info(
    checkpoint: Checkpoint,
    info: WeightsInfoResponse | None,
    details: CheckpointDetailsResponse | None,
) -> None:
    """Print the details of a checkpoint, a line each."""
    facts: list[tuple[str, str | None]] = [
        ("path", checkpoint.tinker_path),
        ("kind", checkpoint.checkpoint_type),
        ("saved", output.when_text(checkpoint.time)),
        ("size", output.size_text(checkpoint.size_bytes) or None),
        ("expires", output.expiry_text(checkpoint.expires_at) or "never"),
        ("public", "yes" if checkpoint.public else "no"),
    ]
    facts += _training_facts(checkpoint, info)
    facts += _detail_facts(details)
    own = output.own_metadata(checkpoint.user_metadata)
    facts += [(f"· {key}", value) for key, value in own.items()]
    output.print_facts(facts)


def _training_facts(
    checkpoint: Checkpoint, info: WeightsInfoResponse | None
) -> list[tuple[str, str | None]]:
    if info is None:
        return [("base model", checkpoint.base_model)]
    parts = {"attention": info.train_attn, "MLP": info.train_mlp, "output head": info.train_unembed}
    trained = ", ".join(name for name, present in parts.items() if present)
    training = checkpoint.checkpoint_type == "training"
    return [
        ("base model", info.base_model),
        ("rank", None if info.lora_rank is None else str(info.lora_rank)),
        ("trained", trained or None),
        *_module_facts(info.adapted_modules),
        (
            "optimizer",
            info.optimizer_config.type if training else None,
        ),
    ]


def _module_facts(modules: AdaptedModules | None) -> list[tuple[str, str | None]]:
    """Return the adapted modules by kind, and those that are not adapted."""
    if modules is None:
        return []
    adapted = {"attention": modules.attention, "MLP": modules.mlp, "output head": modules.unembed}
    return [
        *(("adapted", _counted(kind, forms)) for kind, forms in adapted.items() if forms),
        *(("not adapted", _counted(kind, each)) for kind, each in modules.not_adapted.items()),
    ]


def _counted(kind: str, forms: Mapping[str, int]) -> str:
    each = ", ".join(f"{count} × {form}" for form, count in forms.items())
    return f"{sum(forms.values())} {kind}: {each}"


def _detail_facts(details: CheckpointDetailsResponse | None) -> list[tuple[str, str | None]]:
    if details is None:
        return []
    return [
        ("step", str(details.step)),
        ("diverged", "yes: its weights hold NaN or infinity" if details.diverged else None),
        ("seed", None if details.lora.get("seed") is None else str(details.lora["seed"])),
        *(("note", each) for each in details.notes),
        *(("parent", each) for each in details.parents),
        *(
            ("file", f"{each.name}  {output.size_text(each.size_bytes)}  blake3 {each.blake3}")
            for each in details.files
        ),
    ]


def print_verified(
    found: Sequence[VerifyCheckpointResponse], done: Sequence[Outcome], as_json: bool
) -> None:
    """Print the results of a verification.

    Args:
        found: results of the checkpoints that could be read.
        done: outcomes of all checkpoints.
        as_json: print JSON.
    """
    failed = [each for each in done if each.error is not None]
    if not as_json:
        if found or not failed:
            _print_results(found)
    else:
        results = [each.model_dump(mode="json") for each in found]
        results += [
            {"tinker_path": each.tinker_path, "ok": False, "files": [], "error": each.error}
            for each in failed
        ]
        output.print_json({"ok": all(each["ok"] for each in results), "results": results})
    for each in failed:
        output.messages().print(f"everstep: {each.tinker_path}: {each.error}")


def _print_results(found: Sequence[VerifyCheckpointResponse]) -> None:
    """Print a line for each checkpoint, and the damage below it."""
    out = output.console()
    if not found:
        out.print("No checkpoints.")
        return
    for each in found:
        out.print(f"{'ok' if each.ok else 'DAMAGED':<7}  {each.tinker_path}")
        if each.error is not None:
            out.print(f"         {each.error}")
        if each.diverged:
            out.print("         this adapter has diverged: its weights hold NaN or infinity")
        for file in each.files:
            if file.error is not None:
                out.print(f"         {file.name}: {file.error}")
    size = sum(file.size_bytes for each in found for file in each.files)
    bad = sum(not each.ok for each in found)
    result = f"{bad} damaged." if bad else "all intact."
    out.print(f"{output.counted(len(found), 'checkpoint')}, {output.size_text(size)}: {result}")
    if bad:
        out.print(
            "Load an older checkpoint, or restore the files from a backup: 'everstep restore'."
        )
