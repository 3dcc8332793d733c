"""Tokenizers of the served models, for clients that can't reach the hub."""

from __future__ import annotations

import base64

from fastapi import APIRouter, Request

from everstep.server.common import runtime_of
from everstep.server.openapi import errors
from everstep.wire import types

router = APIRouter(tags=["models"])


@router.get("/tokenizers/{model_name:path}", responses=errors(404))
async def get_tokenizer(request: Request, model_name: str) -> types.TokenizerResponse:
    """A model's tokenizer as files that `AutoTokenizer` loads, each in base64."""
    files = await runtime_of(request).tokenizer_files(model_name)
    return types.TokenizerResponse(
        files={name: base64.b64encode(content).decode() for name, content in files.items()}
    )
