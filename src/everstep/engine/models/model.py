"""Model: a base model whose projections are wrapped, with its hidden states and logprobs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers.pytorch_utils import Conv1D

from everstep.engine.adapter_files import ADAPTER, Buffer, adapter_config, read_safetensors
from everstep.engine.alignment import tensor_from
from everstep.engine.config import AdapterConfig
from everstep.engine.errors import InputError
from everstep.engine.kernels.head import TargetLogprobs
from everstep.engine.kernels.packing import Packing
from everstep.engine.models.attention import packed
from everstep.engine.models.decoder import Decoder, ModuleDecoder
from everstep.engine.models.info import ModelInfo
from everstep.engine.models.lora import AdapterBinding, BoundAdapter, LoraProjection, features
from everstep.engine.models.lora_targets import ROUTERS, LoraTargets
from everstep.engine.models.peft_names import PeftNames
from everstep.engine.numerics import Numerics
from everstep.engine.run_state import (
    Adapter,
    AdapterLayout,
    RunState,
    load_adapter_weights,
    module_name,
)

if TYPE_CHECKING:
    from everstep.engine.training.layers import DirectLayers

HEAD_CELLS = 1 << 24
"""Bound of the logits that exist at once: rows of a piece times the vocabulary."""
_LLAMA_LIKE = ("llama", "mistral", "qwen2", "qwen3")
"""Model types of `Model.is_llama_like`."""


class Model:
    """A base model, its tokenizer, and the projections that adapters are bound to.

    Attributes:
        info: the description that clients get.
        module: the wrapped model.
        tokenizer: its tokenizer.
        binding: the adapters that are bound at present.
        device: device of the weights.
        size: number of the weights.
        numerics: choices of arithmetic for new runs. None: the defaults.
        decoder: computes decoding passes. `load_model` chooses a faster one where there is one.
        layers: compute training passes. None: the modules of transformers do.
        mixes_rows: whether a row's bits depend on the other rows of its pass. They do in a mixture
            of experts, where an expert's product has as many rows as were routed to it.
        is_llama_like: whether its layers are built as those of Llama, so that they may be computed
            without the modules of transformers.
    """

    def __init__(
        self, info: ModelInfo, module: Any, tokenizer: Any, targets: LoraTargets, peft: PeftNames
    ) -> None:
        self.info = info
        self.module = module
        self.tokenizer = tokenizer
        self.binding = AdapterBinding()
        self.numerics: Numerics | None = None
        self.device = torch.device(info.device)
        self.mixes_rows = any(
            "experts" in name or parameter.ndim > 2 for name, parameter in module.named_parameters()
        )
        self.size = sum(parameter.numel() for parameter in module.parameters())
        self._targets = targets
        config = module.config.get_text_config()  # read once: each access costs microseconds
        self.is_llama_like = config.model_type in _LLAMA_LIKE and not self.mixes_rows
        self._is_part = config is not module.config
        self._logit_scale = getattr(config, "logit_scale", None)
        self._logit_divisor = getattr(config, "logits_scaling", None)
        self._logit_cap = getattr(config, "final_logit_softcapping", None)
        self._modules = tuple(name for name, _ in module.named_modules())
        self._peft = peft
        self._by_file_name = {name: module for module, name in self._peft.in_files.items()}
        self._routers = frozenset(targets.unadapted.get(ROUTERS, ()))
        self._conv1d = False
        self._wrap()
        self.decoder: Decoder = ModuleDecoder(self)
        self.layers: DirectLayers | None = None

    def new_run(
        self,
        config: AdapterConfig,
        *,
        initialise: bool = True,
        numerics: Numerics | None = None,
    ) -> RunState:
        """Create a run's state.

        Args:
            config: of its adapter.
            initialise: whether the weights are drawn from the adapter's seed. If not, the state is
                to be restored.
            numerics: choices of its arithmetic. None: the model's.

        Raises:
            InputError: a flag selects projections that this model does not have.
        """
        state = RunState(self.layout(config), self.device, initialise=initialise)
        state.numerics = numerics or self.numerics or state.numerics
        return state

    def load_adapter(self, config: AdapterConfig, adapter_file: Buffer) -> Adapter:
        """Load an adapter for sampling. Raises as `RunState.restore` does."""
        layout = self.layout(self.config_of(config, adapter_file))
        return load_adapter_weights(layout, adapter_file, self.device)

    def layout(self, config: AdapterConfig) -> AdapterLayout:
        """Lay out an adapter's tensors for this model."""
        names = self._selected(config)
        if config.modules is None:
            self._check_flags(config)
        else:
            names = [name for name in (*names, *self._targets.retired) if name in config.modules]
        modules = dict(self.module.named_modules())
        widths = {name: features(modules[name]) for name in names}
        info = self.info  # a directory of this machine means nothing where the files may go
        base = info.name if Path(info.source).is_dir() else info.source
        others = set(self._modules) - set(names)
        targets = self._peft.targets(names, others, whole=self._is_part)
        peft = adapter_config(base, config.rank, config.alpha, targets, self._conv1d)
        return AdapterLayout(config, widths, peft, self._peft.in_files)

    def _selected(self, config: AdapterConfig) -> list[str]:
        """Return the projections that an adapter's flags select."""
        kinds = self._flagged(config)
        return [name for wanted, projections, _ in kinds if wanted for name in projections]

    def _flagged(self, config: AdapterConfig) -> tuple[tuple[bool, tuple[str, ...], str], ...]:
        return (
            (config.train_attn, self._targets.attn, "train_attn"),
            (config.train_mlp, self._targets.mlp, "train_mlp"),
            (config.train_unembed, self._targets.unembed, "train_unembed"),
        )

    def _check_flags(self, config: AdapterConfig) -> None:
        for wanted, projections, flag in self._flagged(config):
            if wanted and not projections:
                raise InputError(
                    f"{flag} is True, but {self.info.name} ({self.info.architecture}) has no "
                    "projections of that kind that LoRA can adapt; set it to False."
                )

    def config_for(
        self, rank: int, alpha: float, widths: Mapping[str, tuple[int, int]]
    ) -> AdapterConfig:
        """Return the configuration that describes an imported adapter.

        Args:
            rank: rank of all its projections.
            alpha: the low-rank product is scaled by alpha / rank.
            widths: in and out features of the projections that it adapts.

        Raises:
            InputError: a projection cannot be adapted here, or has other widths.
        """
        kinds = (self._targets.attn, self._targets.mlp, self._targets.unembed)
        widths = {self.module_of(name): width for name, width in widths.items()}
        for name, (width_in, width_out) in widths.items():
            if not any(name in kind for kind in kinds):
                raise InputError(
                    f"target_modules: {name} is no projection of {self.info.name} "
                    f"({self.info.architecture}) that LoRA can adapt here"
                    + (": routers are never adapted." if name in self._routers else ".")
                )
            ours = features(self.module.get_submodule(name))
            if ours != (width_in, width_out):
                raise InputError(
                    f"target_modules: {name} is {width_in} → {width_out} in the adapter, and "
                    f"{ours[0]} → {ours[1]} in {self.info.name}: it was trained on another model."
                )
        attn, mlp, unembed = (any(name in kind for name in widths) for kind in kinds)
        config = AdapterConfig(rank, alpha, 0, attn, mlp, unembed)
        selected = list(self.layout(config).widths)
        if len(selected) == len(widths):
            return config
        return replace(config, modules=[name for name in selected if name in widths])

    def config_of(self, config: AdapterConfig, adapter_file: Buffer) -> AdapterConfig:
        """Return the configuration of a checkpoint's adapter.

        Earlier releases adapted projections that no flag selects any more, such as routers. A
        checkpoint that holds such tensors is loaded with them.

        Args:
            config: the configuration that was recorded with it.
            adapter_file: content of its tensors' file.

        Raises:
            InputError: the file is malformed.
        """
        if not self._targets.retired:
            return config
        found = {module_name(name) for name in read_safetensors(adapter_file, ADAPTER)}
        retired = [name for name in self._targets.retired if name in found]
        known = config.modules
        if known is not None:
            known = [name for name in known if name not in self._targets.retired] or None
        if not retired:
            return replace(config, modules=known)
        return replace(config, modules=[*(known or self._selected(config)), *retired])

    def module_of(self, name: str) -> str:
        """Return the module that an adapter's file names."""
        return self._by_file_name.get(name, name)

    def check_base_weight(self, name: str, values: np.ndarray[Any, Any]) -> None:
        """Raise `InputError` unless a module has this weight, in the dtype that it is loaded in.

        Args:
            name: name of the module.
            values: the expected weight, float32.
        """
        try:
            weight: torch.Tensor = self.module.get_submodule(name).weight
        except AttributeError as error:
            raise InputError(f"{self.info.name} has no module {name}.") from error
        theirs = tensor_from(values).to(weight.device, weight.dtype)
        if not torch.equal(weight, theirs):
            raise InputError(
                f"modules_to_save: the adapter brings a weight of its own for {name}, which is not "
                f"that of {self.info.name}. Only low-rank products can be imported."
            )

    @contextmanager
    def bind_weights(
        self,
        layout: AdapterLayout,
        tensors: Mapping[str, torch.Tensor],
        numerics: Numerics | None = None,
    ) -> Iterator[None]:
        """Bind an adapter's tensors to all rows for the duration of a pass.

        Args:
            layout: the adapter's.
            tensors: its tensors.
            numerics: choices of the run's arithmetic. None: the defaults.
        """
        in_base = numerics is not None and numerics.lora_products == "base"
        weights, scale = layout.weights(tensors), layout.config.scale
        with self.binding.bind(BoundAdapter(weights, scale, in_base_dtype=in_base)):
            yield

    def hidden(self, tokens: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """Compute the last hidden states, [B, T, H], of token ids [B, T]."""
        output = self._decoder()(input_ids=tokens, use_cache=False, **kwargs)
        states: torch.Tensor = output.last_hidden_state
        return states

    def text_states(self, tokens: torch.Tensor, packing: Packing) -> torch.Tensor:
        """Compute the last hidden states, [N, H], of packed token ids [N]."""
        adapters = self.binding.adapters
        direct = len(adapters) == 1 and adapters[0].rows is None
        if self.layers is not None and direct and not adapters[0].in_base_dtype:
            return self.layers.hidden(tokens, packing, adapters[0])
        with packed(packing):
            return self.hidden(tokens.unsqueeze(0), position_ids=packing.positions)[0]

    def _decoder(self) -> Any:
        """Return the model below the head. One family calls its head a decoder."""
        decoder = self.module.get_decoder()
        if decoder is self.module.get_output_embeddings():
            decoder = self.module.base_model
        return decoder

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Compute float32 logits of hidden states, with the family's scaling and soft capping."""
        return self.scaled(self.module.get_output_embeddings()(hidden))

    def scaled(self, logits: torch.Tensor) -> torch.Tensor:
        """Scale and cap the head's outputs as the family does. Returns them in float32."""
        if self._logit_scale is not None:
            logits = logits * self._logit_scale
        if self._logit_divisor is not None:
            logits = logits / self._logit_divisor
        if self._logit_cap is not None:
            logits = torch.tanh(logits / self._logit_cap) * self._logit_cap
        return logits.float()

    def target_logprobs(
        self, hidden: torch.Tensor, targets: torch.Tensor, rows: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Compute tokens' logprobs in pieces, so a long pass's logits never exist at once.

        Args:
            hidden: hidden states, [N, H].
            targets: token ids, [N, K].
            rows: indices of the tokens that may get a gradient. None: any.

        Returns:
            Float32 [N, K].
        """
        piece = max(1, HEAD_CELLS // self.info.vocab_size)
        logprobs: torch.Tensor = TargetLogprobs.apply(  # type: ignore[no-untyped-call]
            self.logits, piece, rows, hidden, targets, *self._head_parameters()
        )
        return logprobs

    def _head_parameters(self) -> list[torch.Tensor]:
        """Return the bound adapters' tensors of the output head."""
        head = self.module.get_output_embeddings()
        if not isinstance(head, LoraProjection):
            return []
        pairs = [bound.weights.get(head.name, ()) for bound in self.binding.adapters]
        return [tensor for pair in pairs for tensor in pair]

    def _wrap(self) -> None:
        for name in (*self._targets.selectable, *self._targets.retired):
            base = self.module.get_submodule(name)
            self._conv1d = self._conv1d or isinstance(base, Conv1D)
            parent, _, last = name.rpartition(".")
            setattr(
                self.module.get_submodule(parent), last, LoraProjection(base, name, self.binding)
            )
