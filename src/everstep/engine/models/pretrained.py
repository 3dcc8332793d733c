"""Pretrained: reads a causal language model with transformers, and refuses in one sentence.

Of a checkpoint that also sees or hears, the language model alone is kept. Its modules keep the
names that they have in the checkpoint, so that adapters load in PEFT on the whole model.
"""

from __future__ import annotations

from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PretrainedConfig,
)

from everstep.engine.errors import ModelUnsupported, first_line
from everstep.engine.models import attention

_LENGTHS = ("max_position_embeddings", "n_positions", "max_seq_len")
LIBRARY_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    RuntimeError,
    StrictDataclassError,
    TypeError,
    ValueError,
)
"""What a family's own code raises where it does not fit."""


def read_pretrained(source: str, dtype: torch.dtype) -> Any:
    """Load a model with the engine's attention.

    Args:
        source: a directory or a Hugging Face hub id.
        dtype: dtype of the weights.

    Raises:
        ModelUnsupported: it isn't a causal language model, or its attention can't be replaced.
        OSError: it cannot be found or read.
    """
    config = _read_config(source)
    loader = _loader(config)
    try:
        module = loader.from_pretrained(source, dtype=dtype, attn_implementation=attention.NAME)
    except KeyError as error:
        if error.args[:1] != (attention.NAME,):
            raise ModelUnsupported(f"{_described(config)} can't be loaded: {error!r}.") from error
        raise ModelUnsupported(
            f"{_described(config)} has attention of its own, which the engine can't replace."
        ) from error
    except LIBRARY_ERRORS as error:
        raise ModelUnsupported(
            f"{_described(config)} can't be loaded: {first_sentence(error)}"
        ) from error
    if config.get_text_config() is not config:
        _keep_language_model(module)
    return module


def context_length(config: PretrainedConfig) -> int:
    """Return the maximum number of tokens of a model, or raise `ModelUnsupported`."""
    text = config.get_text_config()
    for field in _LENGTHS:
        if getattr(text, field, None):
            return int(getattr(text, field))
    raise ModelUnsupported(
        f"{_described(config)} does not give the length of its context ({', '.join(_LENGTHS)})."
    )


def first_sentence(error: Exception) -> str:
    """Return the first sentence of an error's text, without the pages that libraries add."""
    return first_line(error).partition(". ")[0].rstrip(".:")


def _read_config(source: str) -> PretrainedConfig:
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(source)
    except LIBRARY_ERRORS as error:
        raise ModelUnsupported(
            f"the configuration of {source} can't be read: {first_sentence(error)}"
        ) from error
    return config


def _loader(config: PretrainedConfig) -> Any:
    """Return the auto class that has a language model for a configuration."""
    for loader in (AutoModelForCausalLM, AutoModelForImageTextToText):
        if type(config) in loader._model_mapping:
            return loader
    if "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {}):
        return AutoModelForCausalLM
    raise ModelUnsupported(
        f"{_described(config)} is not a causal language model: transformers has none of the type "
        f"{config.model_type!r}."
    )


def _described(config: PretrainedConfig) -> str:
    """Name a model's class, or its type where the configuration names no class."""
    names = getattr(config, "architectures", None) or [f"a model of type {config.model_type!r}"]
    return str(names[0])


def _keep_language_model(module: Any) -> None:
    """Remove the modules that are neither the decoder, nor the head, nor hold one of them."""
    decoder, head = module.get_decoder(), module.get_output_embeddings()
    names = {id(each): name for name, each in module.named_modules()}
    kept = [names[id(each)] for each in (decoder, head) if id(each) in names]
    if len(kept) < 2 or "" in kept:
        return
    for name, _ in list(module.named_modules()):
        parent, _, last = name.rpartition(".")
        above = parent == "" or any(each.startswith(f"{parent}.") for each in kept)
        inside = any(each == name or each.startswith(f"{name}.") for each in kept)
        within = any(name.startswith(f"{each}.") for each in kept)
        if name and above and not inside and not within:
            setattr(module.get_submodule(parent), last, None)
