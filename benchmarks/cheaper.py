"""What cheaper forms of a method cost in quality, at equal passes over the rows and at equal time.

    python -m benchmarks.cheaper reviews                 short movie reviews, two labels
    python -m benchmarks.cheaper entities --rows FOLDER  kinds of named entities (see studies.py)
    python -m benchmarks.cheaper ... --only METHOD       the forms of one method by themselves
    python -m benchmarks.cheaper                         only writes results/cheaper.md again from what was found

Virtual tokens behind the text (alone, or starting as words that name the task) against virtual tokens in front of it;
learned keys and values behind the text against those in front; LoRA in the last third of the layers against LoRA in all.
What a cheaper form leaves alone is remembered from pass to pass, so in the time of the whole one it makes more passes: as
many as its own first run says. Three seeds, each form with a search of its own for the learning rate. Knows no torch:
`tritune compare` does all the work.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

import yaml

from benchmarks import machine
from benchmarks.studies import SHOWN, WORDS, asked, write
from tritune.evaluate.record import ExampleResult
from tritune.evaluate.stats import compare_pairs
from tritune.tasks.base import Split

HERE = Path(__file__).parent
RECIPE = HERE / "cheaper.yaml"
RESULTS = HERE / "results"
PAGE = RESULTS / "cheaper.md"
METHODS = ("ptuning", "prefix", "lora")
TEMPLATES = {
    "reviews": {"instruction": "Is the movie review positive or negative?", "context": "{{ text }} =>"},
    "entities": {
        "instruction": "Kinds of things named in messages: person, location, corporation, group, product, creative-work.",
        "context": "{{ text }} is a",
    },
}
#: what is equal: passes over the rows, or the time that training took
PASSES, TIME = "passes", "time"
#: what a prompt behind the text may begin as
CUES = {
    "reviews": "All in all, is this review of a movie positive or negative? It is",
    "entities": "Is that a person, location, corporation, group, product or creative-work? It is a",
}


@dataclass(frozen=True)
class Form:
    """A method with a config; `of` names the form that it is a cheaper one of."""

    name: str
    method: str
    config: Mapping[str, Any] = field(default_factory=dict)
    of: str | None = None


def forms(study: str) -> list[Form]:
    behind = {"placement": "suffix"}
    return [
        Form("prompt in front", "ptuning"),
        Form("prompt behind", "ptuning", behind, "prompt in front"),
        Form(
            "prompt behind, begun as words",
            "ptuning",
            behind | {"start": "text", "text": CUES[study]},
            "prompt in front",
        ),
        Form("keys and values in front", "prefix"),
        Form("keys and values behind", "prefix", behind, "keys and values in front"),
        Form("LoRA in all layers", "lora"),
        Form("LoRA in the last 10 layers", "lora", {"top_layers": 10}, "LoRA in all layers"),
    ]


class Study:
    """One kind of rows, in a folder where every form has its own; started again it goes on with what is missing."""

    def __init__(self, name: str, files: Mapping[Split, Path], out: Path) -> None:
        self.name, self.files, self.out = name, files, out

    def folder(self, form: Form, equal: str) -> Path:
        return self.out / f"{form.name} {equal}".replace(",", "").replace(" ", "-")

    def run(self, form: Form, epochs: float, equal: str) -> dict[str, Any]:
        """`tritune compare` of one form; its document."""
        folder = self.folder(form, equal)
        document = folder / "comparison.json"
        if not document.exists():
            recipe = yaml.safe_load(RECIPE.read_text(encoding="utf-8"))
            recipe |= {"epochs": epochs, "methods": [form.method], "configs": {form.method: dict(form.config)}}
            recipe |= {"template": TEMPLATES[self.name]}
            given = [part for split, path in self.files.items() for part in (f"--{split.value}", str(path))]
            with tempfile.NamedTemporaryFile("w", suffix=".yaml", encoding="utf-8") as file:
                yaml.safe_dump(recipe, file, sort_keys=False)
                file.flush()
                command = [str(Path(sys.executable).parent / "tritune"), "compare", "--config", file.name, *given]
                subprocess.run([*command, "--out", str(folder)], check=True, stdout=subprocess.DEVNULL)
        found: dict[str, Any] = json.loads(document.read_text(encoding="utf-8"))
        return found

    def against(self, form: Form, whole: Form, equal: str) -> dict[str, Any]:
        """The comparison's own paired test of a cheaper form and the whole one."""
        pair, *_ = compare_pairs(
            {
                form.name: answers(self.folder(form, equal), form.method),
                whole.name: answers(self.folder(whole, PASSES), whole.method),
            }
        )
        sign = 1 if pair.a == form.name else -1
        low, high = sorted((sign * pair.low, sign * pair.high))
        return {"difference": sign * pair.difference, "low": low, "high": high, "p_by_example": pair.p_by_example}


def measure(study: Study, only: str | None = None) -> Iterator[dict[str, Any]]:
    """Every form, or those of one method: whole ones once, cheaper ones at equal passes and then at equal time."""
    epochs = float(yaml.safe_load(RECIPE.read_text(encoding="utf-8"))["epochs"])
    whole: dict[str, tuple[Form, float]] = {}
    for form in forms(study.name):
        if only not in (None, form.method):
            continue
        found = trained(study.run(form, epochs, PASSES), form.method)
        if form.of is None:
            whole[form.name] = form, seconds_of(found)
            yield result(form, PASSES, epochs, found, None)
            continue
        against, seconds = whole[form.of]
        yield result(form, PASSES, epochs, found, study.against(form, against, PASSES))
        more = passes(found[0]["curve"], epochs, seconds)
        if more > epochs:
            found = trained(study.run(form, more, TIME), form.method)
            yield result(form, TIME, more, found, study.against(form, against, TIME))


def answers(folder: Path, method: str) -> dict[int, tuple[ExampleResult, ...]]:
    """What a method answered on the test rows, by seed."""
    files = sorted((folder / "examples").glob(f"{method}-*.jsonl"))
    return {
        int(file.stem.rpartition("-")[2]): tuple(
            ExampleResult.model_validate_json(line) for line in file.read_text(encoding="utf-8").splitlines()
        )
        for file in files
    }


def trained(found: Mapping[str, Any], method: str) -> list[dict[str, Any]]:
    return [entry for entry in found["entries"] if entry["method"] == method]


def seconds_of(runs: Sequence[Mapping[str, Any]]) -> float:
    """What training took in the mean, of runs that shared no pass over the base with others."""
    return float(mean(run["train_seconds"] for run in runs if not run.get("trained_beside")))


def passes(curve: list[dict[str, Any]], epochs: float, seconds: float) -> float:
    """How many passes fit into `seconds`, when the first takes as long as it did and all others as the last one did."""
    per_pass = curve[-1]["rows"] / epochs
    first = max((point["seconds"] for point in curve if point["rows"] <= per_pass), default=0.0)
    later = (curve[-1]["seconds"] - first) / (epochs - 1)
    return float(max(1, round(1 + (seconds - first) / later)))


def result(
    form: Form, equal: str, epochs: float, entries: list[dict[str, Any]], pair: dict[str, float] | None
) -> dict[str, Any]:
    kept = ("seed", "score", "low", "high", "n", "train_seconds", "trained_beside", "train_rows", "learning_rate")
    return {
        "form": form.name,
        "equal": equal,
        "epochs": epochs,
        "method": form.method,
        "config": dict(form.config),
        "runs": [{key: entry.get(key) for key in kept} for entry in entries],
        "less_the_whole_form": pair,
    }


def page() -> str:
    """All results in words and tables."""
    files = sorted(RESULTS.glob("cheaper-*.json"), key=lambda file: (len(file.stem), file.stem))
    studies = [(study, file) for study in SHOWN for file in files if file.stem.startswith(f"cheaper-{study}")]
    parts = [section(study, json.loads(file.read_text("utf-8"))) for study, file in studies]
    return "\n".join(["# What cheaper forms cost", "", "Written by `python -m benchmarks.cheaper`.", *parts])


def section(study: str, document: Mapping[str, Any]) -> str:
    results = document["found"]
    runs = results[0]["runs"]
    lines = [
        "",
        f"## {SHOWN[study]}",
        "",
        f"`{document['command']}` (settings: `benchmarks/{RECIPE.name}`), commit {document['commit']}, "
        f"{document['processor']['name']} with {document['processor']['cores']} cores, {document['dtype']}. SmolLM2-135M, "
        f"rows of at most {WORDS[study]} words, {runs[0]['train_rows']} training rows, {runs[0]['n']} test rows, "
        f"seeds {', '.join(str(run['seed']) for run in runs)}.",
        "",
        "| form | passes | training, s | accuracy by seed (95 % interval) | mean | less the whole form | p by example |",
        "|---|---|---|---|---|---|---|",
    ]
    for line in results:
        scores = ", ".join(f"{run['score']:.3f} ({run['low']:.3f} to {run['high']:.3f})" for run in line["runs"])
        pair = line["less_the_whole_form"]
        difference = pair and f"{pair['difference']:+.3f} ({pair['low']:+.3f} to {pair['high']:+.3f})"
        lines.append(
            f"| {line['form']} | {line['epochs']:g}{' (equal time)' if line['equal'] == TIME else ''} | "
            f"{seconds_of(line['runs']):.0f} | {scores} | "
            f"{mean(run['score'] for run in line['runs']):.3f} | {difference or ''} | "
            f"{format(pair['p_by_example'], '.2g') if pair else ''} |"
        )
    return "\n".join(lines) + "\n"


def path(study: str, only: str | None) -> Path:
    return RESULTS / f"cheaper-{study}{f'-{only}' if only else ''}.json"


def main() -> None:
    if given := asked("cheaper", __doc__, METHODS):
        commit = machine.commit()
        with tempfile.TemporaryDirectory() as scratch:
            study = Study(given.study, write(Path(scratch), given.rows), given.out)
            found = list(measure(study, given.only))
            first = next(form for form in forms(given.study) if given.only in (None, form.method))
            dtype = study.run(first, 0, PASSES)["base"]["dtype"]
        document = {
            "command": given.command,
            "commit": commit,
            "processor": machine.processor(),
            "dtype": dtype,
            "found": found,
        }
        path(given.study, given.only).write_text(
            json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
        )
    PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
