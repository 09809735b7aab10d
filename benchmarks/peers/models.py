"""The peers' models: the same base with the same method, made by PEFT, by adapter-hub's `adapters`, or plain."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from benchmarks.protocol import Spec


def build(spec: Spec) -> Any:
    """The base with the method in it, as the library makes it (a torch module).

    Raises:
        KeyError: a method that this library has no counterpart of here.
    """
    torch.manual_seed(0)
    options: dict[str, Any] = {}
    if spec.setup.dtype != "default":
        options["dtype"] = stored(spec)
    if spec.setup.attention != "default":
        options["attn_implementation"] = spec.setup.attention
    model: Any = AutoModelForCausalLM.from_pretrained(spec.folder, local_files_only=True, **options)
    model = model.to(spec.device)
    if spec.setup.library == "adapters":
        return _adapter_hub(model, spec)
    return model if spec.method == "full" else _peft(model, spec)


def _peft(model: Any, spec: Spec) -> Any:
    import peft

    configs: dict[str, Callable[[], Any]] = {
        "lora": lambda: peft.LoraConfig(
            task_type="CAUSAL_LM",
            r=int(spec.config["rank"]),
            lora_alpha=int(spec.config["alpha"]),
            target_modules="all-linear",
        ),
        "ptuning": lambda: peft.PromptEncoderConfig(
            task_type="CAUSAL_LM",
            num_virtual_tokens=int(spec.config["tokens"]),
            encoder_reparameterization_type="MLP",
            encoder_hidden_size=model.config.hidden_size,
        ),
        "prefix": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=int(spec.config["tokens"])),
        "ia3": lambda: peft.IA3Config(task_type="CAUSAL_LM"),
    }
    # Tuned: adapters in the base's own format, so that their inputs are not cast and kept in fp32.
    return peft.get_peft_model(model, configs[spec.method](), autocast_adapter_dtype=not spec.setup.tuned)


def _adapter_hub(model: Any, spec: Spec) -> Any:
    import adapters

    if spec.method != "bottleneck":
        raise KeyError(spec.method)
    adapters.init(model)
    model.add_adapter("own", config=adapters.SeqBnConfig(reduction_factor=spec.config["reduction_factor"]))
    model.train_adapter("own")
    return model.to(spec.device, stored(spec) if spec.setup.dtype != "default" else None)


def stored(spec: Spec) -> torch.dtype:
    """The format of the weights: with "autocast" they stay fp32, and products are taken of bf16 copies."""
    found: torch.dtype = getattr(torch, "float32" if spec.setup.dtype == "autocast" else spec.setup.dtype)
    return found
