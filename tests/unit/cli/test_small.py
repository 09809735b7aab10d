"""Small pieces of the command line: language, what was typed, signals, messages, tokens for the eye."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import typer

from tests.oracles import base_of
from tritune.cli import given
from tritune.cli.language import Language, language
from tritune.cli.screen import complain, echo_json
from tritune.cli.stop import stop_wish
from tritune.cli.token_view import pieces
from tritune.errors import Mismatch
from tritune.recipes.settings import CheckSettings, CompareSettings, Settings, TrainSettings


@pytest.mark.parametrize("rates", ["0", "1,-1"])
def test_a_rate_is_above_zero(rates: str) -> None:
    """At rate 0 nothing is learned, and the base's own score would stand as the method's."""
    with pytest.raises(Mismatch, match=r"--rates: .*greater than 0"):
        given.settings(CompareSettings, {"rates": rates})


def test_no_method_at_all_is_no_choice() -> None:
    with pytest.raises(typer.BadParameter, match="names no method"):
        given.settings(CompareSettings, {"methods": " "})


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, "en"),
        ({"LANG": "ru_RU.UTF-8"}, "ru"),
        ({"LANG": "ru_RU.UTF-8", "LC_ALL": "C.UTF-8"}, "en"),
        ({"LANG": "C", "LC_MESSAGES": "ru"}, "ru"),
        ({"LANG": "de_DE"}, "en"),
    ],
)
def test_the_locale_speaks(variables: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LC_ALL", "LC_MESSAGES", "LANG"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert language(None) == expected
    assert language(Language.RU) == "ru"
    assert language(Language.EN) == "en"


def test_what_was_typed_becomes_settings(tmp_path: Path) -> None:
    template = tmp_path / "prompt.jinja"
    template.write_text("Text: {{ body }}\n")
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("epochs: 2\nseeds: [1, 2]\nlabel_words: {a: x, b: y}\nrates: [1e-1, 1]\n")
    params: dict[str, object] = {
        "out": tmp_path, "epochs": None, "seeds": "0, 3", "methods": "lora,full", "label_words": "b=z = 1",
        "template": f"@{template}", "as_json": True,
    }  # fmt: skip
    found = given.settings(CompareSettings, params, str(recipe))
    assert (found.epochs, found.seeds, found.rates) == (2.0, (0, 3), (0.1, 1.0))
    assert found.label_words == {"a": "x", "b": "z = 1"}
    assert found.template == "Text: {{ body }}\n"
    assert found.kinds() == ("lora", "full")


@pytest.mark.parametrize("params", [{"label_words": "x"}, {"template": "@/nowhere/at/all"}])
def test_what_cannot_be_read_is_a_usage_error(params: dict[str, object]) -> None:
    with pytest.raises(typer.BadParameter):
        given.settings(CompareSettings, params)


def test_an_unknown_recipe_names_the_known_ones() -> None:
    with pytest.raises(Mismatch, match="Did you mean 'demo'"):
        given.settings(CompareSettings, {}, "demoo")


def test_assignments() -> None:
    assert given.assignments(["rank=4", "roles=[attn.q, attn.v]", "x=a=b", "y=null"]) == {
        "rank": 4, "roles": ["attn.q", "attn.v"], "x": "a=b", "y": None,
    }  # fmt: skip


def test_the_first_signal_is_a_wish_and_the_second_acts() -> None:
    with stop_wish() as stop:
        assert not stop()
        signal.raise_signal(signal.SIGINT)
        assert stop()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_complaint_is_text(capsys: pytest.CaptureFixture[str]) -> None:
    complain("It [red]failed[/nope]\n  - line [1]: 'x'")
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "It [red]failed[/nope]\n  - line [1]: 'x'\n"


def test_json_is_readable_where_it_can_be(capsys: pytest.CaptureFixture[str]) -> None:
    echo_json({"кино": "😀"})
    assert "кино" in capsys.readouterr().out


def test_tokens_that_make_one_character_stand_together() -> None:
    tokenizer = base_of("llama").tokenizer
    ids = tokenizer("aя\n😀", add_special_tokens=False)["input_ids"]
    assert list(pieces(tokenizer, ids)) == ["a", "я×2", "⏎", "😀×4"]
    assert list(pieces(tokenizer, ids[:2])) == ["a", "�"], "half a character is shown as such"


def test_what_was_typed_is_called_as_it_was_typed() -> None:
    typed: dict[str, object] = {"batch_tokens": 0, "seeds": "a", "methods": "lorra", "search_share": 2.0}
    with pytest.raises(Mismatch) as caught:
        given.settings(CompareSettings, typed, None, {"configs": {"rola": {}}})
    told = [problem.where for problem in caught.value.problems]
    assert sorted(told) == ["--batch-tokens", "--methods", "--search-share", "--seeds", "--set"]
    assert caught.value.hint == "", "a list of everything that a recipe may set helps nobody here"


@pytest.mark.parametrize("command", ["compare", "train", "check", "import"])
def test_every_setting_of_a_command_has_the_option_that_messages_name(command: str) -> None:
    import typer.main

    from tritune.cli.app import app

    kinds = {"compare": CompareSettings, "train": TrainSettings, "check": CheckSettings, "import": Settings}
    parameters = typer.main.get_command(app).commands[command].params  # type: ignore[attr-defined]
    known = {one.name: one.opts for one in parameters}
    shared = known.keys() & kinds[command].model_fields.keys()
    assert len(shared) > 5
    assert all(given.option(name) in known[name] for name in shared)
