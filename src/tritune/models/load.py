"""Loading a base: found, checked, built, and made to prove that packed rows equal solo rows before anyone may use it.

What a base is, `pretrained.py` says. Knows no task and no method.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from tritune.errors import Mismatch, Problem, UnsupportedBase
from tritune.models import regions
from tritune.models.base import LINEAR_ROLES
from tritune.models.device import device_named
from tritune.models.dtype import Dtype, preferred, stored_dtype, torch_dtype
from tritune.models.library import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    __version__,
    lean,
)
from tritune.models.locate import Located, digests, locate, safe_config
from tritune.models.pretrained import Base
from tritune.models.probe import probe
from tritune.models.quantised import check_library, put_quantised
from tritune.models.sites import check_family, find_places
from tritune.spec import Quantisation

WITHOUT_GRAPHS = "Leave --cuda-graphs out."


def load_base(
    ref: str | Path,
    *,
    revision: str | None = None,
    dtype: Dtype | None = None,
    device: str | None = None,
    quantise: Quantisation | None = None,
    compiled: bool = False,
    cuda_graphs: bool = False,
    progress: Callable[[str], None] | None = None,
) -> Base:
    """Load a base and let it prove that it can be packed.

    Args:
        ref: a packaged name ("smollm2-135m"), a local folder, a GGUF file, or a Hub id.
        dtype: None: bf16 where the machine is faster with it, else fp32.
        device: None: the first GPU if there is one, else the CPU.
        quantise: keep the weights of the layers' linear maps in 8 bits ("int8" or, as floats, "fp8") or 4 ("nf4");
            embeddings, head and norms stay. `dtype` is what is computed in. It saves memory, not time; "fp8" both, on a
            GPU that multiplies it.
        compiled: make element-wise parts of the layers one kernel each, with torch.compile, when they first run. That takes
            some 20 s per process and pays in runs of minutes; for all bases of the process. A CPU does it where there is a
            C++ compiler.
        cuda_graphs: record forward and backward of training steps on a GPU, once per shape, and launch them as one. For
            small bases, whose steps are mostly launching; takes the memory of one more step. Full fine-tuning, prompts behind
            texts, adapters of the last layers alone and several adaptations at once go on without.

    Raises:
        Unavailable: it could not be fetched, or bitsandbytes, which quantises, is not installed.
        Mismatch: the folder lacks files, or the device is not there, or has no CUDA graphs.
        UnsupportedBase: unknown family, or packed rows are not solo rows.
    """
    device = device_named(device)
    if cuda_graphs and not device.startswith("cuda"):
        raise Mismatch(f"CUDA graphs are for GPUs, and '{device}' is none.", hint=WITHOUT_GRAPHS)
    located = locate(str(ref), revision=revision, progress=progress)
    config = _config(located)
    check_family(config, next(iter(config.architectures or ()), located.name))
    if quantise is not None:
        check_library(quantise)
    tokenizer = AutoTokenizer.from_pretrained(
        located.folder, config=config, local_files_only=True, trust_remote_code=False
    )
    wanted = torch_dtype(dtype or preferred(device))
    model = _model(located, config, wanted if quantise is None else stored_dtype(located.folder))
    if quantise is not None:
        quantise_layers(model, quantise, wanted)
    model = model.to(device)  # type: ignore[arg-type]  # transformers wraps nn.Module.to
    base = Base(model, tokenizer, located.name, digests(located.folder))
    base.located, base.cuda_graphs = located, cuda_graphs
    if cuda_graphs and not base.recordable:
        problem = Problem(
            f"{located.name}, {base.dtype_name}", "a GPU's one kernel for 16-bit numbers does not attend to it"
        )
        raise Mismatch("Passes over this base cannot be recorded.", [problem], WITHOUT_GRAPHS)
    regions.use(compiled)
    probe(base)
    return base


def quantise_layers(model: PreTrainedModel, form: Quantisation, dtype: torch.dtype) -> None:
    """Quantise every linear map that is a site of the model, as it stands; then bring what is left of it to `dtype`.

    In this order, because codes must not depend on what is computed in: those of rounded weights are other codes. What is
    left is copied: as long as one weight is a part of the mapped file, all of the file stays with the process.
    """
    places = find_places(model, model.config)
    put_quantised(model, (place.module for place in places if place.site.role in LINEAR_ROLES), form)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype, copy=True)


def _config(located: Located) -> PreTrainedConfig:
    """The folder's config, cleaned of everything that could choose code.

    Raises:
        UnsupportedBase: transformers does not know the family, or the values do not suit it.
    """
    document = safe_config(located.folder)
    kind = str(document.get("model_type"))
    if kind not in CONFIG_MAPPING:
        raise UnsupportedBase(f"{located.name} is of family {kind!r}, which transformers {__version__} lacks.")
    try:
        config: PreTrainedConfig = CONFIG_MAPPING[kind].from_dict(document)
    except (ValueError, TypeError) as error:
        raise UnsupportedBase(f"The config.json of {located.name} does not suit family {kind!r}: {error}") from error
    if config.is_encoder_decoder:
        raise UnsupportedBase(f"{located.name} is an encoder-decoder; tritune adapts decoders (GPT, Llama, Qwen, ...).")
    return config


def _model(located: Located, config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    with lean():  # torch runs Python, its compiler's, where a model without numbers is built
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            located.folder,
            config=config,
            dtype=dtype,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            attn_implementation="eager",
        )
    return model
