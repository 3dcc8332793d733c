"""Loading: reads a causal language model with transformers and checks it before it is served."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3
from transformers import AutoTokenizer, PretrainedConfig

from everstep.conversations import without_mark
from everstep.engine import determinism
from everstep.engine.alignment import align_module
from everstep.engine.models import attention, load_checks, pretrained
from everstep.engine.models.decoder_checks import choose_decoder
from everstep.engine.models.info import ModelInfo, Projections, count_forms
from everstep.engine.models.lora import LoraProjection, features
from everstep.engine.models.lora_targets import LoraTargets, find_lora_targets, record_calls
from everstep.engine.models.model import Model
from everstep.engine.models.pass_checks import check_passes
from everstep.engine.models.peft_names import PeftNames
from everstep.engine.models.rotary import fix_frequencies
from everstep.engine.numerics import Numerics, bytes_for_states, tokens_per_micro_batch
from everstep.engine.training.checks import choose_layers

_VOLATILE = ("_name_or_path", "_commit_hash", "transformers_version")
"""Fields of a configuration that describe its file rather than the model."""


def load_model(
    name: str,
    source: str,
    *,
    device: str | None = None,
    dtype: str | None = None,
    context_length: int | None = None,
    deterministic: bool = True,
    lora_products: str = "float32",
) -> Model:
    """Load a causal language model and check that the engine computes it exactly.

    Args:
        name: name that clients use.
        source: a directory or a Hugging Face hub id.
        device: torch device. None: CUDA where it is available, else the CPU.
        dtype: dtype of the weights. None: float32 on a CPU, bfloat16 on CUDA.
        context_length: tokens of the longest sequence. None, or more than the model's own: that.
        deterministic: whether equal passes have to give equal bits, see `determinism`.
        lora_products: of new runs, see `Numerics`. Float32 weights are computed in float32.

    Raises:
        ModelUnsupported: it cannot be trained or sampled exactly here. The message says why.
        OSError: it cannot be found or read.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    determinism.configure(device, deterministic=deterministic)
    kind = (
        getattr(torch, dtype)
        if dtype
        else (torch.bfloat16 if device.startswith("cuda") else torch.float32)
    )
    attention.register()
    module = pretrained.read_pretrained(source, kind)
    module.requires_grad_(False)
    module.eval()
    fingerprint = _compute_fingerprint(module, source)  # while the weights lie on the host
    experts = determinism.experts_implementation(device, deterministic=deterministic)
    if experts is not None:
        module.set_experts_implementation(experts)
    module.to(device)
    align_module(module)
    tokenizer = without_mark(AutoTokenizer.from_pretrained(source))
    targets = find_lora_targets(module)
    longest = pretrained.context_length(module.config)
    served = longest if context_length is None else min(longest, context_length)
    rotary = fix_frequencies(module, served)
    info = ModelInfo(
        name=name,
        source=source,
        architecture=type(module).__name__,
        vocab_size=module.get_input_embeddings().weight.shape[0],
        max_context_length=served,
        fingerprint=fingerprint,
        eos_token_ids=_eos_token_ids(module, tokenizer),
        tokenizer_id=str(Path(source).resolve()) if Path(source).is_dir() else source,
        device=device,
        dtype=str(kind).removeprefix("torch."),
        rotary=rotary,
    )
    tokens = load_checks.probe_tokens(tokenizer, info)
    with record_calls(module) as called:
        reference = load_checks.trace_logits(module, tokens)
    targets = targets.reached_by(called)
    peft = PeftNames.of(module, (*targets.selectable, *targets.retired))
    info = replace(info, projections=_projections(targets, peft))
    model = Model(info, module, tokenizer, targets, peft)
    load_checks.check_model(model, tokens, reference)
    check_passes(model, tokens)
    module.set_attn_implementation(attention.UNMASKED)
    model.decoder = choose_decoder(model)
    model.layers = choose_layers(model)
    layers = model.info.layers if model.layers is None else model.layers.name
    model.info = replace(model.info, decoder=model.decoder.name, layers=layers)
    model.numerics = _numerics(model, "float32" if kind == torch.float32 else lora_products)
    return model


def _numerics(model: Model, lora_products: str) -> Numerics | None:
    """Choose the arithmetic of new runs. None: the defaults."""
    if model.device.type != "cuda":
        return None if lora_products == "float32" else Numerics(lora_products=lora_products)
    adaptable = [each for each in model.module.modules() if isinstance(each, LoraProjection)]
    itemsize, memory = model.module.dtype.itemsize, _device_bytes(model)
    tokens = tokens_per_micro_batch(map(features, adaptable), itemsize, _weights(model), memory)
    return Numerics(tokens, lora_products)


def memory_for_states(models: Collection[Model]) -> int | None:
    """Return the bytes of a device's memory that the states of runs of its models may take.

    Returns:
        None: they lie in the memory of the host.
    """
    first = next(iter(models))
    if first.device.type != "cuda":
        return None
    return bytes_for_states(sum(map(_weights, models)), _device_bytes(first))


def _weights(model: Model) -> int:
    return sum(each.nbytes for each in model.module.parameters())


def _device_bytes(model: Model) -> int:
    """Return all memory of a model's CUDA device."""
    return int(torch.cuda.get_device_properties(model.device).total_memory)


def _projections(targets: LoraTargets, peft: PeftNames) -> Projections:
    return Projections(
        attention=count_forms(targets.attn),
        mlp=count_forms(targets.mlp),
        unembed=count_forms(targets.unembed),
        never={kind: count_forms(names) for kind, names in targets.unadapted.items()},
        peft_parameters=tuple(sorted(peft.fused)),
        peft_lost=tuple(sorted(count_forms(peft.unloadable))),
    )


def _eos_token_ids(module: Any, tokenizer: Any) -> tuple[int, ...]:
    found = getattr(module.generation_config, "eos_token_id", None)
    if found is None:
        found = tokenizer.eos_token_id
    return tuple(found) if isinstance(found, list) else () if found is None else (int(found),)


def _compute_fingerprint(module: Any, source: str) -> str:
    """Hash the weights and the configuration as published, without transformers' defaults."""
    hasher = blake3(max_threads=blake3.AUTO)
    config, _ = PretrainedConfig.get_config_dict(source)
    published = {key: value for key, value in config.items() if key not in _VOLATILE}
    hasher.update(json.dumps(published, sort_keys=True).encode())
    for name, tensor in sorted(module.state_dict().items()):
        hasher.update(name.encode())
        hasher.update(tensor.detach().reshape(-1).view(torch.uint8).numpy().data)
    digest: str = hasher.hexdigest()
    return digest
