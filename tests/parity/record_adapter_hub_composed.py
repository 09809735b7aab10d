"""Records what adapter-hub's package computes with stacked and fused adapters, for `test_adapter_hub_composed.py`.

In the environment that `record_adapter_hub.py` describes, and with its models:

    /tmp/hub/bin/python tests/parity/record_adapter_hub_composed.py [FILE]
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import adapters
import record_adapter_hub  # sets up hooks layer by layer
import torch
from adapter_hub import MODELS, adapter_value, base_value, our_names, rows, weights
from adapter_hub_composed import CASES, SEEN, nudged
from adapters.composition import Fuse, Stack
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

OUT = Path(__file__).with_name("adapter_hub_composed.safetensors")
NAMES = "abc"


def composed_name(theirs: str) -> str | None:
    """The name that one of adapter-hub's parameters has in a stack or fusion of ours; None: the base's."""
    fused = re.search(r"\.(\d+)\.(attention|output)_adapters\.adapter_fusion_layer\.[a-c,]+\.(\w+\.\w+)$", theirs)
    if fused is not None:
        layer, block, part = fused.groups()
        return f"layers.{layer}.block.{'attn' if block == 'attention' else 'mlp'}.{part}"
    own = re.search(r"\.adapters\.([a-c])\.", theirs)
    if own is None:
        return None
    (inner,) = our_names(theirs.replace(f".adapters.{own[1]}.", ".adapters.a."), ())
    return f"parts.{NAMES.index(own[1])}.{inner}"


def composed(model_name: str, case: str) -> Any:
    kind, options = MODELS[model_name]
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **options), attn_implementation="eager")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(base_value(name, tuple(parameter.shape)))
    plug = record_adapter_hub.PLUGS.get(model_name)
    interface = plug and adapters.AdapterModelInterface(adapter_methods=["bottleneck"], layer_cross_attn=None, **plug)
    adapters.init(model, interface=interface)
    how, parts, fusion = CASES[case]
    names = list(NAMES[: len(parts)])
    for name, (preset, changes) in zip(names, parts, strict=True):
        model.add_adapter(name, config=adapters.AdapterConfig.load(preset, **changes))
    if how == "stack":
        model.train_adapter(Stack(*names))
        model.set_active_adapters(Stack(*names))
    else:
        model.add_adapter_fusion(names, fusion)
        model.train_adapter_fusion(Fuse(*names))
    return model.eval()


def record(model_name: str, case: str) -> dict[str, torch.Tensor]:
    model = composed(model_name, case)
    ours = {theirs: composed_name(theirs) for theirs, _ in model.named_parameters()}
    with torch.no_grad():
        for theirs, parameter in model.named_parameters():
            if ours[theirs] is not None:  # the keys' bias too, which is not ours: it must make no difference
                name = str(ours[theirs])
                parameter.copy_(nudged(name, adapter_value(name, tuple(parameter.shape), model_name)))
    logits = [model(input_ids=torch.tensor([row])).logits[0] for row in rows(model_name)]
    sum((t * weights(i, tuple(t.shape))).sum() for i, t in enumerate(logits)).backward()
    trained = {str(ours[name]): p for name, p in model.named_parameters() if p.requires_grad}
    idle = [name for name in trained if name.endswith("key.bias")]
    scale = max(float(p.grad.abs().max()) for p in trained.values())
    assert all(float(trained.pop(name).grad.abs().max()) < 1e-5 * scale for name in idle), "keys' bias learns nothing"
    return {
        f"{model_name}/{case}/logits": torch.cat(logits).detach(),
        f"{model_name}/{case}/gradients": torch.cat([trained[name].grad.flatten() for name in sorted(trained)]),
    }


if __name__ == "__main__":
    recorded = {name: t for model, cases in SEEN.items() for case in cases for name, t in record(model, case).items()}
    made_with = {"adapters": adapters.__version__, "torch": torch.__version__}
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else OUT
    save_file(recorded, out, made_with)
    print(f"{out}: {len(recorded)} tensors, {out.stat().st_size} bytes, {made_with}")
