"""Model record: what the service of a home knows of its base models, for readers of the home.

<home>/model_info.json holds a description of each model that was served last, by name. Without it,
the modules that an adapter adapts are not known until a service runs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from everstep.durable_files import replace_file
from everstep.engine.models.info import ModelInfo
from everstep.logs import get_logger

_log = get_logger("everstep.runtime")
_FILE = "model_info.json"


@dataclass(frozen=True)
class RecordedModels:
    """The models that the last service of a home served, by name."""

    models: Mapping[str, ModelInfo]

    @classmethod
    def of(cls, home: Path) -> RecordedModels:
        """Read a home's record. Without a readable one, no model is known."""
        try:
            content = json.loads((home / _FILE).read_bytes())
            return cls({name: ModelInfo.from_dict(each) for name, each in content.items()})
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return cls({})


def record_models(home: Path, models: Mapping[str, ModelInfo]) -> None:
    """Record the models that are served, unless the record says so already."""
    if RecordedModels.of(home).models == models:
        return
    content = {name: info.to_dict() for name, info in models.items()}
    try:
        replace_file(home / _FILE, json.dumps(content).encode())
    except OSError as error:  # it is a convenience: the service serves all the same
        _log.warning("served models could not be recorded", reason=str(error))
