"""How checkpoints are shown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from everstep.cli import output
from everstep.cli.outcomes import Outcome
from everstep.wire.inspection import CheckpointDetailsResponse, VerifyCheckpointResponse
from everstep.wire.responses import Checkpoint, WeightsInfoResponse

_HEADERS = ("saved (UTC)", "size", "expires", "", "path")


def print_list(shown: Sequence[Checkpoint], total: int) -> None:
    """Print checkpoints, a row each.

    Args:
        shown: those to print.
        total: how many there are.
    """
    rows = [
        (
            output.time_text(each.time),
            output.size_text(each.size_bytes),
            output.left_text(each.expires_at),
            "public" if each.public else "",
            each.tinker_path,
        )
        for each in shown
    ]
    output.print_listing(_HEADERS, rows, total, "checkpoint")


def total_size(found: Sequence[Checkpoint]) -> str:
    """How many checkpoints, and how large all together."""
    size = sum(each.size_bytes or 0 for each in found)
    return f"{output.counted(len(found), 'checkpoint')}, {output.size_text(size)}"


def info_json(
    checkpoint: Checkpoint,
    info: WeightsInfoResponse | None,
    details: CheckpointDetailsResponse | None,
) -> dict[str, Any]:
    """All that is known of a checkpoint; ``details`` is null where the service has none."""
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
    """Print all that is known of a checkpoint; see `info_json`."""
    facts: list[tuple[str, str | None]] = [
        ("path", checkpoint.tinker_path),
        ("kind", checkpoint.checkpoint_type),
        ("saved", f"{output.time_text(checkpoint.time)} UTC"),
        ("size", output.size_text(checkpoint.size_bytes) or None),
        ("expires", output.left_text(checkpoint.expires_at) or "never"),
        ("public", "yes" if checkpoint.public else "no"),
    ]
    facts += _trained(checkpoint, info)
    facts += _made(details)
    own = output.own_metadata(checkpoint.user_metadata)
    facts += [(f"· {key}", value) for key, value in own.items()]
    output.print_facts(facts)


def _trained(
    checkpoint: Checkpoint, info: WeightsInfoResponse | None
) -> list[tuple[str, str | None]]:
    if info is None:
        return [("base model", checkpoint.base_model)]
    parts = {"attention": info.train_attn, "MLP": info.train_mlp, "output head": info.train_unembed}
    trained = ", ".join(name for name, there in parts.items() if there)
    training = checkpoint.checkpoint_type == "training"
    return [
        ("base model", info.base_model),
        ("rank", None if info.lora_rank is None else str(info.lora_rank)),
        ("trained", trained or None),
        (
            "optimizer",
            info.optimizer_config.type if training else None,
        ),
    ]


def _made(details: CheckpointDetailsResponse | None) -> list[tuple[str, str | None]]:
    if details is None:
        return []
    return [
        ("step", str(details.step)),
        ("seed", None if details.lora.get("seed") is None else str(details.lora["seed"])),
        *(("parent", each) for each in details.parents),
        *(
            ("file", f"{each.name}  {output.size_text(each.size_bytes)}  blake3 {each.blake3}")
            for each in details.files
        ),
    ]


def tell_verified(
    found: Sequence[VerifyCheckpointResponse], looked: Sequence[Outcome], as_json: bool
) -> None:
    """Print what a verification found.

    Args:
        found: of those that could be read.
        looked: what came of each.
        as_json: print JSON.
    """
    failed = [each for each in looked if each.error is not None]
    if not as_json:
        if found or not failed:
            _print_verified(found)
    else:
        results = [each.model_dump(mode="json") for each in found]
        results += [
            {"tinker_path": each.tinker_path, "ok": False, "files": [], "error": each.error}
            for each in failed
        ]
        output.print_json({"ok": all(each["ok"] for each in results), "results": results})
    for each in failed:
        output.messages().print(f"everstep: {each.tinker_path}: {each.error}")


def _print_verified(found: Sequence[VerifyCheckpointResponse]) -> None:
    """Print a line for each, and of damaged ones what is wrong."""
    out = output.console()
    if not found:
        out.print("No checkpoints.")
        return
    for each in found:
        out.print(f"{'ok' if each.ok else 'DAMAGED':<7}  {each.tinker_path}")
        if each.error is not None:
            out.print(f"         {each.error}")
        for file in each.files:
            if file.error is not None:
                out.print(f"         {file.name}: {file.error}")
    size = sum(file.size_bytes for each in found for file in each.files)
    bad = sum(not each.ok for each in found)
    told = f"{bad} damaged." if bad else "all as they were written."
    out.print(f"{output.counted(len(found), 'checkpoint')}, {output.size_text(size)}: {told}")
    if bad:
        out.print("Load an older checkpoint, or bring the files back: 'everstep restore'.")
