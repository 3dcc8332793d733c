"""A base model's directory in Hugging Face's format: its files, and where each weight lies."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from everstep.interchange.errors import CannotMerge, Unreadable
from everstep.interchange.tensors import Spec, TensorFile

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_BESIDE = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "LICENSE*", "NOTICE*")
"""What belongs to a model besides its weights: configurations, tokenizer, licence. No code."""
_NOT_BESIDE = (CONFIG, INDEX, "adapter_config.json")
EMBEDDINGS = ("embed_tokens", "wte", "embed_in", "word_embeddings", "tok_embeddings")
"""What families call their input embeddings."""
HEADS = ("lm_head", "embed_out", "output")
"""What they call their output head; a release of transformers may call it otherwise."""


@dataclass(frozen=True)
class BaseModel:
    """A base model's files.

    Attributes:
        directory: where they lie.
        config: its config.json.
        shards: names of its weight files, in the index's order.
        weight_map: which shard each weight is in; None where there is one file and no index.
    """

    directory: Path
    config: dict[str, Any]
    shards: list[str]
    weight_map: dict[str, str] | None

    @classmethod
    def open(cls, directory: Path) -> BaseModel:
        """Look at a base model's directory; no weights are read.

        Raises:
            Unreadable: it holds no model, or one without safetensors files.
        """
        config = read_json(directory / CONFIG)
        if (directory / INDEX).exists():
            weight_map = _weight_map(directory / INDEX)
            return cls(directory, config, list(dict.fromkeys(weight_map.values())), weight_map)
        if not (directory / WEIGHTS).exists():
            raise Unreadable(
                f"{directory} holds neither {WEIGHTS} nor {INDEX}. Weights in other formats are "
                "not read: pickled ones can hold code. Save the model with save_pretrained first."
            )
        return cls(directory, config, [WEIGHTS], None)

    def shard(self, name: str) -> TensorFile:
        """One of its weight files; raises `Unreadable`."""
        return TensorFile(self.directory / name)

    def where(self) -> dict[str, tuple[str, Spec]]:
        """The shard and the spec of every weight; raises `Unreadable`."""
        found: dict[str, tuple[str, Spec]] = {}
        for shard in self.shards:
            found |= {name: (shard, spec) for name, spec in self.shard(shard).specs.items()}
        return found

    def copy_beside(self, directory: Path) -> None:
        """Copy what belongs to the model besides weights and config.json into a directory."""
        for path in self._beside():
            shutil.copyfile(path, directory / path.name)

    def _beside(self) -> Iterator[Path]:
        for pattern in _BESIDE:
            for path in sorted(self.directory.glob(pattern)):
                if path.is_file() and path.name not in _NOT_BESIDE:
                    yield path


def weight_of(module: str, where: dict[str, tuple[str, Spec]]) -> str | None:
    """What a module's weight is called in a base model's files; None where it isn't there.

    Files of a model without its head (as many on the hub) leave the first part of names out.
    """
    names = [module, module.partition(".")[2]]
    if module in HEADS:
        names += HEADS
    return next((f"{name}.weight" for name in names if f"{name}.weight" in where), None)


def input_embeddings(where: dict[str, tuple[str, Spec]], shape: tuple[int, ...]) -> str:
    """What the input embeddings are called, which a tied head shares.

    Raises:
        CannotMerge: none, or more than one, has this shape.
    """
    found = [
        name
        for name, (_, spec) in where.items()
        if spec.shape == shape and name.removesuffix(".weight").split(".")[-1] in EMBEDDINGS
    ]
    if len(found) != 1:
        raise CannotMerge(
            f"The adapter changes an output head of shape {list(shape)} that the base model's "
            f"files don't hold, and they hold {len(found)} input embeddings that it could share. "
            "Merge it onto the model that it was trained on."
        )
    return found[0]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object in a file; raises `Unreadable`."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise Unreadable(f"{path.name} can't be read: {error}") from error
    if not isinstance(content, dict):
        raise Unreadable(f"{path.name} holds no JSON object.")
    return content


def _weight_map(path: Path) -> dict[str, str]:
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(name, str) and Path(name).name == name for name in weight_map.values()
    ):
        raise Unreadable(f"{path} has no weight_map of file names.")
    return weight_map
