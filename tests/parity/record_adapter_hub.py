"""What adapter-hub's own package computes, for `test_adapter_hub.py`. Runs in an environment of its own:

    make benchmarks/.venv-adapters/.ready
    benchmarks/.venv-adapters/bin/python tests/parity/record_adapter_hub.py             writes the recording anew
    benchmarks/.venv-adapters/bin/python tests/parity/record_adapter_hub.py OUT FOLDER  live, with the base in FOLDER as well,
                                                                whose config is as `exchange/adapter_hub/older.py` makes it

The package pins a transformers that cannot stand beside ours. Llama, Mistral and GPT-2 run through its own model classes,
the others through its plug-in interface, or, where an option needs its own classes, as the Llama that they are but for names.
In the interface, its hooks would all use the last layer's norm (a closure in a loop); they are set up layer by layer here, so
that every layer has its own.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import adapters
import torch
from adapter_hub import (
    AS_LLAMA,
    LIVE,
    MODELS,
    NATIVE_ONLY,
    REAL,
    RECORDED,
    adapter_value,
    base_value,
    case_on,
    llama_value,
    our_names,
    rows,
    weights,
)
from adapters.methods import METHOD_INIT_MAPPING  # which function sets up the hooks of a kind of adapter
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

OUT = Path(__file__).with_name("adapter_hub.safetensors")

_LLAMA_PLUG = {
    "model_embeddings": "embed_tokens",
    "model_layers": "layers",
    "layer_self_attn": "self_attn",
    "attn_q_proj": "q_proj",
    "attn_k_proj": "k_proj",
    "attn_v_proj": "v_proj",
    "attn_o_proj": "o_proj",
    "layer_intermediate_proj": "mlp.up_proj",
    "layer_output_proj": "mlp.down_proj",
    "layer_pre_self_attn": "input_layernorm",
    "layer_pre_ffn": "post_attention_layernorm",
}
_NEOX_PLUG = {
    "model_embeddings": "embed_in",
    "model_layers": "layers",
    "layer_self_attn": "attention",
    "attn_qkv_proj": "query_key_value",
    "attn_o_proj": "dense",
    "layer_intermediate_proj": "mlp.dense_h_to_4h",
    "layer_output_proj": "mlp.dense_4h_to_h",
    "layer_pre_self_attn": "input_layernorm",
    "layer_pre_ffn": "post_attention_layernorm",
}
PLUGS = {
    "qwen2": _LLAMA_PLUG,
    "gpt-neox": _NEOX_PLUG,
    "gpt-neox-one-head": _NEOX_PLUG,
    "opt-post-norm": {
        **_LLAMA_PLUG,
        "model_embeddings": "decoder.embed_tokens",
        "model_layers": "decoder.layers",
        "attn_o_proj": "out_proj",
        "layer_intermediate_proj": "fc1",
        "layer_output_proj": "fc2",
        "layer_pre_self_attn": "self_attn.q_proj",
        "layer_pre_ffn": "fc1",
        "layer_ln_1": "self_attn_layer_norm",
        "layer_ln_2": "final_layer_norm",
    },
}


def layer_by_layer(model: Any) -> None:
    base = model.base_model
    for item in list(base.iter_layers()):
        base.iter_layers = lambda item=item: [item]
        HOOKS(model)
    del base.iter_layers


HOOKS = METHOD_INIT_MAPPING["bottleneck"]
METHOD_INIT_MAPPING["bottleneck"] = layer_by_layer


def base(model_name: str, folder: str | None, as_llama: bool = False) -> Any:
    """One of MODELS, or the packaged base, which is in a folder; `as_llama`: as AS_LLAMA has it."""
    if model_name == REAL:
        return AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32, attn_implementation="eager")
    kind, options = (AS_LLAMA if as_llama else MODELS)[model_name]
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **options), attn_implementation="eager")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            shape = tuple(parameter.shape)
            parameter.copy_(llama_value(name, shape, model_name) if as_llama else base_value(name, shape))
    return model


def adapted(model_name: str, case: str, folder: str | None) -> Any:
    as_llama = model_name in AS_LLAMA and case in NATIVE_ONLY
    model = base(model_name, folder, as_llama)
    preset, changes = case_on(model_name, case)
    plug = None if as_llama else PLUGS.get(model_name)
    methods = ["lora" if preset == "lora" else "bottleneck"]
    interface = plug and adapters.AdapterModelInterface(adapter_methods=methods, layer_cross_attn=None, **plug)
    adapters.init(model, interface=interface)
    model.add_adapter("a", config=adapters.AdapterConfig.load(preset, **changes))
    model.set_active_adapters("a")
    model.train_adapter("a")
    return model.eval()


def record(model_name: str, case: str, folder: str | None) -> dict[str, torch.Tensor]:
    model = adapted(model_name, case, folder)
    letters = case_on(model_name, case)[1].get("attn_matrices", ["q", "v"])
    trained = {our_names(name, letters): p for name, p in model.named_parameters() if p.requires_grad}
    assert () not in trained, "only adapters train"
    with torch.no_grad():
        for names, parameter in trained.items():
            parts = [adapter_value(name, tuple(p.shape), model_name) for name, p in split(names, parameter).items()]
            parameter.copy_(torch.cat(parts) if parameter.ndim else parts[0])
    logits = [model(input_ids=torch.tensor([row])).logits[0] for row in rows(model_name)]
    sum((t * weights(i, tuple(t.shape))).sum() for i, t in enumerate(logits)).backward()
    gradients: dict[str, torch.Tensor] = {}
    for names, parameter in trained.items():
        gradients |= split(names, parameter.grad)
    return {
        f"{model_name}/{case}/logits": torch.cat(logits).detach(),
        # by our names, in their order
        f"{model_name}/{case}/gradients": torch.cat([gradients[name].flatten() for name in sorted(gradients)]),
    }


def split(names: tuple[str, ...], tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """The parts of a tensor, one above the other, by our names."""
    return dict(zip(names, tensor.chunk(len(names)) if tensor.ndim else [tensor], strict=True))


def main(out: Path, folder: str | None) -> None:
    cells = [(model, case) for model, cases in (LIVE if folder else RECORDED).items() for case in cases]
    recorded = {name: t for model, case in cells for name, t in record(model, case, folder).items()}
    made_with = {"adapters": adapters.__version__, "torch": torch.__version__}
    save_file(recorded, out, made_with)
    print(f"{out}: {len(recorded)} tensors, {out.stat().st_size} bytes, {made_with}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2]) if len(sys.argv) > 2 else main(OUT, None)
