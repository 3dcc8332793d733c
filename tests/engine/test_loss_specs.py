"""Loss registry: the guide's table, defaults and bounds come from the specs."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

from everstep.engine.errors import InputError
from everstep.engine.losses.specs import LOSSES, LossSpec, SettingSpec
from everstep.engine.validation import check_settings

GUIDE = Path(__file__).parents[2] / "docs/guides/losses.md"


def table_row(spec: LossSpec) -> list[str]:
    """A spec as the cells of its row in the guide."""
    names = [f"`{item.name}`" for item in spec.inputs]
    names += [f"`{item.name}` (optional)" for item in spec.optional]
    settings = [f"`{setting.name}` {setting.default:g}" for setting in spec.settings]
    shapes = [{1: "[T]", 2: "[T, K]"}[dims] for dims in spec.target_dims]
    return [
        f"`{spec.name}`",
        spec.formula,
        ", ".join(names),
        ", ".join(settings),
        " or ".join(shapes),
    ]


def test_the_guides_table_equals_the_registry() -> None:
    head, _, after = GUIDE.read_text().partition("|---|---|---|---|---|\n")
    assert "loss_fn_config" in head.splitlines()[-1]
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in after.partition("\n\n")[0].splitlines()
    ]
    assert rows == [table_row(spec) for spec in LOSSES.values()]


@pytest.mark.parametrize("name", LOSSES)
def test_a_spec_resolves_to_a_function_of_logprobs_inputs_and_settings(name: str) -> None:
    function = LOSSES[name].resolve()
    assert list(inspect.signature(function).parameters) == ["logp", "inputs", "settings"]


@pytest.mark.parametrize("name", LOSSES)
def test_a_bound_names_a_setting_of_the_same_loss(name: str) -> None:
    spec = LOSSES[name]
    check_settings(spec, spec.defaults)
    bounds = {setting.at_most for setting in spec.settings} - {None}
    assert bounds <= spec.defaults.keys()


def test_settings_of_any_spec_are_checked_against_their_bounds() -> None:
    spec = LossSpec(
        "mine",
        "",
        "lab:mine",
        settings=(SettingSpec("low", 1, at_most="high"), SettingSpec("high", 2)),
    )
    check_settings(spec, {"low": 2})
    with pytest.raises(InputError, match=re.escape("low 3 is above high 2")):
        check_settings(spec, {"low": 3})
    with pytest.raises(InputError, match="unknown to mine; it takes low, high"):
        check_settings(spec, {"middle": 1.5})


def test_validation_does_not_import_torch() -> None:
    code = "import everstep.engine.validation, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
