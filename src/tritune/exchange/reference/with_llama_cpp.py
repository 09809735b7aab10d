"""llama.cpp reads a merged model, or a base with a LoRA on it, and answers rows one by one. Knows nothing of tritune.

Usage: python with_llama_cpp.py JOB.json   (folder, base, rows, out: as `exchange/verify.py` writes it; base: GGUF file)
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def main(job: dict[str, Any]) -> None:
    """Write the logits of every row. Keys and values are kept in float32, as the other side keeps them."""
    try:
        import llama_cpp
        import numpy as np
    except ImportError:
        print("llama_cpp is not installed")
        raise SystemExit(77) from None
    whole, adapter = Path(job["folder"]) / "model.gguf", Path(job["folder"]) / "adapter.gguf"
    longest = max(map(len, job["rows"]))
    model = llama_cpp.Llama(
        str(whole if whole.is_file() else job["base"]),
        lora_path=str(adapter) if adapter.is_file() else None,
        n_ctx=longest,
        n_batch=longest,
        n_ubatch=longest,
        logits_all=True,
        type_k=llama_cpp.GGML_TYPE_F32,
        type_v=llama_cpp.GGML_TYPE_F32,
        verbose=False,
    )
    logits = {}
    for i, row in enumerate(job["rows"]):
        model.reset()
        model.eval(row)
        logits[str(i)] = np.array(model.scores[: len(row)], dtype=np.float32)
    _save(logits, Path(job["out"]))
    print(f"llama.cpp (llama_cpp_python {llama_cpp.__version__})")


def _save(logits: dict[str, Any], path: Path) -> None:
    """A safetensors file, without the package: a length, a JSON header, the numbers."""
    header, at = {}, 0
    for name, values in logits.items():
        header[name] = {"dtype": "F32", "shape": list(values.shape), "data_offsets": [at, at + values.nbytes]}
        at += values.nbytes
    head = json.dumps(header).encode()
    path.write_bytes(len(head).to_bytes(8, "little") + head + b"".join(v.tobytes() for v in logits.values()))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
