"""The page parses, holds everything, loads nothing, and lets no user text out of its place."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from html.parser import HTMLParser
from typing import Any

import pytest

from tritune.report.html import SHOWN_TEXT, html

VOID = {"meta", "link", "br", "img", "hr", "input"}


class Page(HTMLParser):
    """Checks the nesting while it reads; keeps tags, ids and text."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: Counter[str] = Counter()
        self.ids: Counter[str] = Counter()
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += attrs
        self.ids.update(value for name, value in attrs if name == "id" and value)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open, tag
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data


@pytest.mark.parametrize("lang", ["en", "ru"])
def test_the_page_is_whole_and_alone(made: Callable[..., Any], lang: str) -> None:
    found = made(seeds=2)
    source = html(found.comparison, found.examples, lang)
    page = Page(source)
    assert page.tags["h1"] == 1
    assert page.tags["svg"] == 4
    assert page.tags["script"] == page.tags["link"] == page.tags["img"] == 0
    assert max(page.ids.values()) == 1
    assert not re.search(r"https?:|//\w|@import|url\((?!#)", source)
    assert all(entry.method in page.text for entry in found.comparison.entries)
    assert f'lang="{lang}"' in source
    assert found.comparison.command in page.text


def test_references_inside_the_plots_lead_somewhere(made: Callable[..., Any]) -> None:
    found = made()
    source = html(found.comparison, found.examples)
    page = Page(source)
    wanted = set(re.findall(r"url\(#([^)]+)\)", source)) | {
        value[1:] for name, value in page.attributes if name == "href" and value
    }
    assert wanted
    assert wanted <= set(page.ids)


@pytest.mark.parametrize("lang", ["en", "ru"])
def test_user_text_stays_text(hostile: Any, hostile_text: str, lang: str) -> None:
    source = html(hostile.comparison, hostile.examples, lang)
    page = Page(source)
    assert page.tags["script"] == 0
    assert "<script" not in source
    assert hostile_text in page.text  # unaltered for the reader
    assert "$x_1$ {{ 7 * 7 }}" in page.text  # no template inside the text was run
    assert "хорошо 🙂" in page.text


@pytest.mark.parametrize(
    ("methods", "sparse", "lang"),
    [
        (["zero-shot"], False, "en"),
        (["zero-shot", "few-shot"], True, "ru"),
        (["lora"], True, "en"),
        (["full", "lora"], False, "ru"),
        (["zero-shot", "ptuning"], True, "ru"),
    ],
)
def test_small_comparisons_have_pages_too(
    made: Callable[..., Any], methods: list[str], sparse: bool, lang: str
) -> None:
    found = made(methods, sparse=sparse, n=40)
    page = Page(html(found.comparison, found.examples, lang))
    assert all(method in page.text for method in methods)


def test_a_page_without_examples_leaves_them_out(made: Callable[..., Any]) -> None:
    assert "Errors per label" not in Page(html(made(["lora"]).comparison, {})).text


def test_an_empty_comparison_has_a_page(made: Callable[..., Any]) -> None:
    empty = made(["lora"]).comparison.model_copy(
        update={"entries": (), "pairs": (), "caveats": (), "caveat_keys": (), "command": ""}
    )
    Page(html(empty, {}))


def test_the_same_record_gives_the_same_page(made: Callable[..., Any]) -> None:
    found = made(seeds=2)
    assert html(found.comparison, found.examples) == html(found.comparison, found.examples)


def test_many_labels_are_listed_not_drawn(made: Callable[..., Any]) -> None:
    found = made(["lora"], labels=[f"label {i:02}" for i in range(60)], n=600)
    page = Page(html(found.comparison, found.examples))
    assert "and 20 more labels" in page.text
    assert "Most frequent mistakes" in page.text


def test_what_is_cut_is_said(made: Callable[..., Any]) -> None:
    found = made(["full", "lora"], text="x" * SHOWN_TEXT)
    text = Page(html(found.comparison, found.examples)).text
    assert re.search(r"… and [234] more characters", text)


def test_a_diverged_rate_is_shown(made: Callable[..., Any]) -> None:
    found = made(["lora"])
    (entry,) = found.comparison.entries
    points = tuple(
        point if point.chosen else point.model_copy(update={"dev_loss": None, "dev_score": None})
        for point in entry.search
    )
    comparison = found.comparison.model_copy(update={"entries": (entry.model_copy(update={"search": points}),)})
    assert "diverged" in Page(html(comparison, found.examples)).text
