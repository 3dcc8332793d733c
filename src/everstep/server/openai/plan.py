"""Completion plans: a completion request as prompts in tokens and a sample for each."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from tokenizers import Tokenizer

from everstep.runtime.sampling.openai import Completer, TextCompletions
from everstep.server.openai.detokenize import CompletionText, TokenTexts
from everstep.wire import types
from everstep.wire.errors import InvalidRequest
from everstep.wire.messages.openai import ChatCompletionRequest, CompletionRequest


@dataclass(frozen=True)
class Plan:
    """A completion request in terms of samples.

    Attributes:
        request: the completion request.
        completer: the sampler and model that complete it.
        tokenizer: the model's tokenizer.
        prompts: each prompt's tokens.
        max_tokens: the maximum number of new tokens. None: all that fit into the context.
        top: the number of likeliest tokens to return at each position. None: no logprobs.
        echo: whether to put a prompt in front of its completion.
    """

    request: CompletionRequest | ChatCompletionRequest
    completer: Completer
    tokenizer: Tokenizer
    prompts: list[list[int]]
    max_tokens: int | None
    top: int | None
    echo: bool = False

    def sample(self, prompt: int, seq_id: int) -> types.SampleRequest:
        """Return the sample request of one of the prompts."""
        asked = self.request
        scored = self.top or 0
        return types.SampleRequest(
            sampling_session_id=self.completer.sampler_id,
            seq_id=seq_id,
            num_samples=asked.n,
            prompt=types.ModelInput.from_ints(self.prompts[prompt]),
            sampling_params=types.SamplingParams(
                max_tokens=self.max_tokens,
                temperature=asked.temperature,
                top_p=asked.top_p,
                top_k=asked.top_k,
                seed=asked.seed,
                stop=[*asked.stops, *self.completer.model.eos_token_ids],
            ),
            prompt_logprobs=self.echo and self.top is not None,
            topk_prompt_logprobs=scored if self.echo else 0,
            topk_sample_logprobs=scored,
        )

    def text(self) -> CompletionText:
        """Return an empty text of the model's tokenizer."""
        ends = frozenset(self.completer.model.eos_token_ids)
        return CompletionText(self._texts, self.request.stops, ends, echo=self.echo)

    @cached_property
    def _texts(self) -> TokenTexts:
        return TokenTexts(self.tokenizer)


async def plan_text(
    completions: TextCompletions, request: CompletionRequest, token: str | None
) -> Plan:
    """Plan a text completion.

    Args:
        completions: finds the model and encodes prompts.
        request: the completion request.
        token: the weights access token that was sent with it, if any.

    Raises:
        Rejected: there is no such model.
        InvalidRequest: there is no prompt.
        OperationFailed: a prompt can't be encoded.
    """
    completer = await completions.completer(request.model, token)
    prompts = [
        await completions.encode(completer.model, {"text": prompt})
        if isinstance(prompt, str)
        else prompt
        for prompt in _prompts(request)
    ]
    tokenizer = await completions.tokenizer(completer.model)
    limit, top = request.max_tokens, request.logprobs
    return Plan(request, completer, tokenizer, prompts, limit, top, request.echo)


async def plan_chat(
    completions: TextCompletions, request: ChatCompletionRequest, token: str | None
) -> Plan:
    """Plan a chat completion. See `plan_text`."""
    completer = await completions.completer(request.model, token)
    messages = [message.fields() for message in request.messages]
    wanted = {"messages": messages, "template": request.chat_template_kwargs}
    prompt = await completions.encode(completer.model, wanted)
    tokenizer = await completions.tokenizer(completer.model)
    top = request.top_logprobs if request.logprobs else None
    return Plan(request, completer, tokenizer, [prompt], request.limit, top)


def _prompts(request: CompletionRequest) -> list[str | list[int]]:
    """Return the prompts of a request as a list."""
    prompt = request.prompt
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise InvalidRequest("prompt is empty; give a text, tokens, or a list of either.")
    texts = [each for each in prompt if not isinstance(each, int)]
    tokens = [each for each in prompt if isinstance(each, int)]
    return [tokens] if tokens else [*texts]
