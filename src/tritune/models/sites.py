"""Which module of which family plays which role: a table. Everything else in tritune speaks roles only.

A new family is one entry in FAMILIES. Knows module paths, not what is learned there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tritune.errors import UnsupportedBase
from tritune.models.base import Role, Site
from tritune.models.library import PreTrainedModel
from tritune.models.quantised import QuantisedLinear


@dataclass(frozen=True, slots=True)
class Block:
    """A sub-layer: the module whose *input* is the residual stream, and the module whose *output* is added to it."""

    entry: str
    exit: str


@dataclass(frozen=True, slots=True)
class Family:
    """Paths of the modules, relative to one layer. A fused module serves several roles: see `_columns`.

    `norms`: the norm that a block's sum with the stream goes through, in families that norm after the sum.
    `front`: modules of the whole model that stand in front of the layers and are no embedding.
    """

    layers: str
    linear: Mapping[Role, str]
    attn: Block
    mlp: Block
    columns: Callable[[Any, Role], Tensor] | None = None
    fused: frozenset[Role] = field(default=frozenset())
    norms: Mapping[Role, str] = field(default_factory=dict)
    front: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Place:
    """A site and how to reach it. `columns` (E,): which outputs of the module are the site's; None: all of them.

    `norm`: at a block whose sum with the stream is normed before it goes on (OPT-350m), the module that does so.
    """

    site: Site
    module: nn.Module
    entry: nn.Module  # its input is the site's x
    columns: Tensor | None = None
    norm: nn.Module | None = None


@dataclass(frozen=True, slots=True)
class Rows:
    """Which part of a weight matrix is a site's, and whether it is stored transposed (GPT-2, and every embedding)."""

    columns: Tensor | None
    transposed: bool

    def of(self, weight: Tensor) -> Tensor:
        """The site's own matrix (E, D)."""
        return self.of_outputs(weight.T if self.transposed else weight)

    def of_outputs(self, values: Tensor) -> Tensor:
        """The site's own part of anything whose first dimension is the outputs of the module."""
        return values if self.columns is None else values[self.columns.to(values.device)]

    @property
    def fused(self) -> bool:
        """Whether other sites are parts of the same matrix, and so read the same input."""
        return self.columns is not None

    def scale(self, weight: Tensor, out_E: Tensor | None = None, in_D: Tensor | None = None) -> Tensor:
        """A new matrix: the site's own outputs times `out_E`, its inputs times `in_D`."""
        scaled_ED = weight.T if self.transposed else weight
        if out_E is not None:
            scaled_ED = self.scale_outputs(scaled_ED, out_E)
        if in_D is not None:
            scaled_ED = scaled_ED * in_D
        return scaled_ED.T.contiguous() if self.transposed else scaled_ED

    def scale_outputs(self, values: Tensor, out_E: Tensor) -> Tensor:
        """The same of anything whose first dimension is the outputs of the module: its matrix, its bias."""
        factor = out_E.view(-1, *[1] * (values.ndim - 1))
        if self.columns is None:
            return values * factor
        columns = self.columns.to(values.device)
        return values.index_copy(0, columns, values[columns] * factor)

    def add_to(self, weight: Tensor, term_ED: Tensor) -> Tensor:
        """A new matrix: the weight with a term (E, D) added to the site's own outputs."""
        stored_ED = weight.T if self.transposed else weight
        if self.columns is None:
            total = stored_ED + term_ED
        else:
            total = stored_ED.index_add(0, self.columns.to(weight.device), term_ED)
        return total.T.contiguous() if self.transposed else total


def heads(config: Any) -> tuple[int, int, int]:
    """Query heads, key heads, head width."""
    n = config.num_attention_heads
    kv = getattr(config, "num_key_value_heads", None) or n
    width = getattr(config, "head_dim", None) or config.hidden_size // n
    return n, kv, width


def _stacked_columns(config: Any, role: Role) -> Tensor:
    """q above k above v, gate above up (Phi-3, GPT-2)."""
    n, kv, width = heads(config)
    if role in (Role.MLP_GATE, Role.MLP_UP):
        first = 0 if role is Role.MLP_GATE else config.intermediate_size
        return torch.arange(first, first + config.intermediate_size)
    sizes = {Role.ATTN_Q: n * width, Role.ATTN_K: kv * width, Role.ATTN_V: kv * width}
    first = sum(size for other, size in sizes.items() if list(sizes).index(other) < list(sizes).index(role))
    return torch.arange(first, first + sizes[role])


def _interleaved_columns(config: Any, role: Role) -> Tensor:
    """q, k, v of one head after the other (GPT-NeoX)."""
    n, _, width = heads(config)
    part = (Role.ATTN_Q, Role.ATTN_K, Role.ATTN_V).index(role)
    return torch.arange(3 * n * width).view(n, 3, width)[:, part].flatten()


_QKV = (Role.ATTN_Q, Role.ATTN_K, Role.ATTN_V)

_LLAMA_LINEAR = {
    Role.ATTN_Q: "self_attn.q_proj",
    Role.ATTN_K: "self_attn.k_proj",
    Role.ATTN_V: "self_attn.v_proj",
    Role.ATTN_O: "self_attn.o_proj",
    Role.MLP_GATE: "mlp.gate_proj",
    Role.MLP_UP: "mlp.up_proj",
    Role.MLP_DOWN: "mlp.down_proj",
}

_LLAMA = Family(
    layers="model.layers",
    linear=_LLAMA_LINEAR,
    attn=Block("input_layernorm", "self_attn"),
    mlp=Block("post_attention_layernorm", "mlp"),
)

# Gemma 2 and 3 norm a sub-layer's output once more before it is added.
_GEMMA = Family(
    layers="model.layers",
    linear=_LLAMA_LINEAR,
    attn=Block("input_layernorm", "post_attention_layernorm"),
    mlp=Block("pre_feedforward_layernorm", "post_feedforward_layernorm"),
)

_PHI3 = Family(
    layers="model.layers",
    linear=dict.fromkeys(_QKV, "self_attn.qkv_proj")
    | {Role.ATTN_O: "self_attn.o_proj", Role.MLP_DOWN: "mlp.down_proj"}
    | dict.fromkeys((Role.MLP_GATE, Role.MLP_UP), "mlp.gate_up_proj"),
    attn=Block("input_layernorm", "self_attn"),
    mlp=Block("post_attention_layernorm", "mlp"),
    columns=_stacked_columns,
    fused=frozenset((*_QKV, Role.MLP_GATE, Role.MLP_UP)),
)

_GPT2 = Family(
    layers="transformer.h",
    linear=dict.fromkeys(_QKV, "attn.c_attn")
    | {Role.ATTN_O: "attn.c_proj", Role.MLP_UP: "mlp.c_fc", Role.MLP_DOWN: "mlp.c_proj"},
    attn=Block("ln_1", "attn"),
    mlp=Block("ln_2", "mlp"),
    columns=_stacked_columns,
    fused=frozenset(_QKV),
)

_NEOX = Family(
    layers="gpt_neox.layers",
    linear=dict.fromkeys(_QKV, "attention.query_key_value")
    | {Role.ATTN_O: "attention.dense", Role.MLP_UP: "mlp.dense_h_to_4h", Role.MLP_DOWN: "mlp.dense_4h_to_h"},
    attn=Block("input_layernorm", "attention"),
    mlp=Block("post_attention_layernorm", "mlp"),
    columns=_interleaved_columns,
    fused=frozenset(_QKV),
)


def _opt(config: Any) -> Family:
    before = config.do_layer_norm_before  # OPT-350m norms after the residual sum instead
    return Family(
        layers="model.decoder.layers",
        linear={
            Role.ATTN_Q: "self_attn.q_proj",
            Role.ATTN_K: "self_attn.k_proj",
            Role.ATTN_V: "self_attn.v_proj",
            Role.ATTN_O: "self_attn.out_proj",
            Role.MLP_UP: "fc1",
            Role.MLP_DOWN: "fc2",
        },
        attn=Block("self_attn_layer_norm" if before else "self_attn", "self_attn"),
        mlp=Block("final_layer_norm" if before else "fc1", "fc2"),
        norms={} if before else {Role.BLOCK_ATTN: "self_attn_layer_norm", Role.BLOCK_MLP: "final_layer_norm"},
        front=("model.decoder.project_in",),  # where embeddings are narrower than the layers (OPT-350m)
    )


#: model_type of the config -> where its sites are
FAMILIES: Mapping[str, Callable[[Any], Family]] = {
    "llama": lambda _: _LLAMA,
    "mistral": lambda _: _LLAMA,
    "qwen2": lambda _: _LLAMA,
    "qwen3": lambda _: _LLAMA,
    "gemma2": lambda _: _GEMMA,
    "gemma3_text": lambda _: _GEMMA,
    "phi3": lambda _: _PHI3,
    "gpt2": lambda _: _GPT2,
    "gpt_neox": lambda _: _NEOX,
    "opt": _opt,
}


def check_family(config: Any, model: str) -> None:
    """
    Args:
        model: what its class is called.

    Raises:
        UnsupportedBase: unknown family.
    """
    kind = config.model_type
    if kind not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise UnsupportedBase(
            f"Family '{kind}' ({model}) is unknown: no table says which of its modules are "
            f"{', '.join(Role)}. Known families: {known}. A new one is one entry in tritune/models/sites.py."
        )


def find_places(model: PreTrainedModel, config: Any) -> tuple[Place, ...]:
    """Every site of a model: the embedding, the layers with their roles in the order of `Role`, the head.

    Raises:
        UnsupportedBase: unknown family, or a known one whose modules are not where they should be; says what was looked for.
    """
    check_family(config, type(model).__name__)
    family, layers = FAMILIES[config.model_type](config), layers_of(model, config)
    places = [place for i, layer in enumerate(layers) for place in _layer_places(layer, i, family, config)]
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()  # type: ignore[no-untyped-call]
    return (_end(embedding, Role.EMBED, -1), *places, _end(head, Role.HEAD, len(layers)))


def layers_of(model: PreTrainedModel, config: Any) -> nn.ModuleList:
    """The layers of a model of a known family, in their order."""
    kind = config.model_type
    layers = _module(model, FAMILIES[kind](config).layers, kind)
    assert isinstance(layers, nn.ModuleList)
    return layers


def _end(module: nn.Module, role: Role, layer: int) -> Place:
    return Place(Site(role.value, role, layer, *sizes(module)), module, module)


def _layer_places(layer: nn.Module, index: int, family: Family, config: Any) -> list[Place]:
    places = []
    for role in Role:
        if role in family.linear:
            module = _module(layer, family.linear[role], config.model_type)
            columns = family.columns(config, role) if family.columns and role in family.fused else None
            d_in, d_out = sizes(module)
            site = Site(f"layers.{index}.{role}", role, index, d_in, d_out if columns is None else len(columns))
            places.append(Place(site, module, module, columns))
        elif role in (Role.BLOCK_ATTN, Role.BLOCK_MLP):
            block = family.attn if role is Role.BLOCK_ATTN else family.mlp
            d = config.hidden_size
            site = Site(f"layers.{index}.{role}", role, index, d, d)
            leave, enter = (_module(layer, path, config.model_type) for path in (block.exit, block.entry))
            norm = _module(layer, family.norms[role], config.model_type) if role in family.norms else None
            places.append(Place(site, leave, enter, norm=norm))
    return places


def is_transposed(module: nn.Module) -> bool:
    """Whether a linear module keeps its weight as (D, E): GPT-2's Conv1D does, also quantised."""
    return module.transposed if isinstance(module, QuantisedLinear) else not isinstance(module, nn.Linear)


def sizes(module: nn.Module) -> tuple[int, int]:
    """Input and output width of a linear module."""
    if isinstance(module, nn.Linear | QuantisedLinear):
        return module.in_features, module.out_features
    if isinstance(module, nn.Embedding):
        return module.num_embeddings, module.embedding_dim
    return int(module.nx), int(module.nf)  # type: ignore[arg-type]  # transformers' Conv1D


def _module(root: nn.Module, path: str, kind: str) -> nn.Module:
    try:
        return root.get_submodule(path)
    except AttributeError as error:
        raise UnsupportedBase(
            f"A '{kind}' base should have a module '{path}' in {type(root).__name__}: {error}."
        ) from None
