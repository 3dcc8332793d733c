"""Tokenizers of several families, small enough for property tests."""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

BEGIN, END = "<s>", "</s>"
_WORDS = ("▁", "▁the", "the", "▁a", "a", "b", "é", "▁漢", ".", "▁not", "not", "▁do", "do")


def byte_fallback() -> Tokenizer:
    """As Llama 2 and Mistral have: SentencePiece pieces, and a token for each byte."""
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    vocabulary = {name: index for index, name in enumerate(["<unk>", BEGIN, END, *bytes_, *_WORDS])}
    tokenizer = Tokenizer(
        models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return _with_special(tokenizer)


def byte_level() -> Tokenizer:
    """As GPT-2 and Qwen have: every token is a part of the bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({name: index for index, name in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return _with_special(tokenizer)


def metaspace() -> Tokenizer:
    """As T5 has: SentencePiece without bytes."""
    tokenizer = Tokenizer(models.Unigram([("<unk>", 0.0), *((word, -1.0) for word in _WORDS)], 0))
    tokenizer.decoder = decoders.Metaspace()
    return _with_special(tokenizer)


def word_piece() -> Tokenizer:
    """As BERT has: a decoder that joins words and takes spaces away."""
    words = ["[UNK]", "the", "##the", "a", "##b", ".", ",", "do", "not", "n't", "é"]
    vocabulary = {name: index for index, name in enumerate(words)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece()
    return _with_special(tokenizer)


def word_ends() -> Tokenizer:
    """As the first GPT has: words end with a mark."""
    words = ["<unk>", "the", "the</w>", "a", "b</w>", "é</w>"]
    vocabulary = {name: index for index, name in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], end_of_word_suffix="</w>"))
    tokenizer.decoder = decoders.BPEDecoder()
    return _with_special(tokenizer)


def undecoded() -> Tokenizer:
    """One without a decoder, whose tokens are joined with spaces."""
    vocabulary = {name: index for index, name in enumerate(["<unk>", "the", "a", "é"])}
    return _with_special(Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>")))


ALL = (byte_fallback, byte_level, metaspace, word_piece, word_ends, undecoded)
"""Functions that build one."""


def token_id(tokenizer: Tokenizer, name: str) -> int:
    """Return the id of a token that the tokenizer has."""
    found = tokenizer.token_to_id(name)
    assert found is not None
    return found


def _with_special(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.add_special_tokens([AddedToken(BEGIN, special=True), AddedToken(END, special=True)])
    return tokenizer
