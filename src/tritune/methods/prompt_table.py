"""A prompt table: one prompt encoder for many tasks, each task with vectors of its own (as in NVIDIA NeMo's p-tuning).

What the encoder learns on one task helps the next. A task that is finished is vectors and nothing else, so tasks that are
added later, and the encoder that goes on learning with them, cannot touch it. Each task's result is an ordinary adaptation of
p-tuning. Unlike NeMo, where words of a task's name replace the first rows of a common table, every task learns its own rows.
Knows p-tuning; no task's data, no file. Shapes: P virtual tokens, D embedding width.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from tritune.errors import Mismatch, Problem
from tritune.methods.ptuning import PTuning, PTuningDelta, new_encoder, new_vectors
from tritune.models.pretrained import Base


class PromptTable:
    """The shared encoder, the tasks it is learning, and the prompts of those that are finished.

    An open task is a delta like any other: train it alone, or several together as a bank, whose optimizer gets the shared
    encoder's parameters once.

    Raises:
        Mismatch: the config has no encoder to share.
    """

    def __init__(self, config: PTuning, base: Base, rng: torch.Generator) -> None:
        with torch.random.fork_rng(devices=[]):  # layers of torch draw from the global generator
            torch.manual_seed(int(torch.randint(2**62, (1,), generator=rng)))
            encoder = new_encoder(config, base)
        Mismatch.check(
            "A prompt table shares a prompt encoder.",
            [Problem("encoder", "is 'none'")] if encoder is None else [],
            "Choose encoder 'mlp' or 'lstm', or train every task by itself.",
        )
        assert encoder is not None
        self.config, self.base = config, base
        self.encoder = encoder.to(base.device)
        self.open: dict[str, PTuningDelta] = {}
        self.finished: dict[str, Tensor] = {}

    def add(self, task: str, rng: torch.Generator, *, text: str | None = None) -> PTuningDelta:
        """A new task, ready to train.

        Args:
            text: words that describe this task, where the config starts from text.

        Raises:
            Mismatch: the table has this task already.
        """
        known = task in self.open or task in self.finished
        Mismatch.check("This task cannot be added.", [Problem(f"'{task}'", "is in the table already")] if known else [])
        config = self.config if text is None else self.config.model_copy(update={"text": text, "start": "text"})
        table_PD, start_PD = new_vectors(config, self.base, rng)
        self.open[task] = PTuningDelta(self.config, table_PD, self.encoder, start_PD).to(self.base.device)
        return self.open[task]

    def finish(self, task: str) -> dict[str, Tensor]:
        """Close a task: its prompt is what the encoder makes of its vectors now, for good. Returns what p-tuning loads."""
        delta = self.open.pop(task)
        self.finished[task] = delta.eval().export()["prompt"]
        return self.export(task)

    def export(self, task: str) -> dict[str, Tensor]:
        """The tensors of a finished task's adaptation."""
        return {"prompt": self.finished[task].clone()}

    def state(self) -> dict[str, Tensor]:
        """Everything needed to go on with this table: the encoder, open tasks' vectors, finished prompts."""
        tensors = {f"encoder/{name}": t for name, t in self.encoder.state_dict().items()}
        for task, delta in self.open.items():
            own = {name: t for name, t in delta.state().items() if not name.startswith("encoder.")}
            tensors |= {f"open/{task}/{name}": t for name, t in own.items()}
        return tensors | {f"finished/{task}": t for task, t in self.finished.items()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of `state`, for a fresh table of the same config."""
        self.encoder.load_state_dict(
            {name.removeprefix("encoder/"): t for name, t in state.items() if name.startswith("encoder/")}
        )
        self.finished = {n.removeprefix("finished/"): t.clone() for n, t in state.items() if n.startswith("finished/")}
        self.open = {}
        for name, table_PD in state.items():
            if name.startswith("open/") and name.endswith("/table"):
                start_PD = state.get(f"{name.removesuffix('/table')}/start")
                delta = PTuningDelta(self.config, table_PD.clone(), self.encoder, start_PD).to(self.base.device)
                self.open[name.removeprefix("open/").removesuffix("/table")] = delta
