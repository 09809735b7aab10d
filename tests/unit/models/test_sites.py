"""Every site of every family is where it says: what goes in, what comes out, and what an edit there reaches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.activations import ACT2FN

from tests import oracles
from tests.oracles import base_of, packed_logits, rows_of, stock_logits, stock_of
from tests.unit.models.family_checks import CLOSE, Term, each_base, record
from tritune.models import attention, fast
from tritune.models.base import END_ROLES, Role, Site
from tritune.models.pretrained import Base
from tritune.models.sites import FAMILIES

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
    Role.EMBED: 0,
    Role.HEAD: 0,
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
    first, *inner, last = base.sites
    assert [site.key for site in inner] == [f"layers.{site.layer}.{site.role}" for site in inner]
    assert (first.key, first.layer, last.key, last.layer) == ("embed", -1, "head", 3)
    assert (first.d_in, first.d_out, last.d_in, last.d_out) == (300, base.d_embedding, base.d_embedding, 300)
    assert len({site.key for site in base.sites}) == len(base.sites)
    roles = [{site.role for site in base.sites if site.layer == layer} for layer in range(3)]
    assert roles[0] == roles[1] == roles[2]
    assert roles[0] | {Role.MLP_GATE} == set(Role) - set(END_ROLES)


@each_base
def test_an_edit_reaches_everything_downstream_and_nothing_else(name: str) -> None:
    base = base_of(name)
    rows = rows_of((7, 9))
    plain, _ = record(base, rows)
    for pushed in (site for site in base.sites if site.layer == 1 or site.role in END_ROLES):
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
    for pushed in (site for site in base.sites if site.layer == 1 or site.role in END_ROLES):
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
