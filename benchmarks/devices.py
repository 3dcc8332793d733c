"""The device of a benchmark: the CPU, or an NVIDIA GPU with ``--device cuda``."""

from __future__ import annotations

import argparse


def device(text: str) -> str:
    """Check the value of ``--device``. A benchmark may have no other use for torch."""
    import torch

    name = torch.device(text).type
    if name not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"{text}: cpu and cuda can be measured")
    if name == "cuda" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError(
            f"{text} needs an NVIDIA GPU and a torch with CUDA; this is torch {torch.__version__}, "
            "and it finds none"
        )
    return text


def described(device: str) -> str | None:
    """Name a GPU and its libraries. None: it is the CPU."""
    import torch

    if torch.device(device).type == "cpu":
        return None
    properties = torch.cuda.get_device_properties(device)
    memory = f"{properties.total_memory / 2**30:.0f} GiB"
    return f"{properties.name}, {memory}, CUDA {torch.version.cuda}, torch {torch.__version__}"


def release_device(device: str) -> None:
    """Give the memory of a GPU back that this process keeps and no longer uses."""
    import torch

    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()


def add_device_option(parser: argparse.ArgumentParser) -> None:
    """Add ``--device``."""
    parser.add_argument("--device", type=device, default="cpu", help="cpu (default), or cuda")
