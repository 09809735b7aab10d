"""What a person can set: one flat document per command, from defaults, a recipe and the command line, in this order.

Every problem of every layer is found before anything is raised. Knows names and types of settings; reads no data, loads
no base, imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal, TypeVar

from pydantic import Field

from tritune.errors import Mismatch, Problem
from tritune.methods import METHODS, table
from tritune.misfits import NO_SETTING, Spelled, inside, misfits, nearest
from tritune.packaged import SMOLLM2_135M
from tritune.run import Training
from tritune.spec import Quantisation
from tritune.text.template import TemplateSpec

Rows = int | None
#: written for the record; not a setting
RECORDED = ("run",)


class Settings(Training):
    """Base, data and training.

    base, dtype, device, quantise, compiled, cuda_graphs: as for `load_base`; null: the machine decides, nothing is quantised.
    train, test, dev, ... allow_duplicates: as for `classification`; `data_seed` draws the rows where there are limits.
    """

    base: str = SMOLLM2_135M.name
    dtype: Literal["float32", "bfloat16"] | None = None
    device: str | None = None
    quantise: Quantisation | None = None
    compiled: bool = False
    cuda_graphs: bool = False
    train: str | None = None
    test: str | None = None
    dev: str | None = None
    text_field: str = "text"
    label_field: str = "label"
    labels: tuple[str | int | bool, ...] | None = None
    label_words: Mapping[str | int | bool, str] | None = None
    template: str | TemplateSpec | None = None
    dev_fraction: float = Field(default=0.1, ge=0, le=0.5)
    train_rows: Rows = Field(default=None, ge=1)
    dev_rows: Rows = Field(default=None, ge=1)
    test_rows: Rows = Field(default=None, ge=1)
    data_seed: int = 0
    allow_duplicates: bool = False

    def training(self) -> Training:
        """How to train, without the rest."""
        return Training(**{name: getattr(self, name) for name in Training.model_fields})


class CompareSettings(Settings):
    """What `compare` can be told. `methods`: names, or "all"; `configs`: by method; null: the comparison's own default."""

    methods: tuple[str, ...] | Literal["all"] = "all"
    configs: Mapping[str, Mapping[str, object]] = {}
    seeds: tuple[int, ...] = Field(default=(0,), min_length=1)
    shots: int | None = Field(default=None, ge=0)
    rates: tuple[Annotated[float, Field(gt=0)], ...] | None = Field(default=None, min_length=1)
    search_share: float | None = Field(default=None, gt=0, le=1)

    def kinds(self) -> tuple[str, ...]:
        """The methods by name."""
        return tuple(METHODS) if self.methods == "all" else tuple(dict.fromkeys(self.methods))


class TrainSettings(Settings):
    """What `train` can be told. `run` is what the settings came to, once they ran: digests of base and data."""

    method: str | None = None
    config: Mapping[str, object] = {}
    seed: int = 0
    run: Mapping[str, object] | None = None


class FuseSettings(Settings):
    """What `compose fuse` can be told. adaptations: the finished adapters; value: whether their weighted sum goes through a
    matrix of its own. `base` is where theirs is now; `run` as for `train`."""

    adaptations: tuple[str, ...] = ()
    value: bool = True
    seed: int = 0
    run: Mapping[str, object] | None = None


class CheckSettings(CompareSettings, TrainSettings):
    """What `check` can be told: a recipe of either command, of which base and data count."""


S = TypeVar("S", bound=Settings)


def layered(
    kind: type[S],
    given: Mapping[str, object],
    recipe: Mapping[str, object] | None,
    where: str,
    spelled: Spelled | None = None,
) -> S:
    """Defaults, over them a recipe, over it what was given on the command line.

    Args:
        where: what to call the recipe in messages.
        spelled: how the command line calls a setting.

    Raises:
        Mismatch: with everything that does not fit, in both layers.
    """
    layers = [(recipe or {}, inside(where)), (given, spelled or inside("command line"))]
    problems = [problem for layer, its in layers for problem in misfits(kind, layer, its)]
    problems += [problem for layer, its in layers for problem in _method_misfits(layer, its)]
    known = ", ".join(name for name in kind.model_fields if name not in RECORDED)
    unknown = any(problem.what.startswith(NO_SETTING) for problem in problems)
    Mismatch.check("These settings cannot be used.", problems, f"Settings: {known}." if unknown else "")
    return kind.read(merged(recipe or {}, given), where)


def merged(below: Mapping[str, object], above: Mapping[str, object]) -> dict[str, object]:
    """Both documents; `above` wins, key by key in documents inside them."""
    result = dict(below)
    for key, new in above.items():
        old = result.get(key)
        result[key] = merged(old, new) if isinstance(old, Mapping) and isinstance(new, Mapping) else new
    return result


def _method_misfits(layer: Mapping[str, object], spelled: Spelled) -> list[Problem]:
    """Methods that a layer names and the table does not have."""
    named = {key: layer.get(key) for key in ("method", "methods", "configs")}
    lists = {key: (names,) if isinstance(names, str) else names for key, names in named.items()}
    lists["methods"] = () if named["methods"] == "all" else lists["methods"]
    known = table()
    return [
        Problem(spelled(key), f"'{name}' is not a method{nearest(str(name), known)}; known: {', '.join(known)}")
        for key, names in lists.items()
        if isinstance(names, list | tuple | Mapping)
        for name in names
        if name not in known
    ]
