"""Base model directory in Hugging Face's format: its files and the location of each weight."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from everstep.interchange.errors import MergeError, UnreadableFile
from everstep.interchange.tensors import TensorFile
from everstep.json_values import check_json
from everstep.safetensors_files import TensorSpec

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_OTHER_FILES = (
    "*.json",
    "*.txt",
    "*.model",
    "*.jinja",
    "*.tiktoken",
    "*.spm",
    "*.bpe",
    "additional_chat_templates/*.jinja",
    "LICENSE*",
    "NOTICE*",
)
"""Files of a model besides its weights: configurations, tokenizer, licence. No code."""
_MAX_DEPTH = 64
"""Nesting of a configuration. What walks or prints it recurses."""
_NOT_COPIED = (CONFIG, INDEX, "adapter_config.json")
EMBEDDINGS = ("embed_tokens", "wte", "embed_in", "word_embeddings", "tok_embeddings", "w")
"""Names of input embeddings in the model families."""
HEADS = ("lm_head", "embed_out", "output")
"""Names of output heads in the model families. They may differ between transformers releases."""
_RENAMED = (
    (".mlp.shared_experts.", ".mlp.shared_mlp."),  # hy_v3
    (".mlp.shared_experts.", ".mlp.shared_expert."),  # laguna
    ("model.language_model.", "language_model.model."),  # gemma3, llava and others that also see
    ("lm_head", "language_model.lm_head"),
)
"""Parts of modules' names that files of some families write otherwise. transformers renames them
as it loads a model."""


@dataclass(frozen=True)
class BaseModel:
    """A base model's files.

    Attributes:
        directory: directory of the files.
        config: content of config.json.
        shards: names of the weight files, in the index's order.
        weight_map: shard of each weight. None for a single file without an index.
    """

    directory: Path
    config: dict[str, Any]
    shards: list[str]
    weight_map: dict[str, str] | None

    @classmethod
    def open(cls, directory: Path) -> BaseModel:
        """Open a base model's directory without reading weights.

        Raises:
            UnreadableFile: it holds no model, or a model without safetensors files.
        """
        config = read_json(directory / CONFIG)
        if (directory / INDEX).exists():
            weight_map = _weight_map(directory / INDEX)
            return cls(directory, config, list(dict.fromkeys(weight_map.values())), weight_map)
        if not (directory / WEIGHTS).exists():
            raise UnreadableFile(
                f"{directory} holds neither {WEIGHTS} nor {INDEX}. Weights in other formats are "
                "not read: pickled ones can hold code. Save the model with save_pretrained first."
            )
        return cls(directory, config, [WEIGHTS], None)

    def shard(self, name: str) -> TensorFile:
        """Open a weight file. Raises `UnreadableFile`."""
        return TensorFile(self.directory / name)

    def locate_weights(self) -> dict[str, tuple[str, TensorSpec]]:
        """Return the shard and the spec of every weight. Raises `UnreadableFile`."""
        found: dict[str, tuple[str, TensorSpec]] = {}
        for shard in self.shards:
            found |= {name: (shard, spec) for name, spec in self.shard(shard).specs.items()}
        return found

    def copy_other_files(self, directory: Path) -> None:
        """Copy the model's files besides weights and config.json into a directory."""
        for path in self._other_files():
            copy = directory / path.relative_to(self.directory)
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, copy)

    def _other_files(self) -> Iterator[Path]:
        for pattern in _OTHER_FILES:
            for path in sorted(self.directory.glob(pattern)):
                if path.is_file() and path.name not in _NOT_COPIED:
                    yield path


def weight_name(module: str, where: dict[str, tuple[str, TensorSpec]]) -> str | None:
    """Return the name of a module's weight in a base model's files, or None if it is absent.

    Files of a model without its head, as many on the hub, omit the first part of names.
    """
    written = [module, *(module.replace(own, other) for own, other in _RENAMED)]
    names = [*written, *(name.partition(".")[2] for name in written)]
    if module in HEADS:
        names += HEADS
    return next((f"{name}.weight" for name in names if f"{name}.weight" in where), None)


def input_embeddings(where: dict[str, tuple[str, TensorSpec]], shape: tuple[int, ...]) -> str:
    """Return the name of the input embeddings that a tied head shares.

    Raises:
        MergeError: no table of this shape was found, or several.
    """
    found = [
        name
        for name, (_, spec) in where.items()
        if spec.shape == shape and name.removesuffix(".weight").split(".")[-1] in EMBEDDINGS
    ]
    if len(found) != 1:
        raise MergeError(
            f"The adapter changes an output head of shape {list(shape)} that the base model's "
            f"files do not hold, and they hold {len(found)} input embeddings that it could share. "
            "Merge it into the model that it was trained on."
        )
    return found[0]


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file. Raises `UnreadableFile`."""
    try:
        content = json.loads(path.read_bytes())
        check_json(content, path.name)
    except (OSError, ValueError, RecursionError) as error:
        raise UnreadableFile(f"{path.name} can't be read: {error}") from error
    if not isinstance(content, dict):
        raise UnreadableFile(f"{path.name} holds no JSON object.")
    if _is_deeper(content, _MAX_DEPTH):
        raise UnreadableFile(f"{path.name} is nested more than {_MAX_DEPTH} levels deep.")
    return content


def _is_deeper(value: Any, depth: int) -> bool:
    """Return whether a decoded JSON value is nested more deeply than so many levels."""
    level = [value]
    for _ in range(depth):
        parts = (each.values() if isinstance(each, dict) else each for each in level)
        level = [one for part in parts for one in part if isinstance(one, dict | list)]
        if not level:
            return False
    return True


def _weight_map(path: Path) -> dict[str, str]:
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(name, str) and Path(name).name == name for name in weight_map.values()
    ):
        raise UnreadableFile(f"{path} has no weight_map of file names.")
    return weight_map
