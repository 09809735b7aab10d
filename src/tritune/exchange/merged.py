"""A whole model with the adaptation folded into its weights: a plain Hugging Face folder that needs no adapter library.

Only written: a whole model is a base, not an adaptation. Checked by transformers alone, with the tokenizer it loads. A
quantised base is written dequantised: what the adaptation learned to correct is what it is merged into.
"""

from __future__ import annotations

from pathlib import Path

import torch

from tritune.adaptation import Adaptation
from tritune.exchange.format import Format
from tritune.models.pretrained import Base

#: largest difference, as a share of the largest logit, where the merged weights are stored in bfloat16
ROUNDED_SUMS = 5e-2


class Merged(Format):
    name = "merged"
    reference = "transformers"
    script = "with_transformers.py"
    whole = True

    def write(self, adaptation: Adaptation, folder: Path) -> None:
        base = adaptation.base
        merged = adaptation.method.merge(adaptation.delta, base)
        base.save_pretrained(folder, {**base.parameters(), **merged})

    def bound(self, base: Base) -> float:
        """Sums rounded to bfloat16 are no longer what was trained; how far off they are is told."""
        return super().bound(base) if base.dtype is torch.float32 else ROUNDED_SUMS


FORMAT = Merged()
