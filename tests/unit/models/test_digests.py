"""A digest changes when the base does, and only then."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.unit.models import tiny_folder
from tritune.errors import Mismatch
from tritune.models import digests as module
from tritune.models.digests import config_digest, digests, read_header, tokenizer_digest, weights_digest
from tritune.models.folder import MARKER, read_json, weight_files


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TRITUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_folder.write(tmp_path / "base")


def change(path: Path, **values: Any) -> None:
    tiny_folder.write_json(path, read_json(path) | values)


def test_sharded_and_unsharded_weights_have_one_digest(folder: Path, tmp_path: Path) -> None:
    sharded = tiny_folder.write(tmp_path / "sharded", shards=3)
    assert digests(sharded) == digests(folder)


def test_the_order_of_a_header_does_not_count(folder: Path, tmp_path: Path) -> None:
    """The same tensors, written by hand in the opposite order, with metadata."""
    header: dict[str, Any] = {"__metadata__": {"format": "np"}}
    data = b""
    names = {"float32": "F32", "float16": "F16", "int64": "I64"}
    for name, tensor in reversed(tiny_folder.tensors().items()):
        raw = tensor.tobytes()
        place = [len(data), len(data) + len(raw)]
        header[name] = {"dtype": names[tensor.dtype.name], "shape": list(tensor.shape), "data_offsets": place}
        data += raw
    text = json.dumps(header).encode()
    (tmp_path / "x.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    assert weights_digest([tmp_path / "x.safetensors"]) == weights_digest(weight_files(folder))


@pytest.mark.parametrize("what", ["value", "name", "shape", "dtype", "one less"])
def test_any_change_of_the_weights_changes_their_digest(what: str, folder: Path) -> None:
    before = digests(folder).weights
    tensors = tiny_folder.tensors()
    if what == "value":
        tensors["a.weight"][2, 3] = np.nextafter(tensors["a.weight"][2, 3], np.float32(9))
    elif what == "name":
        tensors["a.bias"] = tensors.pop("a.weight")
    elif what == "shape":
        tensors["a.weight"] = tensors["a.weight"].reshape(4, 3)
    elif what == "dtype":
        tensors["a.weight"] = tensors["a.weight"].view(np.int32)
    else:
        del tensors["e.empty"]
    save_file(tensors, folder / "model.safetensors")
    assert digests(folder).weights != before


def test_the_weights_digest_is_remembered_until_the_file_changes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = digests(folder)
    with monkeypatch.context() as patch:
        patch.setattr(module, "weights_digest", lambda files: pytest.fail("read again"))
        assert digests(folder) == first
    tensors = tiny_folder.tensors()
    tensors["d.steps"][0] = 9
    save_file(tensors, folder / "model.safetensors")
    assert digests(folder).weights != first.weights


@pytest.mark.parametrize("memory", [b"", b"\xff\xfe", b"short", b"z" * 64])
def test_a_spoilt_memory_is_ignored(memory: bytes, folder: Path, cache: Path) -> None:
    first = digests(folder)
    (remembered,) = (cache / "digests").iterdir()
    remembered.write_bytes(memory)
    assert digests(folder) == first


def test_a_cache_that_cannot_be_used_does_not_matter(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = digests(folder)
    monkeypatch.setenv("TRITUNE_CACHE", str(folder / "config.json"))
    assert digests(folder) == first


def spoilt(raw: bytes) -> dict[str, bytes]:
    """Files that are not whole safetensors."""
    length = int.from_bytes(raw[:8], "little")
    grown = raw[8 : 8 + length].replace(b"[3,4]", b"[3,9]")
    return {
        "empty": b"",
        "truncated": raw[:-1],
        "longer": raw + b"\0",
        "a header too long": b"\xff" * 8 + raw[8:],
        "no JSON": raw[:8] + b"x" * length + raw[8 + length :],
        "a list": (2).to_bytes(8, "little") + b"[]",
        "shape": raw[:8] + grown + raw[8 + length :],
        "entry": (11).to_bytes(8, "little") + b'{"a": null}',
    }


@pytest.mark.parametrize("what", spoilt(bytes(8)))
def test_a_file_that_is_not_whole_is_refused(what: str, folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(spoilt(path.read_bytes())[what])
    with pytest.raises(Mismatch, match=r"model\.safetensors"):
        read_header(path)


def test_one_tensor_in_two_shards_is_refused(folder: Path) -> None:
    path = folder / "model.safetensors"
    with pytest.raises(Mismatch, match=r"tensor '.*' is in model\.safetensors too"):
        weights_digest([path, path])


def test_how_a_config_was_saved_does_not_count(folder: Path) -> None:
    before = config_digest(folder)
    change(folder / "config.json", transformers_version="9", dtype="bfloat16", torch_dtype="float16", hidden_size=4.0)
    change(folder / "config.json", _name_or_path="x", rope_scaling=None, use_cache=False, architectures=["X"])
    assert config_digest(folder) == before
    change(folder / "config.json", rope_theta=1e5)
    assert config_digest(folder) != before


def test_the_tokenizer_digest_follows_ids_not_the_chat_template(folder: Path) -> None:
    before = tokenizer_digest(folder)
    change(folder / "tokenizer_config.json", chat_template="{{ messages }}", pad_token="</s>", model_max_length=7)
    change(folder / "tokenizer_config.json", eos_token={"content": "</s>", "special": True})
    assert tokenizer_digest(folder) == before
    for values in ({"add_bos_token": False}, {"eos_token": "<s>"}):
        change(folder / "tokenizer_config.json", **values)
        assert tokenizer_digest(folder) != before
        before = tokenizer_digest(folder)
    change(folder / "tokenizer.json", model={"type": "BPE", "vocab": {"b": 0}})
    assert tokenizer_digest(folder) != before


def test_a_sentencepiece_model_is_a_tokenizer_too(folder: Path) -> None:
    before = tokenizer_digest(folder)
    (folder / "tokenizer.json").rename(folder / "tokenizer.model")
    after = tokenizer_digest(folder)
    assert after != before
    (folder / "tokenizer.model").write_bytes(b"other")
    assert tokenizer_digest(folder) != after


def test_what_the_converter_noted_counts_while_its_files_are_untouched(folder: Path) -> None:
    names = ("config.json", "tokenizer.json", "tokenizer_config.json")
    sums = {name: module.sha256_of(folder / name) for name in names}
    tiny_folder.write_json(folder / MARKER, {"config": "c" * 64, "tokenizer": "t" * 64, "sha256": sums})
    assert (digests(folder).config, digests(folder).tokenizer) == ("c" * 64, "t" * 64)
    change(folder / "config.json", rope_theta=1e5)
    assert digests(folder).config != "c" * 64
    assert digests(folder).tokenizer == "t" * 64
