"""A base: a pretrained decoder of transformers, unmodified, behind one packed forward pass.

`load.py` finds one and builds it. Knows no task and no method. Shapes: N packed tokens, K scored positions, D embedding
width, V vocabulary.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from tritune.errors import Mismatch, Problem
from tritune.models import attention, round_numbers, varlen
from tritune.models.base import BARE, Batch, Edits, NoEdits, Role, Site
from tritune.models.bound import EVERYWHERE, Read, Stream, hooked
from tritune.models.depth import above, below
from tritune.models.dtype import Dtype, at_least_float32
from tritune.models.fast import quicken, stream_of
from tritune.models.head import head_of
from tritune.models.layout import Layout, build
from tritune.models.library import PreTrainedModel, PreTrainedTokenizerBase
from tritune.models.locate import Located
from tritune.models.lookup import lookup
from tritune.models.matrix import SiteMatrix
from tritune.models.memory import aside, hold_in_memory, is_much
from tritune.models.past import Recorded, Virtual
from tritune.models.pieces import text_batch
from tritune.models.prepared import Prepared
from tritune.models.probe import parts_are_whole
from tritune.models.quantised import QuantisedLinear, Weights, resident_bytes
from tritune.models.sites import Place, Rows, find_places, heads, is_transposed, layers_of
from tritune.models.texts import TextCache, Texts
from tritune.spec import Digests, Quantisation

#: bytes of what texts are to the base that are kept in memory; from a file they come about as fast
MEMORY = 1 << 25
#: tokens that are read are computed in multiples of so many: with ever other numbers of them oneDNN kept 40 MiB more
READ_TOGETHER = 64


class Base:
    """A frozen pretrained model and its tokenizer.

    One set of edits may be bound at a time; unbound, the bare base answers. The weights in here never change:
    full fine-tuning brings its own copies.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str, digests: Digests) -> None:
        self.model = model.requires_grad_(False).eval()  # type: ignore[no-untyped-call]
        self.tokenizer = tokenizer
        self.name = name
        self.digests = digests
        self.located: Located | None = None  # where its files are; None: made in memory
        self.cuda_graphs = False  # whether training steps on it are recorded (`train/graphs.py`)
        self.places: tuple[Place, ...] = find_places(model, model.config)
        known = stream_of(model)
        self._stream = known or Stream()
        self._layers = layers_of(model, model.config)
        self._texts: TextCache | None = None
        self._states: _States | None = None
        self._states_from: Callable[[int], TextCache] | None = None
        self._reached = 0  # the first layer that what is bound acts in or behind
        self._divides: dict[int, bool] = {}
        self._matrices: dict[str, SiteMatrix] = {}
        self._embedding_name = next(n for n, p in model.named_parameters() if p is self.embedding.weight)
        model.set_attn_implementation(attention.NAME)
        self._head = head_of(model)
        if known is None:
            quicken(model, self.places, self._stream)
        hold_in_memory(model)

    @property
    def twins(self) -> bool:
        """Whether modules that have a fast twin (`fast.py`) use it."""
        return self._stream.fast

    @twins.setter
    def twins(self, used: bool) -> None:
        self._stream.fast = used

    @property
    def sites(self) -> tuple[Site, ...]:
        return tuple(place.site for place in self.places)

    def site(self, key: str) -> Site:
        return next(place.site for place in self.places if place.site.key == key)

    @property
    def config(self) -> Any:
        return self.model.config

    @property
    def device(self) -> torch.device:
        return self.embedding.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.weight.dtype

    @property
    def dtype_name(self) -> Dtype:
        return "bfloat16" if self.dtype is torch.bfloat16 else "float32"

    @property
    def embedding(self) -> nn.Embedding:
        module = self.model.get_input_embeddings()
        assert isinstance(module, nn.Embedding)
        return module

    @property
    def d_embedding(self) -> int:
        """Width of an input embedding, and so of a virtual token."""
        return self.embedding.embedding_dim

    @property
    def cache_shape(self) -> tuple[int, int, int]:
        """Number of layers, of key heads, and width of a head: what attention keeps of a token, once as key and as value."""
        _, kv, width = heads(self.config)
        return int(self.config.num_hidden_layers), kv, width

    @property
    def max_positions(self) -> int:
        """The longest row, virtual tokens included, that the base was built for.

        With "longrope" (Phi-3 128k) a row beyond the original length turns the positions of all rows beside it, so that
        length is the limit: packed rows must not depend on their neighbours.
        """
        longest = int(self.config.max_position_embeddings)
        rope = getattr(self.config, "rope_parameters", None) or {}
        return (
            min(longest, int(rope["original_max_position_embeddings"]))
            if rope.get("rope_type") == "longrope"
            else longest
        )

    @property
    def quantised(self) -> Quantisation | None:
        """The form that the linear maps are kept in; None: numbers of `dtype`."""
        forms = {place.module.form for place in self.places if isinstance(place.module, QuantisedLinear)}
        assert len(forms) < 2, "maps of two forms in one base"
        return next(iter(forms), None)

    @property
    def bytes(self) -> int:
        """Of memory for its weights, in the form they are kept in."""
        return resident_bytes(self.model)

    def parameters(self) -> Weights:
        """Every weight once (a tied head is its embedding), by transformers' own name: as numbers of `dtype`, also where
        they are quantised. Those are dequantised at each look, so look once."""
        return Weights(self.model, self.dtype)

    def weight_of(self, site: Site) -> tuple[str, Rows]:
        """Name of the parameter behind a linear site, the embedding or the head, and which part of it is the site's."""
        place = next(place for place in self.places if place.site.key == site.key)
        paths = (path for path, module in self.model.named_modules() if module is place.module)
        own = getattr(place.module, "weight", None)  # a quantised map has none; a tied head's is the embedding's
        names = (name for name, p in self.model.named_parameters() if p is own)
        return next(names, None) or f"{next(paths)}.weight", Rows(place.columns, transposed=is_transposed(place.module))

    def matrix_of(self, site: Site) -> SiteMatrix:
        """The frozen matrix of a linear site, the embedding or the head."""
        if site.key not in self._matrices:
            module = next(place.module for place in self.places if place.site.key == site.key)
            bias = getattr(module, "bias", None)
            self._matrices[site.key] = SiteMatrix(module, self.dtype, bias, self.weight_of(site)[1])
        return self._matrices[site.key]

    @property
    def tied(self) -> bool:
        """Whether the head is the embedding: one matrix."""
        return self.weight_of(self.site("embed"))[0] == self.weight_of(self.site("head"))[0]

    def save_pretrained(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        """A plain Hugging Face folder of this base with other weights, that transformers loads without tritune."""
        tied = {name: weights[same] for name, same in self._tied_names().items() if same in weights}
        # The names are those of `parameters`: some families (GPT-NeoX) would be renamed to what older versions called them.
        self.model.save_pretrained(folder, state_dict={**weights, **tied}, save_original_format=False)
        self.tokenizer.save_pretrained(folder)

    def _tied_names(self) -> dict[str, str]:
        """Names of parameters that are another one (a tied head), and that other's name."""
        first = {id(p): name for name, p in self.model.named_parameters()}
        every = self.model.named_parameters(remove_duplicate=False)
        return {name: first[id(p)] for name, p in every if first[id(p)] != name}

    @contextmanager
    def bind(self, edits: Edits) -> Iterator[None]:
        """Let `edits` act in every forward pass (and its backward) inside the context.

        Raises:
            AssertionError: other edits are bound; nesting them would hide one behind the other.
        """
        stream = self._stream
        assert type(stream.edits) is NoEdits, "edits are already bound to this base"
        wanted = {site.key for site in edits.sites()}
        places = [place for place in self.places if place.site.key in wanted]
        assert len(places) == len(wanted), f"sites this base does not have: {wanted - {p.site.key for p in places}}"
        self._reached = min((place.site.layer for place in places), default=0)
        self._remember_states()
        stream.edits, stream.edited = edits, frozenset(wanted)
        try:
            with hooked([place for place in places if place.site.role is not Role.EMBED], edits, stream):
                yield
        finally:
            stream.edits, stream.edited, self._reached = NoEdits(), frozenset(), 0

    @contextmanager
    def without(self, names: Collection[str]) -> Iterator[None]:
        """Keep weights out of memory as long as the context is open, because others stand in for them (`Edits.weights`).
        They stay what they are: what reads them gets them from a file."""
        own = dict(self.model.named_parameters())
        with aside(own[name] for name in names):
            yield

    @contextmanager
    def remembering(self, texts: Texts, *, memory: int = MEMORY) -> Iterator[None]:
        """Keep what texts are to the bare base as long as the context is open: all keys and values of texts that edits leave
        alone, or what enters the first layer that edits act in, of texts and answers. Edits have to be bound in there.

        Costs nothing where they act on everything. What goes beyond `memory` bytes lies in a file that is gone afterwards;
        what would take more than half of the free disk is computed anew each time.
        """
        assert self._texts is None, "texts are being remembered already"
        with tempfile.TemporaryDirectory(prefix="tritune-texts-") as folder:
            disk = shutil.disk_usage(folder).free // 2
            kept = partial(TextCache, dtype=self.dtype, memory=memory, disk=disk)
            self._texts = kept(
                lambda batch: self.keys_values(batch).cpu(),
                dict.fromkeys(texts, ()),
                numbers=2 * prod(self.cache_shape),
                dim=2,
                path=Path(folder) / "texts",
            )
            self._states_from = lambda first: kept(
                lambda batch: self.states(batch, first).cpu(),
                texts,
                numbers=int(self.config.hidden_size),
                dim=0,
                path=Path(folder) / "states",
            )
            try:
                yield
            finally:
                self._texts = self._states = self._states_from = None

    def _remember_states(self) -> None:
        """From now on, if what is about to be bound leaves layers alone. Adaptations that are trained at once begin with a
        pass for all of them, and so with the lowest layer."""
        first = self._reached
        if self._states_from is None or first < 1 or (self._states is not None and self._states.first <= first):
            return
        if first not in self._divides:
            self._divides[first] = parts_are_whole(self, first)
        if self._divides[first]:
            self._states = _States(first, self._states_from(first))

    def logits(self, batch: Batch, at_K: Tensor, entering: tuple[int, Tensor] | None = None) -> Tensor:
        """Logits (K, V), at least fp32, at positions `at_K` of the packed tokens, under the edits that are bound.

        The head runs on these K positions only. Differentiable in whatever the edits learn. At the end of a text that has
        virtual tokens behind it, the logits are those of the last of these: of what follows. Where a text depends on nothing
        that is learned, it goes through the base first and without gradients; and so do all tokens through the layers below
        the first that is acted in, where some of the rows are remembered.

        Args:
            entering: the first layer that runs and the states (N, D) that go into it, where they are known.

        Raises:
            Mismatch: rows of slots that the edits do not have; as the bare base they would answer unnoticed.
        """
        edits = self._stream.edits
        _check_slots(batch, edits)
        weights = dict(edits.weights())
        virtual = Virtual(edits.segments())
        lay_out = partial(self._laid_out, batch, **virtual.lengths)
        pays = torch.is_grad_enabled() or self._texts is not None
        texts_stand = pays and virtual.texts_stand(edits)
        layout = lay_out(texts_given=texts_stand)
        at_K = at_K.cpu()
        if texts_stand and bool((layout.asked[at_K] < 0).any()):  # positions inside a text are asked for
            layout, texts_stand = lay_out(), False
        keys_values = self.keys_values if self._texts is None else self._remembered_texts
        texts = keys_values(batch).to(self.device) if texts_stand else None
        known = self._states
        if entering is None and known is not None and virtual.none and not weights and known.first <= self._reached:
            entering = (known.first, known.cache.of(batch).to(self.device)) if known.cache.knows(batch) else None
        entering = entering and (entering[0], layout.filled_up(entering[1]))
        layout = replace(layout, past=virtual.past(texts))
        x_ND = self._embedded(batch, weights)
        asked_K = layout.asked[at_K]
        x_ND = virtual.inputs(x_ND, layout)
        return at_least_float32(self._run(x_ND, layout, asked_K, weights, entering, self._read(asked_K, layout)))

    def _read(self, asked_K: Tensor, layout: Layout) -> Read:
        """What of the packed tokens is read behind the last layer's attention, when these positions are asked for."""
        at_R = torch.unique(asked_K)
        filling = -len(at_R) % READ_TOGETHER if round_numbers.wanted(self.device, self.dtype) else 0
        there_R = at_R.to(self.device)
        slot_R = None if layout.slot_N is None else F.pad(layout.slot_N[there_R], (0, filling), value=BARE)
        return Read(there_R, filling, slot_R, EVERYWHERE | dict(layout.runs_among(at_R).items()))

    def loss(self, batch: Batch, at_K: Tensor, labels_K: Tensor) -> Tensor:
        """Sum of the cross-entropies of `labels_K` at positions `at_K`, as a scalar: what `logits` would give, but where
        these are many they are never held together. A head that something acts on gives logits."""
        return self._loss(partial(self.logits, batch, at_K), labels_K.to(self.device))

    def _loss(self, logits: Callable[[], Tensor], labels_K: Tensor) -> Tensor:
        if not self.loses_in_pieces(len(labels_K)):
            return F.cross_entropy(logits(), labels_K, reduction="sum")
        with self._head.answering_with_loss(labels_K):
            return logits().view(())

    def loses_in_pieces(self, n: int) -> bool:
        """Whether the logits of n positions are never held together when only their loss is wanted."""
        return Role.HEAD not in self._stream.edited and self._head.pays(n)

    @property
    def recordable(self) -> bool:
        """Whether a pass over a batch reads nothing but tensors that are there beforehand: on a GPU, where one kernel attends
        to all rows of it, unless positions turn with the longest row, a site of what is bound is some columns of a map, or
        lower layers are left out for what is remembered."""
        width, softcap = self.cache_shape[2], getattr(self.config, "attn_logit_softcapping", None)
        rope = (getattr(self.config, "rope_parameters", None) or {}).get("rope_type", "default")
        edited = [place for place in self.places if place.site.key in self._stream.edited]
        return (
            varlen.suits(self.device, self.dtype, width)
            and softcap is None
            and rope not in ("dynamic", "longrope")
            and all(place.columns is None and place.site.role is not Role.EMBED for place in edited)
            and (self._states is None or self._states.first > self._reached)
        )

    def prepared(self, batch: Batch, at_K: Tensor, labels_K: Tensor, virtual: Virtual) -> Prepared:
        """What `loss_of` reads, still in the processor's memory. Of `virtual`, what is bound puts beside rows, only lengths
        matter."""
        layout = build(batch, **virtual.lengths, varlen=True, grouped=False)
        assert layout.rows is not None
        layout = replace(layout, rows=layout.rows.rounded())
        return Prepared(batch.tokens_N, layout, layout.asked[at_K], labels_K)

    def loss_of(self, prepared: Prepared) -> Tensor:
        """`loss` of a batch whose labels are in there, of which those that are IGNORE count for nothing. The processor reads
        no number of it, so that what a GPU does may be recorded."""

        def logits() -> Tensor:
            virtual = Virtual(self._stream.edits.segments())
            layout = replace(prepared.layout, past=virtual.past())
            x_ND = virtual.inputs(self.embedding(prepared.tokens_N), layout)
            return at_least_float32(self._run(x_ND, layout, prepared.asked_K, {}))

        return self._loss(logits, prepared.labels_K)

    def _embedded(self, batch: Batch, weights: dict[str, Tensor]) -> Tensor:
        """What the batch's own tokens are to the first layer. A table that is trained is what a tied head is to read."""
        tokens_N = batch.tokens_N.to(self.device)
        own = weights.get(self._embedding_name)
        if own is None:
            row_ND = F.embedding(tokens_N, self.embedding.weight)
        else:
            row_ND, weights[self._embedding_name] = lookup(own, tokens_N, self.embedding.padding_idx)
        if Role.EMBED in self._stream.edited:
            slot_N = None
            if batch.slots is not None:
                lengths = torch.tensor([span.length for span in batch.spans])
                slot_N = torch.tensor(batch.slots).repeat_interleave(lengths).to(self.device)
            row_ND = self._stream.edits.edit(self.site("embed"), tokens_N, row_ND, slot_N)
        scale: Tensor | None = getattr(self.embedding, "embed_scale", None)  # of Gemma
        return row_ND if scale is None else row_ND * scale.to(row_ND.dtype)

    def _remembered_texts(self, batch: Batch) -> Tensor:
        assert self._texts is not None
        return self._texts.of(text_batch(batch))

    @torch.no_grad()
    def keys_values(self, batch: Batch) -> Tensor:
        """Keys and values (n, 2, M, K, d) of a batch's texts, up to where each ends, in the bare base: of n layers, M tokens,
        K key heads of width d, with positions applied."""
        assert not self._stream.edits.sites(), "the base is not bare: what is bound acts inside it"
        texts, recorded = text_batch(batch), Recorded()
        layout = replace(self._laid_out(texts), past=recorded)
        x_ND = layout.filled_up(self.embedding(texts.tokens_N.to(self.device)))
        nothing = torch.empty(0, dtype=torch.long)
        self._run(x_ND, layout, nothing, {}, read=self._read(nothing, layout))
        return recorded.layers_n2NKd()[:, :, : len(texts.tokens_N)]

    @torch.no_grad()
    def states(self, batch: Batch, first: int) -> Tensor:
        """What comes out of the layers before `first` (N, D), of a batch's own tokens. What is bound does not act there."""
        layout = self._laid_out(Batch(batch.tokens_N, batch.spans))
        self._stream.slot_N, self._stream.runs, self._stream.read = None, EVERYWHERE, None
        x_ND = layout.filled_up(self.embedding(batch.tokens_N.to(self.device)))
        with below(self._layers, first) as found:  # without the head: that may be acted at
            self.model.base_model(**_arguments(x_ND, layout))
        states_ND: Tensor = found[0][0][: len(batch.tokens_N)]
        return states_ND

    def _laid_out(self, batch: Batch, **segments: Any) -> Layout:
        return build(batch, device=self.device, round_number=round_numbers.wanted(self.device, self.dtype), **segments)

    def _run(
        self,
        x_ND: Tensor,
        layout: Layout,
        at_K: Tensor,
        weights: Mapping[str, Tensor],
        entering: tuple[int, Tensor] | None = None,
        read: Read | None = None,
    ) -> Tensor:
        """`entering`: the first layer that runs, and the states (N, D) that it gets. `read`: what of the last one's; all."""
        self._stream.slot_N, self._stream.read = layout.slot_N, read  # both stay: checkpointing runs layers once more
        self._stream.slot_K = None if layout.slot_N is None else layout.slot_N[at_K.to(self.device)]
        self._stream.runs = EVERYWHERE | dict(layout.runs.items())
        arguments = {**_arguments(x_ND, layout), "logits_to_keep": at_K.to(self.device)}
        part = nullcontext() if entering is None else above(self._layers, *entering)
        # with weights of its own there are gradients and moments as large as the base, and memory is dear
        dear = bool(weights) or is_much(self.config, len(x_ND), self.dtype)
        with part, self._stream.again.instead_of_kept(dear):
            if weights:
                output = functional_call(self.model, dict(weights), (), arguments, tie_weights=True)
            else:
                output = self.model(**arguments)
        logits_KV: Tensor = output.logits[0]
        return logits_KV


@dataclass(frozen=True, slots=True)
class _States:
    """The states that enter layer `first`."""

    first: int
    cache: TextCache


def _arguments(x_ND: Tensor, layout: Layout) -> dict[str, Any]:
    """Of the forward of a model, with its head or without."""
    return {"inputs_embeds": x_ND[None], "position_ids": layout.positions_N[None], "use_cache": False, "layout": layout}


def _check_slots(batch: Batch, edits: Edits) -> None:
    known = edits.slots()
    if known is None or batch.slots is None:
        return
    unknown = sorted(set(batch.slots) - {BARE, *known})
    Mismatch.check(
        "Some rows want an adaptation that is not there.",
        [Problem(f"slot {slot}", f"unknown, wanted by {batch.slots.count(slot)} spans") for slot in unknown],
        f"Slots with an adaptation: {', '.join(map(str, sorted(known))) or 'none'}; {BARE} is the bare base.",
    )
