"""A base model's fingerprint, from its files: is it the one that an adapter was trained on?

It is the BLAKE3 that a service makes of the model that it has loaded: of config.json, and of each
weight's name and numbers, by name, in the dtype that it serves the model in. Here the numbers are
read a piece at a time. The loaded model may call weights otherwise than its files do: that is known
of some families, and of others nothing can be said.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping

from blake3 import blake3

from everstep.interchange.base import EMBEDDINGS, HEADS, BaseModel
from everstep.interchange.tensors import Spec

DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
"""What services serve in: torch's name of it, and safetensors'."""
UNDERSTOOD = (
    "gemma2",
    "gemma3_text",
    "gpt2",
    "gpt_neox",
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "qwen3_moe",
)
"""Families (``model_type``) of which it is known what the loaded model calls its weights."""
_VOLATILE = ("_name_or_path", "_commit_hash", "transformers_version")
"""What a configuration says of its file, not of the model."""
_PREFIXES = ("model.", "transformer.", "gpt_neox.")
"""Of the names of weights; files of a model without its head leave it out."""
_NO_WEIGHT = re.compile(r"\.(attn|attention)\.(bias|masked_bias)$|\.inv_freq$")
"""What files of earlier years hold besides weights."""
_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(gate|up|down)_proj\.weight")
_Names = dict[str, list[str]]
"""The files' weights, one behind the other, that a weight of the loaded model is made of."""


def is_fingerprint(base: BaseModel, fingerprint: str, dtype: str) -> bool | None:
    """Whether a base model has a fingerprint.

    Args:
        base: the base model.
        fingerprint: as a manifest has it.
        dtype: that it was served in, by torch's name.

    Returns:
        None: that can't be said of this family.

    Raises:
        Unreadable: a file of the base model isn't whole.
    """
    where = base.where()
    if any(_hash(base, where, each, dtype) == fingerprint for each in _namings(where)):
        return True
    return False if base.config.get("model_type") in UNDERSTOOD else None


def _hash(base: BaseModel, where: Mapping[str, tuple[str, Spec]], names: _Names, dtype: str) -> str:
    hasher = blake3(max_threads=blake3.AUTO)
    published = {key: value for key, value in base.config.items() if key not in _VOLATILE}
    hasher.update(json.dumps(published, sort_keys=True).encode())
    shards = {shard: base.shard(shard) for shard in base.shards}
    for name in sorted(names):
        hasher.update(name.encode())
        for part in names[name]:
            for piece in shards[where[part][0]].converted(part, DTYPES[dtype]):
                hasher.update(piece)
    digest: str = hasher.hexdigest()
    return digest


def _namings(where: Mapping[str, tuple[str, Spec]]) -> Iterator[_Names]:
    """What the loaded model may call the weights; one way, but for a few families."""
    plain = _fused([name for name in where if not _NO_WEIGHT.search(name)])
    tables = [n for n in plain if n.removesuffix(".weight").rsplit(".", 1)[-1] in EMBEDDINGS]
    own = next((name for name in plain if name.removesuffix(".weight") in HEADS), None)
    # a head that isn't there is the embeddings, and the loaded model names both
    head = plain.pop(own) if own is not None else plain[tables[0]] if len(tables) == 1 else None
    heads = [own or "lm_head.weight"]
    if own == "embed_out.weight":
        heads.append("lm_head.weight")  # in some releases of transformers
    bare = not any(name.startswith(_PREFIXES) for name in plain)
    for prefix in _PREFIXES if bare else ("",):
        names = {prefix + name: parts for name, parts in plain.items()}
        yield from (names | ({each: head} if head is not None else {}) for each in heads)


def _fused(names: list[str]) -> _Names:
    """Experts as the loaded model holds them: all gates with their ups, and all downs."""
    plain: _Names = {}
    experts: dict[str, dict[tuple[int, int], str]] = defaultdict(dict)
    for name in names:
        if (found := _EXPERT.fullmatch(name)) is None:
            plain[name] = [name]
            continue
        into = "down_proj" if found[3] == "down" else "gate_up_proj"
        experts[f"{found[1]}.{into}"][int(found[2]), int(found[3] == "up")] = name
    return plain | {name: [parts[k] for k in sorted(parts)] for name, parts in experts.items()}
