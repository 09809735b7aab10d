"""Fast twins of the modules of Llama, Mistral, Qwen 2 and Qwen 3: the same arithmetic in fewer passes over memory.

What changes: q, k, v are one product and gate, up another; norms, rotary positions and gated activations have hand-written
backwards (`kernels.py`); low-rank terms, one for all rows or one for those of each slot, and scales are computed beside the
frozen product; and once the last layer has attended, only tokens that somebody reads go on. A model's own code stays the
slow twin: it runs with `Base.twins` off, and for modules whose exact class is not known here; where an edit wants to be
called at a linear map, or brings a weight of its own, that map's own module runs. `probe.py` holds the two against each
other whenever a base is loaded. Knows no method and no task.
Shapes: N packed tokens, D model width, E outputs of several maps side by side, H query heads, K key heads, d head width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any, cast

import torch
from torch import Tensor, nn

from tritune.models import kernels
from tritune.models.attention import packed_attention
from tritune.models.base import LINEAR_ROLES, LowRank, Scales, Site
from tritune.models.bound import Stream
from tritune.models.layout import Layout
from tritune.models.quantised import Codes, QuantisedLinear
from tritune.models.sites import Place

#: class names, as transformers spells them: a subclass may compute something else
ATTENTIONS = ("LlamaAttention", "MistralAttention", "Qwen2Attention", "Qwen3Attention")
GATED = ("LlamaMLP", "MistralMLP", "Qwen2MLP", "Qwen3MLP")
SILU = ("SiLU", "SiLUActivation")
NORMS = ("LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm")


class FrozenMaps:
    """Linear maps of one input, as one product. Their weights, or codes, become views of one matrix."""

    def __init__(
        self, modules: Sequence[nn.Linear] | Sequence[QuantisedLinear], sites: Sequence[Site], stream: Stream
    ) -> None:
        self.modules: tuple[nn.Linear | QuantisedLinear, ...] = tuple(modules)
        self.sites, self.stream = tuple(sites), stream
        self.widths = [module.out_features for module in modules]
        plain = all(type(module) is nn.Linear for module in modules)
        #: others have no matrix that could be part of a larger one, and run apart
        self.joinable = plain or all(isinstance(module, QuantisedLinear) and module.joinable for module in modules)
        self.own = [module.weight for module in modules if isinstance(module, nn.Linear)] if plain else []
        biases: list[nn.Parameter | None] = [module.bias for module in modules]
        self.own_biases = [bias for bias in biases if bias is not None]
        if self.joinable:
            self._joined()

    def _joined(self) -> tuple[Tensor | Codes, Tensor | None]:
        """All weights as one (E, D), and all biases (E,)."""
        bias_E = _joined(self.own_biases) if self.own_biases else None
        if self.own:
            return _joined(self.own), bias_E
        parts = [module.kept for module in self.modules if isinstance(module, QuantisedLinear)]
        codes, scales = (_joined([getattr(part, name) for part in parts]) for name in ("codes", "scales"))
        return Codes(parts[0].form, codes, scales, (sum(self.widths), parts[0].shape[1])), bias_E

    def together(self, x_ND: Tensor, again: partial[Tensor] | None = None) -> Tensor | None:
        """(N, E), or None where some map must run by itself. `again`: makes x once more, of tensors."""
        if not self.joinable:
            return None
        biases: list[Tensor | None] = [module.bias for module in self.modules]
        weights = [module.weight for module in self.modules if isinstance(module, nn.Linear)]
        now = [*weights, *(bias for bias in biases if bias is not None)]
        own = [*self.own, *self.own_biases]
        if any(a is not b or b.requires_grad for a, b in zip(now, own, strict=True)):
            return None  # weights or biases of an edit's own, or no longer frozen: they need gradients
        found: list[Mapping[int | None, LowRank]] = []
        factors: list[Tensor | None] = []
        for site in self.sites:
            term = self.stream.edits.low_rank(site) if site.key in self.stream.edited else {}
            scales = self.stream.edits.scales(site) if term is None else Scales(None, None)
            if scales is None or (scales.in_D is not None and len(self.sites) > 1):
                return None  # an edit that wants to be called, or an input that is not the others'
            if scales.in_D is not None:
                x_ND = kernels.times(x_ND, scales.in_D, again)
            factors.append(scales.out_E)
            found.append({None: term} if isinstance(term, LowRank) else dict(term.items() if term else {}))
            assert not found[-1] or None in found[-1] or self.stream.slot_N is not None, (
                "a bank needs a batch with slots"
            )
        parts = [
            kernels.Part(runs, tuple(terms.get(slot) for terms in found)) for slot, runs in self.stream.runs.items()
        ]
        return kernels.scaled(kernels.linear(x_ND, *self._joined(), self.widths, parts), self.widths, factors)

    def apart(self, x_ND: Tensor) -> list[Tensor]:
        """Each map's own module, with whatever hangs on it."""
        return [module(x_ND) for module in self.modules]

    def __call__(self, x_ND: Tensor, again: partial[Tensor] | None = None) -> Sequence[Tensor]:
        y_NE = self.together(x_ND, again)
        return self.apart(x_ND) if y_NE is None else torch.split(y_NE, self.widths, -1)


def _joined(parameters: Sequence[Tensor]) -> Tensor:
    """All in one tensor, of which the parameters are parts or, where they are not yet (the model was copied, or moved
    elsewhere), become parts. Nothing is held twice, and by nobody else."""
    first = parameters[0].data
    if len(parameters) == 1:
        return first
    ends = accumulate((p.nbytes for p in parameters), initial=first.data_ptr())
    whole = first.untyped_storage().data_ptr()
    if all(
        p.data_ptr() == at and p.untyped_storage().data_ptr() == whole for p, at in zip(parameters, ends, strict=False)
    ):
        return first.as_strided((sum(map(len, parameters)), *first.shape[1:]), first.stride())
    joined = torch.cat([parameter.data for parameter in parameters])
    for parameter, part in zip(parameters, torch.split(joined, [len(p) for p in parameters]), strict=True):
        parameter.data = part
    return joined


def stream_of(model: nn.Module) -> Stream | None:
    """The stream of a model whose modules have their twins already: two bases on one model share it."""
    for module in model.modules():
        if isinstance(forward := module.__dict__.get("forward"), StandIn):
            return forward.stream
    return None


def quicken(model: nn.Module, places: Sequence[Place], stream: Stream) -> None:
    """Give every module that has a fast twin its twin's forward, to be used while `stream.fast`."""
    site_of = {id(place.module): place.site for place in places if place.site.role in LINEAR_ROLES}

    def maps(*modules: Any) -> FrozenMaps:
        return FrozenMaps(modules, [site_of[id(module)] for module in modules], stream)

    last = max((site.layer for site in site_of.values()), default=-1)

    def is_last(map_: FrozenMaps) -> bool:
        return map_.sites[0].layer == last

    for module in cast("Iterable[Any]", model.modules()):
        kind = type(module).__name__
        if kind in NORMS:
            module.forward = StandIn(stream, module.forward, FastNorm(module, stream))
        elif kind in ATTENTIONS:
            qkv, out = maps(module.q_proj, module.k_proj, module.v_proj), maps(module.o_proj)
            twin = FastAttention(module, qkv, out, is_last(out))
            module.forward = StandIn(stream, module.forward, twin, True)
        elif kind in GATED and type(module.act_fn).__name__ in SILU:
            gate_up, down = maps(module.gate_proj, module.up_proj), maps(module.down_proj)
            module.forward = StandIn(stream, module.forward, FastGated(gate_up, down, is_last(down)))


@dataclass
class StandIn:
    """A module's forward: its own, or its twin's. An object, so that a copied model has copies that know each other."""

    stream: Stream
    own: Callable[..., Any]
    twin: Callable[..., Any]
    only_packed: bool = False  # whether the twin has to know the batch's layout

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        packed = not self.only_packed or kwargs.get("layout") is not None
        if not packed:
            self.stream.read = None  # somebody calls the model itself: the latest pass over it says nothing of this one
        fast = self.stream.fast and packed
        return (self.twin if fast else self.own)(*args, **kwargs)


@dataclass
class FastNorm:
    module: Any
    stream: Stream

    def __call__(self, hidden_states: Tensor) -> Tensor:
        weight_D, eps = self.module.weight, self.module.variance_epsilon
        normed = kernels.rms_norm(hidden_states, weight_D, eps)
        again = partial(kernels.rms_normed, hidden_states.detach(), weight_D.detach(), eps)
        return self.stream.again.offer(normed, again)


@dataclass
class FastGated:
    """silu(gate) * up, and down."""

    gate_up: FrozenMaps
    down: FrozenMaps
    last: bool  # of all layers: then only some tokens are read

    def __call__(self, x: Tensor) -> Tensor:
        x_ND = x.flatten(0, -2)
        if not self.last:
            return self._of(x_ND).view(x.shape)
        return self.gate_up.stream.of_read(x_ND, self._of, self.down.widths[0]).view(x.shape)

    def _of(self, x_ND: Tensor) -> Tensor:
        both_N2F = self.gate_up.together(x_ND)
        if both_N2F is not None:
            y_NF = kernels.swiglu(both_N2F)
            gate_NF, up_NF = both_N2F.detach().chunk(2, -1)
        else:
            gate_NF, up_NF = self.gate_up.apart(x_ND)
            y_NF = kernels.gated(gate_NF, up_NF)
        again = partial(kernels.swiglu_of, gate_NF.detach(), up_NF.detach())
        return self.down(self.gate_up.stream.again.offer(y_NF, again), again)[0]


@dataclass
class FastAttention:
    """Queries, keys and values with their positions, attention, and the map out of it."""

    module: Any
    qkv: FrozenMaps
    out: FrozenMaps
    last: bool  # of all layers: then only some tokens are read

    def __call__(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        *,
        layout: Layout | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        cos_Nd, sin_Nd = (t[0] for t in position_embeddings)
        q_HNd, k_KNd, v_KNd = self._heads(hidden_states[0], cos_Nd, sin_Nd)
        y_1NHd, _ = packed_attention(
            self.module,
            q_HNd[None],
            k_KNd[None],
            v_KNd[None],
            attention_mask,
            scaling=self.module.scaling,
            sliding_window=self._window(),
            layout=layout,
        )
        y_NE = y_1NHd[0].flatten(-2)
        of_read = self.out.stream.of_read
        return (of_read(y_NE, self._mapped, self.out.widths[0]) if self.last else self._mapped(y_NE))[None], None

    def _mapped(self, y_NE: Tensor) -> Tensor:
        return self.out(y_NE)[0]

    def _heads(self, x_ND: Tensor, cos_Nd: Tensor, sin_Nd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        module, d = self.module, self.module.head_dim
        normed = hasattr(module, "q_norm")
        y_NE = None if normed else self.qkv.together(x_ND)
        if y_NE is not None:
            return kernels.rotated_heads(y_NE, cos_Nd, sin_Nd, module.k_proj.out_features // d)
        q, k, v = (t.view(len(t), -1, d) for t in self.qkv(x_ND))
        if normed:
            q, k = module.q_norm(q), module.k_norm(k)
        return kernels.rotate(q, cos_Nd, sin_Nd), kernels.rotate(k, cos_Nd, sin_Nd), v.transpose(0, 1)

    def _window(self) -> int | None:
        """Mistral takes it from the config, the others say layer by layer."""
        holder = self.module.config if type(self.module).__name__ == "MistralAttention" else self.module
        window: int | None = getattr(holder, "sliding_window", None)
        return window
