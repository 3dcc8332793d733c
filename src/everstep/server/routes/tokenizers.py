"""Tokenizers: the tokenizer files of served models, for clients that can't reach the hub."""

from __future__ import annotations

import base64

from fastapi import APIRouter

from everstep.server.openapi import errors
from everstep.server.requests import CurrentRuntime
from everstep.wire import types

router = APIRouter(tags=["models"])


@router.get("/tokenizers/{model_name:path}", responses=errors(404))
async def get_tokenizer(runtime: CurrentRuntime, model_name: str) -> types.TokenizerResponse:
    """Return a model's tokenizer as files that `AutoTokenizer` loads, each in base64.

    A file's name is its path in the model's directory.
    """
    files = await runtime.tokenizer_files(model_name)
    return types.TokenizerResponse(
        files={name: base64.b64encode(content).decode() for name, content in files.items()}
    )
