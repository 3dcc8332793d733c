"""A card is one that a hub takes, and says where a checkpoint comes from."""

from __future__ import annotations

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
def test_a_hub_is_told_the_base_models_that_it_can_know(name: str, known: str | None) -> None:
    card = model_card(Lineage(PATH, name), None)
    assert ModelCard(card).data.base_model == known
    assert f"| base model | {name} |" in card


def test_parents_and_where_it_was_imported_from_are_told() -> None:
    lineage = Lineage(PATH, "gpt2", parents=["a", "b"], imported_from="their | adapter")
    card = model_card(lineage, "bf16")
    assert "| parents | a, b |" in card
    assert "| imported from | their \\| adapter |" in card
    assert ModelCard(card).data.library_name == "transformers"
