"""Every way to name a base, and every way that goes wrong."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import errors as hub_errors
from huggingface_hub.utils import filter_repo_objects

import tritune.errors
from tests.unit.models import tiny_folder, tiny_gguf
from tritune.errors import Mismatch, Unavailable
from tritune.models import gguf
from tritune.models.digests import digests
from tritune.models.locate import HUB_FILES, HUB_NOT, PACKAGED_BASES, locate

SOURCE = str(Path(tritune.errors.__file__).parents[1])


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of its own; and whoever asks the Hub fails."""
    monkeypatch.setenv("TRITUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: pytest.fail("the Hub was asked"))
    return tmp_path / "cache"


def in_process(body: str, cache: Path) -> subprocess.Popen[str]:
    """Run `body` in another Python with this cache."""
    return subprocess.Popen(
        [sys.executable, "-c", body],
        env={**os.environ, "PYTHONPATH": SOURCE, "TRITUNE_CACHE": str(cache)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_importing_loads_no_model_library() -> None:
    heavy = "{'torch', 'transformers', 'tokenizers', 'gguf', 'huggingface_hub', 'numpy'}"
    body = f"import sys, tritune.models.locate; print(sorted({heavy} & set(sys.modules)))"
    assert in_process(body, Path()).communicate()[0] == "[]\n"


def test_a_folder_is_used_where_it_lies(tmp_path: Path, cache: Path) -> None:
    folder = tiny_folder.write(tmp_path / "my-base")
    located = locate(str(folder))
    assert (located.folder, located.name, located.kind) == (folder, "my-base", "folder")


def test_a_relative_folder_is_found(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_folder.write(tmp_path / "org" / "name")
    monkeypatch.chdir(tmp_path)
    assert locate("org/name").folder == tmp_path / "org" / "name"


@pytest.mark.parametrize(
    "ref", ["./x", "/no/such/base", "../x", "~/no-such", "a/b/c", "x.gguf", "C:\\base", "a/", "dir/x"]
)
def test_what_looks_like_a_path_is_never_asked_of_the_hub(
    ref: str, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "dir").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Mismatch, match="no base at"):
        locate(ref)


def test_a_mistyped_path_gets_its_neighbours(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "smollm-tuned").mkdir()
    with pytest.raises(Mismatch, match="smollm-tuned"):
        locate(str(tmp_path / "smolm-tuned"))


def test_a_file_of_another_kind_is_refused(tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"")
    with pytest.raises(Mismatch, match=r"or a \.gguf file"):
        locate(str(path))


@pytest.mark.parametrize("ref", ["smollm2-135", "SmolLM2-135M", "smolm2-135m"])
def test_a_slip_of_the_finger_gets_the_nearest_name(ref: str, cache: Path) -> None:
    with pytest.raises(Unavailable, match=r"Did you mean: smollm2-135m\?"):
        locate(ref)


@pytest.mark.parametrize("ref", ["", "  ", "a\0b"])
def test_no_name_is_no_base(ref: str, cache: Path) -> None:
    with pytest.raises(Mismatch, match="smollm2-135m"):
        locate(ref)


def test_a_revision_is_for_the_hub_only(cache: Path) -> None:
    with pytest.raises(Mismatch, match="revision"):
        locate("smollm2-135m", revision="main")


def test_the_hub_gives_a_folder(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def download(ref: str, **options: Any) -> str:
        asked.update(options, ref=ref)
        return str(tiny_folder.write(tmp_path / "snapshot"))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    located = locate("org/name", revision="v1")
    assert (located.kind, located.name, located.folder) == ("hub", "org/name", tmp_path / "snapshot")
    assert (asked["ref"], asked["revision"]) == ("org/name", "v1")


def test_no_code_and_no_pickle_is_fetched_from_the_hub() -> None:
    wanted = ["config.json", "model.safetensors", "model.safetensors.index.json", "tokenizer.json", "tokenizer.model"]
    wanted += ["model-00001-of-00002.safetensors", "chat_template.jinja", "merges.txt", "vocab.json"]
    refused = ["modeling_x.py", "pytorch_model.bin", "x.pt", "x.ckpt", "x.pkl", "custom_generate/generate.py", "x.gguf"]
    refused += ["original/model.safetensors", "onnx/config.json", "consolidated.safetensors", "tf_model.h5"]
    kept = filter_repo_objects(wanted + refused, allow_patterns=list(HUB_FILES), ignore_patterns=list(HUB_NOT))
    assert list(kept) == wanted


@pytest.mark.parametrize(
    "error",
    [
        hub_errors.LocalEntryNotFoundError("no connection"),
        hub_errors.OfflineModeIsEnabled("offline mode"),
        RuntimeError("transfer broke off"),
    ],
)
def test_offline_the_message_says_what_to_do(error: Exception, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **options: Any) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(Unavailable, match=r"org/name(.|\n)*smollm2-135m(.|\n)*hf download org/name"):
        locate("org/name")


def test_a_name_the_hub_cannot_have_is_refused(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(ref: str, **options: Any) -> str:
        raise hub_errors.HFValidationError(f"{ref} is not a repo id")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(Unavailable, match="Names that need no hub: smollm2-135m"):
        locate("what is this?")


def test_a_repository_without_safetensors_is_refused(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_folder.write(tmp_path / "snapshot")
    (folder / "model.safetensors").unlink()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: str(folder))
    with pytest.raises(Mismatch, match="Only safetensors"):
        locate("org/name")


def test_a_gguf_file_is_converted_once(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tiny_gguf.write(tmp_path / "Tiny.gguf")
    told: list[str] = []
    located = locate(str(path), progress=told.append)
    assert (located.kind, located.name, located.license) == ("gguf", "Tiny", "apache-2.0")
    assert located.folder.is_relative_to(cache)
    assert any("converting" in line for line in told)
    before = digests(located.folder)
    monkeypatch.setattr(gguf, "convert", lambda *a: pytest.fail("converted again"))
    shutil.copy(path, tmp_path / "copy.gguf")
    again = locate(str(tmp_path / "copy.gguf"))
    assert again.folder == located.folder, "the same content is the same base"
    assert digests(again.folder) == before


def test_a_damaged_conversion_is_made_again(tmp_path: Path, cache: Path) -> None:
    path = tiny_gguf.write(tmp_path / "tiny.gguf")
    folder = locate(str(path)).folder
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-4])
    assert (locate(str(path)).folder / "model.safetensors").read_bytes() == whole
    (folder / "tokenizer.json").unlink()
    assert (locate(str(path)).folder / "tokenizer.json").is_file()


def test_a_failed_conversion_leaves_nothing(tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "broken.gguf"
    path.write_bytes(b"GGUF" + b"\0" * 100)
    with pytest.raises(Mismatch, match=r"broken\.gguf"):
        locate(str(path))
    assert [p.suffix for p in (cache / "bases").iterdir()] == [".lock"]


def test_a_kill_during_conversion_leaves_no_valid_folder(tmp_path: Path, cache: Path) -> None:
    path = tiny_gguf.write(tmp_path / "tiny.gguf")
    body = (
        "import time; from tritune.models import locate as module\n"
        "module._flush = lambda path: (print('now', flush=True), time.sleep(600))\n"  # all written, not yet renamed
        f"module.locate({str(path)!r})"
    )
    process = in_process(body, cache)
    assert process.stdout is not None
    assert process.stdout.readline() == "now\n"
    process.kill()
    process.communicate()
    left = [p.name for p in (cache / "bases").iterdir() if p.is_dir()]
    assert len(left) == 1
    assert left[0].startswith("tmp-")
    folder = locate(str(path)).folder
    assert [p.name for p in (cache / "bases").iterdir() if p.is_dir()] == [folder.name], "the leftovers are gone"


def test_two_processes_convert_once(tmp_path: Path, cache: Path) -> None:
    path = tiny_gguf.write(tmp_path / "tiny.gguf")
    body = (
        "from tritune.models.locate import locate\n"
        f"print(locate({str(path)!r}, progress=lambda line: print('said', line)).folder)"
    )
    both = [in_process(body, cache) for _ in range(2)]
    outputs = [process.communicate(timeout=240) for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert {out.splitlines()[-1] for out, _ in outputs} == {str(locate(str(path)).folder)}
    assert sum(out.count("said converting") for out, _ in outputs) == 1


def test_a_full_disk_is_said(tmp_path: Path, cache: Path) -> None:
    path = tiny_gguf.write(tmp_path / "tiny.gguf")
    body = (
        "import resource, signal\n"
        "from tritune.errors import StorageError; from tritune.models.locate import locate\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
        f"try: locate({str(path)!r})\n"
        "except StorageError as error: print('StorageError', error)"
    )
    out, err = in_process(body, cache).communicate(timeout=240)
    assert out.startswith("StorageError"), err
    assert [p.suffix for p in (cache / "bases").iterdir()] == [".lock"]


@pytest.mark.base
def test_the_packaged_base_is_found_and_has_the_pinned_content() -> None:
    located = locate("smollm2-135m")
    assert (located.kind, located.name, located.license) == ("packaged", "smollm2-135m", "Apache-2.0")
    assert PACKAGED_BASES["smollm2-135m"].member_sha256.startswith(located.folder.name.split("-")[0])
    found = digests(located.folder)
    assert found.weights == "b65e66fedf2d513f3881643ca4f2c96b19ec76bcd7c2d04a7040d62e36eebbfa"
    assert found.config == "21149013190b6d07f0bf00a98fc1341355f6413c8802d38117419b8c4b132ee8"
    assert found.tokenizer == "499de7fb15f3b4baa81a441ea5456b69191855b36bf2267bce89ddf59f507e4d"
