"""A name, a folder, a GGUF file or a Hub id -> one plain Hugging Face folder on this machine.

Fetching and converting happen once; the result is kept in the cache under a name made of its content. Knows where
bases come from; knows nothing of how they are loaded, and imports neither torch nor transformers until it must convert.
"""

from __future__ import annotations

import difflib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from tritune.errors import Mismatch, Problem, StorageError, Unavailable
from tritune.models.digests import digests, file_sha256
from tritune.models.folder import MARKER, problems_of, read_json, safe_config
from tritune.models.gguf import CONVERTER_VERSION
from tritune.packaged import SMOLLM2_135M, Packaged, Progress, cache_dir, fetch, locked, sha256_of

__all__ = ["PACKAGED_BASES", "Located", "digests", "locate", "safe_config"]

Kind = Literal["packaged", "folder", "gguf", "hub"]

PACKAGED_BASES: Mapping[str, Packaged] = {SMOLLM2_135M.name: SMOLLM2_135M}
"""Bases that need no account and no hub."""

# Files in the root of a Hub repository that are fetched; nothing that holds code or pickles is among them.
HUB_FILES = ("*.safetensors", "*.json", "tokenizer.model", "merges.txt", "vocab.txt", "*.jinja")
HUB_NOT = ("*/*", "consolidated*")  # other formats of the same weights


@dataclass(frozen=True, slots=True)
class Located:
    """A base that lies on this machine.

    Attributes:
        folder: a plain Hugging Face folder: config.json, safetensors, tokenizer.
        name: what to show.
        kind: where it came from.
        ref: what was asked for.
        license: SPDX identifier as far as its source states one.
    """

    folder: Path
    name: str
    kind: Kind
    ref: str
    license: str | None = None


def locate(ref: str, *, revision: str | None = None, progress: Progress | None = None) -> Located:
    """Find a base; fetch and convert it if that has not been done.

    Args:
        ref: a packaged name (`PACKAGED_BASES`), a folder, a `.gguf` file, or a Hub id; looked for in this order.
        revision: branch, tag or commit, for a Hub id only.
        progress: told in short lines what takes time.

    Raises:
        Unavailable: an unknown name, or it cannot be fetched (the message says what to do offline).
        Mismatch: a folder or file that is not there or not complete, with everything that is missing.
        UnsupportedBase: a GGUF file that cannot be converted exactly.
        StorageError: the cache cannot be written to.
    """
    if not ref.strip() or "\0" in ref:
        raise Mismatch(f"{ref!r} is not the name of a base. Names that need no hub: {', '.join(PACKAGED_BASES)}.")
    if revision is not None and (ref in PACKAGED_BASES or _is_local(ref)):
        raise Mismatch(f"revision={revision!r} is for Hub ids; {ref} is not one.")
    if packaged := PACKAGED_BASES.get(ref):
        return _packaged(packaged, progress)
    if not _is_local(ref):
        _check_name(ref)
        return _from_hub(ref, revision, progress)
    path = Path(os.path.expanduser(ref))
    if path.is_dir():
        advice = "A base is a folder as transformers' save_pretrained writes it."
        Mismatch.check(f"{path} is not a complete base.", problems_of(path), advice)
        return Located(path.absolute(), path.absolute().name, "folder", ref)
    if path.is_file() and path.suffix.lower() == ".gguf":
        return _gguf(path.absolute(), ref, progress)
    raise _no_such_path(path)


def gguf_file(located: Located, progress: Progress | None = None) -> Path | None:
    """The GGUF file that a base was converted from; None: it came as a folder or from the Hub.

    Raises:
        Unavailable: a packaged one that has to be fetched again and cannot be.
    """
    if located.kind == "packaged":
        return fetch(PACKAGED_BASES[located.ref], progress=progress)
    return Path(located.ref).expanduser().absolute() if located.kind == "gguf" else None


def _is_local(ref: str) -> bool:
    """Whether `ref` means something on this machine; a mistyped path must never be asked of the hub."""
    path = Path(os.path.expanduser(ref))
    return (
        path.exists()
        or ref.startswith((".", "~", os.sep))
        or "\\" in ref
        or ref.count("/") > 1
        or ref.endswith("/")
        or path.suffix.lower() in {".gguf", ".safetensors", ".bin"}
        or ("/" in ref and path.parent.is_dir())
    )


def _no_such_path(path: Path) -> Mismatch:
    if path.is_file():
        return Mismatch(
            f"{path} cannot be used as a base.",
            [Problem(str(path), "expected a folder with config.json and safetensors weights, or a .gguf file")],
        )
    siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, siblings, n=3)
    hint = f"Near it there is: {', '.join(str(path.parent / name) for name in near)}" if near else ""
    return Mismatch(f"There is no base at {path}.", [Problem(str(path), "no such file or folder")], hint)


def _check_name(ref: str) -> None:
    """A short name close to a packaged one is a slip of the finger, not a Hub id."""
    if "/" not in ref and (near := difflib.get_close_matches(ref.lower(), PACKAGED_BASES, n=3)):
        raise Unavailable(f"There is no base named {ref!r}. Did you mean: {', '.join(near)}?")


def _packaged(packaged: Packaged, progress: Progress | None) -> Located:
    target = _bases() / f"{packaged.member_sha256[:16]}-v{CONVERTER_VERSION}"
    if not _complete(target):
        _convert_once(fetch(packaged, progress=progress), target, progress)
    return Located(target, packaged.name, "packaged", packaged.name, packaged.license)


def _gguf(path: Path, ref: str, progress: Progress | None) -> Located:
    target = _bases() / f"{file_sha256(path)[:16]}-v{CONVERTER_VERSION}"
    if not _complete(target):
        _convert_once(path, target, progress)
    license_ = read_json(target / MARKER).get("license")
    return Located(target, path.stem, "gguf", ref, license_ if isinstance(license_, str) else None)


def _bases() -> Path:
    return cache_dir() / "bases"


def _complete(folder: Path) -> bool:
    """Whether a converted folder is whole: every file there, of the size it had."""
    try:
        files = read_json(folder / MARKER)["files"]
        return not problems_of(folder) and all((folder / name).stat().st_size == size for name, size in files.items())
    except (Mismatch, KeyError, AttributeError, OSError):
        return False


def _convert_once(gguf_file: Path, target: Path, progress: Progress | None) -> None:
    """Convert into a temporary folder beside `target` and rename it last, so a kill leaves nothing half-made."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with locked(target.parent / f"{target.name}.lock", gguf_file.stem, progress=progress):
            if _complete(target):  # another process did it while this one waited
                return
            for leftover in (*target.parent.glob(f"tmp-{target.name}-*"), target):
                shutil.rmtree(leftover, ignore_errors=True)
            with tempfile.TemporaryDirectory(prefix=f"tmp-{target.name}-", dir=target.parent) as scratch:
                folder = Path(scratch) / "base"
                folder.mkdir()
                _convert(gguf_file, folder, progress)
                folder.rename(target)
    except OSError as error:
        raise StorageError(
            f"{gguf_file.name} could not be converted into {target}: {error.strerror or error}. Converting needs about "
            "8 times the size of a 4-bit file. Free some space, or set TRITUNE_CACHE to a folder elsewhere."
        ) from error


def _convert(gguf_file: Path, folder: Path, progress: Progress | None) -> None:
    from tritune.models import gguf

    if progress:
        progress(f"converting {gguf_file.name} to safetensors (once)")
    facts = gguf.convert(gguf_file, folder)
    mode = (folder / "config.json").stat().st_mode
    (folder / "model.safetensors").chmod(mode)  # written as private; a cache may be shared
    sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    marker = {
        "source": gguf_file.name,
        "converter": CONVERTER_VERSION,
        **asdict(facts),
        "sha256": {path.name: sha256_of(path) for path in folder.glob("*.json")},
        "files": sizes,
    }
    (folder / MARKER).write_text(json.dumps(marker, indent=2) + "\n", encoding="utf-8")
    for path in (*folder.iterdir(), folder):
        _flush(path)


def _flush(path: Path) -> None:
    """Force a file or folder to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _from_hub(ref: str, revision: str | None, progress: Progress | None) -> Located:
    folder = _download(ref, revision, progress)
    Mismatch.check(
        f"The Hub repository {ref} has no base that can be used, as far as it could be fetched.",
        problems_of(folder),
        "Only safetensors weights are taken from the Hub: pickle files (pytorch_model.bin) can run code. Of a "
        "repository of GGUF files fetch one, and give its path.",
    )
    return Located(folder, ref, "hub", ref)


def _download(ref: str, revision: str | None, progress: Progress | None) -> Path:
    from huggingface_hub import errors, snapshot_download

    if progress:
        progress(f"fetching {ref} from the Hugging Face Hub")
    try:
        found = snapshot_download(ref, revision=revision, allow_patterns=list(HUB_FILES), ignore_patterns=list(HUB_NOT))
    except (errors.HFValidationError, errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        raise _unknown(ref, revision, error) from None
    except _unreachable_errors() as error:
        raise _unreachable(ref, error) from None
    except OSError as error:
        raise StorageError(f"{ref} could not be stored in the Hub cache: {error}.") from error
    return Path(found)


def _unreachable_errors() -> tuple[type[Exception], ...]:
    """What huggingface_hub raises when the network does not answer; the HTTP library below it differs by version."""
    from huggingface_hub import errors

    http = next(base for base in errors.HfHubHTTPError.__mro__ if base.__name__ == "HTTPError")
    named = (getattr(errors, name, None) for name in ("XetDownloadError",))
    known = (http, errors.EntryNotFoundError, errors.OfflineModeIsEnabled, RuntimeError)  # hf_xet: RuntimeError
    return (*known, *(error for error in named if error is not None))


def _unknown(ref: str, revision: str | None, error: BaseException) -> Unavailable:
    at = f" at revision {revision}" if revision else ""
    return Unavailable(
        f"The Hugging Face Hub gives no model {ref!r}{at}: {_first_line(error)}\n"
        f"Names that need no hub: {', '.join(PACKAGED_BASES)}. A gated model needs `hf auth login` and accepted terms."
    )


def _unreachable(ref: str, error: BaseException) -> Unavailable:
    return Unavailable(
        f"{ref!r} is neither a packaged base ({', '.join(PACKAGED_BASES)}) nor a path here, and the Hugging Face Hub "
        f"could not be asked: {_first_line(error)}\n"
        f"Offline: fetch it elsewhere (`hf download {ref} --local-dir FOLDER`), bring it here, and give its path."
    )


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
