"""Base models: loading, the wrapped projections, hidden states, the output head in pieces."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from blake3 import blake3
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer, PretrainedConfig
from transformers.pytorch_utils import Conv1D

from everstep.engine import attention, probe
from everstep.engine.adapter_files import Buffer, adapter_config
from everstep.engine.config import AdapterConfig
from everstep.engine.errors import InputError, ModelUnsupported
from everstep.engine.info import ModelInfo
from everstep.engine.lora import Binding, Bound, LoraProjection, features
from everstep.engine.state import Adapter, AdapterLayout, RunState, read_adapter
from everstep.engine.targets import Targets, find_targets

_VOLATILE = ("_name_or_path", "_commit_hash", "transformers_version")
"""What a configuration says of its file, not of the model."""
_HEAD_CELLS = 1 << 24
"""Logits that exist at once: rows of a piece times the vocabulary."""


class Model:
    """A base model, its tokenizer, and the projections that adapters are bound to.

    Attributes:
        info: what clients are told.
        module: the wrapped model.
        tokenizer: its tokenizer.
        binding: what is bound now.
        device: where it lies.
        mixes_rows: whether a row's bits depend on the others of its pass, as in a mixture of
            experts, where each expert's product has as many rows as were sent to it.
    """

    def __init__(self, info: ModelInfo, module: Any, tokenizer: Any, targets: Targets) -> None:
        self.info = info
        self.module = module
        self.tokenizer = tokenizer
        self.binding = Binding()
        self.device = torch.device(info.device)
        self.mixes_rows = any(
            "experts" in name or parameter.ndim > 2 for name, parameter in module.named_parameters()
        )
        self._targets = targets
        self._conv1d = False
        self._wrap()

    def new_run(self, config: AdapterConfig) -> RunState:
        """A run from its seed.

        Raises:
            InputError: a flag asks for projections that this model doesn't have.
        """
        return RunState(self.layout(config), self.device)

    def load_adapter(self, config: AdapterConfig, adapter_file: Buffer) -> Adapter:
        """An adapter to sample with, from its file; raises as `RunState.restore` does."""
        return read_adapter(self.layout(config), adapter_file, self.device)

    def layout(self, config: AdapterConfig) -> AdapterLayout:
        """Where an adapter's tensors are, for this model."""
        names: list[str] = []
        for wanted, found, flag in (
            (config.train_attn, self._targets.attn, "train_attn"),
            (config.train_mlp, self._targets.mlp, "train_mlp"),
            (config.train_unembed, self._targets.unembed, "train_unembed"),
        ):
            if wanted and not found:
                raise InputError(
                    f"{flag} is True, but {self.info.name} ({self.info.architecture}) has no "
                    "projections of that kind that LoRA can be put on; set it to False."
                )
            names += found if wanted else ()
        if config.modules is not None:
            names = [name for name in names if name in config.modules]
        modules = dict(self.module.named_modules())
        widths = {name: features(modules[name]) for name in names}
        info = self.info  # a directory of this machine means nothing where the files may go
        base = info.name if Path(info.source).is_dir() else info.source
        peft = adapter_config(base, config.rank, config.alpha, self._suffixes(names), self._conv1d)
        return AdapterLayout(config, widths, peft)

    def fitting(
        self, rank: int, alpha: float, widths: Mapping[str, tuple[int, int]]
    ) -> AdapterConfig:
        """The configuration of an adapter that was made elsewhere.

        Args:
            rank: of all its projections.
            alpha: the product is scaled by alpha / rank.
            widths: in and out features of the projections that it is put on.

        Raises:
            InputError: a projection can't be adapted here, or has other widths.
        """
        kinds = (self._targets.attn, self._targets.mlp, self._targets.unembed)
        for name, (width_in, width_out) in widths.items():
            if not any(name in kind for kind in kinds):
                raise InputError(
                    f"target_modules: {name} is no projection of {self.info.name} "
                    f"({self.info.architecture}) that LoRA can be put on here."
                )
            ours = features(self.module.get_submodule(name))
            if ours != (width_in, width_out):
                raise InputError(
                    f"target_modules: {name} is {width_in} → {width_out} in the adapter, and "
                    f"{ours[0]} → {ours[1]} in {self.info.name}: it was trained on another model."
                )
        attn, mlp, unembed = (any(name in kind for name in widths) for kind in kinds)
        config = AdapterConfig(rank, alpha, 0, attn, mlp, unembed)
        every = list(self.layout(config).widths)
        if len(every) == len(widths):
            return config
        return replace(config, modules=[name for name in every if name in widths])

    def check_weight(self, name: str, values: np.ndarray[Any, Any]) -> None:
        """Raise `InputError` unless a module's own weight is this, in the dtype that it is held in.

        Args:
            name: of the module.
            values: float32.
        """
        try:
            weight: torch.Tensor = self.module.get_submodule(name).weight
        except AttributeError as error:
            raise InputError(f"{self.info.name} has no module {name}.") from error
        theirs = torch.from_numpy(values).to(weight.device, weight.dtype)
        if not torch.equal(weight, theirs):
            raise InputError(
                f"modules_to_save: the adapter brings a weight of its own for {name}, which is not "
                f"that of {self.info.name}. Only low-rank products can be imported."
            )

    @contextmanager
    def bound_weights(
        self, layout: AdapterLayout, tensors: Mapping[str, torch.Tensor]
    ) -> Iterator[None]:
        """Bind an adapter's tensors to all rows for the time of a pass."""
        with self.binding.to(Bound(layout.weights(tensors), layout.config.scale)):
            yield

    def hidden(self, tokens: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """The last hidden states, [B, T, H], of token ids [B, T]."""
        output = self.module.get_decoder()(input_ids=tokens, use_cache=False, **kwargs)
        states: torch.Tensor = output.last_hidden_state
        return states

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Float32 logits of hidden states, with what the family does to them after the head."""
        config = self.module.config
        logits: torch.Tensor = self.module.get_output_embeddings()(hidden)
        scale = getattr(config, "logit_scale", None)
        if scale is not None:
            logits = logits * scale
        divisor = getattr(config, "logits_scaling", None)
        if divisor is not None:
            logits = logits / divisor
        cap = getattr(config, "final_logit_softcapping", None)
        if cap is not None:
            logits = torch.tanh(logits / cap) * cap
        return logits.float()

    def target_logprobs(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Logprobs of tokens, in pieces, so that a long pass's logits never exist at once.

        Args:
            hidden: [N, H].
            targets: token ids, [N, K].

        Returns:
            Float32 [N, K].
        """
        rows = max(1, _HEAD_CELLS // self.info.vocab_size)
        pieces = []
        for states, ids in zip(torch.split(hidden, rows), torch.split(targets, rows), strict=True):
            if torch.is_grad_enabled() and len(hidden) > rows:
                pieces.append(checkpoint(self._piece, states, ids, use_reentrant=False))
            else:
                pieces.append(self._piece(states, ids))
        return torch.cat(pieces)

    def _piece(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        logits = self.logits(hidden)
        return logits.gather(-1, targets) - torch.logsumexp(logits, dim=-1, keepdim=True)

    def _wrap(self) -> None:
        for name in (*self._targets.attn, *self._targets.mlp, *self._targets.unembed):
            base = self.module.get_submodule(name)
            self._conv1d = self._conv1d or isinstance(base, Conv1D)
            parent, _, last = name.rpartition(".")
            setattr(
                self.module.get_submodule(parent), last, LoraProjection(base, name, self.binding)
            )

    def _suffixes(self, names: list[str]) -> list[str]:
        """The modules as PEFT selects them: by last name where that hits no other module."""
        everything = (*self._targets.attn, *self._targets.mlp, *self._targets.unembed)
        short = sorted({name.rsplit(".", 1)[-1] for name in names})
        others = {name.rsplit(".", 1)[-1] for name in everything if name not in set(names)}
        return names if others & set(short) else short


def load_model(
    name: str, source: str, *, device: str | None = None, dtype: str | None = None
) -> Model:
    """Load a causal language model.

    Args:
        name: what clients call it.
        source: a directory or a Hugging Face hub id.
        device: torch device; None: CUDA when it is there.
        dtype: dtype of the weights; None: float32 on a CPU, bfloat16 on CUDA.

    Raises:
        ModelUnsupported: it can't be trained or sampled exactly here; says why.
        OSError: it can't be found or read.
    """
    torch.use_deterministic_algorithms(True, warn_only=True)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    kind = (
        getattr(torch, dtype)
        if dtype
        else (torch.bfloat16 if device.startswith("cuda") else torch.float32)
    )
    attention.register()
    module = _pretrained(source, kind)
    module.requires_grad_(False)
    module.eval()
    module.to(device)
    tokenizer = AutoTokenizer.from_pretrained(source)
    targets = find_targets(module)
    info = ModelInfo(
        name=name,
        source=source,
        architecture=type(module).__name__,
        vocab_size=module.get_input_embeddings().weight.shape[0],
        max_context_length=_context_length(module.config),
        fingerprint=_fingerprint(module, source),
        eos_token_ids=_eos(module, tokenizer),
        tokenizer_id=str(Path(source).resolve()) if Path(source).is_dir() else source,
        device=device,
        dtype=str(kind).removeprefix("torch."),
    )
    whole = probe.watched_logits(module)
    model = Model(info, module, tokenizer, targets)
    probe.check(model, whole)
    return model


def _pretrained(source: str, kind: torch.dtype) -> Any:
    try:
        return AutoModelForCausalLM.from_pretrained(
            source, dtype=kind, attn_implementation=attention.NAME
        )
    except (KeyError, ValueError) as error:
        raise ModelUnsupported(
            f"{source} is not a causal language model whose attention the engine can take over "
            f"({type(error).__name__}: {error})."
        ) from error


def _context_length(config: Any) -> int:
    for field in ("max_position_embeddings", "n_positions", "max_seq_len"):
        if getattr(config, field, None):
            return int(getattr(config, field))
    raise ModelUnsupported("The model's configuration does not say how long its context is.")


def _eos(module: Any, tokenizer: Any) -> tuple[int, ...]:
    found = getattr(module.generation_config, "eos_token_id", None)
    if found is None:
        found = tokenizer.eos_token_id
    return tuple(found) if isinstance(found, list) else () if found is None else (int(found),)


def _fingerprint(module: Any, source: str) -> str:
    """Of the configuration as it was published, not as this version of transformers fills it up."""
    hasher = blake3(max_threads=blake3.AUTO)
    config, _ = PretrainedConfig.get_config_dict(source)
    published = {key: value for key, value in config.items() if key not in _VOLATILE}
    hasher.update(json.dumps(published, sort_keys=True).encode())
    for name, tensor in sorted(module.state_dict().items()):
        hasher.update(name.encode())
        hasher.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    digest: str = hasher.hexdigest()
    return digest
