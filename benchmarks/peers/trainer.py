"""The peers' trainers: transformers' `Trainer`, TRL's `SFTTrainer`, adapter-hub's `AdapterTrainer`; as installed, or tuned.

Only what cannot change speed is set besides the peer's own defaults: the rate, the order of the rows (that of the batches,
so that all sides see the same), no files, no reports.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.utils.data import Sampler, SequentialSampler
from transformers import (
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from benchmarks.peers.models import build
from benchmarks.protocol import Row, Spec, read_rows
from benchmarks.worker import Clock

IGNORE = -100


class _Watch(TrainerCallback):
    """Tells the clock of every step and every logged loss."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.clock.start()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.clock.step()

    def on_log(self, *args: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self.clock.losses.append(float(logs["loss"]))


def _in_order(kind: type[Trainer]) -> type[Trainer]:
    class InOrder(kind):  # type: ignore[valid-type,misc]
        """Rows in the order they are given in."""

        def _get_train_sampler(self, *args: Any) -> Sampler[int]:
            return SequentialSampler(self.train_dataset)

    return InOrder


def _arguments(spec: Spec, folder: str) -> dict[str, Any]:
    """What every trainer is told."""
    given = {
        "output_dir": folder,
        "per_device_train_batch_size": spec.setup.batch,
        "max_steps": len(spec.batches),
        "learning_rate": spec.learning_rate,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": spec.device == "cpu",
    }
    if spec.setup.tuned:
        given |= {
            "gradient_checkpointing": False,
            "bf16": spec.setup.dtype == "autocast",
            "optim": "adamw_torch_fused",
            "disable_tqdm": True,
        }
    return given


def _train(trainer: Trainer) -> None:
    trainer.train()


def _examples(spec: Spec) -> list[Row]:
    rows = read_rows(Path(spec.rows))
    return [rows[i] for members in spec.batches for i in members]


def prepare_trainer(spec: Spec, clock: Clock) -> Callable[[], None]:
    """transformers' Trainer, or adapter-hub's own one; labels on the answer only."""
    kind: type[Trainer] = Trainer
    if spec.setup.library == "adapters":
        from adapters import AdapterTrainer

        kind = AdapterTrainer
    data = [
        {
            "input_ids": [*row.context, *row.target],
            "attention_mask": [1] * (row.tokens + 1),
            "labels": [*[IGNORE] * len(row.context), *row.target],
        }
        for row in _examples(spec)
    ]
    model = build(spec)
    clock.dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    trainer = _in_order(kind)(
        model=model,
        args=TrainingArguments(**_arguments(spec, tempfile.mkdtemp())),
        train_dataset=data,
        data_collator=DataCollatorForSeq2Seq(AutoTokenizer.from_pretrained(spec.folder)),
        callbacks=[_Watch(clock)],
    )
    return lambda: _train(trainer)


def prepare_trl(spec: Spec, clock: Clock) -> Callable[[], None]:
    """TRL's SFTTrainer; loss on the completion only."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    data = Dataset.from_list(
        [
            {
                "input_ids": [*row.context, *row.target],
                "completion_mask": [*[0] * len(row.context), *[1] * len(row.target)],
            }
            for row in _examples(spec)
        ]
    )
    model = build(spec)
    trainer = _in_order(SFTTrainer)(
        model=model,
        args=SFTConfig(completion_only_loss=True, **_arguments(spec, tempfile.mkdtemp())),
        train_dataset=data,
        processing_class=AutoTokenizer.from_pretrained(spec.folder),
        callbacks=[_Watch(clock)],
    )
    clock.dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    return lambda: _train(trainer)
