"""Progress as a person sees it: sparse lines in a log, one bar on a terminal, nothing when quiet."""

from __future__ import annotations

import io
import time

import pytest
from rich.console import Console

from tritune.cli import progress
from tritune.cli.progress import Plain, Stage, Terminal, shown


def work(target: Plain | Terminal) -> None:
    target.say("base [bold]tiny[/bold]")
    target.stage("train, rate 0.001", 4, "steps")
    for step in range(4):
        target.advance(True, loss=1.0 / (step + 1), dev=None if step < 3 else 0.84, tokens_per_second=6100.0)
    target.advance(False, dev=0.9)
    target.stage("evaluate", 1000, "rows")
    target.advance(1000)
    target.close()


def test_a_log_gets_few_lines_with_everything() -> None:
    file = io.StringIO()
    work(Plain(Console(file=file, width=40)))
    lines = file.getvalue().splitlines()
    assert lines[0] == "base [bold]tiny[/bold]"
    assert lines[1].startswith("train, rate 0.001: 4/4 steps, 6,100 tok/s loss 0.250 dev 0.900, peak ")
    assert lines[2].startswith("evaluate: 1,000/1,000 rows, peak ")
    assert len(lines) == 3, "no line is cut at the width of a console, and none is told twice"


def test_in_russian_it_has_russian_words_and_numbers() -> None:
    file = io.StringIO()
    work(Plain(Console(file=file, width=40), "ru"))
    lines = file.getvalue().splitlines()
    assert lines[1].startswith("train, rate 0.001: 4/4 шагов, 6 100 ток/с loss 0,250 dev 0,900, пик ")
    assert lines[2].startswith("evaluate: 1 000/1 000 строк, пик ")
    assert "МБ" in lines[2] or "ГБ" in lines[2]


def test_a_long_stage_is_told_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    file = io.StringIO()
    target = Plain(Console(file=file))
    target.stage("train", 100, "steps")
    for _ in range(50):
        now[0] += 1.0
        target.advance(1)
    told = file.getvalue().splitlines()
    assert len(told) == 50 // int(progress.EVERY)
    assert "85 s left" in told[0], told


def test_a_terminal_gets_one_bar_that_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "REDRAWS", 200.0)
    file = io.StringIO()
    target = Terminal(Console(file=file, force_terminal=True, width=120))
    target.stage("first", 1, "rows")
    work(target)
    target.stage("train, rate 0.001", 4, "steps")
    target.advance(2, loss=0.25, dev=0.9, tokens_per_second=6100.0)
    time.sleep(0.1)
    target.close()
    text = file.getvalue()
    assert "train, rate 0.001" in text
    assert "2/4 steps" in text
    assert "6,100 tok/s loss 0.250 dev 0.900" in text
    assert "base [bold]tiny[/bold]" in text
    target.advance(1)  # after the end: nothing to draw, nothing to break


def test_quiet_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with shown(quiet=True) as silent:
        silent.stage("train", 1, "steps")
        silent.advance(1, loss=0.1)
        silent.say("something")
    assert capsys.readouterr() == ("", "")


def test_only_standard_error_is_used_and_the_end_is_told_after_a_failure(capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted() -> None:
        with shown(quiet=False) as told:
            told.stage("train", 2, "steps")
            told.advance(1)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    out, err = capsys.readouterr()
    assert out == ""
    assert "train: 1/2 steps" in err


def test_time_left_needs_a_pace() -> None:
    stage = Stage("x", 10, "rows")
    assert stage.left() == ""
    stage.advance(10, {})
    assert stage.left() == ""
