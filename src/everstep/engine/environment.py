"""The numeric environment: what has to be the same for the same bits."""

from __future__ import annotations

from typing import Any

import torch


def environment() -> dict[str, Any]:
    """Torch's version, kernels, threads and device names."""
    cuda = torch.cuda.is_available()
    mkldnn: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return {
        "torch": torch.__version__,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "mkldnn": mkldnn,
        "device": torch.cuda.get_device_name() if cuda else "cpu",
    }
