"""DoRA, and LoRA at the embedding and the head, against PEFT: logits, gradients, starts and merged weights, given the same
weights. Fused matrices included: PEFT has one term for the whole of one, ours stand in it block by block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

from tests import oracles
from tests.oracles import base_of, packed_logits, stock_logits
from tests.parity.seen import SEEN
from tests.parity.test_peft import (
    REAL,
    ROWS,
    assert_close,
    assert_given_ours_it_agrees,
    assert_gradients_close,
    bare,
    move,
    moved,
    ours,
    run_peft,
)
from tritune.errors import NotMergeable
from tritune.methods.base import Delta
from tritune.methods.lora import METHOD, LoRA
from tritune.models.base import Role
from tritune.models.pretrained import Base
from tritune.models.sites import Place

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's and transformers' own

FAMILIES = (
    "llama",
    "llama-tied",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3",
    "phi3",
    "gpt2",
    "gpt-neox",
    "opt",
    "opt-post-norm",
)
ENDS = (Role.EMBED, Role.HEAD)


@dataclass
class Theirs:
    """One module of PEFT's and our sites in it."""

    module: Any
    places: list[Place]

    def parts(self, delta: Delta) -> dict[str, tuple[Tensor, tuple[Any, ...]]]:
        """For each of our tensors PEFT's parameter and which of its entries it is."""
        if self.places[0].site.role is Role.EMBED:
            A, B = self.module.lora_embedding_A["default"], self.module.lora_embedding_B["default"]
        else:
            A, B = self.module.lora_A["default"].weight, self.module.lora_B["default"].weight
        found: dict[str, tuple[Tensor, tuple[Any, ...]]] = {}
        at = 0
        for place in self.places:
            key, r = place.site.key, delta.part(place.site, "A").shape[0]
            rows = torch.arange(place.site.d_out) if place.columns is None else place.columns
            found[f"{key}.A"] = (A, (slice(at, at + r),))
            found[f"{key}.B"] = (B, (rows[:, None], torch.arange(at, at + r)))
            if "default" in self.module.lora_magnitude_vector:
                found[f"{key}.m"] = (self.module.lora_magnitude_vector["default"].weight, (rows,))
            at += r
        return found


def peft_model(base: Base, delta: Delta, config: LoRA, **options: Any) -> tuple[Any, dict[str, Any]]:
    """PEFT's model with our weights in it, and where each of our tensors is."""
    names = {module: name for name, module in base.model.named_modules()}
    paths: dict[str, list[Place]] = {}
    for place in base.places:
        if place.site in delta.sites():
            paths.setdefault(names[place.module], []).append(place)
    ranks = {path: sum(config.rank_at(place.site) for place in places) for path, places in paths.items()}
    scales = {path: config.scale_at(places[0].site) for path, places in paths.items()}
    given = peft.LoraConfig(
        r=1,
        lora_alpha=1,
        rank_pattern={f"^{path}$": rank for path, rank in ranks.items()},
        alpha_pattern={
            f"^{path}$": scale * (ranks[path] ** 0.5 if config.rank_stabilised else ranks[path])
            for path, scale in scales.items()
        },
        use_rslora=config.rank_stabilised,
        use_dora=config.dora,
        lora_dropout=config.dropout,
        target_modules=list(paths),
        task_type="CAUSAL_LM",
        **options,
    )
    model = peft.get_peft_model(oracles.stock(base), given).eval()
    pairs: dict[str, Any] = {}
    for path, places in paths.items():
        pairs |= Theirs(model.base_model.model.get_submodule(path), places).parts(delta)
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p, _ in pairs.values()}, (
        "the same places"
    )
    return model, pairs


def copy_into(pairs: dict[str, Any], delta: Delta) -> None:
    with torch.no_grad():
        for parameter, _ in pairs.values():
            parameter.zero_()
        for name, tensor in delta.export().items():
            parameter, index = pairs[name]
            parameter[index] = tensor


DORAS = {
    "all linear": LoRA(rank=3, alpha=5.0, dora=True),
    "rank-stabilised": LoRA(rank=3, alpha=5.0, dora=True, rank_stabilised=True),
    "ends": LoRA(rank=3, alpha=5.0, dora=True, roles=(Role.ATTN_O, *ENDS)),
}
PLAIN = {
    "embedding": LoRA(rank=3, alpha=5.0, roles=(Role.EMBED,)),
    "embedding, rank-stabilised, dropout": LoRA(
        rank=3, alpha=3.0, rank_stabilised=True, dropout=0.5, roles=(Role.EMBED,)
    ),
    "head": LoRA(rank=3, alpha=5.0, roles=(Role.HEAD,)),
    "both ends and a layer": LoRA(rank=2, alpha=5.0, roles=(Role.MLP_DOWN, *ENDS)),
}
FUSED = {"on a fused matrix": LoRA(rank=3, alpha=5.0, roles=(Role.ATTN_Q, Role.ATTN_K, Role.ATTN_V))}


@pytest.mark.parametrize(
    ("name", "case"),
    [
        *((name, case) for name in FAMILIES for case in (*DORAS, *PLAIN)),
        *((REAL, case) for case in (*DORAS, *PLAIN)),
        ("gpt-neox", "on a fused matrix"),  # the others of a fused matrix: test_peft.py
    ],
)
def test_logits_and_gradients_are_pefts(name: str, case: str) -> None:
    base, config = base_of(name), (DORAS | PLAIN | FUSED)[case]
    SEEN.comparing("lora", f"DoRA, {case}" if config.dora else case, base)
    delta = moved(config, base)
    model, pairs = peft_model(base, delta, config)
    copy_into(pairs, delta)
    wanted = run_peft(model)
    got, gradients = ours(base, delta)
    assert_close(got, wanted, bare(name))
    assert_gradients_close(gradients, {n: parameter.grad[index] for n, (parameter, index) in pairs.items()})


LAYERS = (Role.ATTN_Q, Role.MLP_DOWN)


@pytest.mark.parametrize(
    ("name", "dora", "roles"),
    [
        (name, dora, roles)
        for name in (REAL, "llama", "qwen3", "gemma2", "mistral", "opt-post-norm")
        for dora in (True, False)
        for roles in (LAYERS, (Role.ATTN_V, *ENDS))
    ],
)
def test_dropout_while_training_is_pefts(
    name: str, dora: bool, roles: tuple[Role, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both drop the same third of the features. DoRA drops what W is given too; the embedding drops nothing."""

    def every_third(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        return x * (torch.arange(x.shape[-1]) % 3 != 0) / (1 - p) if training and p else x

    base, config = base_of(name), LoRA(rank=3, alpha=5.0, dora=dora, dropout=0.25, roles=roles)
    SEEN.comparing("lora", f"{'DoRA, ' if dora else ''}dropout while training", base)
    delta = moved(config, base)
    model, pairs = peft_model(base, delta, config)
    copy_into(pairs, delta)
    still = run_peft(model)
    for parameter, _ in pairs.values():
        parameter.grad = None
    monkeypatch.setattr(torch.nn.functional, "dropout", every_third)
    for module in model.modules():
        if hasattr(module, "lora_dropout"):  # not the base: OPT has dropout of its own
            module.train()
    wanted = run_peft(model)
    got, gradients = ours(base, delta.train())
    assert_close(got, wanted, still)
    assert_gradients_close(gradients, {n: parameter.grad[index] for n, (parameter, index) in pairs.items()})


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt-neox", "gemma3"])
def test_the_starts_are_pefts(name: str) -> None:
    """Lengths as the base's rows have them; at the embedding A at zero and B normal, elsewhere the other way round."""
    base, config = base_of(name), LoRA(rank=64, dora=True, roles=(Role.ATTN_O, *ENDS))
    delta = METHOD.init(config, base, torch.Generator().manual_seed(0))
    _, pairs = peft_model(base, delta, config)
    for tensor_name, mine in delta.export().items():
        parameter, index = pairs[tensor_name]
        their = parameter.detach()[index]
        assert mine.shape == their.shape
        if tensor_name.endswith(".m"):
            torch.testing.assert_close(mine, their, rtol=1e-6, atol=0)
        else:
            assert bool(mine.any()) == bool(their.any()), tensor_name
            assert float(mine.std()) == pytest.approx(float(their.std()), rel=0.1), tensor_name


@pytest.mark.parametrize("start", ["pissa", "olora"])
@pytest.mark.parametrize("name", [REAL, "llama-tied", "qwen3", "gemma2", "mistral", "opt-post-norm"])
def test_dora_from_the_weights_is_pefts(name: str, start: Any) -> None:
    """PEFT takes the start out of the base first; the lengths are those of the untouched rows."""
    base = base_of(name)
    # of the real base only the smallest matrices: a decomposition of each of its layers takes its time
    roles = (Role.ATTN_K,) if name == REAL else (Role.ATTN_O, Role.MLP_DOWN)
    config = LoRA(rank=3, alpha=3.0, roles=roles, start=start, dora=True)
    SEEN.comparing("lora", f"DoRA, {start}", base)
    delta = METHOD.init(config, base, torch.Generator()).eval()
    model, pairs = peft_model(base, delta, config, init_lora_weights=start)
    move(delta, 0.1 if name != REAL else 0.01)  # at 0.02 one length's gradient is 7e-5 and 3e-5 off that in float64
    # all of each: in `pairs` ours is of twice the rank, with what is taken out
    theirs = {n: p for n, (p, _) in pairs.items()}
    assert_given_ours_it_agrees(name, delta, theirs, lambda: run_peft(model))


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt-neox", "phi3", "gemma3", "opt"])
@pytest.mark.parametrize("dora", [True, False])
def test_merged_weights_are_pefts(name: str, dora: bool) -> None:
    base = base_of(name)
    config = LoRA(
        rank=3, alpha=5.0, dora=dora, roles=None if base.tied else (Role.ATTN_Q, Role.ATTN_K, Role.ATTN_V, *ENDS)
    )
    delta = moved(config, base)
    model, pairs = peft_model(base, delta, config)
    copy_into(pairs, delta)
    merged = dict(model.merge_and_unload().named_parameters())
    mine = METHOD.merge(delta, base)
    assert len(mine) == len({base.weight_of(site)[0] for site in delta.sites()})
    for weight_name, weight in mine.items():
        torch.testing.assert_close(weight, merged[weight_name].detach(), rtol=1e-5, atol=3e-6)
        assert weight.is_contiguous()


@pytest.mark.parametrize("dora", [True, False])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt-neox", "phi3"])
def test_both_ends_merged_answer_as_unmerged(name: str, dora: bool) -> None:
    base, config = base_of(name), LoRA(rank=3, alpha=5.0, dora=dora, roles=ENDS)
    delta = moved(config, base)
    with torch.no_grad(), base.bind(delta):
        live = packed_logits(base, ROWS)
    model = oracles.stock(base)
    mine = METHOD.merge(delta, base)
    assert len(mine) == 2
    with torch.no_grad():
        for weight_name, weight in mine.items():
            model.get_parameter(weight_name).copy_(weight)
        for row, wanted in zip(ROWS, live, strict=True):
            torch.testing.assert_close(stock_logits(model, row), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("roles", [(Role.EMBED,), (Role.HEAD, Role.ATTN_Q), ENDS])
@pytest.mark.parametrize("name", ["llama-tied", "gpt2", "opt"])
def test_one_matrix_for_both_ends_is_not_merged_into(name: str, roles: tuple[Role, ...]) -> None:
    base = base_of(name)
    with pytest.raises(NotMergeable, match="are one matrix of the base"):
        METHOD.merge(moved(LoRA(rank=2, roles=roles), base), base)
