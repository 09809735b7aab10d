"""PEFT itself, in this process: its model of a folder of ours, its folder of a model of its own, and folders spoilt."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests import oracles
from tests.unit.exchange.conftest import ROWS, problems
from tritune.errors import Mismatch
from tritune.exchange import format_named
from tritune.exchange.peft import CONFIG, TENSORS
from tritune.models.pretrained import Base

PEFT = format_named("peft")
LORA = {"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 6, "init_lora_weights": False}


@torch.no_grad()
def theirs(model: Any) -> list[Tensor]:
    return [model(input_ids=torch.tensor([row])).logits[0, -len(row) :] for row in ROWS]


def loaded_by_peft(base: Base, folder: Path) -> Any:
    return peft.PeftModel.from_pretrained(oracles.stock(base), str(folder)).eval()


def made_by_peft(base: Base, folder: Path, config: peft.PeftConfig) -> Any:
    """A model of PEFT's with everything away from its start, saved by PEFT."""
    model = peft.get_peft_model(oracles.stock(base), config)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    model.peft_config["default"].base_model_name_or_path = base.name
    model.save_pretrained(str(folder))
    return model.eval()


def change(folder: Path, config: Mapping[str, Any], tensors: Callable[[dict[str, Tensor]], None]) -> None:
    found = load_file(folder / TENSORS)
    tensors(found)
    save_file(found, folder / TENSORS)
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | dict(config)))


def refused(folder: Path, base: Base) -> dict[str, str]:
    with pytest.raises(Mismatch) as caught:
        PEFT.read(folder, base)
    return problems(caught.value)
