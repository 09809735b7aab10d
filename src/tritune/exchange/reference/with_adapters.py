"""adapter-hub's package reads an adapter folder onto its base and answers rows one by one. Knows nothing of tritune.

Usage: python with_adapters.py JOB.json   (folder, base, rows, dtype, device, out: as `exchange/verify.py` writes it)
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def main(job: dict[str, Any]) -> None:
    """Write the logits of every row."""
    try:
        import adapters
    except ImportError:
        print("adapters is not installed")
        raise SystemExit(77) from None
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        job["base"], torch_dtype=getattr(torch, job["dtype"]), attn_implementation="eager", local_files_only=True
    ).to(job["device"])
    adapters.init(model)
    information: dict[str, Any] = {}
    safe = (Path(job["folder"]) / "adapter.safetensors").is_file()
    name = model.load_adapter(
        job["folder"], set_active=True, with_head=False, use_safetensors=safe, loading_info=information
    )
    model.adapter_to(name, device=job["device"])
    if any(information.values()):  # it only logs what is missing or not used
        raise SystemExit(f"adapters uses other tensors than are stored: {information}")
    model.eval()
    logits = {}
    with torch.no_grad():
        for i, row in enumerate(job["rows"]):
            given = model(input_ids=torch.tensor([row], device=job["device"]))
            logits[str(i)] = given.logits[0].float().cpu().contiguous()
    save_file(logits, job["out"])
    print(f"adapters {adapters.__version__}")


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
