"""Exports of checkpoints as directories in others' formats.

    <DIR>/adapter_model.safetensors, adapter_config.json    for PEFT, vLLM, SGLang, or, merged,
    <DIR>/model*.safetensors, config.json, tokenizer, …     for transformers and everything else
    <DIR>/README.md                                         model card with the lineage

DIR appears complete or not at all.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from everstep.cli.checkpoint.download import fetch
from everstep.cli.common import hub, listing, names, output
from everstep.cli.common.errors import Refused
from everstep.cli.common.target import Service, Target
from everstep.interchange.base import BaseModel, read_json
from everstep.interchange.card import CARD, Lineage, model_card
from everstep.interchange.fingerprint import DTYPES, matches_fingerprint
from everstep.interchange.merge import merge
from everstep.interchange.peft_config import (
    ADAPTER,
    ADAPTER_CONFIG,
    PeftAdapter,
    with_target_parameters,
)
from everstep.interchange.serving import vllm_limits, vllm_options
from everstep.vault.disk_guard import readable
from everstep.vault.export import whole_directory
from everstep.wire.messages.inspection import CheckpointDetailsResponse

_FILES = (ADAPTER, ADAPTER_CONFIG)


@dataclass(frozen=True)
class Export:
    """A request for an export.

    Attributes:
        path: path of the checkpoint.
        directory: directory to create.
        merged_as: dtype of the merged model, ``fp32`` or ``bf16``, or None for the adapter alone.
        base_model: directory or hub id of the base model, or None for the one it was trained on.
        repository: repository of the hub to push to.
        public: whether a new repository is public.
    """

    path: str
    directory: Path
    merged_as: str | None = None
    base_model: str | None = None
    repository: str | None = None
    public: bool = False


def export_checkpoint(target: Target, wanted: Export) -> None:
    """Export a checkpoint and print the files.

    Args:
        target: the service.
        wanted: checkpoint, directory and format.

    Raises:
        NotFound: there is no such checkpoint.
        Refused: the download is damaged, or the hub refuses the push.
        InterchangeError: the adapter can't be merged, or has diverged.
        VaultError: the directory is not empty.
    """
    directory = wanted.directory.expanduser().resolve()
    with _download(target, wanted.path) as (files, lineage, details):
        adapter = PeftAdapter.open(files)
        adapter.check_finite()
        base = _base(target.home, wanted, adapter) if wanted.merged_as else None
        notes = _compare(base, wanted, lineage) if base else _notes(adapter, wanted, details)
        with whole_directory(directory) as stage:
            if wanted.merged_as and base is not None:
                merge(base, adapter, wanted.merged_as, stage)
            else:
                _write_adapter(files, adapter, details, stage)
            (stage / CARD).write_text(model_card(lineage, wanted.merged_as), encoding="utf-8")
    pushed = None
    if wanted.repository:
        message = f"Export {wanted.path}"
        pushed = hub.push(directory, wanted.repository, public=wanted.public, message=message)
    _print(wanted, directory, notes, pushed, target.as_json)


@contextmanager
def _download(
    target: Target, path: str
) -> Iterator[tuple[Path, Lineage, CheckpointDetailsResponse | None]]:
    """Download a checkpoint's files. Yields their directory, the lineage and the details."""
    with tempfile.TemporaryDirectory(prefix="everstep-export-") as temporary:
        files = Path(temporary) / "files"
        with target.service() as service:
            path = names.checkpoint_path(service.rest, path)
            listing.checkpoint(service.rest, path)
            fetch(service, path, files, quiet=target.as_json)
            details = service.details(path)
            lineage = _lineage(service, path, details)
        for name in _FILES:
            if not (files / name).is_file():
                raise Refused(
                    f"{path} holds no {name}. If it is encrypted, export the checkpoint that it "
                    "was saved from."
                )
        yield files, lineage, details


def _lineage(service: Service, path: str, details: CheckpointDetailsResponse | None) -> Lineage:
    if details is None:
        known = service.rest.get_weights_info_by_tinker_path(path).result()
        return Lineage(path, known.base_model, lora={"rank": known.lora_rank})
    return Lineage(
        path=path,
        base_model=details.base_model,
        base_fingerprint=details.base_fingerprint,
        base_dtype=details.environment.get("dtype"),
        step=details.step,
        created_at=details.created_at,
        parents=details.parents,
        imported_from=(details.imported or {}).get("from"),
        lora=details.lora,
        optimizer=details.optimizer,
        user_metadata=details.user_metadata,
        files={each.name: each.blake3 for each in details.files if each.name in _FILES},
    )


def _write_adapter(
    files: Path, adapter: PeftAdapter, details: CheckpointDetailsResponse | None, stage: Path
) -> None:
    """Copy an adapter's files, with a configuration by which PEFT finds all its modules.

    The saved configuration is kept byte for byte, unless an earlier release wrote it in a way that
    PEFT takes for routed experts.
    """
    shutil.copyfile(files / ADAPTER, stage / ADAPTER)
    saved = read_json(files / ADAPTER_CONFIG)
    parameters = details.peft_parameters if details is not None else ()
    config = with_target_parameters(saved, adapter.widths, parameters)
    if config == saved:
        shutil.copyfile(files / ADAPTER_CONFIG, stage / ADAPTER_CONFIG)
    else:
        (stage / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2), encoding="utf-8")


def _base(home: Path, wanted: Export, adapter: PeftAdapter) -> BaseModel:
    """Open the base model: the given one, else one that the home made, else from the hub."""
    name = wanted.base_model or adapter.base_model
    if name is None:
        raise Refused("The adapter does not name its base model; give --base-model.")
    built_in = home.expanduser() / "models" / name
    if wanted.base_model is None and built_in.is_dir():
        return BaseModel.open(built_in)
    return BaseModel.open(hub.base_directory(name))


def _compare(base: BaseModel, wanted: Export, lineage: Lineage) -> list[str]:
    """Compare the base model with the one that the checkpoint was trained on.

    Returns:
        Notes for users of the merged model.

    Raises:
        Refused: it is another model.
    """
    if not lineage.base_fingerprint:
        return []
    dtypes = [lineage.base_dtype] if lineage.base_dtype in DTYPES else list(DTYPES)
    found = [matches_fingerprint(base, lineage.base_fingerprint, each) for each in dtypes]
    if True in found:
        return []
    if False in found:
        raise Refused(
            f"{base.directory} is not the {lineage.base_model} that {wanted.path} was trained on: "
            "its config.json or its weights differ. Name the directory of the service's base "
            "model with --base-model DIR."
        )
    return [
        f"Could not check whether {base.directory} is the {lineage.base_model} that the checkpoint "
        "was trained on: its fingerprint is not known to be made of files alone."
    ]


def _notes(
    adapter: PeftAdapter, wanted: Export, details: CheckpointDetailsResponse | None
) -> list[str]:
    """Return notes for loading and serving the adapter."""
    notes = list(details.notes) if details is not None else []
    limits = vllm_limits(adapter)
    if limits:
        return [
            *notes,
            f"vLLM can't serve this adapter: {'; '.join(limits)}. Export the merged model "
            f"for it: everstep checkpoint export {wanted.path} DIR --format merged",
        ]
    options = vllm_options(adapter)
    return [*notes, *([f"vLLM needs {options} for it."] if options else [])]


def _print(
    wanted: Export, directory: Path, notes: list[str], pushed: str | None, as_json: bool
) -> None:
    paths = (path for path in sorted(directory.rglob("*")) if path.is_file())
    files = {str(path.relative_to(directory)): path.stat().st_size for path in paths}
    if as_json:
        content = {"tinker_path": wanted.path, "directory": str(directory), "files": files}
        output.print_json(
            content | {"merged_as": wanted.merged_as, "notes": notes, "pushed": pushed}
        )
        return
    out = output.console()
    size = readable(sum(files.values()))
    out.print(f"Exported {wanted.path} to {directory}: {len(files)} files, {size}.")
    for note in notes:
        out.print(note)
    if pushed:
        out.print(f"Pushed to {pushed}")
