"""Detokenization: the text of a completion from its tokens, incrementally.

The text is the tokenizer's decoding of all tokens. It is sent as soon as later tokens can't change
it: an incomplete character waits for its bytes, and a run of byte-fallback tokens for its end,
because the decoder replaces every byte of a run that is not valid UTF-8.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from tokenizers import Tokenizer

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_MAX_RUN = 64
"""Number of byte-fallback tokens that wait for the end of their run."""
_MAX_PENDING = 96
"""Number of tokens that wait for the rest of a character. Text that never becomes valid UTF-8 would
otherwise be decoded again with every token."""


@dataclass(frozen=True)
class Scored:
    """A token with the part of the text that it gave, and its logprobs.

    Attributes:
        token: its id.
        text: its part of the text. Empty for a token without text: the end token, a special token,
            one that a stop string cut off, or the first parts of a character.
        offset: the number of characters before it.
        logprob: under the model's own distribution, None for a prompt's first token.
        top: the likeliest tokens at its position as (id, text, logprob).
    """

    token: int
    text: str
    offset: int
    logprob: float | None
    top: tuple[tuple[int, str, float], ...]


class TokenTexts:
    """The texts of a tokenizer's tokens.

    Args:
        tokenizer: the tokenizer.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._words: dict[int, str] = {}
        self._shown: dict[int, bool] = {}
        self._bytes: dict[int, bool] = {}

    def decode(self, tokens: Sequence[int], *, special: bool = False) -> str:
        """Decode tokens, by default without the special ones."""
        return str(self._tokenizer.decode(tokens, skip_special_tokens=not special))

    def word(self, token: int) -> str:
        """Return a token's text as it is inside a text, which keeps its leading space."""
        if token not in self._words:
            self._words[token] = self._inside(token, special=True)
        return self._words[token]

    def is_shown(self, token: int) -> bool:
        """Return whether a token is part of a text: special and unknown tokens are not."""
        if token not in self._shown:
            self._shown[token] = bool(self._inside(token, special=False))
        return self._shown[token]

    def is_byte(self, token: int) -> bool:
        """Return whether a token stands for one byte (``<0xE2>``)."""
        if token not in self._bytes:
            name = self._tokenizer.id_to_token(token) or ""
            self._bytes[token] = bool(_BYTE.fullmatch(name)) and self.word(token) != name
        return self._bytes[token]

    def _inside(self, token: int, *, special: bool) -> str:
        """Decode a token behind itself, because decoders strip the beginning of a text."""
        alone = self.decode([token], special=special)
        twice = self.decode([token, token], special=special)
        return twice[len(alone) :] if twice.startswith(alone) else alone


@dataclass
class _Entry:
    """A token, and the part of the text that it gave once that is known."""

    token: int
    shown: bool
    logprob: float | None
    top: Sequence[tuple[int, float]]
    start: int = 0
    stop: int | None = None


class CompletionText:
    """A completion's text as it grows, without the stop string or end token that ends it.

    Text is held back while it may be the beginning of a stop string or of a character.

    Args:
        texts: the texts of the model's tokens.
        stops: stop strings.
        ends: the model's end tokens.
        echo: whether the first tokens are a prompt, until `begin`.
    """

    def __init__(
        self, texts: TokenTexts, stops: Sequence[str], ends: Collection[int], *, echo: bool = False
    ) -> None:
        self._texts = texts
        self._stops = [stop for stop in stops if stop]
        self._ends = ends
        self._in_prompt = echo
        self._context: list[int] = []
        self._pending: list[_Entry] = []
        self._entries: list[_Entry] = []
        self._sent = 0
        self._begin = 0
        self._ended = False
        self.text = ""

    def begin(self) -> None:
        """Begin the completion: stop strings count only in the text from here on."""
        self._in_prompt = False
        self._begin = len(self.text)

    def push(
        self, token: int, logprob: float | None = None, top: Sequence[tuple[int, float]] = ()
    ) -> str:
        """Add a token and return the text that can be sent now."""
        is_end = token in self._ends and not self._in_prompt
        entry = _Entry(token, not is_end and self._texts.is_shown(token), logprob, top)
        self._entries.append(entry)
        self._pending.append(entry)
        self._decode()
        return self._send(len(self.text) - self._held())

    def end(self) -> str:
        """Return the remaining text, up to a stop string."""
        self._decode(last=True)
        self._ended = True
        at = self._stopped()
        if at is not None:
            self.text = self.text[:at]
        return self._send(len(self.text))

    def take(self) -> list[Scored]:
        """Take the tokens whose text has been sent; after the end, all of them."""
        count = 0
        for entry in self._entries:
            if entry.stop is None or (entry.stop > self._sent and not self._ended):
                break
            count += 1
        taken, self._entries = self._entries[:count], self._entries[count:]
        return [self._scored(entry) for entry in taken]

    def _scored(self, entry: _Entry) -> Scored:
        text = self.text[entry.start : entry.stop]
        offset = min(entry.start, len(self.text))
        word = self._texts.word
        top = tuple((each, word(each), value) for each, value in entry.top)
        return Scored(entry.token, text, offset, entry.logprob, top)

    def _decode(self, *, last: bool = False) -> None:
        """Decode the pending tokens, if later ones can't change their text."""
        shown = [entry.token for entry in self._pending if entry.shown]
        text = self._after_context(shown)
        if last or self._is_stable(shown, text):
            self._place(shown, text)

    def _is_stable(self, shown: Sequence[int], text: str) -> bool:
        if len(self._pending) >= _MAX_PENDING:
            return True
        if not text or text.endswith(REPLACEMENT):
            return not shown
        return len(shown) >= _MAX_RUN or not self._texts.is_byte(shown[-1])

    def _place(self, shown: list[int], text: str) -> None:
        """Add the pending tokens' text, and note which part of it each of them gave."""
        begin, at, seen = len(self.text), 0, 0
        for entry in self._pending:
            entry.start = begin + at
            if entry.shown:
                seen += 1
                if seen == len(shown):
                    at = len(text)
                else:
                    at = max(at, _common(self._after_context(shown[:seen]), text))
            entry.stop = begin + at
        self.text += text
        self._pending = []
        if text:
            self._context = shown

    def _after_context(self, tokens: Sequence[int]) -> str:
        """Decode tokens as they are behind the last ones that gave text."""
        before = self._texts.decode(self._context)
        text = self._texts.decode([*self._context, *tokens])
        return text[len(before) :] if text.startswith(before) else self._texts.decode(tokens)

    def _send(self, until: int) -> str:
        new = self.text[self._sent : until]
        self._sent += len(new)
        return new

    def _stopped(self) -> int | None:
        """Return the offset of the first stop string, or None if there is none."""
        offsets = (self.text.find(stop, self._begin) for stop in self._stops)
        return min((at for at in offsets if at >= 0), default=None)

    def _held(self) -> int:
        """Return how many characters at the end may belong to a stop string."""
        at = self._stopped()
        if at is not None:
            return len(self.text) - at
        completed = len(self.text) - self._begin
        return max(
            (
                length
                for stop in self._stops
                for length in range(1, min(len(stop), completed + 1))
                if self.text.endswith(stop[:length])
            ),
            default=0,
        )


def _common(a: str, b: str) -> int:
    """Return how many characters two texts begin with in common."""
    pairs = enumerate(zip(a, b, strict=False))
    return next((at for at, (x, y) in pairs if x != y), min(len(a), len(b)))
