"""``everstep sample``: text from a base model or a checkpoint."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from everstep.cli.completion import checkpoint_paths
from everstep.cli.errors import Refused, WrongUsage
from everstep.cli.target import Service, Target, with_target
from everstep.wire.paths import SCHEME

if TYPE_CHECKING:
    from everstep.client import SamplingClient
    from everstep.wire.types import SampledSequence


@with_target
def sample(
    target: Target,
    prompt: Annotated[
        str, typer.Argument(metavar="PROMPT", help="Text to continue; '-' reads it from stdin.")
    ],
    source: Annotated[
        str | None,
        typer.Option(
            "--from",
            metavar="PATH_OR_MODEL",
            help="tinker://…, or a base model; none: the only one that is served.",
            autocompletion=checkpoint_paths,
        ),
    ] = None,
    num_samples: Annotated[int, typer.Option("--num-samples", "-n", min=1)] = 1,
    max_tokens: Annotated[int, typer.Option(min=1)] = 256,
    temperature: Annotated[float, typer.Option(min=0)] = 1.0,
    top_p: Annotated[float, typer.Option(min=0, max=1)] = 1.0,
    top_k: Annotated[int, typer.Option(min=-1, help="-1: all.")] = -1,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same text.")] = None,
    stop: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="Ends a sample; may be repeated.")
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="The prompt is a user's turn of the chat template.")
    ] = False,
) -> None:
    """Print text that a base model or a checkpoint gives for a prompt.

    Several are parted by lines that number them.
    """
    from everstep.cli import output
    from everstep.cli.models import served_model
    from everstep.wire.types import ModelInput, SamplingParams

    text = _read(prompt)
    base = source is not None and not source.startswith(SCHEME)
    models = (served_model(str(source))[1],) if base else ()
    with target.service(create=True, models=models) as service:
        client, name = _client(service, source)
        tokenizer = client.get_tokenizer()
        tokens = _tokens(tokenizer, text, chat)
        if not tokens:
            raise WrongUsage("The prompt is empty, and the model has no token to begin with.")
        params = SamplingParams(
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            seed=seed,
            stop=stop or None,
        )
        answer = client.sample(ModelInput.from_ints(tokens), num_samples, params).result()
    if target.as_json:
        content = [_json(tokenizer, each) for each in answer.sequences]
        output.print_json({"from": name, "prompt_tokens": len(tokens), "samples": content})
        return
    for number, each in enumerate(answer.sequences, 1):
        if num_samples > 1:
            output.console().print(f"--- {number} ({each.stop_reason})", style="dim")
        decoded = tokenizer.decode(each.tokens, skip_special_tokens=True)
        print(output.printable(decoded) if sys.stdout.isatty() else decoded)


def _read(prompt: str) -> str:
    """The prompt; of standard input where it is ``-``."""
    if prompt != "-":
        prompt.encode()  # what is no text can't be, and that is told
        return prompt
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise WrongUsage(f"What came on standard input is not UTF-8 text: {error}.") from error


def _client(service: Service, source: str | None) -> tuple[SamplingClient, str]:
    """A client of what is sampled from, and its name."""
    if source is not None and source.startswith(SCHEME):
        from everstep.cli import listing

        listing.one(service.rest, source)
        return service.client.create_sampling_client(model_path=source).result(), source
    served = service.rest.get_server_capabilities().result().supported_models
    names = [str(each.model_name) for each in served]
    if source is None and len(names) != 1:
        raise WrongUsage(f"--from: give tinker://…, or one of the base models {', '.join(names)}.")
    name = source or names[0]
    if name not in names:
        raise Refused(
            f"{service.url} does not serve {name!r}; it serves {', '.join(names)}. A checkpoint's "
            "path begins with tinker://."
        )
    return service.client.create_sampling_client(base_model=name).result(), name


def _tokens(tokenizer: Any, text: str, chat: bool) -> list[int]:
    if not chat:
        return list(tokenizer.encode(text))
    if not tokenizer.chat_template:
        raise WrongUsage("--chat: this model's tokenizer has no chat template; leave it away.")
    turn = [{"role": "user", "content": text}]
    rendered = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    return list(tokenizer.encode(rendered, add_special_tokens=False))


def _json(tokenizer: Any, sequence: SampledSequence) -> dict[str, Any]:
    return {
        "text": tokenizer.decode(sequence.tokens, skip_special_tokens=True),
        "stop_reason": str(sequence.stop_reason),
        "tokens": list(sequence.tokens),
        "logprobs": None if sequence.logprobs is None else list(sequence.logprobs),
    }
