"""A made-up comparison, as large and as hostile as a test wants it. Knows no model: records only."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest

from tritune.evaluate.caveats import caveat_text, caveats
from tritune.evaluate.record import Comparison, CurvePoint, Entry, ExampleResult, SearchPoint
from tritune.evaluate.stats import compare_pairs, mean_interval

#: name -> (strategy, chance of a right answer, stored bytes, trained parameters, seconds of training)
METHODS = {
    "zero-shot": ("prompting", 0.74, 0, 0, 0.0),
    "few-shot": ("prompting", 0.70, 0, 0, 0.0),
    "full": ("full", 0.86, 538_000_000, 134_515_008, 131.4),
    "ptuning": ("p-tuning", 0.83, 46_080, 1_671_744, 64.2),
    "bottleneck": ("adapters", 0.85, 5_400_000, 1_360_000, 71.0),
    "lora": ("adapters", 0.865, 9_770_000, 2_442_240, 82.7),
}
HOSTILE = '<script>alert("x")</script></svg> & кириллица 🙂 $x_1$ {{ 7 * 7 }} | `a`'


@dataclass(frozen=True)
class Made:
    comparison: Comparison
    examples: dict[str, dict[int, list[ExampleResult]]]


def answers(rng: random.Random, chance: float, labels: Sequence[str], n: int, text: str) -> list[ExampleResult]:
    rows = []
    for i in range(n):
        gold = labels[i % len(labels)]
        hard = i % 11 == 0
        right = rng.random() < (chance - 0.5 if hard else chance)
        predicted = gold if right else rng.choice([label for label in labels if label != gold])
        rows.append(ExampleResult(id=f"r{i}", text=f"{text} {i}", gold=gold, predicted=predicted, score=float(right)))
    return rows


def entry(method: str, seed: int, rows: Sequence[ExampleResult], *, sparse: bool) -> Entry:
    strategy, _, stored, parameters, seconds = METHODS[method]
    scores = [row.score for row in rows]
    low, high = mean_interval(scores)
    prompting = strategy == "prompting"
    curve = tuple(
        CurvePoint(
            step=step,
            rows=step * 20,
            tokens=step * 700,
            seconds=step * 0.8,
            train_loss=0.7 / (1 + step / 30) + 0.02 * len(method),
            dev_score=0.85 - 0.2 / (1 + step / 15),
        )
        for step in range(10, 101, 10)
    )
    rates = (1e-4, 3e-4, 1e-3)
    search = tuple(
        SearchPoint(learning_rate=rate, steps=50, dev_loss=0.4, dev_score=0.8, chosen=rate == 3e-4) for rate in rates
    )
    bare = prompting or sparse
    return Entry(
        method=method, strategy=strategy, seed=seed, metric="accuracy", score=sum(scores) / len(scores), low=low,
        high=high, n=len(rows), trainable_parameters=parameters, stored_bytes=stored, train_seconds=seconds,
        train_tokens_per_second=None if bare else 4_321.5, train_peak_bytes=None if bare else 1_900_000_000,
        eval_peak_bytes=900_000_000, seconds_per_1000_rows=14.0 + len(method),
        adaptation=None if prompting else "a1" * 32, forgetting=None if bare else 0.1 * seed - 0.05,
        learning_rate=None if bare else 3e-4,
        config={} if bare else {"rank": 8, "roles": ["attn.q", "attn.v"], "scaling": {"alpha": 16, "rs": True}},
        train_rows=0 if prompting else 1000, best_step=None if bare else 90,
        search=() if bare else search, curve=() if bare else curve,
    )  # fmt: skip


def make(
    methods: Sequence[str] = tuple(METHODS),
    seeds: int = 1,
    n: int = 300,
    labels: Sequence[str] = ("negative", "positive"),
    text: str = "a film about",
    sparse: bool = False,
) -> Made:
    """A comparison of `methods`; `sparse` leaves out everything that a record may leave out."""
    rng = random.Random(7)
    examples = {
        method: {
            seed: answers(rng, METHODS[method][1], labels, n, text)
            for seed in range(1 if METHODS[method][0] == "prompting" else seeds)
        }
        for method in methods
    }
    entries = [entry(m, seed, rows, sparse=sparse) for m, by_seed in examples.items() for seed, rows in by_seed.items()]
    pairs = compare_pairs(examples)
    found = caveats(entries, pairs, results=examples, dev_rows=150, train_rows_available=8_530)
    documents = {} if sparse else {
        "base": {"name": "smollm2-135m", "digests": {"weights": "0f" * 32, "tokenizer": "1e" * 32}, "license": None},
        "task": {"kind": "classification", "sources": ["train.csv", "test.csv"], "labels": dict.fromkeys(labels, n)},
        "training": {"epochs": 2, "tokens_per_batch": 4096, "bf16": True},
        "environment": {"tritune": "0.1.0", "torch": "2.13.0", "machine": "2 cores, 8 GB", "note": text},
        "command": "tritune compare --base smollm2-135m --train train.csv --test test.csv",
    }  # fmt: skip
    comparison = Comparison(
        entries=tuple(entries),
        pairs=pairs,
        caveats=tuple(caveat_text(c) for c in found),
        caveat_keys=found,
        **documents,
    )
    return Made(comparison, examples)


@pytest.fixture
def made() -> Callable[..., Made]:
    """Builds a comparison: `made()`, `made(seeds=3)`, `made(["zero-shot"])`, ..."""
    return make


@pytest.fixture
def hostile() -> Made:
    """Texts and labels that try to break out of the page, several seeds, other scripts."""
    return make(labels=(HOSTILE, "плохо", "хорошо 🙂"), text=HOSTILE, seeds=3)


@pytest.fixture
def hostile_text() -> str:
    return HOSTILE
