"""PEFT reads an adapter folder onto its base and answers rows one by one. Knows nothing of tritune.

Usage: python with_peft.py JOB.json   (folder, base, rows, dtype, device, out: as `exchange/verify.py` writes it)
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def main(job: dict[str, Any]) -> None:
    """Write the logits of every row's own tokens, whatever stands in front of them."""
    try:
        import peft
    except ImportError:
        print("peft is not installed")
        raise SystemExit(77) from None
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        job["base"], dtype=getattr(torch, job["dtype"]), attn_implementation="eager", local_files_only=True
    ).to(job["device"])
    adapted = peft.PeftModel.from_pretrained(model, job["folder"]).eval()
    # PEFT would keep the base's own weights beside what it learned of an embedding.
    learned = peft.get_peft_model_state_dict(adapted, save_embedding_layers=False)
    _check(learned, load_file(Path(job["folder"]) / "adapter_model.safetensors"))
    logits = {}
    with torch.no_grad():
        for i, row in enumerate(job["rows"]):
            given = adapted(input_ids=torch.tensor([row], device=job["device"]))
            logits[str(i)] = given.logits[0, -len(row) :].float().cpu().contiguous()
    save_file(logits, job["out"])
    print(f"peft {peft.__version__}")


def _check(loaded: dict[str, Any], stored: dict[str, Any]) -> None:
    """PEFT only warns of tensors that are missing, and says nothing of those it does not use."""
    if loaded.keys() != stored.keys():
        raise SystemExit(f"peft uses other tensors than are stored: {sorted(loaded.keys() ^ stored.keys())}")


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
