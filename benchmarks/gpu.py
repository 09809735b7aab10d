"""Training speed on one GPU: bases of 0.1B to 8B shape with random weights, made from configs; nothing is fetched.

    python -m benchmarks.gpu [--shapes 0.1B 1B 3B 8B] [--methods lora full] [--length 4096] [--batch-tokens 16384]
    python -m benchmarks.gpu --device cpu --shapes tiny --length 32 --batch-tokens 64       does it run at all

Every row has the same length and all of it is supervised but the first token, as published figures are measured. One JSON
line per method and shape. Peak memory is what torch had allocated. Use of the machine counts as in `flops.py`.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.protocol import Outcome, Row, Spec, write_rows
from benchmarks.records import Records, say
from benchmarks.rows import synthetic
from benchmarks.runner import RunFailed, in_turn
from benchmarks.sides import SUBJECTS, ours
from tritune.methods import method
from tritune.models.tiny import byte_tokenizer

#: layers, width, feed-forward width, heads, key heads, vocabulary, tied head: SmolLM2-135M, Llama 3.2 1B and 3B, Llama 3 8B
SHAPES: dict[str, tuple[int, int, int, int, int, int, bool]] = {
    "tiny": (2, 64, 128, 4, 2, 512, True),
    "0.1B": (30, 576, 1536, 9, 3, 49152, True),
    "1B": (16, 2048, 8192, 32, 8, 128256, True),
    "3B": (28, 3072, 8192, 24, 8, 128256, True),
    "8B": (32, 4096, 14336, 32, 8, 128256, False),
}
WARMUP = 3


def build(name: str, folder: Path, longest: int, device: str) -> None:
    """A base of this shape with random weights, as a folder."""
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
        architectures=["LlamaForCausalLM"],
    )
    torch.manual_seed(0)
    with torch.device(device):  # drawing eight thousand million numbers takes minutes on a processor
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)  # type: ignore[no-untyped-call]
    model.cpu().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


def rows_of(n: int, length: int, vocabulary: int) -> list[Row]:
    """Rows of which every position but the first is learned."""
    return [Row(row.context[:1], row.context[1:] + row.target) for row in synthetic(n, length, vocabulary)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=["0.1B", "1B", "3B", "8B"])
    parser.add_argument("--methods", nargs="+", choices=list(SUBJECTS), default=["lora", "full"])
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--batch-tokens", type=int, default=16384)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10, help="steps of a turn")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, help="file of results (benchmarks/results/gpu.jsonl)")
    options = parser.parse_args()
    records = Records("gpu", options.out)
    per_step = max(1, options.batch_tokens // options.length)
    step = list(range(per_step))
    turns = [[step] * WARMUP, *[[step] * options.steps] * options.turns]
    for shape in options.shapes:
        with tempfile.TemporaryDirectory() as scratch:
            folder, rows_file = Path(scratch) / "base", Path(scratch) / "rows.json"
            build(shape, folder, options.length, options.device)
            write_rows(rows_of(per_step, options.length, SHAPES[shape][5]), rows_file)
            for name in options.methods:
                subject = SUBJECTS[name]
                setup, rate = ours(options.batch_tokens), method(subject.kind).learning_rate
                config = dict(subject.config)
                spec = Spec(
                    setup, subject.kind, config, str(folder), str(rows_file), turns, rate, device=options.device
                )
                try:
                    outcome = in_turn({"ours": spec})["ours"]
                except RunFailed as error:
                    say(f"{shape} {name} failed: {error}")
                    continue
                found = {"shape": shape, "method": name, "length": options.length, "device": _device(options.device)}
                record = found | line(outcome, per_step * options.length)
                records.add(record)
                say(f"{shape} {name}: {record['tokens_per_second']:.0f} tokens/s")


def line(outcome: Outcome, tokens: int) -> dict[str, Any]:
    """What was measured of one method; the machine's rate is that of its faster format."""
    seconds = median(sum(turn) / len(turn) for turn in outcome.seconds[1:])
    timed = outcome.matrix_rates[1:]
    rate = max(median(r for turn in timed for r in turn[name]) for name in timed[0])
    return {
        "tokens_per_second": tokens / seconds,
        "mfu": outcome.flops[-1] / seconds / rate,
        "flops_per_second": outcome.flops[-1] / seconds,
        "matrix_rate": rate,
        "peak_bytes": outcome.peak_bytes,
        "tokens_of_a_step": tokens,
        "seconds_of_steps": outcome.seconds[1:],
        "losses": [outcome.losses[0], outcome.losses[-1]],
        "dtype": outcome.dtype,
        "versions": outcome.versions,
    }


def _device(device: str) -> str:
    return torch.cuda.get_device_name() if device.startswith("cuda") else device


if __name__ == "__main__":
    main()
