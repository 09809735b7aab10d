"""Published contrasts in small, on short movie reviews, by the product itself: three seeds, intervals, paired tests.

    python -m benchmarks.contrasts                       runs the comparison (about an hour) and writes results/contrasts.md
    python -m benchmarks.contrasts --summary-only        writes the page again from results/contrasts.json

Prompts at the input stay below deep prompts (P-tuning v2, 2110.07602); deep prompts, LoRA (2106.09685) and bottleneck
adapters (1902.00751) come near full fine-tuning. Knows no torch: `tritune compare` does all the work.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks import machine
from tritune.evaluate.record import ExampleResult
from tritune.evaluate.stats import compare_pairs
from tritune.tasks.base import Example, Split
from tritune.tasks.classification import classification

HERE = Path(__file__).parent
RECIPE = HERE / "contrasts.yaml"
RESULT = HERE / "results" / "contrasts.json"
PAGE = HERE / "results" / "contrasts.md"
#: reviews of at most so many words: the sizes that two cores get through
WORDS = 14
#: run again without a search: in the first run one seed of three collapsed at the rate that the search had chosen
STEADY = "bottleneck at its default rate"
#: what was published: (lower or equal, higher or equal, in words)
CONTRASTS = (
    ("ptuning", "prefix", "prompt tuning is far below deep prompts"),
    ("prefix", "full", "deep prompts are near full fine-tuning"),
    ("lora", "full", "LoRA is near full fine-tuning"),
    ("bottleneck", "full", "bottleneck adapters are within a point or two of full fine-tuning"),
    (STEADY, "full", "the same"),
)


def write_short(folder: Path) -> dict[str, Path]:
    """Short reviews of each split, as the files that anybody would give."""
    task = classification(train="movie-reviews")
    files = {}
    for split in Split:
        files[split.value] = folder / f"{split.value}.csv"
        with files[split.value].open("w", encoding="utf-8", newline="") as file:
            table = csv.writer(file)
            table.writerow(["text", "label"])
            table.writerows(_short(task.examples(split)))
    return files


def _short(rows: Iterable[Example]) -> Iterable[tuple[str, str | None]]:
    return ((row.fields["text"], row.label) for row in rows if len(row.fields["text"].split()) <= WORDS)


def run(out: Path) -> None:
    """`tritune compare` on the short reviews, twice; started again it goes on with what is missing."""
    with tempfile.TemporaryDirectory() as scratch:
        files = write_short(Path(scratch))
        given = [part for name, path in files.items() for part in (f"--{name}", str(path))]
        command = [str(Path(sys.executable).parent / "tritune"), "compare", "--config", str(RECIPE), *given]
        subprocess.run([*command, "--out", str(out)], check=True)
        subprocess.run([*command, "--methods", "bottleneck", "--rates", "1.0", "--out", str(steady(out))], check=True)


def steady(out: Path) -> Path:
    return out.with_name(f"{out.name}-default-rate")


def assembled(out: Path, commit: str) -> dict[str, Any]:
    """Both comparisons as one document."""
    found, again = (json.loads((at / "comparison.json").read_text(encoding="utf-8")) for at in (out, steady(out)))
    found["entries"] += [e | {"method": STEADY} for e in again["entries"] if e["method"] == "bottleneck"]
    pairs = compare_pairs({STEADY: answers(steady(out), "bottleneck"), "full": answers(out, "full")})
    found["pairs"] += [pair.model_dump(mode="json") for pair in pairs]
    found["command"] = "python -m benchmarks.contrasts"  # the files of the real one are gone by now
    return dict(found) | {"commit": commit, "processor": machine.processor()}


def answers(folder: Path, method: str) -> dict[int, tuple[ExampleResult, ...]]:
    """What a method answered on the test rows, by seed."""
    files = sorted((folder / "examples").glob(f"{method}-*.jsonl"))
    return {
        int(file.stem.rpartition("-")[2]): tuple(
            ExampleResult.model_validate_json(line) for line in file.read_text(encoding="utf-8").splitlines()
        )
        for file in files
    }


def page(found: Mapping[str, Any]) -> str:
    """The result in words and tables."""
    entries = [e for e in found["entries"] if e["train_rows"]]
    total = max(e["trainable_parameters"] for e in entries)
    n, seeds = entries[0]["n"], sorted({e["seed"] for e in entries})
    lines = [
        "# Published contrasts in small",
        "",
        f"Written by `{found['command']}` (settings: `benchmarks/contrasts.yaml`), commit {found['commit']}, "
        f"{found['processor']['name']} with {found['processor']['cores']} cores. SmolLM2-135M on reviews of at most {WORDS} "
        f"words, {entries[0]['train_rows']} training rows, {n} test rows, seeds {', '.join(map(str, seeds))}.",
        "",
        "| method | accuracy by seed (95 % interval) | mean | trained parameters | share of full |",
        "|---|---|---|---|---|",
    ]
    for method in dict.fromkeys(e["method"] for e in entries):
        own = [e for e in entries if e["method"] == method]
        scores = ", ".join(f"{e['score']:.3f} ({e['low']:.3f} to {e['high']:.3f})" for e in own)
        trained = own[0]["trainable_parameters"]
        mean = sum(e["score"] for e in own) / len(own)
        lines.append(f"| {method} | {scores} | {mean:.3f} | {trained:,} | {trained / total:.2%} |")
    lines += ["", "`ptuning` is prompt tuning here: 20 vectors without an encoder.", ""]
    lines += [
        "| contrast as published | difference here (95 % interval) | p by example | said by the comparison |",
        "|---|---|---|---|",
    ]
    return "\n".join([*lines, *(_contrast(found["pairs"], *contrast) for contrast in CONTRASTS)]) + "\n"


def _contrast(pairs: Iterable[Mapping[str, Any]], a: str, b: str, words: str) -> str:
    pair = next(p for p in pairs if {p["a"], p["b"]} == {a, b})
    sign = 1 if pair["a"] == a else -1
    low, high = sorted((sign * pair["low"], sign * pair["high"]))
    return (
        f"| {words} | {a} - {b}: {sign * pair['difference']:+.3f} ({low:+.3f} to {high:+.3f}), n = {pair['n']} x "
        f"{pair['seeds']} seeds | {pair['p_by_example']:.2g} | {pair['verdict']} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/contrasts"), help="the comparison's own folder")
    parser.add_argument("--summary-only", action="store_true")
    options = parser.parse_args()
    if not options.summary_only:
        commit = machine.commit()
        run(options.out)
        document = json.dumps(assembled(options.out, commit), indent=1, ensure_ascii=False)
        RESULT.write_text(document + "\n", encoding="utf-8")
    PAGE.write_text(page(json.loads(RESULT.read_text(encoding="utf-8"))), encoding="utf-8")


if __name__ == "__main__":
    main()
