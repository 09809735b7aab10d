"""What a person gets wrong: exit code 2, every problem named, nothing on standard output, nothing written."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.conftest import POSITIONS, REVIEWS, Data, Run, rows, write
from tritune.methods import METHODS


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def refused(tritune: Run, out: Path, *arguments: object) -> str:
    done = tritune("compare", *arguments, "--out", out)
    assert (done.code, done.stdout) == (2, ""), done
    assert not out.exists()
    return done.stderr


def test_every_problem_of_every_file(tritune: Run, out: Path, tmp_path: Path) -> None:
    train = tmp_path / "train.csv"
    train.write_bytes(b"body,topic\n,sport\nabc,\nok,cinema\nfine,sport\n\xff\xfe,sport\n")
    test = tmp_path / "test.csv"
    test.write_text("body,topic\nok,cinema\nnew,sprot\n")
    told = refused(tritune, out, "--train", train, "--test", test, "--text-field", "body", "--label-field", "topic")
    for place in (
        "line 2, field 'body'",
        "line 3, field 'topic'",
        "line 6",
        "test.csv, line 2",
        "did you mean 'sport'",
    ):
        assert place in told, told


def test_missing_files_and_columns_together(tritune: Run, out: Path, reviews: Data) -> None:
    told = refused(tritune, out, "--train", "nowhere.csv", "--test", reviews.test, "--text-field", "bdy")
    assert "nowhere.csv: no such file" in told
    assert "did you mean 'body'?" in told


def test_every_problem_of_recipe_and_command_line(tritune: Run, out: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("epoch: 2\nseeds: [a]\nmethods: [lorra]\nbase: x\n")
    told = refused(tritune, out, "--config", recipe, "--epochs", "-1", "--rates", "x")
    for part in (
        "'epoch'",
        "did you mean 'epochs'",
        "'seeds.0'",
        "'lorra'",
        "did you mean 'lora'",
        "--epochs: ",
        "--rates: ",
        "Settings: ",
    ):
        assert part in told, told


def test_what_is_missing_is_listed(tritune: Run, out: Path) -> None:
    told = refused(tritune, out)
    assert "--train" in told
    assert "--test" in told


def test_settings_of_methods(tritune: Run, out: Path, reviews: Data) -> None:
    told = refused(tritune, out, *reviews.options, "--set", "lora.rank=0", "--set", "lora.rnk=1", "--set", "full.x=1")
    for part in ("'lora.rank'", "'lora.rnk'", "Settings of lora", "'full.x'"):
        assert part in told, told
    assert "not among" in refused(tritune, out, *reviews.options, "--set", "lora.rank=4", "--methods", "full")
    assert "KEY=VALUE" in refused(tritune, out, *reviews.options, "--set", "lora.rank")


def test_rows_that_are_too_long(tritune: Run, out: Path, base: Path, tmp_path: Path) -> None:
    content = rows(REVIEWS, 40, 1)
    content[3]["body"] = "long " * POSITIONS
    train = write(tmp_path / "train.csv", content)
    test = write(tmp_path / "test.csv", rows(REVIEWS, 10, 2))
    options = ["--train", train, "--test", test, "--text-field", "body", "--label-field", "topic", "--shots", "0"]
    done = tritune("compare", "--base", base, *options, "--out", out)
    assert (done.code, done.stdout) == (2, "")
    assert "train.csv, line 5" in done.stderr
    alone = tritune("train", "--base", base, *options[:-2], "--method", next(iter(METHODS)), "--out", tmp_path / "one")
    assert alone.code == 2
    assert not (tmp_path / "one").exists()

    checked = tritune("check", "--base", base, *options[:-2])
    assert checked.code == 2
    assert "train.csv, line 5: is" in checked.stdout
    assert "tokens per row" in checked.stdout


def test_markup_in_user_text_is_text(tritune: Run, out: Path, tmp_path: Path) -> None:
    train = tmp_path / "train.csv"
    train.write_text("body,[bold]x[/nope]\na,b\n")
    told = refused(tritune, out, "--train", train, "--test", train, "--text-field", "body", "--label-field", "topic")
    assert "[bold]x[/nope]" in told


def test_check_shows_tokens_lengths_and_all_problems(tritune: Run, base: Path, topics: Data, tmp_path: Path) -> None:
    good = tritune("check", "--base", base, *topics.options, "--rows", "2")
    assert good.code == 0, good.stderr
    assert good.stdout.count("read ") == good.stdout.count("trained (") == 2
    assert "м×2│а×2│т×2│ч×2" in good.stdout or "×2│" in good.stdout
    for part in ("спортзал", "tokens per row", "█", "No problems found"):
        assert part in good.stdout

    bad = tmp_path / "bad.csv"
    bad.write_text("body,topic\n" + ",x\n" * 30)
    told = tritune("check", "--base", base, "--train", bad, "--text-field", "body", "--label-field", "topic")
    assert told.code == 2
    assert all(f"line {line}," in told.stdout for line in range(2, 32)), "every problem, not the first twenty"
