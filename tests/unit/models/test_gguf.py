"""A GGUF file becomes a Hugging Face folder with the same weights and the very same tokenisation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.unit.models import tiny_gguf
from tritune.errors import Mismatch, UnsupportedBase
from tritune.models import gguf, gguf_tokenizer

FIXTURE = Path(__file__).parents[2] / "fixtures" / "smollm2_tokenization.json"


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder converted from the tiny file."""
    folder = tmp_path_factory.mktemp("converted")
    gguf.convert(tiny_gguf.write(folder.parent / "tiny.gguf", eot=0), folder)
    return folder


def metadata_of(path: Path) -> dict[str, Any]:
    return gguf.read_metadata(path)


def rotary_rows(weight: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """GGUF keeps the two halves of a rotary head interleaved; transformers keeps them one after the other."""
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def test_every_weight_is_the_files_own(converted: Path) -> None:
    from safetensors.numpy import load_file

    got = load_file(converted / "model.safetensors")
    want = tiny_gguf.tensors(len(tiny_gguf.vocabulary()))
    names = {"attn_output": "self_attn.o_proj", "attn_v": "self_attn.v_proj", "ffn_gate": "mlp.gate_proj"}
    names |= {"ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm"}
    for theirs, ours in names.items():
        np.testing.assert_array_equal(got[f"model.layers.1.{ours}.weight"], want[f"blk.1.{theirs}.weight"])
    for theirs, ours, heads in (("attn_q", "q_proj", tiny_gguf.HEADS), ("attn_k", "k_proj", tiny_gguf.KV_HEADS)):
        rows = rotary_rows(want[f"blk.1.{theirs}.weight"], heads)
        np.testing.assert_array_equal(got[f"model.layers.1.self_attn.{ours}.weight"], rows)
    np.testing.assert_array_equal(got["model.embed_tokens.weight"], want["token_embd.weight"])
    assert {tensor.dtype for tensor in got.values()} == {np.dtype("float32")}
    assert len(got) == len(want), "the head is tied, so it is not stored twice"


def test_the_config_is_plain_and_has_the_files_special_ids(converted: Path) -> None:
    config = json.loads((converted / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (1, 2, 2)
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["dtype"] == "float32"
    assert "quantization_config" not in config
    assert not [key for key in config if key.startswith("_")]


def test_generation_stops_at_the_end_of_text_and_of_turn(converted: Path) -> None:
    generation = json.loads((converted / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [2, 0]


def test_only_plain_files_are_written(converted: Path) -> None:
    names = {path.name for path in converted.iterdir()}
    assert names == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }


def test_bos_is_added_exactly_where_the_file_says_so(tmp_path: Path) -> None:
    for add_bos in (True, False):
        path = tiny_gguf.write(tmp_path / f"{add_bos}.gguf", add_bos=add_bos)
        tokenizer, settings = gguf_tokenizer.build(metadata_of(path))
        assert settings["add_bos_token"] is add_bos
        assert (tokenizer.encode("the").tokens == ["<|im_start|>", "the"]) is add_bos
        assert tokenizer.encode("a", "b").ids.count(1) == 2 * add_bos


def test_a_byte_without_a_token_vanishes_and_parts_its_neighbours(tmp_path: Path) -> None:
    path = tiny_gguf.write(tmp_path / "a.gguf", without="Ć")  # the letter of byte 0x06
    tokenizer, _ = gguf_tokenizer.build(metadata_of(path))
    assert tokenizer.encode("t\x06he the", add_special_tokens=False).tokens == ["t", "h", "e", "Ġthe"]


def test_an_unknown_pre_tokenizer_is_refused_by_name(tmp_path: Path) -> None:
    path = tiny_gguf.write(tmp_path / "a.gguf", pre="some-new-split")
    with pytest.raises(UnsupportedBase, match=r"some-new-split.*known: .*smollm"):
        gguf_tokenizer.build(metadata_of(path))


@pytest.mark.parametrize(
    ("name", "text", "pieces"),
    [
        ("gpt-2", "it's 123  x", ["it", "'s", "Ġ123", "Ġ", "Ġx"]),
        ("smollm", "it's 123  x", ["it", "'s", "Ġ", "1", "2", "3", "Ġ", "Ġx"]),
        ("llama-bpe", "IT'S 1234\n x", ["IT", "'S", "Ġ", "123", "4", "Ċ", "Ġx"]),
        ("qwen2", "IT'S 12.\n\n x", ["IT", "'S", "Ġ", "1", "2", ".ĊĊ", "Ġx"]),
    ],
)
def test_pre_tokenizers_cut_where_their_models_did(name: str, text: str, pieces: list[str], tmp_path: Path) -> None:
    tokenizer, _ = gguf_tokenizer.build(metadata_of(tiny_gguf.write(tmp_path / "a.gguf", pre=name)))
    assert tokenizer.pre_tokenizer is not None
    assert [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)] == pieces


def sentencepiece(*tokens: str, **keys: Any) -> dict[str, Any]:
    """Metadata of a SentencePiece vocabulary: a few control tokens, all bytes, and `tokens`, best score first."""
    control = ["<unk>", "<s>", "</s>", "<|end|>"]
    every = [*control, *(f"<0x{byte:02X}>" for byte in range(256)), *tokens]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": every,
        "tokenizer.ggml.token_type": [2, 3, 3, 3] + [6] * 256 + [1] * len(tokens),
        "tokenizer.ggml.scores": [0.0] * 260 + [-float(i) for i in range(len(tokens))],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        **keys,
    }


def pieces(metadata: dict[str, Any], text: str) -> list[str]:
    tokenizer, _ = gguf_tokenizer.build(metadata)
    return [str(tokenizer.id_to_token(i)) for i in tokenizer.encode(text, add_special_tokens=False).ids]


def test_sentencepiece_merges_by_score_and_falls_back_to_bytes() -> None:
    letters = sentencepiece("bc", "ab", "▁a", "▁", "a", "b", "c")
    assert pieces(letters, "abc ab") == ["▁a", "bc", "▁", "ab"]
    assert pieces(letters, "é") == ["▁", "<0xC3>", "<0xA9>"]
    tokenizer, settings = gguf_tokenizer.build(letters)
    assert settings["add_bos_token"], "llama.cpp's default for these vocabularies"
    assert tokenizer.encode("a").tokens == ["<s>", "▁a"]
    assert tokenizer.decode(tokenizer.encode("abc é  ab").ids) == "abc é  ab"


def test_the_space_in_front_is_added_after_every_special_token_or_never() -> None:
    tokens = ("▁a", "▁", "a")
    assert pieces(sentencepiece(*tokens), "a<|end|>a") == ["▁a", "<|end|>", "▁a"]
    without = sentencepiece(*tokens, **{"tokenizer.ggml.add_space_prefix": False})
    assert pieces(without, "a<|end|>a a") == ["a", "<|end|>", "a", "▁a"]


def test_phi_3_cuts_the_spaces_after_its_special_tokens() -> None:
    tokens = ("▁a", "▁", "a")
    assert pieces(sentencepiece(*tokens), "<|end|>  a") == ["<|end|>", "▁", "▁", "▁a"]
    phi = sentencepiece(*tokens, **{"general.name": "Phi-3 Mini"})
    assert pieces(phi, "<|end|>  a<s>  a") == ["<|end|>", "▁a", "<s>", "▁", "▁", "▁a"]


def test_a_kind_of_vocabulary_that_is_not_known_is_refused() -> None:
    with pytest.raises(UnsupportedBase, match="'rwkv'"):
        gguf_tokenizer.build({"tokenizer.ggml.model": "rwkv"})


def test_a_file_that_is_not_gguf_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(b"this is not a model" * 10)
    with pytest.raises(Mismatch, match=r"x\.gguf"):
        gguf.read_metadata(path)


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    path = tiny_gguf.write(tmp_path / "x.gguf")
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(Mismatch, match=r"x\.gguf"):
        gguf.read_metadata(path)


def test_the_digests_of_a_file_do_not_depend_on_where_it_lies(tmp_path: Path) -> None:
    first, second = (gguf._facts(metadata_of(tiny_gguf.write(tmp_path / name))) for name in ("a.gguf", "b.gguf"))
    other = gguf._facts(metadata_of(tiny_gguf.write(tmp_path / "c.gguf", add_bos=True)))
    assert first == second
    assert first.license == "apache-2.0"
    assert other.config == first.config
    assert other.tokenizer != first.tokenizer


@pytest.fixture(scope="module")
def recorded() -> dict[str, Any]:
    """What llama.cpp said (see tests/fixtures/record_smollm2_tokenization.py)."""
    content: dict[str, Any] = json.loads(FIXTURE.read_text(encoding="ascii"))
    return content


@pytest.fixture(scope="module")
def smollm2() -> Any:
    """The packaged base's tokenizer, loaded as anyone would load it."""
    from transformers import AutoTokenizer

    from tritune.models.locate import locate

    return AutoTokenizer.from_pretrained(locate("smollm2-135m").folder)


@pytest.mark.base
def test_the_fixture_was_recorded_from_the_packaged_file(recorded: dict[str, Any]) -> None:
    from tritune.packaged import SMOLLM2_135M

    assert recorded["gguf_sha256"] == SMOLLM2_135M.member_sha256
    assert len(recorded["strings"]) >= 500


@pytest.mark.base
@pytest.mark.parametrize("parse_special", [True, False])
def test_ids_equal_those_of_llama_cpp(recorded: dict[str, Any], smollm2: Any, parse_special: bool) -> None:
    wrong = []
    for row in recorded["strings"]:
        want = row["special"] if parse_special else row.get("plain", row["special"])
        got = smollm2(row["text"], split_special_tokens=not parse_special)["input_ids"]
        if got != want:
            wrong.append((row["text"], got, want))
    assert not wrong


@pytest.mark.base
def test_ids_become_the_text_again(recorded: dict[str, Any], smollm2: Any) -> None:
    lossless = [row for row in recorded["strings"] if not set(row["text"]) & set("\x04\x06\x13\x14\x16\x1d")]
    assert len(lossless) >= 600
    assert [smollm2.decode(row["special"]) for row in lossless] == [row["text"] for row in lossless]


@pytest.mark.base
def test_special_ids_are_the_files(recorded: dict[str, Any], smollm2: Any) -> None:
    assert (smollm2.bos_token_id, smollm2.eos_token_id) == (recorded["bos"], recorded["eos"])
    assert (smollm2.bos_token, smollm2.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert smollm2.add_bos_token is recorded["add_bos"] is False
    assert len(smollm2) == recorded["vocab_size"]


@pytest.mark.base
def test_the_chat_template_is_the_files_and_renders(recorded: dict[str, Any], smollm2: Any) -> None:
    assert smollm2.chat_template == recorded["chat_template"]
    messages = [{"role": "user", "content": "Hi"}]
    assert smollm2.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.base
def test_stored_weights_are_the_dequantised_blocks() -> None:
    from gguf import GGUFReader, dequantize
    from safetensors import safe_open

    from tritune.models.locate import locate
    from tritune.packaged import SMOLLM2_135M, fetch

    reader = GGUFReader(fetch(SMOLLM2_135M))
    names = {"token_embd": "embed_tokens", "blk.7.ffn_down": "layers.7.mlp.down_proj", "output_norm": "norm"}
    with safe_open(locate("smollm2-135m").folder / "model.safetensors", framework="numpy") as stored:
        for theirs, ours in names.items():
            tensor = next(tensor for tensor in reader.tensors if tensor.name == f"{theirs}.weight")
            want = dequantize(tensor.data, tensor.tensor_type)
            np.testing.assert_array_equal(stored.get_tensor(f"model.{ours}.weight"), want)
