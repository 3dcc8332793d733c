"""Text generated from a base model or a checkpoint."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

from everstep.cli.common import listing, names, output
from everstep.cli.common.errors import Refused, WrongUsage
from everstep.cli.common.models import served_model
from everstep.cli.common.target import Service, Target
from everstep.client import SamplingClient
from everstep.conversations import encode_prompt, encode_rendered, render
from everstep.text_files import TextFileError, decode_text
from everstep.wire.paths import SCHEME
from everstep.wire.types import ModelInput, SampledSequence, SamplingParams


@dataclass(frozen=True)
class Request:
    """A request for samples.

    Attributes:
        prompt: the text to continue, or ``-`` for standard input.
        source: a checkpoint's path or a base model, or None for the only base model that is served.
        num_samples: how many samples.
        chat: format the prompt by the model's chat template.
        sampling: fields of `SamplingParams`.
    """

    prompt: str
    source: str | None
    num_samples: int
    chat: bool
    sampling: dict[str, Any]


def generate(target: Target, request: Request) -> None:
    """Generate samples and print them.

    Args:
        target: the service. One that is started for this command serves the base model.
        request: the prompt, the source and the sampling parameters.

    Raises:
        WrongUsage: the prompt is empty or not UTF-8, or the source is ambiguous.
        Refused: the service does not serve the base model.
    """
    text = _read(request.prompt)
    source = request.source
    base = source is not None and not source.startswith(SCHEME)
    models = (served_model(str(source))[1],) if base else ()
    with target.service(create=True, models=models) as service:
        client, name = _client(service, source)
        tokenizer = client.get_tokenizer()
        tokens = _tokens(tokenizer, text, request.chat)
        if not tokens:
            raise WrongUsage("The prompt is empty, and the model has no token to begin with.")
        params = SamplingParams(**request.sampling)
        answer = client.sample(ModelInput.from_ints(tokens), request.num_samples, params).result()
    if target.as_json:
        content = [_json(tokenizer, each) for each in answer.sequences]
        output.print_json({"from": name, "prompt_tokens": len(tokens), "samples": content})
        return
    for number, each in enumerate(answer.sequences, 1):
        if request.num_samples > 1:
            output.console().print(f"--- {number} ({each.stop_reason})", style="dim")
        decoded = tokenizer.decode(each.tokens, skip_special_tokens=True)
        print(output.printable(decoded) if sys.stdout.isatty() else decoded)


def _read(prompt: str) -> str:
    """Return the prompt. ``-`` reads it from standard input."""
    if prompt != "-":
        prompt.encode()  # raises UnicodeEncodeError for an argument that is not UTF-8
        return prompt
    try:
        return decode_text(sys.stdin.buffer.read(), "standard input")
    except TextFileError as error:
        raise WrongUsage(str(error)) from error


def _client(service: Service, source: str | None) -> tuple[SamplingClient, str]:
    """Create the sampling client. Returns it with the name of its source."""
    served = service.rest.get_server_capabilities().result().supported_models
    models = [str(each.model_name) for each in served]
    if source is not None and source not in models and ":" in source:
        path = names.checkpoint_path(service.rest, source)
        listing.checkpoint(service.rest, path)
        return service.client.create_sampling_client(model_path=path).result(), path
    if source is None and len(models) != 1:
        raise WrongUsage(f"--from: give tinker://…, or one of the base models {', '.join(models)}.")
    name = source or models[0]
    if name not in models:
        raise Refused(
            f"{service.url} does not serve {name!r}; it serves {', '.join(models)}. A checkpoint's "
            "path begins with tinker://."
        )
    return service.client.create_sampling_client(base_model=name).result(), name


def _tokens(tokenizer: Any, text: str, chat: bool) -> list[int]:
    if not chat:
        return encode_prompt(tokenizer, text)
    if not tokenizer.chat_template:
        raise WrongUsage("--chat: this model's tokenizer has no chat template; omit --chat.")
    turn = [{"role": "user", "content": text}]
    return encode_rendered(tokenizer, render(tokenizer, turn, reply=True))


def _json(tokenizer: Any, sequence: SampledSequence) -> dict[str, Any]:
    return {
        "text": tokenizer.decode(sequence.tokens, skip_special_tokens=True),
        "stop_reason": str(sequence.stop_reason),
        "tokens": list(sequence.tokens),
        "logprobs": None if sequence.logprobs is None else list(sequence.logprobs),
    }
