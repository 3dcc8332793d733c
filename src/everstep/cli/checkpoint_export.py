"""``everstep checkpoint export``: a checkpoint as a directory that others load.

    <DIR>/adapter_model.safetensors, adapter_config.json    for PEFT, vLLM, SGLang; or, merged,
    <DIR>/model*.safetensors, config.json, tokenizer, …     for transformers and everything else
    <DIR>/README.md                                         where it comes from

DIR appears whole or not at all.
"""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from everstep.cli import hub, output
from everstep.cli.errors import Refused
from everstep.cli.options import existing_home
from everstep.cli.target import Target
from everstep.cli.vault_work import opened
from everstep.interchange.base import BaseModel
from everstep.interchange.card import CARD, Lineage, model_card
from everstep.interchange.fingerprint import DTYPES, is_fingerprint
from everstep.interchange.merge import merge
from everstep.interchange.peft_config import ADAPTER, ADAPTER_CONFIG, PeftAdapter
from everstep.interchange.serving import vllm_limits, vllm_options
from everstep.runtime import Settings
from everstep.runtime.checkpoints import Checkpoints
from everstep.vault import Manifest, Vault, open_vault
from everstep.vault.export import whole_directory
from everstep.vault.room import readable

_FILES = (ADAPTER, ADAPTER_CONFIG)


@dataclass(frozen=True)
class Export:
    """What is wanted.

    Attributes:
        path: of the checkpoint.
        directory: where to.
        merged_as: ``fp32`` or ``bf16`` of the merged model; None: the adapter itself.
        base_model: directory or hub id of the base model; None: the one it was trained on.
        repository: of the hub, to push it to.
        public: whether a repository that is made for it is public.
    """

    path: str
    directory: Path
    merged_as: str | None = None
    base_model: str | None = None
    repository: str | None = None
    public: bool = False


def export(target: Target, wanted: Export) -> None:
    """Export a checkpoint and print what came of it.

    Args:
        target: the service, or the home: that is read as it lies there, also beside its service.
        wanted: what, and where to.

    Raises:
        Refused: it can't be read, or the hub doesn't take it.
        InterchangeError: it can't be merged.
        VaultError: it is damaged, or the directory isn't empty.
    """
    directory = wanted.directory.expanduser().resolve()
    with _fetched(target, wanted.path) as (files, lineage):
        adapter = PeftAdapter.open(files)
        base = _base(target.home, wanted, adapter) if wanted.merged_as else None
        notes = _notes(adapter, wanted) if base is None else _compare(base, wanted, lineage)
        with whole_directory(directory) as stage:
            if wanted.merged_as and base is not None:
                merge(base, adapter, wanted.merged_as, stage)
            else:
                for name in _FILES:
                    shutil.copyfile(files / name, stage / name)
            (stage / CARD).write_text(model_card(lineage, wanted.merged_as))
    pushed = None
    if wanted.repository:
        message = f"Export {wanted.path}"
        pushed = hub.push(directory, wanted.repository, public=wanted.public, message=message)
    _print(wanted, directory, notes, pushed, target.as_json)


@contextmanager
def _fetched(target: Target, path: str) -> Iterator[tuple[Path, Lineage]]:
    """A directory with a checkpoint's adapter, verified, and where it comes from."""
    with tempfile.TemporaryDirectory(prefix="everstep-export-") as temporary:
        files = Path(temporary) / "files"
        fetch = _from_home if target.base_url is None else _from_service
        lineage = fetch(target, path, files)
        for name in _FILES:
            if not (files / name).is_file():
                raise Refused(
                    f"{path} holds no {name}. If it is encrypted, export what it was saved from."
                )
        yield files, lineage


def _from_service(target: Target, path: str, files: Path) -> Lineage:
    from everstep.client import download_checkpoint

    with target.service() as service:
        download_checkpoint(service.client, path, files)
        details = service.details(path)
        if details is not None:
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
        known = service.rest.get_weights_info_by_tinker_path(path).result()
        return Lineage(path, known.base_model, lora={"rank": known.lora_rank})


def _from_home(target: Target, path: str, files: Path) -> Lineage:
    home = existing_home(target.home)
    vault = open_vault(home, writer=False)
    manifest = asyncio.run(_manifest(home, vault, path))
    vault.export(manifest, files, only=_FILES)
    return Lineage(
        path=path,
        base_model=manifest.base_model,
        base_fingerprint=manifest.base_fingerprint,
        base_dtype=manifest.environment.get("dtype"),
        step=manifest.step,
        created_at=manifest.created_at,
        parents=manifest.parents,
        imported_from=(manifest.imported or {}).get("from"),
        lora=manifest.lora,
        optimizer=manifest.optimizer,
        user_metadata=manifest.user_metadata,
        files={name: ref.blake3 for name, ref in manifest.files.items() if name in _FILES},
    )


async def _manifest(home: Path, vault: Vault, path: str) -> Manifest:
    async with opened(home, read_only=True) as ledger:
        row = await Checkpoints(ledger, vault, Settings()).find(path)
    return vault.marked(vault.manifest(row.kind, row.run_id, row.name))


def _base(home: Path, wanted: Export, adapter: PeftAdapter) -> BaseModel:
    """The base model: as it was said, as the service made it in its home, or of the hub."""
    name = wanted.base_model or adapter.base_model
    if name is None:
        raise Refused("The adapter doesn't say what it was trained on; give --base-model.")
    made = home.expanduser() / "models" / name
    if wanted.base_model is None and made.is_dir():
        return BaseModel.open(made)
    return BaseModel.open(hub.base_directory(name))


def _compare(base: BaseModel, wanted: Export, lineage: Lineage) -> list[str]:
    """Refuse a base model that is another than the checkpoint was trained on.

    Returns:
        What whoever uses the merged model has to know.
    """
    if not lineage.base_fingerprint:
        return []
    dtypes = [lineage.base_dtype] if lineage.base_dtype in DTYPES else list(DTYPES)
    found = [is_fingerprint(base, lineage.base_fingerprint, each) for each in dtypes]
    if True in found:
        return []
    if False in found:
        raise Refused(
            f"{base.directory} is not the {lineage.base_model} that {wanted.path} was trained on: "
            "its config.json or its weights are others. Name the directory of the one that the "
            "service had, with --base-model DIR."
        )
    return [
        f"Whether {base.directory} is the {lineage.base_model} that the checkpoint was trained on "
        "could not be told: its fingerprint is not known to be made of files alone."
    ]


def _notes(adapter: PeftAdapter, wanted: Export) -> list[str]:
    """What whoever serves the adapter has to know."""
    limits = vllm_limits(adapter)
    if limits:
        return [
            f"vLLM can't serve this adapter as it is: {'; '.join(limits)}. Export the merged model "
            f"for it: everstep checkpoint export {wanted.path} DIR --format merged"
        ]
    options = vllm_options(adapter)
    return [f"vLLM needs {options} for it."] if options else []


def _print(
    wanted: Export, directory: Path, notes: list[str], pushed: str | None, as_json: bool
) -> None:
    files = {path.name: path.stat().st_size for path in sorted(directory.iterdir())}
    if as_json:
        told = {"tinker_path": wanted.path, "directory": str(directory), "files": files}
        output.print_json(told | {"merged_as": wanted.merged_as, "notes": notes, "pushed": pushed})
        return
    out = output.console()
    size = readable(sum(files.values()))
    out.print(f"{wanted.path} is in {directory}: {len(files)} files, {size}.")
    for note in notes:
        out.print(note)
    if pushed:
        out.print(f"Pushed to {pushed}")
