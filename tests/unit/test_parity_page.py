"""docs/parity.md, as `make parity` writes it, names everything that can be exchanged and every method beside its reference.

What can be exchanged is found by writing it, so a new codec without a row is told here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from tests.parity.cover import EXCEPTIONS, breaches, footnotes, lacking, told
from tests.parity.seen import POST_NORM, Gaps, Seen, Variant
from tests.unit.exchange.conftest import adapted
from tests.unit.models import tiny_gguf
from tritune.errors import Mismatch, NotMergeable
from tritune.exchange import FORMATS, format_named
from tritune.methods import METHODS, method
from tritune.models.load import load_base
from tritune.models.pretrained import Base

PAGE = Path(__file__).parents[2] / "docs" / "parity.md"
REAL = "smollm2-135m"
#: whole models in llama.cpp's form are compared on tiny ones alone: one of SmolLM2-135M takes a minute
TINY_ONLY = {"gguf"}


def rows(section: str) -> Iterator[list[str]]:
    """Cells of a section's table, below its head."""
    text = PAGE.read_text(encoding="utf-8").partition(f"## {section}\n")[2].partition("\n## ")[0]
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len(lines) > 2, section
    for line in lines[2:]:
        yield [cell.strip() for cell in line.strip("|").split("|")]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Base]:
    """Of a family that every format knows, from a GGUF file."""
    root = tmp_path_factory.mktemp("gguf")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITUNE_CACHE", str(root / "cache"))
        yield load_base(tiny_gguf.write(root / "tiny.gguf"), dtype="float32", device="cpu")


def is_written(kind: str, format: str, base: Base, folder: Path) -> bool:
    """Whether some variant of a method has a form there."""
    for i, config in enumerate(method(kind).variants):
        place = folder / f"{kind} {format} {i}"
        place.mkdir()
        try:
            format_named(format).write(adapted(base, config), place)
        except (Mismatch, NotMergeable):
            continue
        return True
    return False


@pytest.mark.parametrize("format", FORMATS)
def test_the_page_names_everything_that_goes_out(format: str, base: Base, tmp_path: Path) -> None:
    shown = {(kind, where) for kind, its, where, gap in rows("In exchange") if its == format and float(gap) < 1e-4}
    written = {kind for kind in METHODS if is_written(kind, format, base, tmp_path)}
    assert written
    assert written == {kind for kind, _ in shown}
    if format not in TINY_ONLY:
        assert written == {kind for kind, where in shown if where == REAL}


@pytest.mark.parametrize("kind", METHODS)
def test_the_page_has_every_method_beside_its_reference(kind: str) -> None:
    found = [row for row in rows("Beside the reference implementations") if row[0] == kind and row[2] != "formula"]
    assert found
    families = {family for row in found for family in row[3].split(", ")} - {"-"}
    assert len(families) >= 5
    assert POST_NORM in families
    figures = [figure for row in found for figure in row[4:]]
    assert all(float(figure) < 1e-4 for figure in figures if figure != "-")
    assert any(row[6] != "-" for row in found), "on the real base"


# --- which bases a run must have seen ---

PLAIN = Variant("lora", "plain", "PEFT")
ALL = ("llama", "gemma2", "mistral", "qwen3", POST_NORM)


def seen(bases: Iterable[str], *, real: bool = True, gradients: float | None = 1e-6, variant: Variant = PLAIN) -> Seen:
    found = Seen(variants={(variant, True): Gaps(set(bases), 1e-6, gradients)})
    if real:
        found.variants[variant, False] = Gaps({REAL}, 1e-6, gradients)
    return found


@pytest.mark.parametrize(
    ("found", "missing"),
    [
        (seen(ALL), []),
        (seen(ALL, real=False), ["SmolLM2-135M"]),
        (seen(("llama", "gemma2", "mistral", POST_NORM)), ["4 families beside llama (only gemma2, mistral, opt)"]),
        (
            seen(("llama", "gemma2", "mistral", "opt", POST_NORM)),
            ["4 families beside llama (only gemma2, mistral, opt)"],
        ),
        (seen(("gemma2", "mistral", "qwen3", "opt")), [POST_NORM]),
        (seen(ALL, gradients=None), ["gradients of tiny bases", "gradients of SmolLM2-135M"]),
    ],
    ids=["all", "no real", "three families", "one family twice", "no post-norm", "no gradients"],
)
def test_what_a_variant_was_not_compared_on_is_named(found: Seen, missing: list[str]) -> None:
    assert lacking(found, PLAIN) == missing
    said = [line for line in breaches(found) if line.startswith("lora, plain (PEFT)")]
    assert said == ([f"lora, plain (PEFT): was not compared on {'; '.join(missing)}"] if missing else [])


def test_a_merge_has_no_gradients_to_lack() -> None:
    merged = Variant("merge", "linear", "PEFT")
    assert not lacking(seen(ALL, gradients=None, variant=merged), merged)


def test_an_exception_that_nothing_needs_is_told() -> None:
    fused = next(iter(EXCEPTIONS))
    assert any(line.startswith(told(fused)) for line in breaches(seen(ALL, variant=fused)))
    assert not any(line.startswith(told(fused)) for line in breaches(seen(("gpt2",), real=False, variant=fused)))


def test_the_page_lists_the_exceptions() -> None:
    assert footnotes() in PAGE.read_text(encoding="utf-8")
