"""Published contrasts in small, by the product itself: three seeds, intervals, paired tests. On two kinds of rows:

    python -m benchmarks.contrasts reviews               short movie reviews, two labels
    python -m benchmarks.contrasts entities --rows FOLDER  kinds of named entities (see studies.py)
    python -m benchmarks.contrasts                       only writes results/contrasts.md again from what was found

Prompts at the input stay below deep prompts (P-tuning v2, 2110.07602), and further below where the task is harder; deep
prompts, LoRA (2106.09685) and bottleneck adapters (1902.00751) come near full fine-tuning. Each run takes a quarter
of an hour to an hour on two cores. Knows no torch: `tritune compare` does all the work.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.studies import SHOWN, WORDS, Asked, asked, write

HERE = Path(__file__).parent
PAGE = HERE / "results" / "contrasts.md"
#: of SmolLM2-135M
PARAMETERS = 134_515_008
#: what was published: (lower or equal, higher or equal, in words)
CONTRASTS = (
    ("ptuning", "prefix", "prompt tuning is far below deep prompts"),
    ("prefix", "full", "deep prompts are near full fine-tuning"),
    ("lora", "full", "LoRA is near full fine-tuning"),
    ("bottleneck", "full", "bottleneck adapters are within a point or two of full fine-tuning"),
)


def recipe(study: str) -> Path:
    return HERE / f"contrasts-{study}.yaml"


def result(study: str) -> Path:
    return HERE / "results" / f"contrasts-{study}.json"


def run(asked: Asked) -> None:
    """`tritune compare`; started again it goes on with what is missing."""
    with tempfile.TemporaryDirectory() as scratch:
        files = write(Path(scratch), asked.rows)
        given = [part for split, path in files.items() for part in (f"--{split.value}", str(path))]
        command = [
            str(Path(sys.executable).parent / "tritune"),
            "compare",
            "--config",
            str(recipe(asked.study)),
            *given,
        ]
        subprocess.run([*command, "--out", str(asked.out)], check=True)


def assembled(asked: Asked, commit: str) -> dict[str, Any]:
    """What was found, as one document."""
    found = json.loads((asked.out / "comparison.json").read_text(encoding="utf-8"))
    # files and folders of the real command are this machine's own, and gone by now; of a curve, dev is enough
    for entry in found["entries"]:
        entry["adaptation"] = entry["adaptation"] and Path(entry["adaptation"]).name
        entry["curve"] = [point for point in entry["curve"] if point["dev_score"] is not None]
    found["task"]["sources"] = {split: Path(path).name for split, path in found["task"]["sources"].items()}
    found["command"] = asked.command
    return dict(found) | {"commit": commit, "processor": machine.processor()}


def page() -> str:
    """All results in words and tables."""
    parts = [section(study, json.loads(result(study).read_text("utf-8"))) for study in SHOWN if result(study).exists()]
    return "\n".join(["# Published contrasts in small", "", "Written by `python -m benchmarks.contrasts`.", *parts])


def section(study: str, found: Mapping[str, Any]) -> str:
    entries = [e for e in found["entries"] if e["train_rows"]]
    n, seeds, dtype = entries[0]["n"], sorted({e["seed"] for e in entries}), found["base"]["dtype"]
    lines = [
        "",
        f"## {SHOWN[study]}",
        "",
        f"`{found['command']}` (settings: `benchmarks/{recipe(study).name}`), commit {found['commit']}, "
        f"{found['processor']['name']} with {found['processor']['cores']} cores, {dtype}. SmolLM2-135M, rows of at most "
        f"{WORDS[study]} words, {entries[0]['train_rows']} training rows, {n} test rows, seeds {', '.join(map(str, seeds))}.",
        "",
        "| method | accuracy by seed (95 % interval) | mean | trained parameters | share of the base |",
        "|---|---|---|---|---|",
    ]
    for method in dict.fromkeys(e["method"] for e in entries):
        own = [e for e in entries if e["method"] == method]
        scores = ", ".join(f"{e['score']:.3f} ({e['low']:.3f} to {e['high']:.3f})" for e in own)
        trained = own[0]["trainable_parameters"]
        mean = sum(e["score"] for e in own) / len(own)
        lines.append(f"| {method} | {scores} | {mean:.3f} | {trained:,} | {trained / PARAMETERS:.2%} |")
    lines += ["", "`ptuning` is prompt tuning here: 20 vectors without an encoder.", ""]
    lines += [
        "| contrast as published | difference here (95 % interval) | p by example | said by the comparison |",
        "|---|---|---|---|",
    ]
    return "\n".join([*lines, *contrasts(found["pairs"])]) + "\n"


def contrasts(pairs: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    by_methods = {frozenset((pair["a"], pair["b"])): pair for pair in pairs}
    for a, b, words in CONTRASTS:
        pair = by_methods.get(frozenset((a, b)))
        if pair is None:
            continue
        sign = 1 if pair["a"] == a else -1
        low, high = sorted((sign * pair["low"], sign * pair["high"]))
        yield (
            f"| {words} | {a} - {b}: {sign * pair['difference']:+.3f} ({low:+.3f} to {high:+.3f}), n = {pair['n']} x "
            f"{pair['seeds']} seeds | {pair['p_by_example']:.2g} | {pair['verdict']} |"
        )


def main() -> None:
    if study := asked("contrasts", __doc__):
        commit = machine.commit()
        run(study)
        document = json.dumps(assembled(study, commit), indent=1, ensure_ascii=False)
        result(study.study).write_text(document + "\n", encoding="utf-8")
    PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
