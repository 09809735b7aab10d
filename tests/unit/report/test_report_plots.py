"""Plots are sound SVG, the same every time, with words for those who cannot see them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from xml.etree import ElementTree

import matplotlib
import pytest

from tritune.report import plots
from tritune.report.rows import rows

DRAWN = [plots.dev_curves, plots.loss_curves, plots.score_by_bytes, plots.score_by_seconds]


@pytest.mark.parametrize("draw", DRAWN)
@pytest.mark.parametrize("lang", ["en", "ru"])
def test_plots_are_sound_and_repeat(made: Callable[..., Any], draw: Callable[..., str], lang: str) -> None:
    comparison = made(seeds=2).comparison
    svg = draw(comparison, lang)
    assert svg == draw(comparison, lang)
    root = ElementTree.fromstring(svg)
    assert root.tag == "svg"
    assert root.get("role") == "img"
    assert root.find("title") is not None
    assert "lora: 0" in (root.findtext("desc") or "")
    assert "date" not in svg.lower()
    assert "http" not in svg


@pytest.mark.parametrize("draw", DRAWN)
def test_nothing_to_draw_is_no_plot(made: Callable[..., Any], draw: Callable[..., str]) -> None:
    assert draw(made(["zero-shot"]).comparison) == ""


def test_curves_need_points(made: Callable[..., Any]) -> None:
    comparison = made(["lora"], sparse=True).comparison
    assert plots.dev_curves(comparison) == plots.loss_curves(comparison) == ""
    assert plots.score_by_bytes(comparison)


def test_a_method_keeps_its_colour(made: Callable[..., Any]) -> None:
    comparison = made().comparison
    lora = next(row for row in rows(comparison) if row.method == "lora")
    assert all(plots.colour(lora) in draw(comparison) for draw in DRAWN)
    colours = [plots.colour(row) for row in rows(comparison)]
    assert len(set(colours)) == len(colours)


@pytest.mark.parametrize("name", ["</svg><script>", "кириллица", "$\\frac{1}{2}$", "a & b", "-->"])
def test_any_name_can_be_drawn(made: Callable[..., Any], name: str) -> None:
    comparison = made(["lora"]).comparison
    renamed = comparison.model_copy(
        update={"entries": tuple(entry.model_copy(update={"method": name}) for entry in comparison.entries)}
    )
    root = ElementTree.fromstring(plots.score_by_bytes(renamed))
    assert name in (root.findtext("desc") or "")


def test_the_users_own_style_neither_matters_nor_suffers(made: Callable[..., Any]) -> None:
    comparison = made().comparison
    plain = plots.dev_curves(comparison)
    with matplotlib.rc_context({"font.size": 30.0, "axes.grid": False}):
        assert plots.dev_curves(comparison) == plain
        assert matplotlib.rcParams["font.size"] == 30.0


def test_a_file_of_its_own_has_its_namespace(made: Callable[..., Any]) -> None:
    root = ElementTree.fromstring(plots.standalone(plots.dev_curves(made().comparison)))
    assert root.tag == f"{{{plots.SVG}}}svg"
