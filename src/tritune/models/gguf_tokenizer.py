"""The tokenizer that a GGUF file describes, as a `tokenizer.json`, splitting text exactly as llama.cpp splits it.

A GGUF file holds the vocabulary, the merges and the *name* of a pre-tokenizer; what the name means is knowledge, kept
here as data. A name not listed is refused rather than guessed: a wrong split gives ids that are wrong but look right.
Knows the file's metadata as a plain mapping; knows nothing of tensors or models.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

from tritune.errors import UnsupportedBase

Metadata = Mapping[str, Any]


class TokenType(IntEnum):
    """What `tokenizer.ggml.token_type` says of a token."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True, slots=True)
class Split:
    """A byte-level pre-tokenizer: patterns applied one after the other, each cutting the pieces of the one before.

    Attributes:
        patterns: regular expressions (Oniguruma); a match is a piece, and so is what lies between matches.
        whole_words: a piece that is a token is taken whole, without going through the merges.
        adds_bos: llama.cpp's default where the file does not say.
    """

    patterns: tuple[str, ...]
    whole_words: bool = False
    adds_bos: bool = False


def _words(contraction: str, letters: str, digits: str, after_symbols: str = r"[\r\n]*") -> str:
    """The family of patterns that GPT-4 began: words, numbers, symbols, line ends, spaces."""
    return rf"{contraction}{letters}|{digits}| ?[^\s\p{{L}}\p{{N}}]+{after_symbols}|\s*[\r\n]+|\s+(?!\S)|\s+"


SPACE = "\u2581"
"""How SentencePiece writes a space."""

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_ANY_CASE = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|"
_LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_LLAMA3 = _words(_ANY_CASE, _LETTERS, r"\p{N}{1,3}")
_QWEN2 = _words(_ANY_CASE, _LETTERS, r"\p{N}")

_GPT2_SPLIT = Split((_GPT2,))
_DIGITS_SPLIT = Split((r"\p{N}", _GPT2))
_LLAMA3_SPLIT = Split((_LLAMA3,), whole_words=True, adds_bos=True)

SPLITS: Mapping[str, Split] = {
    **dict.fromkeys(("gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "granite-docling"), _GPT2_SPLIT),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone"), _DIGITS_SPLIT),
    **dict.fromkeys(("llama3", "llama-v3", "llama-bpe", "falcon3"), _LLAMA3_SPLIT),
    **dict.fromkeys(("dbrx", "smaug-bpe"), Split((_LLAMA3,))),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "stablelm2"), Split((_QWEN2,))),
}
"""What `tokenizer.ggml.pre` means, for the byte-level vocabularies of the supported families."""


def build(metadata: Metadata) -> tuple[Tokenizer, dict[str, Any]]:
    """The tokenizer and the content of its `tokenizer_config.json`.

    Args:
        metadata: the file's keys and values: `tokenizer.ggml.*`, `tokenizer.chat_template`, `general.name`.

    Raises:
        UnsupportedBase: a kind of vocabulary or pre-tokenizer that cannot be reproduced exactly.
    """
    kind = metadata.get("tokenizer.ggml.model")
    if kind == "gpt2":
        tokenizer, adds_bos = _byte_level(metadata)
    elif kind == "llama":
        tokenizer, adds_bos = _sentencepiece(metadata), True
    else:
        raise UnsupportedBase(
            f"The GGUF file has a vocabulary of kind {kind!r}; known are 'gpt2' (byte-level BPE) and 'llama' "
            "(SentencePiece BPE). Use the model's original Hugging Face folder instead."
        )
    _add_special(tokenizer, metadata)
    config = _settings(metadata, adds_bos)
    tokenizer.post_processor = _ends(config, metadata)
    return tokenizer, config


def _byte_level(metadata: Metadata) -> tuple[Tokenizer, bool]:
    name = metadata.get("tokenizer.ggml.pre")
    split = SPLITS.get(str(name))
    if split is None:
        raise UnsupportedBase(
            f"The GGUF file names the pre-tokenizer {name!r}, and how that splits text is not known here; known: "
            f"{', '.join(sorted(SPLITS))}. Use the model's original Hugging Face folder instead."
        )
    vocabulary = _vocabulary(metadata)
    merges = [_pair(merge) for merge in metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=merges, ignore_merges=split.whole_words))
    steps: list[pre_tokenizers.PreTokenizer] = [
        pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in split.patterns
    ]
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    if absent := set(pre_tokenizers.ByteLevel.alphabet()) - vocabulary.keys():
        # A byte without a token gives no id, but what stands on either side of it must not be merged.
        pattern = "|".join(map(re.escape, sorted(absent)))
        steps.append(pre_tokenizers.Split(Regex(pattern), behavior="removed"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, split.adds_bos


def _pair(merge: str) -> tuple[str, str]:
    left, _, right = merge.partition(" ")
    return left, right


def _sentencepiece(metadata: Metadata) -> Tokenizer:
    """SentencePiece BPE: no pre-tokenizer, spaces are a letter, unknown characters are bytes."""
    vocabulary = _vocabulary(metadata)
    if any(f"<0x{byte:02X}>" not in vocabulary for byte in range(256)):
        raise UnsupportedBase("The GGUF file's SentencePiece vocabulary has no token for some bytes.")
    scores: Sequence[float] = metadata["tokenizer.ggml.scores"]
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=_merges(vocabulary, scores), byte_fallback=True))
    spaces: list[normalizers.Normalizer] = [normalizers.Replace(" ", SPACE)]
    letters: list[decoders.Decoder] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if metadata.get("tokenizer.ggml.add_space_prefix", True):
        spaces.insert(0, normalizers.Prepend(SPACE))
        letters.append(decoders.Strip(" ", 1, 0))
    tokenizer.normalizer = normalizers.Sequence(spaces)
    tokenizer.decoder = decoders.Sequence(letters)
    return tokenizer


def _merges(vocabulary: Mapping[str, int], scores: Sequence[float]) -> list[tuple[str, str]]:
    """Every way to make a token of two others, best score first: SentencePiece stores scores instead of merges."""
    made = []
    for token, i in vocabulary.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in vocabulary and right in vocabulary:
                made.append((-scores[i], i, cut, left, right))
    return [(left, right) for *_, left, right in sorted(made)]


def _vocabulary(metadata: Metadata) -> dict[str, int]:
    tokens: Sequence[str] = metadata["tokenizer.ggml.tokens"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        raise UnsupportedBase(
            f"The GGUF file's vocabulary has {len(tokens)} entries, but only {len(vocabulary)} different ones."
        )
    return vocabulary


def _add_special(tokenizer: Tokenizer, metadata: Metadata) -> None:
    """Tokens matched as a whole, before any splitting: `special` ones only where special text is parsed."""
    tokens: Sequence[str] = metadata["tokenizer.ggml.tokens"]
    types: Sequence[int] = metadata.get("tokenizer.ggml.token_type", ())
    special = {TokenType.CONTROL, TokenType.UNKNOWN}
    # No key of the file says so, but Phi-3 was trained with the spaces after most of its special tokens cut off.
    # (llama.cpp cuts ASCII spaces only; the original tokenizer, like this one, cuts all.)
    cuts_spaces = any(name in str(metadata.get("general.name", "")).lower() for name in ("phi-3", "phi3"))
    keeps_spaces = {"<unk>", "<s>", "<|endoftext|>"} if cuts_spaces else set(tokens)
    whole = [
        AddedToken(token, special=kind in special, normalized=False, rstrip=token not in keeps_spaces)
        for token, kind in zip(tokens, types, strict=False)
        if token and (kind in special or kind == TokenType.USER_DEFINED)
    ]
    tokenizer.add_tokens(whole)


def _settings(metadata: Metadata, adds_bos: bool) -> dict[str, Any]:
    tokens: Sequence[str] = metadata["tokenizer.ggml.tokens"]
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    ids = {ours: metadata.get(f"tokenizer.ggml.{theirs}_token_id") for ours, theirs in names.items()}
    config: dict[str, Any] = {name: tokens[i] for name, i in ids.items() if i is not None and i < len(tokens)}
    config |= {
        "add_bos_token": bool(metadata.get("tokenizer.ggml.add_bos_token", adds_bos)) and "bos_token" in config,
        "add_eos_token": bool(metadata.get("tokenizer.ggml.add_eos_token", False)) and "eos_token" in config,
        "clean_up_tokenization_spaces": False,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    if template := metadata.get("tokenizer.chat_template"):
        config["chat_template"] = template
    return config


def _ends(config: Mapping[str, Any], metadata: Metadata) -> processors.TemplateProcessing:
    """BOS and EOS around a text, where the file wants them."""
    tokens: Sequence[str] = metadata["tokenizer.ggml.tokens"]
    bos = [config["bos_token"]] if config["add_bos_token"] else []
    eos = [config["eos_token"]] if config["add_eos_token"] else []
    ids = [(token, tokens.index(token)) for token in dict.fromkeys(bos + eos)]
    first = [f"{token}:0" for token in bos] + ["$A:0"] + [f"{token}:0" for token in eos]
    second = [f"{token}:1" for token in bos] + ["$B:1"] + [f"{token}:1" for token in eos]
    return processors.TemplateProcessing(single=first, pair=first + second, special_tokens=ids)
