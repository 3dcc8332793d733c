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

from everstep.cli import hub
from everstep.cli import vault_tables as tables
from everstep.cli.options import Refused
from everstep.cli.vault_work import opened
from everstep.interchange.base import BaseModel
from everstep.interchange.card import CARD, Lineage, model_card
from everstep.interchange.merge import merge
from everstep.interchange.peft_config import ADAPTER, ADAPTER_CONFIG, PeftAdapter
from everstep.interchange.serving import vllm_limits, vllm_options
from everstep.runtime import Settings
from everstep.runtime.checkpoints import Checkpoints
from everstep.vault import Manifest, Vault
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


def export(home: Path, wanted: Export, *, as_json: bool) -> None:
    """Export a checkpoint of a home, and print what came of it; also beside a service.

    Args:
        home: the home.
        wanted: what, and where to.
        as_json: print JSON.

    Raises:
        Refused: it can't be read, or the hub doesn't take it.
        InterchangeError: it can't be merged.
        VaultError: it is damaged, or the directory isn't empty.
    """
    target = wanted.directory.expanduser().resolve()
    with _fetched(home, wanted.path) as (files, lineage):
        adapter = PeftAdapter.open(files)
        base = _base(wanted, adapter) if wanted.merged_as else None
        with whole_directory(target) as stage:
            if wanted.merged_as and base is not None:
                merge(base, adapter, wanted.merged_as, stage)
            else:
                for name in _FILES:
                    shutil.copyfile(files / name, stage / name)
            (stage / CARD).write_text(model_card(lineage, wanted.merged_as))
        notes = [] if wanted.merged_as else _notes(adapter, wanted)
    pushed = _push(wanted, target) if wanted.repository else None
    _print(wanted, target, notes, pushed, as_json)


@contextmanager
def _fetched(home: Path, path: str) -> Iterator[tuple[Path, Lineage]]:
    """A directory with a checkpoint's adapter, verified, and where it comes from."""
    vault = Vault(home / "vault", writer=False)
    manifest = asyncio.run(_manifest(home, vault, path))
    with tempfile.TemporaryDirectory(prefix="everstep-export-") as directory:
        files = Path(directory)
        found = {each.name for each in vault.export(manifest, files, only=_FILES)}
        if missing := set(_FILES) - found:
            raise Refused(f"{path} holds no {', '.join(sorted(missing))}.")
        yield files, lineage_of(path, manifest)


async def _manifest(home: Path, vault: Vault, path: str) -> Manifest:
    async with opened(home, read_only=True) as ledger:
        row = await Checkpoints(ledger, vault, Settings()).find(path)
    return vault.marked(vault.manifest(row.kind, row.run_id, row.name))


def lineage_of(path: str, manifest: Manifest) -> Lineage:
    """What a manifest says of where a checkpoint comes from."""
    return Lineage(
        path=path,
        base_model=manifest.base_model,
        base_fingerprint=manifest.base_fingerprint,
        step=manifest.step,
        created_at=manifest.created_at,
        parents=manifest.parents,
        lora=manifest.lora,
        optimizer=manifest.optimizer,
        user_metadata=manifest.user_metadata,
        files={name: manifest.files[name].blake3 for name in _FILES},
    )


def _base(wanted: Export, adapter: PeftAdapter) -> BaseModel:
    name = wanted.base_model or adapter.base_model
    if name is None:
        raise Refused("The adapter doesn't say what it was trained on; give --base-model.")
    return BaseModel.open(hub.base_directory(name))


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


def _push(wanted: Export, target: Path) -> str:
    message = f"Export {wanted.path}"
    assert wanted.repository is not None
    return hub.push(target, wanted.repository, public=wanted.public, message=message)


def _print(
    wanted: Export, target: Path, notes: list[str], pushed: str | None, as_json: bool
) -> None:
    files = {path.name: path.stat().st_size for path in sorted(target.iterdir())}
    if as_json:
        told = {"tinker_path": wanted.path, "directory": str(target), "files": files}
        tables.print_json(told | {"merged_as": wanted.merged_as, "notes": notes, "pushed": pushed})
        return
    out = tables.console()
    size = readable(sum(files.values()))
    out.print(f"{wanted.path} is in {target}: {len(files)} files, {size}.")
    for note in notes:
        out.print(note)
    if pushed:
        out.print(f"Pushed to {pushed}")
