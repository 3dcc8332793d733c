"""Fingerprint: checks from a base model's files that an adapter was trained on this model.

A service computes it from the loaded model: the BLAKE3 of config.json and of each weight's name and
numbers, sorted by name, in the dtype that it serves. Here the numbers are read chunk by chunk. A
loaded model's names of weights may differ from those in its files. The differences are known for
some families only.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping

from blake3 import blake3

from everstep.interchange.base import EMBEDDINGS, HEADS, BaseModel
from everstep.safetensors_files import TensorSpec

DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
"""Dtypes that services use: torch's names, and safetensors'."""
KNOWN_FAMILIES = (
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
"""Families (``model_type``) whose names of loaded weights are known."""
_VOLATILE = ("_name_or_path", "_commit_hash", "transformers_version")
"""Fields of a configuration that describe its file rather than the model."""
_PREFIXES = ("model.", "transformer.", "gpt_neox.")
"""Prefixes of weights' names, which files of a model without its head omit."""
_NO_WEIGHT = re.compile(r"\.(attn|attention)\.(bias|masked_bias)$|\.inv_freq$")
"""Buffers that older files hold besides weights."""
_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(gate|up|down)_proj\.weight")
_Names = dict[str, list[str]]
"""For each weight of the loaded model, the files' weights that are concatenated to it."""


def matches_fingerprint(base: BaseModel, fingerprint: str, dtype: str) -> bool | None:
    """Whether a base model has a fingerprint.

    Args:
        base: the base model.
        fingerprint: a manifest's fingerprint of the base model.
        dtype: torch's name of the dtype that was served.

    Returns:
        None where the family's names of weights are unknown and no naming matches.

    Raises:
        UnreadableFile: a file of the base model is incomplete.
    """
    where = base.locate_weights()
    if any(_hash(base, where, each, dtype) == fingerprint for each in _namings(where)):
        return True
    return False if base.config.get("model_type") in KNOWN_FAMILIES else None


def _hash(
    base: BaseModel, where: Mapping[str, tuple[str, TensorSpec]], names: _Names, dtype: str
) -> str:
    hasher = blake3(max_threads=blake3.AUTO)
    published = {key: value for key, value in base.config.items() if key not in _VOLATILE}
    hasher.update(json.dumps(published, sort_keys=True).encode())
    shards = {shard: base.shard(shard) for shard in base.shards}
    for name in sorted(names):
        hasher.update(name.encode())
        for part in names[name]:
            for chunk in shards[where[part][0]].converted(part, DTYPES[dtype]):
                hasher.update(chunk)
    digest: str = hasher.hexdigest()
    return digest


def _namings(where: Mapping[str, tuple[str, TensorSpec]]) -> Iterator[_Names]:
    """Iterate over the possible names of the loaded weights. Most families have one naming."""
    plain = _fused([name for name in where if not _NO_WEIGHT.search(name)])
    tables = [n for n in plain if n.removesuffix(".weight").rsplit(".", 1)[-1] in EMBEDDINGS]
    own = next((name for name in plain if name.removesuffix(".weight") in HEADS), None)
    # an absent head is tied to the embeddings, and the loaded model names both
    head = plain.pop(own) if own is not None else plain[tables[0]] if len(tables) == 1 else None
    heads = [own or "lm_head.weight"]
    if own == "embed_out.weight":
        heads.append("lm_head.weight")  # in some releases of transformers
    bare = not any(name.startswith(_PREFIXES) for name in plain)
    for prefix in _PREFIXES if bare else ("",):
        names = {prefix + name: parts for name, parts in plain.items()}
        yield from (names | ({each: head} if head is not None else {}) for each in heads)


def _fused(names: list[str]) -> _Names:
    """Group experts as the loaded model fuses them: all gates with their ups, and all downs."""
    plain: _Names = {}
    experts: dict[str, dict[tuple[int, int], str]] = defaultdict(dict)
    for name in names:
        if (found := _EXPERT.fullmatch(name)) is None:
            plain[name] = [name]
            continue
        fused = "down_proj" if found[3] == "down" else "gate_up_proj"
        experts[f"{found[1]}.{fused}"][int(found[2]), int(found[3] == "up")] = name
    return plain | {name: [parts[k] for k in sorted(parts)] for name, parts in experts.items()}
