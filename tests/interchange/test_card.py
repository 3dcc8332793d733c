"""Model card: valid for the hub, with the checkpoint's lineage."""

from __future__ import annotations

from typing import Any

import pytest
from huggingface_hub import ModelCard

from everstep.interchange.card import Lineage, model_card

PATH = "tinker://run:train:0/weights/last"


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("Qwen/Qwen3-8B", "Qwen/Qwen3-8B"),
        ("gpt2", "gpt2"),
        ("/data/models/mine", None),
        ("a/b/c", None),
        ('"quoted"', None),
    ],
)
def test_the_metadata_names_base_models_of_the_hub_only(name: str, known: str | None) -> None:
    card = model_card(Lineage(PATH, name), None)
    data: Any = ModelCard(card).data
    assert data.base_model == known
    assert f"| base model | {name} |" in card


def test_the_card_names_parents_and_the_import() -> None:
    lineage = Lineage(PATH, "gpt2", parents=["a", "b"], imported_from="their | adapter")
    card = model_card(lineage, "bf16")
    assert "| parents | a, b |" in card
    assert "| imported from | their \\| adapter |" in card
    data: Any = ModelCard(card).data
    assert data.library_name == "transformers"
