"""Text completions: samplers by a model's name, and prompts as tokens, for the OpenAI API.

A completion is a durable sample like any other. Its sampler belongs to a session of the service
itself, which has one sampler for each model.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer

from everstep.engine.models.info import ModelInfo
from everstep.runtime.context import RuntimeContext
from everstep.runtime.errors import OperationFailed, Rejected, WorkerLost
from everstep.runtime.sessions import Sessions
from everstep.wire import types
from everstep.wire.errors import ErrorCategory
from everstep.worker.protocol.messages import Encode
from everstep.worker.protocol.tokenizer_files import decoder_file

_SCHEME = "tinker://"
_ATTEMPTS = 3


@dataclass(frozen=True)
class Completer:
    """A sampler for text completions.

    Attributes:
        sampler_id: the sampler's id.
        model: the base model.
    """

    sampler_id: str
    model: ModelInfo


class TextCompletions:
    """Finds the sampler for a model's name, and tokenizes prompts.

    Args:
        context: of the service.
        sessions: creates the samplers.
    """

    def __init__(self, context: RuntimeContext, sessions: Sessions) -> None:
        self._ledger = context.ledger
        self._workers = context.workers
        self._sessions = sessions
        self._finished = 0
        self._home = context.home
        self._tokenizers: dict[str, Tokenizer] = {}

    async def completer(self, model: str, token: str | None) -> Completer:
        """Return the sampler for a name. The first call creates it.

        Args:
            model: a base model's name, or a checkpoint's path.
            token: the weights access token that was sent with it, if any.

        Raises:
            Rejected: 404, the model or checkpoint does not exist.
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
        return Completer(created.sampling_session_id, self._workers.models[base_model])

    async def encode(self, model: ModelInfo, prompt: Mapping[str, Any]) -> list[int]:
        """Tokenize a prompt in the worker.

        Raises:
            OperationFailed: the model can't read the prompt.
        """
        for _ in range(_ATTEMPTS):
            lease = await self._workers.for_model(model.name)
            try:
                call = await lease.call(Encode(model.name, prompt))
                return list((await call.done).tokens)
            except WorkerLost:
                continue
        raise OperationFailed(
            f"The worker ended {_ATTEMPTS} times while it read this prompt.", ErrorCategory.SERVER
        )

    async def tokenizer(self, model: ModelInfo) -> Tokenizer:
        """Load a model's tokenizer, for decoding.

        Raises:
            OperationFailed: it is not a fast tokenizer.
        """
        if model.name not in self._tokenizers:
            content = await asyncio.to_thread(decoder_file, self._home, model.name)
            if content is None:
                raise OperationFailed(
                    f"The tokenizer of {model.name} is not a fast one, which text completions "
                    "need. Sample tokens over the Tinker protocol, or serve the model with a fast "
                    "tokenizer."
                )
            self._tokenizers[model.name] = Tokenizer.from_buffer(content)
        return self._tokenizers[model.name]

    async def _session_id(self) -> str:
        """Return the session of completions, or open the next one if it was finished."""
        for number in itertools.count(self._finished):
            request = types.CreateSessionRequest(display_name="completions", tags=["completions"])
            created = await self._sessions.create(request, f"everstep:completions:{number}")
            session = await self._ledger.session(created.session_id)
            if session is not None and session.finished is None:
                break
            self._finished = number + 1
        return created.session_id


def sample_seq_id(idempotency_key: str | None, prompt: int) -> int:
    """Return the sequence id of a sample. A retry with the same key gets the same one.

    Args:
        idempotency_key: the request's key, or None for a request that is not retried.
        prompt: index of the prompt in the request.
    """
    if idempotency_key is None:
        return secrets.randbits(62)
    return _number(f"{prompt}:{idempotency_key}")


def _number(text: str) -> int:
    """Hash a text to 62 bits."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 2
