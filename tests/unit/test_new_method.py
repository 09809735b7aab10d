"""A new method's way in: one file and one line of the table, and the laws, the help and comparisons have it."""

from __future__ import annotations

import inspect
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import tritune as tt
from tests.laws import test_laws
from tests.laws.conftest import Case, shared_base
from tests.oracles import base_of
from tests.unit.test_adapt import BASE, QUICK, task_of
from tritune.comparison import Plan, compare
from tritune.errors import TrituneError
from tritune.methods import METHODS, method

TILT = '''
"""Tilt: a learned vector added to what each feed-forward block gives."""

import torch
from pydantic import Field
from torch import Tensor

from tritune.methods.base import Budget, Delta, Method, sites_of
from tritune.models.base import Role
from tritune.spec import MethodConfig, Strategy


class Tilt(MethodConfig):
    """A vector per block.

    size: what the vector is multiplied by.
    """

    size: float = Field(default=1.0, gt=0)


class TiltDelta(Delta):
    def __init__(self, config, sites, tensors):
        super().__init__(sites)
        self.config = config
        for name, tensor in tensors.items():
            self.put(name, tensor)

    def edit(self, site, x_ND, y_NE, slot_N):
        return y_NE + self.config.size * self.part(site, "tilt").to(y_NE.dtype)

    def export(self):
        return {name: p.detach().clone() for name, p in self.trainable().items()}


class TiltMethod(Method[Tilt]):
    kind = "tilt"
    strategy = Strategy.ADAPTERS
    Config = Tilt
    summary = "a learned vector beside every feed-forward block"
    learning_rate = 1e-2
    variants = (Tilt(), Tilt(size=0.5))

    def budget(self, config, base):
        n = sum(site.d_out for site in sites_of(base, (Role.BLOCK_MLP,)))
        return Budget(trained=n, stored=n, stored_bytes=4 * n)

    def shapes(self, config, base):
        return {f"{site.key}.tilt": (site.d_out,) for site in sites_of(base, (Role.BLOCK_MLP,))}

    def init(self, config, base, rng):
        tensors = {name: torch.zeros(shape) for name, shape in self.shapes(config, base).items()}
        return TiltDelta(config, sites_of(base, (Role.BLOCK_MLP,)), tensors)

    def _load(self, config, base, tensors):
        return TiltDelta(config, sites_of(base, (Role.BLOCK_MLP,)), tensors)


METHOD = TiltMethod()
'''
LINE = "tilt_of_somebody:Tilt"


@pytest.fixture
def tilt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """One file somewhere on the path, one line in the table."""
    folder = tmp_path / "theirs"
    folder.mkdir()
    (folder / "tilt_of_somebody.py").write_text(TILT)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setitem(METHODS, "tilt", LINE)
    yield folder
    sys.modules.pop("tilt_of_somebody", None)


def laws() -> list[tuple[str, dict[str, Any]]]:
    """Every law there is, read from where they are written."""
    found = [name for name in vars(test_laws) if name.startswith("test_")]
    return [
        (name, {"stop": 3} if "stop" in inspect.signature(getattr(test_laws, name)).parameters else {})
        for name in found
    ]


@pytest.mark.parametrize("base", ["llama-tied", "gpt2"])
@pytest.mark.parametrize(("law", "options"), laws(), ids=[name for name, _ in laws()])
def test_a_new_method_passes_the_laws(tilt: Path, law: str, options: dict[str, Any], base: str) -> None:
    found = method("tilt")
    assert Path(inspect.getfile(type(found))).parent == tilt
    for config in found.variants:
        call: Callable[..., None] = getattr(test_laws, law)
        call(Case(found, config, shared_base(base)), **options)


def test_the_laws_are_all_there() -> None:
    assert len(laws()) >= 15


@pytest.mark.parametrize("broken", ["frozen", "not the identity", "leaks"])
def test_the_laws_would_notice_a_broken_method(tilt: Path, broken: str) -> None:
    change = {
        "frozen": ('self.part(site, "tilt")', 'self.part(site, "tilt").detach()'),
        "not the identity": ("torch.zeros(shape)", "torch.ones(shape)"),
        "leaks": ("y_NE + self.config.size", "y_NE + y_NE.mean(0) * self.config.size"),
    }[broken]
    source = (tilt / "tilt_of_somebody.py").read_text()
    assert change[0] in source
    (tilt / "tilt_of_somebody.py").write_text(source.replace(*change))
    sys.modules.pop("tilt_of_somebody", None)
    found = method("tilt")
    red = []
    for law, options in laws():
        try:
            getattr(test_laws, law)(Case(found, found.variants[0], shared_base("llama-tied")), **options)
        except (AssertionError, RuntimeError, TrituneError):
            red.append(law)
    wanted = {
        "frozen": "test_every_declared_tensor_moves_and_nothing_else",
        "not the identity": "test_a_fresh_delta_is_the_identity_exactly_where_declared",
        "leaks": "test_packed_equals_solo",
    }[broken]
    assert wanted in red


def test_a_new_method_is_compared_saved_and_loaded(tilt: Path, tmp_path: Path) -> None:
    base, task = base_of(BASE), task_of(40, 20, 20)
    plan = Plan(methods=("tilt", "lora"), seeds=(0,), shots=0, rates=(1.0, 3.0), training=QUICK)
    comparison, results = compare(base, task, plan, tmp_path / "run")
    entries = {entry.method: entry for entry in comparison.entries}
    assert set(entries) == {"zero-shot", "tilt", "lora"} == set(results)
    assert entries["tilt"].trainable_parameters == 3 * 32
    assert entries["tilt"].strategy == "adapters"
    assert any({pair.a, pair.b} == {"tilt", "lora"} for pair in comparison.pairs)
    assert entries["tilt"].adaptation is not None
    loaded = tt.load(entries["tilt"].adaptation, base=base, task=task)
    assert loaded.evaluate().score == entries["tilt"].score
    assert type(loaded.config).__name__ == "Tilt"


def test_a_new_method_is_a_public_name(tilt: Path) -> None:
    assert tt.Tilt(size=2.0).size == 2.0
    assert "Tilt" in dir(tt)


@pytest.mark.parametrize("command", ["train", "compare"])
def test_a_new_method_appears_in_the_help(tilt: Path, command: str) -> None:
    """In a process of its own: the command line as it would be with the line in the table."""
    code = (
        f"import sys; sys.path.insert(0, {str(tilt)!r})\n"
        f"from tritune.methods import METHODS; METHODS['tilt'] = {LINE!r}\n"
        f"sys.argv = ['tritune', {command!r}, '--help']\n"
        "from tritune.cli import main; main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "tilt" in done.stdout
    assert all(kind in done.stdout for kind in METHODS)
