"""What a completion request comes to: prompts as tokens, and a sample for each."""

from __future__ import annotations

from dataclasses import dataclass

from tokenizers import Tokenizer

from everstep.runtime.text_completions import Completer, TextCompletions
from everstep.server.openai.text import CompletionText
from everstep.wire import types
from everstep.wire.errors import InvalidRequest
from everstep.wire.openai import ChatCompletionRequest, CompletionRequest


@dataclass(frozen=True)
class Plan:
    """How a request is carried out.

    Attributes:
        request: what was asked.
        completer: what completes it.
        tokenizer: of the completer's model.
        prompts: each prompt's tokens.
        max_tokens: most new tokens; None: up to the context's end.
        top: how many likeliest tokens at each place; None: no logprobs are wanted.
        echo: whether a prompt is in front of its completion.
    """

    request: CompletionRequest | ChatCompletionRequest
    completer: Completer
    tokenizer: Tokenizer
    prompts: list[list[int]]
    max_tokens: int | None
    top: int | None
    echo: bool = False

    def sample(self, prompt: int, seq_id: int) -> types.SampleRequest:
        """The sample that one of the prompts needs."""
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
        """An empty text of the model's tokenizer."""
        ends = frozenset(self.completer.model.eos_token_ids)
        return CompletionText(self.tokenizer, self.request.stops, ends)


async def plan_text(
    completions: TextCompletions, request: CompletionRequest, token: str | None
) -> Plan:
    """The plan of a text completion.

    Args:
        completions: finds the model and reads prompts.
        request: what was asked.
        token: the weights access token that was sent with it, if any.

    Raises:
        Rejected: there is no such model.
        InvalidRequest: there is no prompt.
        OperationFailed: the model can't read a prompt.
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
    """The plan of a chat completion; see `plan_text`."""
    completer = await completions.completer(request.model, token)
    messages = [
        {**message.model_dump(exclude_none=True), "content": message.text}
        for message in request.messages
    ]
    wanted = {"messages": messages, "template": request.chat_template_kwargs}
    prompt = await completions.encode(completer.model, wanted)
    tokenizer = await completions.tokenizer(completer.model)
    top = request.top_logprobs if request.logprobs else None
    return Plan(request, completer, tokenizer, [prompt], request.limit, top)


def _prompts(request: CompletionRequest) -> list[str | list[int]]:
    """The prompts of a request, one by one."""
    prompt = request.prompt
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise InvalidRequest("prompt is empty; give a text, tokens, or a list of either.")
    texts = [each for each in prompt if not isinstance(each, int)]
    tokens = [each for each in prompt if isinstance(each, int)]
    return [tokens] if tokens else [*texts]
