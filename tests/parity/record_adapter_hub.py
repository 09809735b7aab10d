"""Records what adapter-hub's own package computes, for `test_adapter_hub.py`. Run in an environment of its own:

    python -m venv /tmp/hub && /tmp/hub/bin/pip install adapters==1.3.0 torch
    /tmp/hub/bin/python tests/parity/record_adapter_hub.py

The package pins a transformers that cannot stand beside ours. Llama, Mistral and GPT-2 run through its own model classes,
the others through its plug-in interface. There, its hooks would all use the last layer's norm (a closure in a loop); they
are set up layer by layer here, so that every layer has its own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import adapters
import torch
from adapter_hub import CASES, MODELS, SEEN, adapter_value, base_value, our_name, rows, weights
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
PLUGS = {
    "qwen2": _LLAMA_PLUG,
    "gpt-neox": {
        "model_embeddings": "embed_in",
        "model_layers": "layers",
        "layer_self_attn": "attention",
        "attn_qkv_proj": "query_key_value",
        "attn_o_proj": "dense",
        "layer_intermediate_proj": "mlp.dense_h_to_4h",
        "layer_output_proj": "mlp.dense_4h_to_h",
        "layer_pre_self_attn": "input_layernorm",
        "layer_pre_ffn": "post_attention_layernorm",
    },
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


def adapted(model_name: str, case: str) -> Any:
    kind, options = MODELS[model_name]
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **options), attn_implementation="eager")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(base_value(name, tuple(parameter.shape)))
    plug = PLUGS.get(model_name)
    interface = plug and adapters.AdapterModelInterface(adapter_methods=["bottleneck"], layer_cross_attn=None, **plug)
    adapters.init(model, interface=interface)
    preset, changes = CASES[case]
    model.add_adapter("a", config=adapters.AdapterConfig.load(preset, **changes))
    model.set_active_adapters("a")
    model.train_adapter("a")
    return model.eval()


def record(model_name: str, case: str) -> dict[str, torch.Tensor]:
    model = adapted(model_name, case)
    trained = {our_name(name): p for name, p in model.named_parameters() if p.requires_grad}
    assert None not in trained, "only adapters train"
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(adapter_value(str(name), tuple(parameter.shape)))
    logits = [model(input_ids=torch.tensor([row])).logits[0] for row in rows()]
    sum((t * weights(i, tuple(t.shape))).sum() for i, t in enumerate(logits)).backward()
    gradients = [trained[name].grad.flatten() for name in sorted(trained)]
    return {
        f"{model_name}/{case}/logits": torch.cat(logits).detach(),
        f"{model_name}/{case}/gradients": torch.cat(gradients),  # by our names, in their order
    }


if __name__ == "__main__":
    recorded = {name: t for model, cases in SEEN.items() for case in cases for name, t in record(model, case).items()}
    made_with = {"adapters": adapters.__version__, "torch": torch.__version__}
    save_file(recorded, OUT, made_with)
    print(f"{OUT}: {len(recorded)} tensors, {OUT.stat().st_size} bytes, {made_with}")
