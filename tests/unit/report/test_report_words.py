"""Both languages say the same things; numbers look as they should in each."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from string import Formatter
from typing import Any

import pytest

from tritune.report import units
from tritune.report.explain import explain
from tritune.report.facts import Fact, facts
from tritune.report.html import html
from tritune.report.told import TOLD
from tritune.report.words import WORDS, words
from tritune.spec import Strategy


def gaps(text: str) -> set[str]:
    return {name for _, name, _, _ in Formatter().parse(text) if name}


@pytest.mark.parametrize(("english", "russian"), [*WORDS.values(), *TOLD.values()], ids=[*WORDS, *TOLD])
def test_both_languages_have_every_text_with_the_same_gaps(english: str, russian: str) -> None:
    assert english
    assert russian
    assert gaps(english) == gaps(russian)
    assert english.count("\n") == russian.count("\n")


def test_there_are_two_languages() -> None:
    with pytest.raises(ValueError, match="'de'"):
        words("de")  # type: ignore[arg-type]


@pytest.mark.parametrize("strategy", Strategy)
def test_every_strategy_has_a_name(strategy: Strategy) -> None:
    assert f"strategy_{strategy}" in WORDS


def test_the_russian_page_has_no_english_of_ours(made: Callable[..., Any]) -> None:
    found = made(seeds=2)
    page = html(found.comparison, found.examples, "ru")
    sentences = {english for english, russian in WORDS.values() if english != russian and len(english) > 12}
    assert [text for text in sentences if gaps(text) == set() and text in page] == []


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (units.size(46_080, "en"), "46.1 KB"),
        (units.size(0, "en"), "0 B"),
        (units.size(999_999, "en"), "1 MB"),
        (units.size(538_000_000, "ru"), "538 МБ"),
        (units.size(9_770_000, "ru"), "9,77 МБ"),
        (units.size(None, "en"), "–"),
        (units.count(134_515_008, "en"), "135 M"),
        (units.count(950, "en"), "950"),
        (units.whole(1_234_567, "en"), "1,234,567"),
        (units.whole(1_234, "ru"), "1 234"),
        (units.rate(4_321.5, "en"), "4,320"),
        (units.rate(0.25, "en"), "0.25"),
        (units.seconds(4.2, "en"), "4.2 s"),
        (units.seconds(82.7, "ru"), "83 с"),
        (units.seconds(150, "en"), "2.5 min"),
        (units.seconds(9_000, "en"), "2.5 h"),
        (units.seconds(0, "en"), "–"),
        (units.score(0.8611, "ru"), "0,861"),
        (units.signed(-0.0123, "en"), "−0.012"),
        (units.signed(-0.0001, "en"), "0.000"),
        (units.p_value(0.00001, "en"), "< 0.001"),
        (units.p_value(None, "en"), "–"),
        (units.p_value(0.0456, "ru"), "0,046"),
    ],
)
def test_numbers(shown: str, expected: str) -> None:
    assert shown.replace("\u00a0", " ") == expected


def test_facts_translate_our_keys_and_leave_the_users_labels() -> None:
    found = facts({"rows": {"test": 5}, "labels": {"rows": 2, "some_label": [1, 0.5]}, "odd_key": None}, "ru")
    assert found == (
        Fact("строк", parts=(Fact("проверка (test)", "5"),)),
        Fact("метки", parts=(Fact("rows", "2"), Fact("some_label", "1; 0,5"))),
        Fact("odd_key", "–"),
    )


# ---- explain


@pytest.mark.parametrize("lang", ["en", "ru"])
@pytest.mark.parametrize("strategy", [None, "full", "p-tuning", "adapters"])
def test_every_strategy_is_explained_with_figures_and_without(
    made: Callable[..., Any], strategy: Any, lang: Any
) -> None:
    plain = explain(strategy, lang)
    told = explain(strategy, lang, made().comparison)
    assert plain.startswith("# ")
    assert told.startswith(plain.strip())
    assert words(lang)["this_run"] in told
    assert "n = 300" in told


def test_figures_are_those_of_the_strategy(made: Callable[..., Any]) -> None:
    told = explain("adapters", "en", made().comparison).partition("## In this run")[2].replace("\u00a0", " ")
    assert "**lora**" in told
    assert "**bottleneck**" in told
    assert "**full**" not in told
    assert "stores 9.77 MB" in told
    assert "Against zero-shot: +0.097" in told


def test_a_strategy_that_was_not_tried_says_so(made: Callable[..., Any]) -> None:
    assert "did not try" in explain("full", "en", made(["lora"]).comparison)


def test_p_tuning_is_training() -> None:
    assert "training, not prompting" in explain("p-tuning")
    assert "обучение, а не подбор запроса" in explain("p-tuning", "ru")


@pytest.mark.parametrize("strategy", ["lora", "prompting"])
def test_other_strategies_are_refused(strategy: Any) -> None:
    with pytest.raises(ValueError):
        explain(strategy)


def test_importing_the_report_loads_nothing_heavy() -> None:
    modules = ["compare", "html", "plots", "explain", "facts", "samples", "units", "words"]
    code = "; ".join([*(f"import tritune.report.{name}" for name in modules), "import sys",
                      "print([m for m in ('torch', 'matplotlib', 'scipy', 'sklearn') if m in sys.modules])"])  # fmt: skip
    source = str(Path(__file__).parents[3] / "src")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=source)
    assert done.stdout.strip() == "[]"
