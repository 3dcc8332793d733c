"""Base models as they are named on the command line."""

from __future__ import annotations

from pathlib import Path

from everstep.cli.errors import Refused

PICO = "everstep/pico"
_PICO_LEARNING_RATE = 6e-3
_LEARNING_RATE = 5e-4


def served_model(model: str) -> tuple[str, str]:
    """The name a model is served under, and what ``everstep serve --model`` is given for it.

    Args:
        model: a name (``everstep/pico``, a hub id) or a local directory.

    Raises:
        Refused: it is written as a path, and there is no such directory.
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
    """What a LoRA adapter of a model learns well at, where nobody says better."""
    return _PICO_LEARNING_RATE if name == PICO else _LEARNING_RATE
