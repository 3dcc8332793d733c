"""What of an adapter vLLM can't serve as it is, and what to do about it.

From vLLM's sources (``vllm/config/lora.py``, ``vllm/lora/layers/logits_processor.py``): the rank is
at most ``--max-lora-rank``, which is one of a few; an adapter of the output head is taken by some
families of models only, others refuse to load it or leave it out, and with a large vocabulary none
take it.
"""

from __future__ import annotations

from everstep.interchange.peft_config import PeftAdapter

_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
_DEFAULT_RANK = 16


def vllm_limits(adapter: PeftAdapter) -> list[str]:
    """Why vLLM can't serve an adapter as it is; empty where it can."""
    limits = []
    if adapter.rank > _RANKS[-1]:
        limits.append(f"its rank is {adapter.rank}, and vLLM takes {_RANKS[-1]} at most")
    heads = [module for module in adapter.widths if is_head(module)]
    if heads:
        limits.append(
            f"it changes the output head ({', '.join(heads)}), which vLLM refuses or leaves out "
            "for most models"
        )
    return limits


def vllm_options(adapter: PeftAdapter) -> str | None:
    """What vLLM has to be started with for an adapter's rank; None: nothing, or nothing helps."""
    if not _DEFAULT_RANK < adapter.rank <= _RANKS[-1]:
        return None
    return f"--max-lora-rank {next(rank for rank in _RANKS if rank >= adapter.rank)}"


def is_head(module: str) -> bool:
    """Whether a projection is in no layer: it is the output head."""
    return not any(part.isdecimal() for part in module.split("."))
