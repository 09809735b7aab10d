"""transformers reads a whole model from a folder and answers rows one by one. Knows nothing of tritune.

Usage: python with_transformers.py JOB.json   (folder, rows, dtype, device, out: as `exchange/verify.py` writes it)
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def main(job: dict[str, Any]) -> None:
    """Write the logits of every row."""
    try:
        import transformers
    except ImportError:
        print("transformers is not installed")
        raise SystemExit(77) from None
    import torch
    from safetensors.torch import save_file

    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
        job["folder"],
        dtype=getattr(torch, job["dtype"]),
        attn_implementation="eager",
        local_files_only=True,
        output_loading_info=True,
    )
    model, information = loaded
    if any(information.values()):
        raise SystemExit(f"transformers uses other weights than are stored: {information}")
    model = model.to(job["device"]).eval()
    transformers.AutoTokenizer.from_pretrained(job["folder"], local_files_only=True)
    logits = {}
    with torch.no_grad():
        for i, row in enumerate(job["rows"]):
            given = model(input_ids=torch.tensor([row], device=job["device"]))
            logits[str(i)] = given.logits[0].float().cpu().contiguous()
    save_file(logits, job["out"])
    print(f"transformers {transformers.__version__}")


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
