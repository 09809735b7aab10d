"""A whole model with the adaptation folded into its weights: a plain Hugging Face folder that needs no adapter library.

Only written: a whole model is a base, not an adaptation. Checked by transformers alone, with the tokenizer it loads.
"""

from __future__ import annotations

from pathlib import Path

from tritune.adaptation import Adaptation
from tritune.exchange.format import Format


class Merged(Format):
    name = "merged"
    reference = "transformers"
    script = "with_transformers.py"

    def write(self, adaptation: Adaptation, folder: Path) -> None:
        base = adaptation.base
        merged = adaptation.method.merge(adaptation.delta, base)
        base.save_pretrained(folder, {**base.parameters(), **merged})


FORMAT = Merged()
