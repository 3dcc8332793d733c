"""Base models on the command line: names and default learning rates."""

from __future__ import annotations

from pathlib import Path

from everstep.cli.common.errors import Refused

PICO = "everstep/pico"
_PICO_LEARNING_RATE = 6e-3
_LEARNING_RATE = 5e-4


def served_model(model: str) -> tuple[str, str]:
    """Return the name of a served model, and its argument for ``everstep serve --model``.

    Args:
        model: a name (``everstep/pico``, a hub id) or a local directory.

    Raises:
        Refused: it is written as a path, and the directory does not exist.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        path = path.resolve()
        return path.name, f"{path.name}={path}"
    if model.startswith((".", "/", "~")):
        raise Refused(
            f"{model}: there is no such directory. Give one with a model's config.json, weights "
            "and tokenizer, or the name of a model on the Hugging Face hub."
        )
    return model, model


def learning_rate(name: str) -> float:
    """Return the default learning rate of a LoRA adapter of a model."""
    return _PICO_LEARNING_RATE if name == PICO else _LEARNING_RATE
