"""Public surface: `import everstep as tinker` has the official SDK's names and parameters."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import tinker
import tinker.types

import everstep
import everstep.types

TYPES = sorted(n for n in vars(tinker.types) if n[0].isupper())
CLIENTS = ("ServiceClient", "TrainingClient", "SamplingClient", "RestClient", "AdminClient")
KINDS = {
    inspect.Parameter.POSITIONAL_ONLY: "positional",
    inspect.Parameter.POSITIONAL_OR_KEYWORD: "positional",
    inspect.Parameter.KEYWORD_ONLY: "keyword",
    inspect.Parameter.VAR_KEYWORD: "keywords",
    inspect.Parameter.VAR_POSITIONAL: "positionals",
}


def parameters(function: Any) -> dict[str, tuple[str, Any]]:
    found = inspect.signature(function).parameters.values()
    return {p.name: (KINDS[p.kind], p.default) for p in found}


def plain(value: Any) -> Any:
    return value.model_dump() if hasattr(value, "model_dump") else value


def public_methods() -> list[tuple[str, str]]:
    return [
        (client, name)
        for client in CLIENTS
        for name in dir(getattr(tinker, client))
        if (not name.startswith("_") and name != "holder")  # an attribute of instances
        or name in ("__init__", "__enter__", "__exit__", "__reduce__")
    ]


@pytest.mark.parametrize("name", tinker.__all__)
def test_official_public_names_exist(name: str) -> None:
    assert getattr(everstep, name, None) is not None
    assert name in everstep.__all__


@pytest.mark.parametrize("name", TYPES)
def test_official_types_exist(name: str) -> None:
    assert hasattr(everstep.types, name)


@pytest.mark.parametrize(("client", "name"), public_methods())
def test_methods_take_the_official_parameters(client: str, name: str) -> None:
    theirs, ours = getattr(getattr(tinker, client), name), getattr(getattr(everstep, client), name)
    if not callable(theirs):
        return
    wanted, given = parameters(theirs), parameters(ours)
    more = {n: value for n, value in given.items() if n not in wanted}
    for parameter, (kind, default) in wanted.items():
        assert given[parameter][0] == kind, parameter
        assert default in (inspect.Parameter.empty, given[parameter][1]), parameter
    assert all(default is not inspect.Parameter.empty for _, default in more.values()), more
    assert inspect.iscoroutinefunction(ours) == name.endswith("_async")


@pytest.mark.parametrize(
    "name", [n for n in TYPES if hasattr(vars(tinker.types)[n], "model_fields")]
)
def test_types_have_the_official_fields_and_defaults(name: str) -> None:
    theirs, ours = getattr(tinker.types, name), getattr(everstep.types, name)
    for field, info in theirs.model_fields.items():
        if field == "optim_params":
            continue  # ours has its two wire fields instead
        assert field in ours.model_fields, field
        mine = ours.model_fields[field]
        if not theirs.__name__.endswith("Response") and info.is_required():
            continue  # a field that theirs requires may have a default in ours
        if not info.is_required() and field != "type":
            assert not mine.is_required(), field
            wanted, given = (f.get_default(call_default_factory=True) for f in (info, mine))
            assert plain(given) == plain(wanted), field


def test_submodules_can_be_imported() -> None:
    from everstep.auth import tinker_has_credentials
    from everstep.types import AdamParams, Datum

    assert everstep.types.Datum is Datum
    assert everstep.AdamParams is AdamParams
    assert everstep.auth.tinker_has_credentials is tinker_has_credentials


@pytest.mark.parametrize("client", CLIENTS)
def test_async_aliases_exist(client: str) -> None:
    theirs = {name for name in dir(getattr(tinker, client)) if name.endswith("_async")}
    assert theirs <= set(dir(getattr(everstep, client)))
