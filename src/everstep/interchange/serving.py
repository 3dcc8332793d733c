"""Serving limits: reports why vLLM cannot serve an adapter, and the options that it needs.

From vLLM's sources (``vllm/config/lora.py``, ``vllm/lora/layers/logits_processor.py``): the rank is
bounded by ``--max-lora-rank``, which has a few allowed values. Only some model families load an
adapter of the output head, others reject or ignore it, and none load it with a large vocabulary.
"""

from __future__ import annotations

from everstep.interchange.peft_config import PeftAdapter

_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
_DEFAULT_RANK = 16


def vllm_limits(adapter: PeftAdapter) -> list[str]:
    """Return the reasons why vLLM cannot serve an adapter, if any."""
    limits = []
    if adapter.rank > _RANKS[-1]:
        limits.append(f"its rank is {adapter.rank}, and vLLM takes {_RANKS[-1]} at most")
    heads = [module for module in adapter.widths if is_output_head(module)]
    if heads:
        limits.append(
            f"it changes the output head ({', '.join(heads)}), which vLLM rejects or ignores "
            "for most models"
        )
    return limits


def vllm_options(adapter: PeftAdapter) -> str | None:
    """Return vLLM's option for an adapter's rank. None: it needs no option, or none suffices."""
    if not _DEFAULT_RANK < adapter.rank <= _RANKS[-1]:
        return None
    return f"--max-lora-rank {next(rank for rank in _RANKS if rank >= adapter.rank)}"


def is_output_head(module: str) -> bool:
    """Whether a projection is the output head: it is in no layer."""
    return not any(part.isdecimal() for part in module.split("."))
