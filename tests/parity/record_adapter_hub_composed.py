"""What adapter-hub's package computes with stacked and fused adapters, for `test_adapter_hub_composed.py`.

In the environment that `record_adapter_hub.py` describes, with its models and the same arguments: none, or OUT FOLDER.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import adapters
import record_adapter_hub  # sets up hooks layer by layer
import torch
from adapter_hub import adapter_value, our_names, rows, weights
from adapter_hub_composed import CASES, LIVE, RECORDED, case_on, nudged
from adapters.composition import Fuse, Stack
from safetensors.torch import save_file

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


def in_rows(module: torch.nn.Module, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
    """OPT's feed-forward runs on tokens without rows, which the package's fusion does not take; this computes the same."""
    return (inputs[0][None],)


def composed(model_name: str, case: str, folder: str | None) -> Any:
    model = record_adapter_hub.base(model_name, folder)
    if model_name == "opt-post-norm":  # in front of the package's own hooks
        for layer in model.model.decoder.layers:
            layer.fc1.register_forward_pre_hook(in_rows)
    plug = record_adapter_hub.PLUGS.get(model_name)
    interface = plug and adapters.AdapterModelInterface(adapter_methods=["bottleneck"], layer_cross_attn=None, **plug)
    adapters.init(model, interface=interface)
    how, parts, fusion = case_on(model_name, case)
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


def record(model_name: str, case: str, folder: str | None) -> dict[str, torch.Tensor]:
    model = composed(model_name, case, folder)
    ours = {theirs: composed_name(theirs) for theirs, _ in model.named_parameters()}
    with torch.no_grad():
        for theirs, parameter in model.named_parameters():
            if ours[theirs] is not None:  # the keys' bias too, which is not ours: it must make no difference
                name = str(ours[theirs])
                drawn = adapter_value(name, tuple(parameter.shape), model_name)
                parameter.copy_(nudged(name, drawn, model_name))
    logits = [model(input_ids=torch.tensor([row])).logits[0] for row in rows(model_name)]
    sum((t * weights(i, tuple(t.shape))).sum() for i, t in enumerate(logits)).backward()
    # the package gives a fusion to layers without adapters too, where nothing reaches it
    trained = {str(ours[name]): p for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}
    idle = [name for name in trained if name.endswith("key.bias")]
    scale = max(float(p.grad.abs().max()) for p in trained.values())
    assert all(float(trained.pop(name).grad.abs().max()) < 1e-5 * scale for name in idle), "keys' bias learns nothing"
    return {
        f"{model_name}/{case}/logits": torch.cat(logits).detach(),
        f"{model_name}/{case}/gradients": torch.cat([trained[name].grad.flatten() for name in sorted(trained)]),
    }


def main(out: Path, folder: str | None) -> None:
    recorded: dict[str, torch.Tensor] = {}
    for model, cases in (dict.fromkeys(LIVE, tuple(CASES)) if folder else RECORDED).items():
        for case in cases:
            recorded |= record(model, case, folder)
    made_with = {"adapters": adapters.__version__, "torch": torch.__version__}
    save_file(recorded, out, made_with)
    print(f"{out}: {len(recorded)} tensors, {out.stat().st_size} bytes, {made_with}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2]) if len(sys.argv) > 2 else main(OUT, None)
