"""Training speed on one GPU: bases of 0.1B to 8B shape with random weights, made from configs; nothing is fetched or stored.

    python -m benchmarks.gpu [--shapes 0.1B 1B 3B 8B] [--methods lora full] [--length 4096] [--batch-tokens 16384]
    python -m benchmarks.gpu --methods lora --quantise fp8       a frozen base in floats of 8 bits, multiplied as such
    python -m benchmarks.gpu --device cpu --shapes tiny --length 32 --batch-tokens 64       does it run at all

Every row has the same length and all of it is supervised but the first token, as published figures are measured. One JSON
line per method, shape and way, each in turn: as it comes, with regions compiled (`--compile`), and with steps recorded
(`--cuda-graphs`), both without and with compiled regions. Peak memory is what torch had allocated; what recorded passes
keep for themselves is in what it had reserved, which is that of all ways so far. Use of the machine counts as in `flops.py`,
of the rate of bf16 products also where fp8 is multiplied.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple, get_args

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks import flops
from benchmarks.machine import matrix_rates
from benchmarks.ours import beside
from benchmarks.protocol import Row
from benchmarks.records import Records, say
from benchmarks.rows import synthetic
from benchmarks.sides import SUBJECTS
from tritune.measure import measured
from tritune.methods import method
from tritune.models import regions
from tritune.models.load import quantise_layers
from tritune.models.pretrained import Base
from tritune.models.probe import probe
from tritune.models.tiny import byte_tokenizer
from tritune.spec import Digests, Quantisation, digest
from tritune.text.encode import Encoded
from tritune.text.pack import training_batch
from tritune.train.graphs import Graphs, may_be_recorded
from tritune.train.loop import batch_loss
from tritune.train.optim import AdamW, clipping

#: layers, width, feed-forward width, heads, key heads, vocabulary, tied head: SmolLM2-135M, Llama 3.2 1B and 3B, Llama 3 8B
SHAPES: dict[str, tuple[int, int, int, int, int, int, bool]] = {
    "tiny": (2, 64, 128, 4, 2, 512, True),
    "0.1B": (30, 576, 1536, 9, 3, 49152, True),
    "1B": (16, 2048, 8192, 32, 8, 128256, True),
    "3B": (28, 3072, 8192, 24, 8, 128256, True),
    "8B": (32, 4096, 14336, 32, 8, 128256, False),
}
#: steps before the first that counts
WARMUP = 2


def build(name: str, longest: int, device: str, form: Quantisation | None = None) -> Base:
    """A base of this shape with random weights, quantised to `form`, that has passed the probe."""
    layers, hidden, intermediate, heads, kv_heads, vocabulary, tied = SHAPES[name]
    config = AutoConfig.for_model(
        "llama",
        num_hidden_layers=layers,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocabulary,
        tie_word_embeddings=tied,
        max_position_embeddings=longest + 128,
    )
    torch.manual_seed(0)
    with torch.device(device):  # drawing eight thousand million numbers takes minutes on a processor
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)  # type: ignore[no-untyped-call]
    if form is not None:
        quantise_layers(model, form, torch.bfloat16)
    same = digest({"random": name})
    base = Base(model, byte_tokenizer(), f"random-{name}", Digests(weights=same, config=same, tokenizer=same))
    probe(base)
    return base


def rows_of(n: int, length: int, vocabulary: int) -> list[Encoded]:
    """Rows of which every position but the first is learned."""
    whole = [Row(row.context[:1], row.context[1:] + row.target) for row in synthetic(n, length, vocabulary)]
    return [
        Encoded(str(i), tuple(row.context), tuple(row.target), (tuple(row.target),), 0) for i, row in enumerate(whole)
    ]


class Subject:
    """One method in training on a base, step by step."""

    def __init__(self, base: Base, name: str, rows: list[Encoded]) -> None:
        self.base, self.rows, self.kind = base, rows, SUBJECTS[name].kind
        made = method(self.kind)
        config = made.Config(**SUBJECTS[name].config)
        self.delta = made.init(config, base, torch.Generator().manual_seed(0)).train()
        self.optimizer = AdamW(self.delta.trainable(), rests=self.delta.rests())
        self.learning_rate = made.learning_rate
        self.supervised = sum(len(row.target) for row in rows)
        virtual, keys = beside(self.delta)
        work = flops.Work(
            lengths=[row.n_trained for row in rows],
            supervised=self.supervised,
            added=made.budget(config, base).added_flops,
            virtual=virtual,
            keys=keys,
        )
        self.flops = flops.step(flops.Shape.of(base.config.to_dict()), self.kind, work)

    def step(self, graphs: Graphs | None) -> tuple[float, float]:
        """Its seconds and its loss, as float only when the step is over."""
        start = time.perf_counter()
        batch = training_batch(self.rows)
        if graphs is None:
            loss = batch_loss(self.base, batch) / self.supervised
            loss.backward()  # type: ignore[no-untyped-call]
        else:
            loss = torch.tensor(graphs.backward(batch, self.supervised))
        self.optimizer.take(self.learning_rate, clipping(self.optimizer.norm(), 1.0))
        if self.base.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start, float(loss.detach())


@dataclass
class Turns:
    """What one way of running took: its first step, then the steps of each turn."""

    first: float = 0.0
    seconds: list[list[float]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    peak_bytes: int = 0
    reserved_bytes: int = 0

    def take(self, subject: Subject, graphs: Graphs | None, steps: int) -> None:
        with measured() as cost:
            begun = [subject.step(graphs) for _ in range(WARMUP)]
            timed = [subject.step(graphs) for _ in range(steps)]
        self.first = self.first or begun[0][0]
        self.seconds.append([seconds for seconds, _ in timed])
        self.losses += [loss for _, loss in begun + timed]
        self.peak_bytes = max(self.peak_bytes, cost.peak_bytes)
        if torch.cuda.is_available():
            self.reserved_bytes = torch.cuda.memory_reserved()


class Way(NamedTuple):
    """How steps run."""

    compiled: bool
    recorded: bool

    def __str__(self) -> str:
        return "".join(f", {name}" for name, used in self._asdict().items() if used)


def in_turn(subject: Subject, turns: int, steps: int) -> dict[Way, Turns]:
    """As it comes and, on a GPU, compiled and recorded, one after the other, so that all see the same machine."""
    with subject.base.bind(subject.delta), subject.base.without(subject.delta.weights()):
        on_gpu = subject.base.device.type == "cuda"
        may = on_gpu and subject.base.recordable and may_be_recorded(subject.delta)
        ways = [Way(*way) for way in product((False, True)[: 1 + on_gpu], (False, True)[: 1 + may])]
        found = {way: Turns() for way in ways}
        graphs = {way: Graphs(subject.base, subject.delta) if way.recorded else None for way in ways}
        for _ in range(turns):
            for way, taken in found.items():
                regions.use(way.compiled)
                taken.take(subject, graphs[way], steps)
    regions.use(False)
    return found


def line(subject: Subject, way: Way, taken: Turns, matrix_rate: float) -> dict[str, Any]:
    seconds = median(map(median, taken.seconds))
    tokens = sum(row.n_trained for row in subject.rows)
    return {
        "base": subject.base.name,
        "quantised": subject.base.quantised,
        "method": subject.kind,
        **way._asdict(),
        "device": torch.cuda.get_device_name() if subject.base.device.type == "cuda" else "cpu",
        "tokens_per_second": tokens / seconds,
        "mfu": subject.flops / seconds / matrix_rate,
        "matrix_rate": matrix_rate,
        "peak_bytes": taken.peak_bytes,
        "reserved_bytes": taken.reserved_bytes,
        "tokens_of_a_step": tokens,
        "first_step_seconds": taken.first,
        "seconds_of_steps": taken.seconds,
        "losses": [taken.losses[0], taken.losses[-1]],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=["0.1B", "1B", "3B", "8B"])
    parser.add_argument("--methods", nargs="+", choices=list(SUBJECTS), default=["lora", "full"])
    parser.add_argument("--quantise", choices=get_args(Quantisation), help="form of a frozen base's weights")
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--batch-tokens", type=int, default=16384)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10, help="steps of a turn")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, help="file of results (benchmarks/results/gpu.jsonl)")
    options = parser.parse_args()
    if options.quantise and "full" in options.methods:
        parser.error("a quantised base stays as it is: leave 'full' out of --methods")
    records = Records("gpu", options.out)
    for shape in options.shapes:
        base = build(shape, options.length, options.device, options.quantise)
        rows = rows_of(max(1, options.batch_tokens // options.length), options.length, SHAPES[shape][5])
        for name in options.methods:
            try:
                subject = Subject(base, name, rows)
                ways = in_turn(subject, options.turns, options.steps)
            except torch.OutOfMemoryError as error:
                say(f"{shape} {name}: {error}")
                continue
            rate = max(matrix_rates(options.device).values())
            for way, taken in ways.items():
                found = line(subject, way, taken, rate)
                records.add(found)
                say(f"{shape} {name}{way}: {found['tokens_per_second']:.0f} tokens/s")


if __name__ == "__main__":
    main()
