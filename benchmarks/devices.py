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


def add_device_option(parser: argparse.ArgumentParser) -> None:
    """Add ``--device``."""
    parser.add_argument("--device", type=device, default="cpu", help="cpu (default), or cuda")
