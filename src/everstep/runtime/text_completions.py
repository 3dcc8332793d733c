"""Completions by a model's name: samplers that exist for it alone, and prompts as tokens.

Each completion is an accepted, durable sample like any other; what names it beyond one request is
a session of the service's own, in which every model has one sampler.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from everstep.engine.info import ModelInfo
from everstep.ledger import Ledger
from everstep.runtime.errors import OperationFailed, Rejected, WorkerLost
from everstep.runtime.sessions import Sessions
from everstep.runtime.tokenizers import tokenizer_files
from everstep.runtime.worker_process import WorkerProcess
from everstep.wire import types
from everstep.wire.errors import ErrorCategory

_SCHEME = "tinker://"
_ATTEMPTS = 3
_FILE = "tokenizer.json"


@dataclass(frozen=True)
class Completer:
    """What completes a text.

    Attributes:
        sampler_id: where its samples are taken.
        model: the base model.
    """

    sampler_id: str
    model: ModelInfo


class TextCompletions:
    """Finds what completes a text, and turns prompts into tokens.

    Args:
        home: has the tokenizers' files.
        ledger: where its session is.
        worker: has the tokenizers.
        sessions: creates its samplers.
    """

    def __init__(
        self, home: Path, ledger: Ledger, worker: WorkerProcess, sessions: Sessions
    ) -> None:
        self._ledger = ledger
        self._worker = worker
        self._sessions = sessions
        self._finished = 0
        self._home = home
        self._tokenizers: dict[str, Tokenizer] = {}

    async def completer(self, model: str, token: str | None) -> Completer:
        """What completes texts under a name; it exists from the first call on.

        Args:
            model: a base model's name, or a checkpoint's path.
            token: the weights access token that was sent with it, if any.

        Raises:
            Rejected: 404, there is no such model or checkpoint.
        """
        request = types.CreateSamplingSessionRequest(
            session_id=await self._session_id(),
            sampling_session_seq_id=_number(model),
            **{"model_path" if model.startswith(_SCHEME) else "base_model": model},
        )
        try:
            base_model, _ = await self._sessions.subject(request, token)
        except Rejected as error:
            raise Rejected(404, error.detail) from error
        created = await self._sessions.create_sampler(request, token)
        return Completer(created.sampling_session_id, self._worker.models[base_model])

    async def encode(self, model: ModelInfo, prompt: Mapping[str, Any]) -> list[int]:
        """The tokens of a prompt, as `prompts.prompt_tokens` reads it.

        Raises:
            OperationFailed: the model can't read it.
        """
        for _ in range(_ATTEMPTS):
            generation = await self._worker.wait_ready()
            try:
                call = await self._worker.call(
                    {"command": "encode", "model": model.name},
                    json.dumps(prompt).encode(),
                    generation,
                )
                return list((await call.done).header["tokens"])
            except WorkerLost:
                continue
        raise OperationFailed(
            f"The worker ended {_ATTEMPTS} times while it read this prompt.", ErrorCategory.SERVER
        )

    async def tokenizer(self, model: ModelInfo) -> Tokenizer:
        """A model's tokenizer, for decoding.

        Raises:
            OperationFailed: it is of a kind that can't be had as a file.
        """
        if model.name not in self._tokenizers:
            files = await asyncio.to_thread(tokenizer_files, self._home, model.name)
            if _FILE not in files:
                raise OperationFailed(
                    f"The tokenizer of {model.name} has no {_FILE}, by which texts are completed. "
                    "Sample tokens over the Tinker protocol, or serve the model with a fast "
                    "tokenizer."
                )
            self._tokenizers[model.name] = Tokenizer.from_buffer(files[_FILE])
        return self._tokenizers[model.name]

    async def _session_id(self) -> str:
        """The session of completions; another one when somebody finished it."""
        for number in itertools.count(self._finished):
            request = types.CreateSessionRequest(display_name="completions", tags=["completions"])
            created = await self._sessions.create(request, f"everstep:completions:{number}")
            session = await self._ledger.session(created.session_id)
            if session is not None and session.finished is None:
                break
            self._finished = number + 1
        return created.session_id


def place(idempotency_key: str | None, prompt: int) -> int:
    """The sequence id of a sample: a retry with the same key takes the same place.

    Args:
        idempotency_key: of the request; None: this one is not retried.
        prompt: which of the request's prompts.
    """
    if idempotency_key is None:
        return secrets.randbits(62)
    return _number(f"{prompt}:{idempotency_key}")


def _number(text: str) -> int:
    """62 bits that stand for a text."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 2
