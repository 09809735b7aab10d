"""What makes a folder a base, and that nothing in it is ever run."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from tests.unit.models import tiny_folder
from tritune.errors import Mismatch, UnsupportedBase
from tritune.models.digests import digests
from tritune.models.folder import problems_of, read_json, safe_config, weight_files
from tritune.models.locate import locate


class Trap:
    """Pickled, it makes a file when unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[Path, str]]:
        return Path.write_text, (self.marker, "ran")


def said(folder: Path) -> str:
    return "\n".join(map(str, problems_of(folder)))


def test_a_whole_folder_has_no_problems(tmp_path: Path) -> None:
    assert not problems_of(tiny_folder.write(tmp_path / "one"))
    assert not problems_of(tiny_folder.write(tmp_path / "three", shards=3))
    assert len(weight_files(tmp_path / "three")) == 3


def test_everything_that_is_missing_is_listed_at_once(tmp_path: Path) -> None:
    assert len(problems_of(tmp_path)) == 3
    assert "config.json" in said(tmp_path)
    assert "no weights" in said(tmp_path)
    assert "no tokenizer" in said(tmp_path)


def test_pickled_weights_are_refused_and_not_touched(tmp_path: Path) -> None:
    folder = tiny_folder.write(tmp_path / "base")
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Trap(tmp_path / "marker")))
    with pytest.raises(Mismatch, match=r"pytorch_model\.bin: pickle files can run code and are never loaded"):
        locate(str(folder))
    with pytest.raises(Mismatch, match="pickle"):
        digests(folder)
    assert not (tmp_path / "marker").exists()


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    folder = tiny_folder.write(tmp_path / "base", shards=3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    assert "model-00002-of-00003.safetensors: missing shard" in said(folder)


@pytest.mark.parametrize("place", ["../other.safetensors", "/etc/x.safetensors", "weights.bin", 7])
def test_an_index_can_name_only_safetensors_beside_it(place: object, tmp_path: Path) -> None:
    folder = tiny_folder.write(tmp_path / "base", shards=2)
    tiny_folder.write(tmp_path / "base2", shards=1)
    tiny_folder.write_json(folder / "model.safetensors.index.json", {"weight_map": {"a.weight": place}})
    assert "weight_map must name" in said(folder)
    with pytest.raises(Mismatch, match="weight_map"):
        weight_files(folder)


@pytest.mark.parametrize("name", ["model.gguf", "adapter_config.json", "other.safetensors"])
def test_a_near_miss_gets_a_hint(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"{}")
    hints = {"model.gguf": "path of the file itself", "adapter_config.json": "PEFT", "other.safetensors": "other.safe"}
    assert hints[name] in said(tmp_path)


@pytest.mark.parametrize("text", ["", "[1]", "{", '{"a": NaN', "\ufeff\ud800".encode("utf-8", "surrogatepass")])
def test_json_that_is_not_an_object_is_refused(text: str | bytes, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(Mismatch, match=r"config\.json"):
        read_json(path)


def test_deeply_nested_json_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"a":' * 100_000)
    with pytest.raises(Mismatch, match=r"config\.json"):
        read_json(tmp_path / "config.json")


def hostile(folder: Path, marker: Path) -> Path:
    """A folder whose configs ask for code to be run, by every way known."""
    tiny_folder.write(folder)
    (folder / "evil.py").write_text(f"open({str(marker)!r}, 'w').close()\nclass Evil: pass\n")
    asks = {
        "auto_map": {
            "AutoConfig": "evil.Evil",
            "AutoModelForCausalLM": "evil.Evil",
            "AutoTokenizer": ["evil.Evil"] * 2,
        },
        "_attn_implementation_internal": "someone/kernel",
        "_attn_implementation": "someone/kernel",
        "attn_implementation": "someone/kernel",
        "trust_remote_code": True,
    }
    config = read_json(folder / "config.json") | asks
    tiny_folder.write_json(folder / "config.json", config | {"text_config": {"hidden_size": 4, "parts": [asks]}})
    tiny_folder.write_json(folder / "tokenizer_config.json", {"auto_map": asks["auto_map"], "bos_token": "<s>"})
    return folder


def test_a_hostile_config_is_disarmed_at_every_depth(tmp_path: Path) -> None:
    folder = hostile(tmp_path / "base", tmp_path / "marker")
    config = safe_config(folder)
    assert config == {
        "model_type": "llama",
        "hidden_size": 4,
        "dtype": "float32",
        "text_config": {"hidden_size": 4, "parts": [{}]},
    }


def test_nothing_in_a_hostile_folder_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITUNE_CACHE", str(tmp_path / "cache"))
    folder = hostile(tmp_path / "base", tmp_path / "marker")
    located = locate(str(folder))
    digests(located.folder)
    safe_config(located.folder)
    assert not (tmp_path / "marker").exists()


def test_a_config_without_a_known_kind_of_model_is_refused(tmp_path: Path) -> None:
    folder = tiny_folder.write(tmp_path / "base")
    tiny_folder.write_json(folder / "config.json", {"auto_map": {"AutoConfig": "evil.Evil"}})
    with pytest.raises(UnsupportedBase, match="never run"):
        safe_config(folder)


def test_quantised_weights_are_refused_by_name(tmp_path: Path) -> None:
    folder = tiny_folder.write(tmp_path / "base")
    config = read_json(folder / "config.json") | {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    tiny_folder.write_json(folder / "config.json", config)
    with pytest.raises(UnsupportedBase, match="gptq"):
        safe_config(folder)
