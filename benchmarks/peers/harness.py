"""lm-evaluation-harness' `hf` backend, given the same ids: what it does for a multiple-choice task, without its files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from lm_eval.models.huggingface import HFLM

from benchmarks.protocol import Spec, read_rows
from benchmarks.worker import Clock


def prepare(spec: Spec, clock: Clock) -> Callable[[], None]:
    """Load the base; a request for each answer of each row, in the backend's own order and batches."""
    dtype = "auto" if spec.setup.dtype == "default" else spec.setup.dtype
    model = HFLM(pretrained=spec.folder, device=spec.device, dtype=dtype, batch_size=spec.setup.batch)
    rows = read_rows(Path(spec.rows))
    clock.dtype = str(model.model.dtype).removeprefix("torch.")

    def score() -> None:
        clock.start()
        for members in spec.batches:
            # The texts only name the requests: all of them different, or the backend would answer once for all.
            requests = [
                ((f"{i}", f"{k}"), rows[i].context, choice) for i in members for k, choice in enumerate(spec.choices)
            ]
            found = model._loglikelihood_tokens(requests, disable_tqdm=True)
            clock.step(-sum(likelihood for likelihood, _ in found) / len(found))

    return score
