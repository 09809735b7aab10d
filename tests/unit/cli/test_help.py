"""Help is quick, has an example for every command, and names the methods of the table."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from tritune.cli.app import app
from tritune.methods import METHODS

COMMANDS = (
    "demo",
    "compare",
    "train",
    "eval",
    "predict",
    "list",
    "show",
    "export",
    "import",
    "explain",
    "check",
    "compose",
)
HEAVY = (
    "torch",
    "transformers",
    "numpy",
    "scipy",
    "sklearn",
    "matplotlib",
    "pyarrow",
    "safetensors",
    "huggingface_hub",
)

SCRIPT = """
import json, sys, time
start = time.process_time()
import tritune
from tritune.cli import main
told = {}
for command in json.loads(sys.argv[1]):
    sys.argv = ["tritune", *command, "--help"]
    try:
        main()
    except SystemExit as end:
        assert end.code == 0
    told[" ".join(command)] = time.process_time() - start
loaded = [name for name in json.loads(sys.argv[0] and HEAVY) if name in sys.modules]
print("\\n" + json.dumps([loaded, told]))
"""


def test_help_loads_nothing_heavy() -> None:
    script = SCRIPT.replace("HEAVY", repr(json.dumps(HEAVY)))
    commands = json.dumps([[], *([command] for command in COMMANDS)])
    done = subprocess.run(
        [sys.executable, "-c", script, commands], capture_output=True, encoding="utf-8", check=True, timeout=300
    )
    loaded, seconds = json.loads(done.stdout.splitlines()[-1])
    assert loaded == []
    assert seconds[""] < 3, "of the processor: what else runs does not count; about 0.4 to 0.9 s"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_an_example(command: str) -> None:
    done = CliRunner().invoke(app, [command, "--help"])
    assert done.exit_code == 0
    assert f"tritune {command}" in done.stdout.split("Example:")[1]
    assert "{method" not in done.stdout, "no gap of a help text stays open"


@pytest.mark.parametrize("way", ["stack", "merge", "fuse"])
def test_every_way_to_compose_has_an_example(way: str) -> None:
    done = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["compose", way, "--help"])
    assert f"tritune compose {way}" in done.stdout.split("Example:")[1]


@pytest.mark.parametrize("command", ["compare", "train"])
def test_methods_come_from_the_table(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "newcomer", "tests.nowhere:Newcomer")
    told = CliRunner(env={"COLUMNS": "200"}).invoke(app, [command, "--help"]).stdout
    assert all(kind in told for kind in METHODS)


def test_version_and_typos() -> None:
    assert CliRunner().invoke(app, ["--version"]).stdout.startswith("tritune 0.")
    typo = CliRunner().invoke(app, ["comprae"])
    assert typo.exit_code == 2
    assert "compare" in typo.stderr
    option = CliRunner().invoke(app, ["compare", "--outt", "x"])
    assert option.exit_code == 2
    assert option.stdout == ""
