"""Every family: packed rows, shared segments and virtual prompts against stock transformers, and every site where it says.

A family without a tiny config fails here; a broken attention function makes these same checks red (last section).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM
from transformers.activations import ACT2FN

from tests import oracles
from tests.oracles import base_of, packed_logits, rows_of, stock_logits, stock_of
from tritune.errors import UnsupportedBase
from tritune.models import attention, fast, layout, sites, tiny
from tritune.models.base import Batch, Edits, NoEdits, Role, Segment, Site, Span
from tritune.models.load import Base
from tritune.models.probe import probe
from tritune.models.sites import FAMILIES, Block, Family
from tritune.models.tiny import CONFIGS, byte_tokenizer, tiny_base
from tritune.spec import Digests

CLOSE = {"rtol": 1e-4, "atol": 3e-5}
#: shorter and longer than every window of the tiny configs, the shortest possible, and equal ones
LENGTHS = (9, 1, 14, 5, 9, 23, 2)

each_base = pytest.mark.parametrize("name", CONFIGS)


@dataclass
class Prompt(NoEdits):
    """Virtual tokens, as a method would bring them."""

    given: Sequence[Segment]

    def segments(self) -> Sequence[Segment]:
        return self.given


def prompt_of(base: Base, P: int, seed: int = 7) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(P, base.d_embedding, generator=generator) * float(base.embedding.weight.std())


# --- the table ---


def test_every_family_has_a_tiny_config() -> None:
    assert set(FAMILIES) == {kind for kind, _ in CONFIGS.values()}


@each_base
def test_the_tiny_config_is_of_the_family_it_says(name: str) -> None:
    assert base_of(name).config.model_type == CONFIGS[name][0]


# --- packed, shared, virtual ---


@torch.no_grad()
def check_packed_rows_are_solo_rows(name: str) -> None:
    base, model = base_of(name), stock_of(name)
    rows = rows_of(LENGTHS)
    wanted = [stock_logits(model, row) for row in rows]
    generator = torch.Generator().manual_seed(1)
    for order in (list(range(len(rows))), *(torch.randperm(len(rows), generator=generator).tolist() for _ in range(2))):
        for i, logits in zip(order, packed_logits(base, [rows[i] for i in order]), strict=True):
            torch.testing.assert_close(logits, wanted[i], **CLOSE)


@torch.no_grad()
def check_shared_spans_are_whole_rows(name: str) -> None:
    """An instruction, contexts behind it, several answers behind each context: as if every row were written out."""
    base, model = base_of(name), stock_of(name)
    instruction, a, b, a1, a2, b1, b2, alone = rows_of((8, 5, 12, 3, 1, 2, 9, 6), seed=2)
    parts = [instruction, a, a1, a2, b, b1, b2, alone]
    parents: list[tuple[int, ...]] = [(), (0,), (0, 1), (0, 1), (0,), (0, 4), (0, 4), ()]
    starts = [sum(map(len, parts[:i])) for i in range(len(parts))]
    spans = tuple(Span(s, len(p), up) for s, p, up in zip(starts, parts, parents, strict=True))
    batch = Batch(torch.tensor([i for part in parts for i in part]), spans)
    logits = base.logits(batch, torch.arange(len(batch.tokens_N)))
    for span, part, up in zip(spans, parts, parents, strict=True):
        whole = [i for p in up for i in parts[p]] + part
        wanted = stock_logits(model, whole)[-len(part) :]
        torch.testing.assert_close(logits[span.start : span.start + span.length], wanted, **CLOSE)


@torch.no_grad()
def check_a_virtual_segment_is_a_prepended_prompt(name: str) -> None:
    base, model = base_of(name), stock_of(name)
    rows = rows_of(LENGTHS, seed=3)
    for P in (1, 4, 10):
        prompt = prompt_of(base, P)
        with base.bind(Prompt([Segment(prompt)])):
            packed = packed_logits(base, rows)
        for row, logits in zip(rows, packed, strict=True):
            torch.testing.assert_close(logits, stock_logits(model, row, prompt), **CLOSE)


CHECKS: dict[str, Callable[[str], None]] = {
    "packed": check_packed_rows_are_solo_rows,
    "shared": check_shared_spans_are_whole_rows,
    "virtual": check_a_virtual_segment_is_a_prepended_prompt,
}


@each_base
@pytest.mark.parametrize("check", CHECKS)
def test_against_stock_transformers(name: str, check: str) -> None:
    CHECKS[check](name)


@each_base
@torch.no_grad()
def test_each_slot_gets_its_own_prompt(name: str) -> None:
    base, model = base_of(name), stock_of(name)
    rows = rows_of(LENGTHS, seed=4)
    prompts = {0: prompt_of(base, 3, 1), 1: prompt_of(base, 6, 2)}
    slots = (1, 0, -1, 1, 0, 0, -1)
    with base.bind(Prompt([Segment(p, slot) for slot, p in prompts.items()])):
        packed = packed_logits(base, rows, slots)
    for row, slot, logits in zip(rows, slots, packed, strict=True):
        torch.testing.assert_close(logits, stock_logits(model, row, prompts.get(slot)), **CLOSE)


def test_two_prompts_for_one_slot_are_refused() -> None:
    base = base_of("llama")
    twice = Prompt([Segment(prompt_of(base, 2), 0), Segment(prompt_of(base, 3), 0)])
    with base.bind(twice), pytest.raises(AssertionError, match="two segments"):
        packed_logits(base, rows_of((4,)), (0,))


@each_base
def test_gradients_of_a_shared_prompt_are_the_sum_over_prepended_rows(name: str) -> None:
    base, model = base_of(name), stock_of(name)
    rows = rows_of(LENGTHS, seed=5)
    prompt = prompt_of(base, 4).requires_grad_(True)
    generator = torch.Generator().manual_seed(6)
    weights = [torch.randn(len(row), tiny.VOCABULARY, generator=generator) for row in rows]
    with base.bind(Prompt([Segment(prompt)])):
        total = sum((logits * w).sum() for logits, w in zip(packed_logits(base, rows), weights, strict=True))
    (got,) = torch.autograd.grad(total, prompt)
    wanted = torch.zeros_like(got)
    for row, w in zip(rows, weights, strict=True):
        wanted += torch.autograd.grad((stock_logits(model, row, prompt) * w).sum(), prompt)[0]
    assert float(wanted.abs().max()) > 1e-2
    torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))


@each_base
@torch.no_grad()
def test_the_head_runs_on_the_asked_positions_only(name: str) -> None:
    base = base_of(name)
    rows = rows_of((4, 6))
    batch = Batch(torch.tensor([*rows[0], *rows[1]]), (Span(0, 4), Span(4, 6)))
    seen: list[int] = []
    head = base.model.get_output_embeddings()
    handle = head.register_forward_pre_hook(
        lambda _, args: seen.append(args[0].reshape(-1, args[0].shape[-1]).shape[0])
    )
    try:
        some = base.logits(batch, torch.tensor([9, 2, 2]))
    finally:
        handle.remove()
    assert seen == [3]
    torch.testing.assert_close(some, base.logits(batch, torch.arange(10))[[9, 2, 2]], **CLOSE)


@each_base
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@torch.no_grad()
def test_other_number_formats_pass_the_probe_and_give_wide_logits(name: str, dtype: torch.dtype) -> None:
    base = tiny_base(name, dtype=dtype)
    assert base.dtype is dtype
    (logits,) = packed_logits(base, rows_of((9,)))
    assert logits.dtype is (torch.float64 if dtype is torch.float64 else torch.float32)
    (wanted,) = packed_logits(base_of(name), rows_of((9,)))
    spread = float(wanted.std())
    difference = float((logits.double() - wanted.double()).square().mean().sqrt())
    assert difference < (0.1 if dtype is torch.bfloat16 else 1e-4) * spread


@torch.no_grad()
def test_positions_that_depend_on_the_longest_row_limit_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Phi-3 128k computes other positions for every row of a batch as soon as one row is long."""
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0, 1.2, 1.4, 1.6],
        "long_factor": [2.0, 3.0, 4.0, 8.0],
        "original_max_position_embeddings": 20,
    }
    kind, options = CONFIGS["phi3"]
    options = {**options, "rope_parameters": rope, "original_max_position_embeddings": 20}
    monkeypatch.setattr(tiny, "CONFIGS", {"phi3-long": (kind, options)})
    base = tiny_base("phi3-long")
    assert base.max_positions == 20
    model = oracles.stock(base)
    rows = rows_of((5, 20, 9))
    for row, logits in zip(rows, packed_logits(base, rows), strict=True):
        torch.testing.assert_close(logits, stock_logits(model, row), **CLOSE)


# --- sites ---


@dataclass
class Recorder(NoEdits):
    """Sees every site of a base; pushes one of them, at one token or at all."""

    base: Base
    pushed: str | None = None
    token: int | None = None
    x: dict[str, Tensor] = field(default_factory=dict)
    y: dict[str, Tensor] = field(default_factory=dict)

    def sites(self) -> Sequence[Site]:
        return self.base.sites

    def edit(self, site: Site, x_ND: Tensor, y_NE: Tensor, slot_N: Tensor | None) -> Tensor:
        assert slot_N is None
        assert x_ND.shape[1] == site.d_in
        assert y_NE.shape[1] == site.d_out
        assert x_ND.shape[0] == y_NE.shape[0]
        self.x[site.key] = x_ND.clone()
        if site.key == self.pushed:
            push = 0.5 * torch.randn(y_NE.shape, generator=torch.Generator().manual_seed(3))
            if self.token is not None:
                push *= (torch.arange(len(y_NE)) == self.token)[:, None]
            y_NE = y_NE + push
        self.y[site.key] = y_NE.clone()
        return y_NE


def record(base: Base, rows: Sequence[Sequence[int]], **options: Any) -> tuple[Recorder, list[Tensor]]:
    recorder = Recorder(base, **options)
    with torch.no_grad(), base.bind(recorder):
        logits = packed_logits(base, rows)
    assert set(recorder.x) == {site.key for site in base.sites}
    return recorder, logits


#: what comes after what inside a layer whose sub-layers follow each other
STAGE = {
    Role.ATTN_Q: 0,
    Role.ATTN_K: 0,
    Role.ATTN_V: 0,
    Role.ATTN_O: 1,
    Role.BLOCK_ATTN: 2,
    Role.MLP_GATE: 3,
    Role.MLP_UP: 3,
    Role.MLP_DOWN: 4,
    Role.BLOCK_MLP: 5,
}


def parallel(base: Base) -> bool:
    return bool(getattr(base.config, "use_parallel_residual", False))


def is_downstream(base: Base, site: Site, pushed: Site) -> bool:
    if site.layer != pushed.layer:
        return site.layer > pushed.layer
    if parallel(base) and STAGE[site.role] >= 3:
        return STAGE[pushed.role] >= 3 and STAGE[site.role] > STAGE[pushed.role]
    return STAGE[site.role] > STAGE[pushed.role]


@each_base
def test_sites_are_named_by_layer_and_role(name: str) -> None:
    base = base_of(name)
    assert [site.key for site in base.sites] == [f"layers.{site.layer}.{site.role}" for site in base.sites]
    assert len({site.key for site in base.sites}) == len(base.sites)
    roles = [{site.role for site in base.sites if site.layer == layer} for layer in range(3)]
    assert roles[0] == roles[1] == roles[2]
    assert roles[0] | {Role.MLP_GATE} == set(Role)


@each_base
def test_an_edit_reaches_everything_downstream_and_nothing_else(name: str) -> None:
    base = base_of(name)
    rows = rows_of((7, 9))
    plain, _ = record(base, rows)
    for pushed in (site for site in base.sites if site.layer == 1):
        moved, logits = record(base, rows, pushed=pushed.key)
        assert not torch.allclose(logits[0], packed_logits(base, rows)[0], atol=1e-3), pushed.key
        for site in base.sites:
            same_x = torch.equal(moved.x[site.key], plain.x[site.key])
            same_y = torch.equal(moved.y[site.key], plain.y[site.key])
            if site.key == pushed.key:
                assert same_x
                assert not same_y
            elif is_downstream(base, site, pushed):
                assert not same_y, f"{pushed.key} does not reach {site.key}"
            else:
                assert same_x, f"{pushed.key} reaches {site.key}"
                assert same_y, f"{pushed.key} reaches {site.key}"


@each_base
def test_an_edit_at_one_token_stays_in_its_row_and_behind_it(name: str) -> None:
    base = base_of(name)
    rows = rows_of((6, 8, 5))
    _, before = record(base, rows)
    for pushed in (site for site in base.sites if site.layer == 1):
        _, after = record(base, rows, pushed=pushed.key, token=6 + 3)
        assert torch.equal(after[0], before[0]), pushed.key
        assert torch.equal(after[2], before[2]), pushed.key
        assert torch.equal(after[1][:3], before[1][:3]), pushed.key
        assert not torch.allclose(after[1][3:], before[1][3:], atol=1e-4), pushed.key


@contextmanager
def spied(seen: dict[int, tuple[Tensor, Tensor, Tensor]]) -> Iterator[None]:
    """Keeps what a model hands to its attention function: query, key and value of each layer."""

    def spy(module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        layer = module.layer_idx
        seen[layer] = (query.clone(), key.clone(), value.clone())
        return attention.packed_attention(module, query, key, value, *args, **kwargs)

    AttentionInterface.register(attention.NAME, spy)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fast, "packed_attention", spy)
        yield
    AttentionInterface.register(attention.NAME, attention.packed_attention)


@each_base
def test_q_k_and_v_are_what_the_attention_function_gets(name: str) -> None:
    """Fused matrices included: pushing one role moves that one argument of the attention function, in every head."""
    base = base_of(name)
    rows = rows_of((6, 4))
    plain: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
    with spied(plain):
        record(base, rows)
    for i, role in enumerate((Role.ATTN_Q, Role.ATTN_K, Role.ATTN_V)):
        moved: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        with spied(moved):
            record(base, rows, pushed=f"layers.1.{role}")
        for j in range(3):
            difference = (moved[1][j] - plain[1][j]).abs().amax(dim=(0, 2, 3))
            assert difference.shape[0] in (2, 4)
            assert bool((difference > 1e-3).all()) if i == j else bool((difference == 0).all()), (role, j)


@each_base
def test_the_value_site_holds_the_heads_in_order(name: str) -> None:
    """Values reach the attention function untouched, so the site's columns can be compared number by number."""
    base = base_of(name)
    seen: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
    with spied(seen):
        recorder, _ = record(base, rows_of((6, 4)))
    for layer, (_, _, value) in seen.items():
        assert torch.equal(value[0].transpose(0, 1).flatten(1), recorder.y[f"layers.{layer}.attn.v"])


@each_base
def test_the_attention_output_goes_through_the_output_site(name: str) -> None:
    base = base_of(name)
    site = next(s for s in base.sites if s.role is Role.ATTN_O)
    values = next(s for s in base.sites if s.role is Role.ATTN_V and s.layer == site.layer)
    _, rows = base.weight_of(site)
    assert rows.columns is None
    recorder, _ = record(base, rows_of((1,)))  # one token sees itself only: out goes the value of its own head group
    value = recorder.y[values.key].view(1, values.d_out // 8, 8)
    per_head = value.repeat_interleave(site.d_in // values.d_out, dim=1).flatten(1)
    torch.testing.assert_close(recorder.x[site.key], per_head, **CLOSE)


@each_base
def test_gate_and_up_make_what_enters_down(name: str) -> None:
    base = base_of(name)
    config = base.config
    names = ("hidden_activation", "hidden_act", "activation_function")
    function = ACT2FN[next(getattr(config, n) for n in names if getattr(config, n, None))]
    recorder, _ = record(base, rows_of((6, 4)))
    for layer in range(3):
        y = {role: recorder.y.get(f"layers.{layer}.{role}") for role in Role}
        up, gate = y[Role.MLP_UP], y[Role.MLP_GATE]
        assert up is not None
        wanted = function(up) if gate is None else function(gate) * up
        torch.testing.assert_close(recorder.x[f"layers.{layer}.mlp.down"], wanted, **CLOSE)


@each_base
def test_block_sites_are_the_residual_stream_and_what_is_added_to_it(name: str) -> None:
    base, model = base_of(name), stock_of(name)
    (row,) = rows_of((11,))
    recorder, _ = record(base, [row])
    layers = model.get_submodule(FAMILIES[base.config.model_type](base.config).layers)
    stream: dict[int, tuple[Tensor, Tensor]] = {}

    def keep(layer: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            entered = args[0] if args else kwargs["hidden_states"]
            stream[layer] = (entered[0], (output[0] if isinstance(output, tuple) else output).reshape(len(row), -1))

        return hook

    handles = [m.register_forward_hook(keep(i), with_kwargs=True) for i, m in enumerate(layers)]
    with torch.no_grad():
        stock_logits(model, row)
        for handle in handles:
            handle.remove()
        for layer, (before, after) in stream.items():
            attn, mlp = f"layers.{layer}.block.attn", f"layers.{layer}.block.mlp"
            x, y = recorder.x, recorder.y
            torch.testing.assert_close(x[attn], before, **CLOSE)
            if parallel(base):
                torch.testing.assert_close(x[mlp], before, **CLOSE)
                torch.testing.assert_close(before + y[attn] + y[mlp], after, **CLOSE)
            elif getattr(base.config, "do_layer_norm_before", True):
                torch.testing.assert_close(before + y[attn], x[mlp], **CLOSE)
                torch.testing.assert_close(x[mlp] + y[mlp], after, **CLOSE)
            else:  # the norm comes after the sum
                module: Any = layers[layer]
                torch.testing.assert_close(module.self_attn_layer_norm(before + y[attn]), x[mlp], **CLOSE)
                torch.testing.assert_close(module.final_layer_norm(x[mlp] + y[mlp]), after, **CLOSE)
    assert set(stream) == {0, 1, 2}


def fused_rows(kind: str, role: Role, heads: int, kv: int, width: int, inner: int) -> tuple[str, list[int], bool]:
    """Parameter, outputs and whether it is stored transposed; read from the papers' and transformers' own splits."""
    q, k = heads * width, kv * width
    if kind == "gpt_neox":  # each head: query, key, value
        part = [Role.ATTN_Q, Role.ATTN_K, Role.ATTN_V].index(role)
        columns = [h * 3 * width + part * width + i for h in range(heads) for i in range(width)]
        return "gpt_neox.layers.1.attention.query_key_value.weight", columns, False
    first, last = {
        Role.ATTN_Q: (0, q),
        Role.ATTN_K: (q, q + k),
        Role.ATTN_V: (q + k, q + 2 * k),
        Role.MLP_GATE: (0, inner),
        Role.MLP_UP: (inner, 2 * inner),
    }[role]
    if kind == "gpt2":
        return "transformer.h.1.attn.c_attn.weight", list(range(first, last)), True
    module = "self_attn.qkv_proj" if role.startswith("attn") else "mlp.gate_up_proj"
    return f"model.layers.1.{module}.weight", list(range(first, last)), False


@dataclass
class Term(NoEdits):
    """y + x M at one site: what a low-rank method adds, with M given."""

    site: Site
    matrix_DE: Tensor

    def sites(self) -> Sequence[Site]:
        return (self.site,)

    def edit(self, site: Site, x_ND: Tensor, y_NE: Tensor, slot_N: Tensor | None) -> Tensor:
        return y_NE + x_ND @ self.matrix_DE


FUSED = [
    (name, role)
    for name, roles in {
        "gpt2": (Role.ATTN_Q, Role.ATTN_K, Role.ATTN_V),
        "gpt-neox": (Role.ATTN_Q, Role.ATTN_K, Role.ATTN_V),
        "phi3": (Role.ATTN_Q, Role.ATTN_K, Role.ATTN_V, Role.MLP_GATE, Role.MLP_UP),
    }.items()
    for role in roles
]


@pytest.mark.parametrize(("name", "role"), FUSED, ids=[f"{name}-{role}" for name, role in FUSED])
@torch.no_grad()
def test_a_term_at_a_fused_site_is_a_change_of_its_own_columns(name: str, role: Role) -> None:
    base = base_of(name)
    config = base.config
    kv = getattr(config, "num_key_value_heads", 4)
    parameter, columns, transposed = fused_rows(config.model_type, role, 4, kv, 8, 48)
    site = next(s for s in base.sites if s.key == f"layers.1.{role}")
    assert site.d_out == len(columns)
    assert base.weight_of(site)[0] == parameter
    matrix = 0.3 * torch.randn(site.d_in, site.d_out, generator=torch.Generator().manual_seed(0))
    rows = rows_of((6, 9))
    with base.bind(Term(site, matrix)):
        edited = packed_logits(base, rows)
    changed = oracles.stock(base)
    weight = changed.get_parameter(parameter)
    if transposed:
        weight[:, columns] += matrix
    else:
        weight[columns] += matrix.T
    for row, logits in zip(rows, edited, strict=True):
        torch.testing.assert_close(logits, stock_logits(changed, row), rtol=1e-3, atol=1e-4)
        assert not torch.allclose(logits, stock_logits(stock_of(name), row), atol=1e-2)


# --- what may not happen to a base ---


@each_base
def test_edits_leave_nothing_behind_even_when_they_fail(name: str) -> None:
    base = base_of(name)

    class Failing(Recorder):
        def edit(self, site: Site, x_ND: Tensor, y_NE: Tensor, slot_N: Tensor | None) -> Tensor:
            raise RuntimeError("on purpose")

    hooks = count_hooks(base)
    before = packed_logits(base, rows_of((5,)))[0]
    with pytest.raises(RuntimeError, match="on purpose"), base.bind(Failing(base)):
        packed_logits(base, rows_of((5,)))
    assert count_hooks(base) == hooks
    assert not base._stream.entered, "a failed forward pass keeps activations alive"
    assert torch.equal(packed_logits(base, rows_of((5,)))[0], before)


def count_hooks(base: Base) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in base.model.modules())


def test_two_edits_at_once_are_refused() -> None:
    base = base_of("llama")
    prompt = Prompt([Segment(prompt_of(base, 2))])
    with base.bind(prompt), pytest.raises(AssertionError, match="already bound"), base.bind(prompt):
        pass
    with base.bind(prompt):  # and the refusal did not lock it
        pass


def test_sites_that_a_base_lacks_are_refused() -> None:
    base = base_of("llama")
    stranger = Term(Site("layers.9.attn.q", Role.ATTN_Q, 9, 32, 32), torch.zeros(32, 32))
    with pytest.raises(AssertionError, match=r"layers\.9\.attn\.q"), base.bind(stranger):
        pass
    with base.bind(NoEdits()):
        pass


# --- what is refused ---


def test_an_unknown_family_says_what_was_looked_for() -> None:
    options = {**CONFIGS["llama"][1]}
    config = AutoConfig.for_model("olmo2", **options)
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(UnsupportedBase) as caught:
        Base(model, byte_tokenizer(), "stranger", Digests(weights="w", config="c", tokenizer="t"))
    message = str(caught.value)
    for word in ("olmo2", "Olmo2ForCausalLM", "attn.q", "mlp.down", "block.mlp", "llama", "gpt_neox"):
        assert word in message


def test_a_family_whose_modules_moved_says_which_one_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    moved = Family(
        layers="model.layers",
        linear={Role.ATTN_Q: "self_attn.wq"},
        attn=Block("input_layernorm", "self_attn"),
        mlp=Block("post_attention_layernorm", "mlp"),
    )
    monkeypatch.setitem(sites.FAMILIES, "llama", lambda _: moved)
    with pytest.raises(UnsupportedBase, match=r"'llama'.*'self_attn\.wq'.*LlamaDecoderLayer"):
        tiny_base("llama")


#: families that mix tokens outside attention, or attend by a function of their own: type, options, layers, any sub-layer
_GQA = {k: v for k, v in CONFIGS["llama"][1].items() if k != "num_hidden_layers"} | {"num_hidden_layers": 3}
MIXERS: dict[str, tuple[dict[str, Any], str, str]] = {
    "mamba": (
        {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8},
        "backbone.layers",
        "norm",
    ),
    "recurrent_gemma": (
        {**_GQA, "lru_width": 32, "attention_window_size": 6, "block_types": ["recurrent", "recurrent", "attention"]},
        "model.layers",
        "channel_pre_norm",
    ),
    "lfm2": ({**_GQA, "layer_types": ["conv", "full_attention", "conv"]}, "model.layers", "operator_norm"),
    "qwen3_next": (
        {
            **_GQA,
            "layer_types": ["linear_attention", "linear_attention", "full_attention"],
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
        },
        "model.layers",
        "input_layernorm",
    ),
    "falcon_h1": (
        {
            **_GQA,
            "mamba_d_ssm": 32,
            "mamba_n_heads": 4,
            "mamba_d_head": 8,
            "mamba_d_state": 8,
            "mamba_n_groups": 1,
            "mamba_chunk_size": 16,
        },
        "model.layers",
        "input_layernorm",
    ),
    "bloom": (
        {"vocab_size": 300, "hidden_size": 32, "n_layer": 2, "n_head": 4},
        "transformer.h",
        "input_layernorm",
    ),
}


def stranger(monkeypatch: pytest.MonkeyPatch, kind: str, options: dict[str, Any], layers: str, inside: str) -> Base:
    """A tiny model whose family the table is made to know, so that only the probe can refuse it."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **options), attn_implementation="eager")
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.25)
    family = Family(layers=layers, linear={}, attn=Block(inside, inside), mlp=Block(inside, inside))
    monkeypatch.setitem(sites.FAMILIES, kind, lambda _: family)
    return Base(model, byte_tokenizer(), f"tiny-{kind}", Digests(weights="w", config="c", tokenizer="t"))


@pytest.mark.parametrize("kind", MIXERS)
@pytest.mark.filterwarnings("ignore")  # those models warn about missing kernels
def test_a_model_that_mixes_tokens_elsewhere_is_refused_by_name(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    base = stranger(monkeypatch, kind, *MIXERS[kind])
    with pytest.raises(UnsupportedBase) as caught:
        probe(base)
    assert f"tiny-{kind}" in str(caught.value)
    assert type(base.model).__name__ in str(caught.value)


@pytest.mark.filterwarnings("ignore")
def test_a_model_with_attention_sinks_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    options = {**_GQA, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 6}
    base = stranger(monkeypatch, "gpt_oss", options, "model.layers", "input_layernorm")
    with pytest.raises(UnsupportedBase, match=r"tiny-gpt_oss.*sinks"):
        probe(base)


# --- would these checks notice? ---


def broken_window(self: layout.Group, window: int | None) -> Tensor:
    return _hidden(self, None if window is None else window + 1)


def broken_causality(self: layout.Group, window: int | None) -> Tensor:
    one_ahead = _hidden(self, window).roll(1, dims=2)
    one_ahead[..., 0] = False
    return one_ahead


def without(option: str) -> Callable[..., Any]:
    def broken(*args: Any, **kwargs: Any) -> Any:
        return attention.packed_attention(*args, **{**kwargs, option: None})

    return broken


_hidden = layout.Group.hidden
_SLIDING = ("mistral", "gemma2", "gemma3", "phi3")
MUTATIONS: dict[str, tuple[tuple[str, ...], Callable[[pytest.MonkeyPatch], None]]] = {
    "a window one too wide": (_SLIDING, lambda m: m.setattr(layout.Group, "hidden", broken_window)),
    "a window ignored": (_SLIDING, lambda m: register(m, without("sliding_window"))),
    "a soft cap ignored": (("gemma2",), lambda m: register(m, without("softcap"))),
    "the model's scaling ignored": (("opt", "gemma2", "gemma3"), lambda m: register(m, without("scaling"))),
    "one key ahead": (tuple(CONFIGS), lambda m: m.setattr(layout.Group, "hidden", broken_causality)),
}


def register(monkeypatch: pytest.MonkeyPatch, function: Callable[..., Any]) -> None:
    monkeypatch.setitem(AttentionInterface._global_mapping, attention.NAME, function)
    monkeypatch.setattr(fast, "packed_attention", function)


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_broken_attention_function_is_noticed(monkeypatch: pytest.MonkeyPatch, mutation: str) -> None:
    """By the checks above, and by the probe that every base goes through at load."""
    names, mutate = MUTATIONS[mutation]
    for name in names:
        base_of(name)
        stock_of(name)
    mutate(monkeypatch)
    for name in names:
        for check in CHECKS.values():
            with pytest.raises(AssertionError):
                check(name)
        with pytest.raises(UnsupportedBase, match=f"tiny-{name}"):
            probe(base_of(name))


def test_edits_are_a_protocol_that_doing_nothing_fulfils() -> None:
    nothing: Edits = NoEdits()
    y = torch.ones(2, 3)
    assert nothing.edit(base_of("llama").sites[0], torch.ones(2, 2), y, None) is y
    assert not nothing.sites()
    assert not nothing.segments()
    assert not nothing.weights()
