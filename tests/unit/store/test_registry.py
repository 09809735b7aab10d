"""Adaptations on disk: named by content, whole or not at all, found again, and nothing of anybody else's touched."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.unit.store import child
from tests.unit.store.adaptations import TENSOR, manifest, other
from tritune.errors import Mismatch, StorageError
from tritune.run import BaseRef
from tritune.spec import Digests
from tritune.store import files, registry
from tritune.store.manifest import FORMAT, base_misfits
from tritune.store.registry import MANIFEST, TENSORS, WHOLE_BASE, find, listing, read, save, save_as


def tree(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# --- named by content ---


def test_a_changed_manifest_is_refused_under_any_name(tmp_path: Path) -> None:
    """Other label words would turn every answer round."""
    stored = save_as(tmp_path / "mine", manifest, tensors=TENSOR)
    path = stored.folder / MANIFEST
    document = json.loads(path.read_text())
    path.write_text(json.dumps(document | {"task": {"kind": "classification", "label_words": {"a": "b"}}}))
    with pytest.raises(Mismatch, match="damaged or was changed"):
        read(stored.folder)
    path.write_text(json.dumps({key: value for key, value in document.items() if key != "id"}))
    assert read(stored.folder).id == stored.id, "folders of before have none"


def test_the_name_is_the_beginning_of_the_content_hash(tmp_path: Path) -> None:
    stored = save(tmp_path, manifest, tensors=TENSOR)
    assert stored.folder == tmp_path / stored.id[:12]
    assert re.fullmatch(r"[0-9a-f]{64}", stored.id)
    assert sorted(tree(stored.folder)) == [TENSORS, MANIFEST]
    assert stored.bytes == sum(map(len, tree(stored.folder).values()))
    assert read(stored.folder) == stored
    assert all(torch.equal(t, TENSOR[n]) for n, t in read(stored.folder).tensors().items())


def test_the_same_content_is_the_same_folder(tmp_path: Path) -> None:
    first = save(tmp_path, manifest, tensors=TENSOR)
    before = {p.name: p.stat().st_mtime_ns for p in first.folder.iterdir()}
    again = save(tmp_path, manifest, tensors=dict(reversed(list(TENSOR.items()))))
    assert again.folder == first.folder
    assert {p.name: p.stat().st_mtime_ns for p in first.folder.iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == [first.folder.name]
    elsewhere = save(tmp_path / "deep" / "below", manifest, tensors=TENSOR)
    assert elsewhere.id == first.id


def test_other_content_is_another_folder(tmp_path: Path) -> None:
    nudged = {**TENSOR, "layers.0.attn.q.B": TENSOR["layers.0.attn.q.B"].clone()}
    nudged["layers.0.attn.q.B"][0, 0] += 1e-7
    digests = Digests(weights="w", config="c", tokenizer="another")
    saved = [
        save(tmp_path, manifest, tensors=TENSOR),
        save(tmp_path, manifest, tensors=nudged),
        save(tmp_path, manifest, tensors={"renamed": TENSOR["layers.0.attn.q.A"]}),
        save(tmp_path, other(seed=1), tensors=TENSOR),
        save(tmp_path, other(config={"rank": 3}), tensors=TENSOR),
        save(tmp_path, other(template="another"), tensors=TENSOR),
        save(tmp_path, other(base=BaseRef(name="tiny", digests=digests, dtype="float32")), tensors=TENSOR),
    ]
    assert len({stored.id for stored in saved}) == len(saved)
    assert listing((tmp_path,)) == sorted(saved, key=lambda stored: stored.folder)


def test_a_damaged_folder_of_the_same_name_is_made_whole_again(tmp_path: Path) -> None:
    stored = save(tmp_path, manifest, tensors=TENSOR)
    whole = tree(stored.folder)
    (stored.folder / TENSORS).write_bytes(whole[TENSORS][:40])
    assert tree(save(tmp_path, manifest, tensors=TENSOR).folder) == whole
    (stored.folder / MANIFEST).unlink()
    assert tree(save(tmp_path, manifest, tensors=TENSOR).folder) == whole


def test_a_whole_base_brings_its_own_files(tmp_path: Path) -> None:
    def write(folder: Path) -> None:
        files.write_tensors(folder / WHOLE_BASE, TENSOR)
        files.write_json(folder / "config.json", {"model_type": "llama"})

    stored = save(tmp_path, manifest, whole_base=write)
    assert set(stored.manifest.files) == {WHOLE_BASE, "config.json"}
    assert all(torch.equal(t, TENSOR[n]) for n, t in stored.tensors().items())
    (stored.folder / "config.json").write_text("{}")
    with pytest.raises(Mismatch, match=r"config\.json"):
        stored.tensors()


# --- damage ---


def test_every_damaged_byte_and_every_missing_file_is_noticed(tmp_path: Path) -> None:
    stored = save(tmp_path, manifest, tensors=TENSOR)
    path = stored.folder / TENSORS
    whole = path.read_bytes()
    for at in range(0, len(whole), 7):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(Mismatch, match=f"{TENSORS}: sha256"):
            stored.tensors()
    for eighth in range(8):
        path.write_bytes(whole[: len(whole) * eighth // 8])
        with pytest.raises(Mismatch, match=TENSORS):
            stored.tensors()
    path.unlink()
    with pytest.raises(Mismatch, match=f"{TENSORS}: missing"):
        stored.tensors()


def test_a_changed_manifest_no_longer_fits_its_folder(tmp_path: Path) -> None:
    stored = save(tmp_path, manifest, tensors=TENSOR)
    path = stored.folder / MANIFEST
    document = json.loads(path.read_text())
    path.write_text(json.dumps({**document, "learning_rate": 0.5}))
    with pytest.raises(Mismatch, match="content hash"):
        read(stored.folder)
    assert listing((tmp_path,)) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format": FORMAT + 1}, ("newer tritune", str(FORMAT + 1))),
        ({"seed": "0", "surprise": 1}, ("'seed'", "'surprise'")),
        ({"base": {"name": "tiny"}}, ("base.digests", "base.dtype")),
        (None, ("Manifest",)),
    ],
    ids=["newer", "two fields", "a nested one", "no object"],
)
def test_a_manifest_that_does_not_fit_is_named_field_by_field(
    tmp_path: Path, change: dict[str, Any] | None, words: tuple[str, ...]
) -> None:
    folder = tmp_path / "mine"
    save_as(folder, manifest, tensors=TENSOR)
    document = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps([1, 2] if change is None else {**document, **change}))
    with pytest.raises(Mismatch) as caught:
        read(folder)
    for word in words:
        assert word in str(caught.value)


def test_a_folder_without_a_manifest_is_no_adaptation(tmp_path: Path) -> None:
    with pytest.raises(Mismatch, match="no adaptation at"):
        read(tmp_path / "nowhere")
    with pytest.raises(Mismatch, match=f"{MANIFEST}: missing"):
        read(tmp_path)


def test_what_differs_of_a_base_is_told_apart() -> None:
    mine = manifest({})
    assert base_misfits(mine, "tiny", mine.base.digests) == []
    found = base_misfits(mine, "giant", Digests(weights="w", config="x", tokenizer="y"))
    assert [problem.where for problem in found] == ["config of the base", "tokenizer of the base"]
    assert all("giant" in problem.what and "tiny" in problem.what for problem in found)


# --- a folder of the user's naming ---


def test_an_older_adaptation_is_replaced(tmp_path: Path) -> None:
    save_as(tmp_path / "mine", manifest, tensors=TENSOR)
    newer = save_as(tmp_path / "mine", other(seed=4), tensors={"a": torch.zeros(1)})
    assert read(tmp_path / "mine").manifest.seed == 4
    assert set(newer.tensors()) == {"a"}
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]


def test_an_empty_folder_may_be_filled(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    assert read(save_as(tmp_path / "mine", manifest, tensors=TENSOR).folder).manifest.seed == 0


@pytest.mark.parametrize(
    "content",
    [
        {"thesis.docx": "years of work"},
        {"manifest.json": '{"name": "my web app", "icons": []}', "index.html": "<html>"},
        {"manifest.json": "not even JSON"},
    ],
    ids=["other files", "a manifest of something else", "a broken one"],
)
def test_what_is_no_adaptation_is_never_overwritten(tmp_path: Path, content: dict[str, str]) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    for name, text in content.items():
        (folder / name).write_text(text)
    before = tree(tmp_path)
    with pytest.raises(Mismatch, match="nothing was written"):
        save_as(folder, manifest, tensors=TENSOR)
    assert tree(tmp_path) == before


def test_files_that_were_put_beside_an_adaptation_are_not_deleted_with_it(tmp_path: Path) -> None:
    save_as(tmp_path / "mine", manifest, tensors=TENSOR)
    (tmp_path / "mine" / "notes.txt").write_text("what I tried")
    before = tree(tmp_path)
    with pytest.raises(Mismatch, match=r"notes\.txt"):
        save_as(tmp_path / "mine", other(seed=2), tensors=TENSOR)
    assert tree(tmp_path) == before


def test_a_file_in_the_way_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("a file")
    with pytest.raises(Mismatch, match="nothing was written"):
        save_as(tmp_path / "mine", manifest, tensors=TENSOR)
    assert (tmp_path / "mine").read_text() == "a file"


# --- kills, rights, races ---


@pytest.mark.parametrize("point", ["write_tensors", "write_json", "publish"])
def test_killed_while_saving_the_old_one_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str) -> None:
    save_as(tmp_path / "mine", manifest, tensors=TENSOR)
    below = save(tmp_path / "runs", manifest, tensors=TENSOR)
    before = {name: data for name, data in tree(tmp_path).items() if not name.startswith(".")}
    monkeypatch.setattr(registry, point, lambda *_: child.die())
    for work in (
        lambda: save_as(tmp_path / "mine", other(seed=9), tensors=TENSOR),
        lambda: save(tmp_path / "runs", other(seed=9), tensors=TENSOR),
    ):
        assert child.run(lambda work=work: void(work())) == -9  # type: ignore[misc]
    monkeypatch.undo()
    visible = {name: data for name, data in tree(tmp_path).items() if not hidden(name)}
    assert visible == before
    assert read(tmp_path / "mine").manifest.seed == 0
    assert listing((tmp_path,)) == [read(tmp_path / "mine"), below], "what was left half-written is not listed"


def hidden(name: str) -> bool:
    return any(part.startswith(".") for part in Path(name).parts)


def void(_: object) -> None:
    """A child's work gives nothing back."""


@pytest.fixture
def forbidden() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp())
    save_as(folder / "mine", manifest, tensors=TENSOR)
    folder.chmod(0o555)
    yield folder
    folder.chmod(0o755)
    shutil.rmtree(folder)


def test_where_nothing_may_be_written_it_says_so_and_changes_nothing(forbidden: Path) -> None:
    before = tree(forbidden)

    def work() -> None:
        for each in (save_as, save):
            with pytest.raises(StorageError, match="may not write"):
                each(forbidden / "mine", other(seed=2), tensors=TENSOR)

    assert child.run(child.as_nobody(work)) == 0
    assert tree(forbidden) == before


def test_four_processes_that_save_the_same_agree(tmp_path: Path) -> None:
    def work() -> None:
        for _ in range(5):
            assert save(tmp_path, manifest, tensors=TENSOR).tensors().keys() == TENSOR.keys()

    assert child.race(work, work, work, work) == [0, 0, 0, 0]
    (stored,) = listing((tmp_path,))
    assert stored.tensors().keys() == TENSOR.keys()
    assert [p.name for p in tmp_path.iterdir()] == [stored.folder.name]


def test_processes_that_save_to_one_name_leave_one_whole_adaptation(tmp_path: Path) -> None:
    def work(seed: int) -> Callable[[], None]:
        return lambda: [void(save_as(tmp_path / "mine", other(seed=seed), tensors=TENSOR)) for _ in range(5)].clear()

    assert child.race(work(1), work(2), work(3)) == [0, 0, 0]
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]
    stored = read(tmp_path / "mine")
    assert stored.manifest.seed in (1, 2, 3)
    assert stored.tensors().keys() == TENSOR.keys()


# --- found again ---


def test_it_is_found_by_folder_and_by_the_beginning_of_its_hash(tmp_path: Path) -> None:
    a = save(tmp_path / "runs", manifest, tensors=TENSOR)
    b = save(tmp_path / "runs", other(seed=1), tensors=TENSOR)
    roots = (tmp_path,)
    assert find(str(a.folder), roots) == a
    assert find(a.id[:12], roots) == a
    assert find(b.id, roots) == b
    save_as(tmp_path / "named", manifest, tensors=TENSOR)  # the same adaptation twice is no ambiguity
    assert find(a.id[:12], roots).id == a.id


def test_what_is_not_found_or_not_clear_is_said(tmp_path: Path) -> None:
    stored = [save(tmp_path, other(seed=seed), tensors=TENSOR) for seed in range(40)]
    for ref in ("nonsense", "0123", "abcdef012345", "../..", ""):
        if not any(each.id.startswith(ref) for each in stored) and ref not in ("../..", ""):
            with pytest.raises(Mismatch, match="names no adaptation"):
                find(ref, (tmp_path,))
    with pytest.raises(Mismatch):
        find(stored[0].id[:3], (tmp_path,))  # three digits are no name


def test_folders_that_are_hidden_foreign_or_broken_are_passed_over(tmp_path: Path) -> None:
    stored = save(tmp_path / "deep" / "er", manifest, tensors=TENSOR)
    shutil.copytree(stored.folder, tmp_path / ".trash" / "mine")
    (tmp_path / "app").mkdir()
    (tmp_path / "app" / MANIFEST).write_text('{"name": "a web app"}')
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / MANIFEST).write_text("{")
    assert listing((tmp_path, tmp_path / "no such root")) == [stored]
