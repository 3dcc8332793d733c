"""The table of models in docs/models.md: `make models` writes it, and the zoo checks its rows."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Sequence
from pathlib import Path

import transformers
from transformers import AutoTokenizer

from everstep.engine.models.pico import write_pico
from tests.zoo.configs import FAMILIES
from tests.zoo.specimens import Specimen, specimen

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
_ROW = re.compile(r"^\| `([\w.-]+)` \| .*$", re.MULTILINE)
_SERVED = """\
| family | `train_attn` | `train_mlp` | `train_unembed` | never adapted |
|---|---|---|---|---|"""
_REFUSED = "| family | reason |\n|---|---|"
_TEXT = """\
# Models

Every causal family of transformers {version}, by the `model_type` of its `config.json`. Written by
`make models` from the zoo (`tests/zoo`). It builds a tiny random model of each family and compares
those that are served with transformers and PEFT: loss, gradients, steps, samples, exports, imports.

A model is checked again when it is loaded ([Numerics](numerics.md)). One that the engine would not
compute exactly is refused with the reason.

## Served

The columns name the projections that a flag adapts. Routers are never adapted: another routing is
another model. Routed experts are stacked into one parameter each and are not adapted either.
`get_info`, `weights_info` and `everstep checkpoint info` give the same for a run, with counts.

{served}

## Refused

{refused}
"""


def committed() -> dict[str, str]:
    """Return the rows of the committed table, by family."""
    return {match[1]: match[0] for match in _ROW.finditer(PAGE.read_text())}


def served() -> tuple[str, ...]:
    """Return the families that the committed table says are served."""
    text = PAGE.read_text().partition("## Refused")[0]
    return tuple(match[1] for match in _ROW.finditer(text))


def page(found: Sequence[Specimen]) -> str:
    """Return the page's content."""
    kept = sorted(found, key=lambda each: each.family)
    served = [each.row for each in kept if each.model is not None]
    refused = [each.row for each in kept if each.model is None]
    return _TEXT.format(
        version=transformers.__version__,
        served="\n".join([_SERVED, *served]),
        refused="\n".join([_REFUSED, *refused]),
    )


def main() -> None:
    """Write the page."""
    transformers.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        write_pico(root / "pico")
        tokenizer = AutoTokenizer.from_pretrained(root / "pico")
        PAGE.write_text(page([specimen(name, root / name, tokenizer) for name in FAMILIES]))


if __name__ == "__main__":
    main()
