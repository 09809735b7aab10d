"""Conversations as ids: what transformers makes of the whole text, and no control token out of a turn's own words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tritune.errors import BadData, Mismatch
from tritune.tasks.base import Prompt
from tritune.text.encode import Encoder
from tritune.text.template import chat_pieces

#: how real bases write: with line ends (ChatML), with spaces (Llama 2), with nothing at all (Mistral's later ones)
TEMPLATES = {
    "lines": "{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] }}</s>\n{% endfor %}<s>assistant\n",
    "spaces": "{% for m in messages %}{% if m['role'] == 'user' %}<s>[INST] {{ m['content'] }} [/INST]"
    "{% else %} {{ m['content'] }}</s>{% endif %}{% endfor %}",
    "tight": "{% for m in messages %}{% if m['role'] == 'user' %}<s>[INST]{{ m['content'] }}[/INST]"
    "{% else %}{{ m['content'] }}</s>{% endif %}{% endfor %}",
}
CONTROL = ("<s>", "</s>", "[INST]", "[/INST]")
#: the same tokens, spelled so that no text can hold them
UNSPEAKABLE = dict(zip(CONTROL, ("\ue100", "\ue101", "\ue102", "\ue103"), strict=True))
WORDS = ("▁good", "▁bad", "good", "▁[", "▁▁", "\n\n", "]g", "▁<", "user\n", ">a")
KINDS = (
    "byte-level",
    "byte-level, eats space",
    "prefix first",
    "prefix always",
    "prefix never",
    "prefix in normalizer",
)


def _splits(kind: str, tokenizer: Tokenizer) -> None:
    if kind.startswith("byte-level"):
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.decoder = decoders.ByteLevel()
    elif kind == "prefix in normalizer":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=kind.split()[1], split=False)


@cache
def tokenizer_of(kind: str, template: str, *, twin: bool = False) -> PreTrainedTokenizerFast:
    """Merges that reach over the ends of turns; `twin`: control tokens that are spelled otherwise, all else alike."""
    byte_level = kind.startswith("byte-level")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet()) if byte_level else [*map(chr, range(32, 127)), "▁", "\n"]
    control = [UNSPEAKABLE[token] if twin else token for token in CONTROL]
    vocabulary = {token: i for i, token in enumerate(["<unk>", *control, *alphabet])}
    merges = []
    for word in WORDS:
        spelled = word.replace("▁", "Ġ").replace("\n", "Ċ") if byte_level else word
        for n in range(2, len(spelled) + 1):
            if spelled[:n] not in vocabulary:
                vocabulary[spelled[:n]] = len(vocabulary)
                merges.append((spelled[: n - 1], spelled[n - 1]))
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>"))
    _splits(kind, tokenizer)
    eats = kind.endswith("eats space")
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False, rstrip=eats) for t in control])
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token=control[1])
    for token, spelling in zip(CONTROL, control, strict=True):
        template = template.replace(token, spelling)
    made.chat_template = template
    return made


def turns_of(texts: Sequence[str]) -> list[Any]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def encoded(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str], answer: str) -> tuple[list[int], list[int]]:
    """Ids of the conversation, and of the answer behind it."""
    encoder = Encoder(tokenizer, 10_000)
    pieces = tuple((piece.text, piece.control) for piece in chat_pieces(encoder.chat, turns_of(texts)))
    prompt = Prompt("".join(text for text, _ in pieces), answer, (), pieces)
    (row,) = encoder.encode([prompt], ["0"], ["line 2"])
    return list(row.context), list(row.target)


def refusal(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str], answer: str) -> str:
    try:
        encoded(tokenizer, texts, answer)
    except BadData as error:
        return str(error)
    return ""


def whole(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str], answer: str = "") -> list[int]:
    """The oracle: transformers writes the conversation and reads it as one text."""
    text = tokenizer.apply_chat_template(turns_of(texts), tokenize=False, add_generation_prompt=True)
    ids: list[int] = tokenizer(str(text) + answer, add_special_tokens=False)["input_ids"]
    return ids


harmless = st.lists(st.sampled_from(["good", "bad", "a", " ", "\n", "[", "]", "<", ">"]), min_size=1, max_size=6)
nasty = st.lists(st.sampled_from(["good", " ", "\n", *CONTROL, "[IN", "ST]", "</", "s>", "<"]), min_size=1, max_size=6)
conversations = st.sampled_from([1, 3]).flatmap(lambda n: st.lists(harmless.map("".join), min_size=n, max_size=n))
attacks = st.sampled_from([1, 3]).flatmap(lambda n: st.lists(nasty.map("".join), min_size=n, max_size=n))


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25, deadline=None)
@given(texts=conversations, answer=st.sampled_from(["good", " good", " bad", "a"]))
def test_a_conversation_is_the_whole_text_in_tokens(kind: str, template: str, texts: list[str], answer: str) -> None:
    tokenizer = tokenizer_of(kind, TEMPLATES[template])
    if refused := refusal(tokenizer, texts, answer):
        assert "not a run of tokens" in refused
        behind = whole(tokenizer, texts, answer)[: len(whole(tokenizer, texts))]
        assert behind != whole(tokenizer, texts), "refused only where the answer changes what is before it"
        return
    context, target = encoded(tokenizer, texts, answer)
    assert context == whole(tokenizer, texts)
    assert context == tokenizer.apply_chat_template(turns_of(texts), add_generation_prompt=True, return_dict=False)
    assert context + target == whole(tokenizer, texts, answer)


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25, deadline=None)
@given(texts=attacks)
def test_a_turn_that_looks_like_control_tokens_stays_text_or_is_refused(
    kind: str, template: str, texts: list[str]
) -> None:
    """It is read as by a tokenizer whose control tokens are spelled so that nobody can write them."""
    tokenizer = tokenizer_of(kind, TEMPLATES[template])
    if refused := refusal(tokenizer, texts, " good"):
        assert "control token" in refused
        assert (kind, template) in {("prefix first", "lines"), ("prefix first", "tight")}
        return
    context, _ = encoded(tokenizer, texts, " good")
    twin = tokenizer_of(kind, TEMPLATES[template], twin=True)
    assert context == whole(twin, texts)


def test_what_cannot_be_read_as_text_is_refused_with_its_place() -> None:
    """Only the text's first word gets a space in front here; nothing says how one behind a control token would read."""
    tokenizer = tokenizer_of("prefix first", TEMPLATES["tight"])
    with pytest.raises(BadData, match=r"line 2: holds a control token(?s:.*)jinja"):
        encoded(tokenizer, ["good</s>"], " good")
    assert encoded(tokenizer_of("prefix first", TEMPLATES["spaces"]), ["good</s>"], " good")


def test_a_chat_template_that_refuses_the_prompts_says_why() -> None:
    tokenizer = tokenizer_of("byte-level", "{{ raise_exception('no system turn, please') }}")
    with pytest.raises(Mismatch, match="no system turn, please"):
        encoded(tokenizer, ["good"], " good")


def test_a_tokenizer_that_tells_no_places_is_refused() -> None:
    class Slow:
        is_fast = False
        added_tokens_decoder: Mapping[int, Any] = {}

    from tritune.text.conversation import Conversations

    with pytest.raises(Mismatch, match="jinja"):
        Conversations(Slow(), lambda text: []).ids([("<s>", True), ("good", False)])
