"""Files are there whole or not at all: kills, full disks, forbidden folders and racing writers included."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import pytest
import torch

from tests.unit.store.child import as_nobody, die, race, run, start, wait
from tritune.errors import Mismatch, StorageError
from tritune.measure import measured
from tritune.store import files, registry
from tritune.store.exchange import exchange
from tritune.store.files import (
    folder_bytes,
    publish,
    read_json,
    read_tensors,
    recover,
    staging,
    write_json,
    write_tensors,
    write_text,
)


def raises_storage_error(work: Callable[[], None], *words: str) -> Callable[[], None]:
    def checked() -> None:
        with pytest.raises(StorageError) as caught:
            work()
        for word in words:
            assert word in str(caught.value), str(caught.value)

    return checked


@pytest.fixture
def forbidden() -> Iterator[Path]:
    """A folder that others can read and only its owner could write, with something in it."""
    folder = Path(tempfile.mkdtemp())
    (folder / "old.json").write_text('"old"')
    folder.chmod(0o555)
    yield folder
    folder.chmod(0o755)
    shutil.rmtree(folder)


# --- text and JSON ---


def test_a_text_is_replaced_in_one_step_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "a.txt"
    write_text(path, "один\n")
    write_text(path, "два\n")
    assert path.read_bytes() == "два\n".encode()
    assert list(path.parent.iterdir()) == [path]


def test_killed_while_writing_a_text_the_old_one_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"n": 1})
    monkeypatch.setattr(os, "fsync", lambda _: die())
    assert run(lambda: write_json(path, {"n": 2})) == -signal.SIGKILL
    assert read_json(path) == {"n": 1}


def test_json_holds_no_nan(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "a.json", {"score": float("nan")})
    assert not (tmp_path / "a.json").exists()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", [b"", b"{", b'{"a": 1', b"\xff\xfe\x00", b"nonsense"])
def test_damaged_json_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(Mismatch, match=r"a\.json"):
        read_json(tmp_path / "a.json")
    with pytest.raises(Mismatch, match=r"b\.json: missing"):
        read_json(tmp_path / "b.json")


# --- tensors ---


def some_tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    whole = torch.randn(6, 4, generator=generator)
    return {
        "a": whole,
        "transposed": whole.T,
        "a view of a": whole[:2],
        "another": whole[1:3],
        "beside these": whole[4:],
        "half": torch.randn(3, generator=generator).bfloat16(),
        "counts": torch.arange(5),
        "scalar": torch.tensor(1.5),
        "empty": torch.zeros(0, 3),
        "grads": torch.ones(2, requires_grad=True),
    }


def test_tensors_come_back_bit_for_bit(tmp_path: Path) -> None:
    write_tensors(tmp_path / "t.safetensors", some_tensors())
    back = read_tensors(tmp_path / "t.safetensors")
    assert back.keys() == some_tensors().keys()
    for name, tensor in some_tensors().items():
        assert torch.equal(back[name], tensor)
        assert back[name].dtype is tensor.dtype
        assert not back[name].requires_grad


def test_what_is_written_is_not_copied_first(tmp_path: Path) -> None:
    """The state of a full fine-tuning is gigabytes. Parts of one tensor that do not overlap are no reason to copy either."""
    parts = torch.rand(4, 1 << 22).unbind()  # 64 MiB
    with measured() as idle:
        pass
    with measured() as cost:
        write_tensors(tmp_path / "t.safetensors", {str(i): part for i, part in enumerate(parts)})
    assert cost.peak_bytes - idle.peak_bytes < 32 << 20
    assert all(torch.equal(read_tensors(tmp_path / "t.safetensors")[str(i)], part) for i, part in enumerate(parts))


def test_the_same_tensors_are_the_same_bytes_in_any_order(tmp_path: Path) -> None:
    given = some_tensors()
    write_tensors(tmp_path / "a", given)
    write_tensors(tmp_path / "b", dict(reversed(list(given.items()))))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_file_cut_off_anywhere_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    write_tensors(path, some_tensors())
    whole = path.read_bytes()
    cuts = {len(whole) * i // 8 for i in range(8)} | {1, 7, 8, 9, len(whole) - 1}
    for cut in sorted(cuts):
        path.write_bytes(whole[:cut])
        with pytest.raises(Mismatch, match=r"t\.safetensors"):
            read_tensors(path)


def test_what_is_no_safetensors_file_is_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "t.safetensors")
    with pytest.raises(Mismatch, match="no whole safetensors"):
        read_tensors(tmp_path / "t.safetensors")
    with pytest.raises(Mismatch, match="missing"):
        read_tensors(tmp_path / "other.safetensors")
    (tmp_path / "folder").mkdir()
    with pytest.raises(Mismatch):
        read_tensors(tmp_path / "folder")


# --- disks and permissions ---


def test_a_full_disk_is_one_clear_error_and_harms_nothing(tmp_path: Path) -> None:
    """A limit on the size of files acts as a full disk does, at the same calls."""
    path = tmp_path / "t.safetensors"
    big = {"w": torch.zeros(10_000)}

    def write() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        raises_storage_error(lambda: write_tensors(path, big), "t.safetensors", "Could not write")()
        raises_storage_error(lambda: write_text(tmp_path / "a.txt", "x" * 5000), "a.txt")()

    write_text(tmp_path / "a.txt", "old")
    assert run(write) == 0
    assert (tmp_path / "a.txt").read_text() == "old"


def test_a_folder_that_may_not_be_written_is_one_clear_error(forbidden: Path) -> None:
    def fill() -> None:
        with staging(forbidden / "below"):
            pass

    work = [lambda: write_text(forbidden / "a.txt", "x"), lambda: write_json(forbidden / "old.json", "new"), fill]
    for each in work:
        assert run(as_nobody(raises_storage_error(each, "may not write", "--out"))) == 0
    assert [p.name for p in forbidden.iterdir()] == ["old.json"]
    assert read_json(forbidden / "old.json") == "old"


def test_a_file_where_a_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(StorageError, match="file"):
        write_text(tmp_path / "file" / "a.txt", "x")
    with pytest.raises(StorageError, match="file"), staging(tmp_path / "file"):
        pass
    assert (tmp_path / "file").read_text() == "mine"


# --- whole folders ---


def without_exchange(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "exchange", lambda a, b: False)


def two_folders(parent: Path) -> tuple[Path, Path]:
    for name in ("a", "b"):
        (parent / f"{name}-full").mkdir()
        (parent / f"{name}-full" / name).write_text(name)
    return parent / "a-full", parent / "b-full"


def test_two_folders_change_places_or_nothing_happens(tmp_path: Path) -> None:
    a, b = two_folders(tmp_path)
    changed = exchange(a, b)
    assert changed or sys.platform not in ("linux", "darwin")
    assert [p.name for p in a.iterdir()] == ["b" if changed else "a"]
    assert [p.name for p in b.iterdir()] == ["a" if changed else "b"]
    if changed:
        with pytest.raises(FileNotFoundError):
            exchange(a, tmp_path / "nothing")


def fill_and_publish(parent: Path, name: str, content: str) -> None:
    with staging(parent) as made:
        (made / "a.txt").write_text(content)
        publish(made, parent / name)


def test_a_folder_replaces_an_older_one_whole(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "left over.txt").write_text("old")
    fill_and_publish(tmp_path, "x", "new")
    assert [p.name for p in tmp_path.iterdir()] == ["x"]
    assert [p.name for p in (tmp_path / "x").iterdir()] == ["a.txt"]
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o755


def test_what_was_not_published_is_gone(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), staging(tmp_path) as made:
        (made / "a.txt").write_text("half")
        raise RuntimeError
    assert not list(tmp_path.iterdir())


def test_if_the_new_folder_cannot_take_its_place_the_old_one_is_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill_and_publish(tmp_path, "x", "old")
    without_exchange(monkeypatch)
    rename = Path.rename
    moved_away: list[str] = []

    def full_after_the_old_one_moved(self: Path, target: Path) -> Path:
        if target.name == "x" and len(moved_away) == 1 and ".old-" not in self.name:
            raise OSError(28, "No space left on device")
        if self.name == "x":
            moved_away.append(target.name)
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", full_after_the_old_one_moved)
    with pytest.raises(StorageError, match="disk is full"):
        fill_and_publish(tmp_path, "x", "new")
    assert [p.name for p in tmp_path.iterdir()] == ["x"]
    assert (tmp_path / "x" / "a.txt").read_text() == "old"


def test_killed_before_the_name_is_given_the_old_folder_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill_and_publish(tmp_path, "x", "old")
    monkeypatch.setattr(files, "publish", lambda made, target: die())

    def killed() -> None:
        with staging(tmp_path) as made:
            (made / "a.txt").write_text("new")
            files.publish(made, tmp_path / "x")

    assert run(killed) == -signal.SIGKILL
    assert (tmp_path / "x" / "a.txt").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir() if not p.name.startswith(".")] == ["x"]


def test_where_folders_can_be_exchanged_the_old_one_is_never_moved_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not exchange(*two_folders(tmp_path)):
        pytest.skip("this system cannot exchange folders")
    fill_and_publish(tmp_path, "x", "old")
    rename = Path.rename

    def watched(self: Path, target: Path) -> Path:
        assert self.name != "x"
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", watched)
    fill_and_publish(tmp_path, "x", "new")
    assert (tmp_path / "x" / "a.txt").read_text() == "new"


@pytest.mark.parametrize("turn", range(8))
def test_killed_at_any_moment_a_whole_folder_is_there(tmp_path: Path, turn: int) -> None:
    """A process that replaces a folder over and over is killed somewhere; not for a moment is the name missing."""
    fill_and_publish(tmp_path, "x", "0")

    def work() -> None:
        for number in count(1):
            fill_and_publish(tmp_path, "x", str(number))

    pid = start(work)
    time.sleep(0.02 + 0.003 * turn)
    os.kill(pid, signal.SIGKILL)
    assert wait(pid) == -signal.SIGKILL
    if exchange(*two_folders(tmp_path)):
        assert (tmp_path / "x" / "a.txt").read_text().isdigit()


@pytest.mark.parametrize("later", ["found", "listed", "written"])
def test_killed_between_two_renames_a_later_start_has_the_old_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, later: str
) -> None:
    """On a system without exchange."""
    without_exchange(monkeypatch)
    root = tmp_path / "root"
    with staging(root) as made:
        write_json(made / registry.MANIFEST, {})
        publish(made, root / "x")
    rename = Path.rename

    def killed_after(self: Path, target: Path) -> None:
        rename(self, target)
        if self.name == "x":
            die()

    def work() -> None:
        Path.rename = killed_after  # type: ignore[assignment, method-assign]
        fill_and_publish(root, "x", "new")

    assert run(work) == -signal.SIGKILL
    assert not (root / "x").exists()
    if later == "found":
        with pytest.raises(Mismatch, match="not a valid Manifest"):
            registry.find(str(root / "x"))
    elif later == "listed":
        assert registry.listing((tmp_path,)) == []  # it has no manifest that could be read, but it was looked at
    else:
        recover(root)
        fill_and_publish(root, "x", "newer")
        assert (root / "x" / "a.txt").read_text() == "newer"
        return
    assert [p.name for p in (root / "x").iterdir()] == [registry.MANIFEST]


@pytest.mark.parametrize("exchanging", [True, False])
def test_racing_writers_leave_one_whole_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchanging: bool
) -> None:
    """Four processes replace the same folder over and over; a reader at any later time finds one of them whole."""
    if not exchanging:
        without_exchange(monkeypatch)

    def write(number: int) -> Callable[[], None]:
        def work() -> None:
            for turn in range(15):
                with staging(tmp_path) as made:
                    for i in range(3):
                        (made / f"{i}.json").write_text(json.dumps([number, turn]))
                    publish(made, tmp_path / "x")

        return work

    assert race(*(write(number) for number in range(4))) == [0, 0, 0, 0]
    assert [p.name for p in tmp_path.iterdir()] == ["x"]
    contents = {(tmp_path / "x" / f"{i}.json").read_text() for i in range(3)}
    assert len(contents) == 1


def test_bytes_of_a_folder_count_what_lies_deep(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "c").write_bytes(b"12345")
    (tmp_path / "d").write_bytes(b"678")
    assert folder_bytes(tmp_path) == 8
