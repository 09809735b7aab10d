"""Quantised bases: they take the bytes they should, and have the answers and gradients of the weights they stand for.

The oracle is a base of floats whose weights are the dequantised ones: nothing of how codes are multiplied is in it.
"""

from __future__ import annotations

import copy
import gc
import math
import subprocess
import sys
import weakref
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.laws.conftest import Case, kinds_and_variants, training_rows
from tests.oracles import (
    dequantised_base_of,
    packed_logits,
    quantised_base_of,
    rows_of,
)
from tritune.errors import Mismatch
from tritune.methods import method
from tritune.methods.full import Full
from tritune.models import probe as probing
from tritune.models.base import LINEAR_ROLES
from tritune.models.load import load_base
from tritune.models.pretrained import Base
from tritune.models.quantised import QuantisedLinear, put_quantised
from tritune.models.tiny import CONFIGS, tiny_base
from tritune.spec import Quantisation
from tritune.text.pack import training_batch
from tritune.train.loop import batch_loss

FORMS: tuple[Quantisation, ...] = ("int8", "nf4", "fp8")
ROWS = rows_of((9, 1, 14, 5))
each = pytest.mark.parametrize("form", FORMS)


def linear(d_out: int, d_in: int, *, bias: bool = True, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Linear:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Linear(d_in, d_out, bias=bias, dtype=dtype).requires_grad_(False)


def codes_bytes(form: Quantisation, d_out: int, d_in: int) -> int:
    """What the page on quantised bases says."""
    if form in ("int8", "fp8"):
        return d_out * d_in + 4 * d_out
    return math.ceil(d_out * d_in / 2) + 4 * math.ceil(d_out * d_in / 64)


# --- one matrix ---


@each
@pytest.mark.parametrize("shape", [(48, 32), (128, 64), (7, 11), (1, 3), (64, 160), (33, 96)])
def test_a_matrix_takes_the_bytes_it_should_and_stays_near(form: Quantisation, shape: tuple[int, int]) -> None:
    source = linear(*shape)
    module = QuantisedLinear(source, form)
    assert sum(b.untyped_storage().nbytes() for b in module.buffers()) == codes_bytes(form, *shape)
    error = (module.matrix() - source.weight).abs()
    # int8: half a step of an output's largest weight / 127; nf4: half the widest gap between its 16 numbers, 0.304; fp8: half
    # a step of the smallest numbers, 2^-9 where the largest is 448, and of others half of an eighth
    largest_E1 = source.weight.abs().amax(1, keepdim=True)
    step = {"int8": largest_E1 / 127, "nf4": 0.304 * largest_E1.max(), "fp8": largest_E1 / 448 / 2**9}[form]
    relative = 1.01 / 16 if form == "fp8" else 1e-3
    assert bool((error <= 0.51 * step + relative * source.weight.abs()).all())
    assert bool(error.any())


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_product_and_gradient_are_those_of_the_dequantised_matrix(form: Quantisation, dtype: torch.dtype) -> None:
    module = QuantisedLinear(linear(24, 40, dtype=torch.bfloat16 if dtype is torch.bfloat16 else torch.float32), form)
    weight_ED, bias_E = module.matrix(dtype), module.bias.to(dtype)
    module.bias = nn.Parameter(bias_E, requires_grad=False)
    x = torch.randn(2, 5, 40, generator=torch.Generator().manual_seed(1)).to(dtype)
    results = []
    for product in (module, lambda x: nn.functional.linear(x, weight_ED) + bias_E):
        mine = x.clone().requires_grad_()
        y = product(mine)
        y.square().sum().backward()
        results.append((y.detach(), mine.grad))
    for got, wanted in zip(*results, strict=True):
        assert got is not None
        assert got.dtype is dtype
        torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6)


@each
def test_zeros_stay_zeros(form: Quantisation) -> None:
    source = linear(3, 64, bias=False)
    source.weight[1] = 0
    matrix = QuantisedLinear(source, form).matrix()
    assert not bool(matrix[1].any())
    assert bool(matrix.isfinite().all())


@each
def test_a_graph_keeps_no_dequantised_matrix(form: Quantisation) -> None:
    """Else training would hold the whole base in floats until the backward pass has been through it."""
    base = quantised_base_of("llama", form)
    shapes = {(m.out_features, m.in_features) for m in base.model.modules() if isinstance(m, QuantisedLinear)}
    kept: list[tuple[int, ...]] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tuple(tensor.shape))
        return tensor

    delta = Case(method("lora"), method("lora").variants[0], base).moved()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), base.bind(delta):
        batch_loss(base, training_batch(training_rows())).backward()
    assert kept
    assert not {shape for shape in kept if shape in shapes or shape[::-1] in shapes}


# --- a base ---


@pytest.mark.parametrize(("kind", "variant"), kinds_and_variants())
def test_what_moves_codes_is_known_without_a_base(kind: str, variant: int) -> None:
    its = method(kind)
    config = its.variants[variant]
    said = pytest.raises(Mismatch, match="codes, which learn nothing") if its.moves_codes(config) else nullcontext()
    with said:
        its.budget(config, quantised_base_of("llama", "int8"))


@each
@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_every_family_answers_as_its_dequantised_weights(name: str, form: Quantisation) -> None:
    base, wanted = quantised_base_of(name, form), dequantised_base_of(name, form)
    for got, row in zip(packed_logits(base, ROWS), ROWS, strict=True):
        torch.testing.assert_close(got, packed_logits(wanted, [row])[0], rtol=1e-4, atol=3e-5)
    far = [
        float((a - b).abs().max())
        for a, b in zip(packed_logits(base, ROWS), packed_logits(tiny_base(name), ROWS), strict=True)
    ]
    assert max(far) > 1e-3, "quantising moves the answers: the comparison above means something"


@each
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_the_probe_runs_on_the_quantised_modules(name: str, form: Quantisation) -> None:
    base = quantised_base_of(name, form)
    assert base.quantised == form
    assert probing.probe(base) < probing.TOLERANCE[torch.float32]
    assert base.twins, "the twins that are left agree with the modules"
    linear_places = [place for place in base.places if place.site.role in LINEAR_ROLES]
    assert all(isinstance(place.module, QuantisedLinear) for place in linear_places)


@each
@pytest.mark.parametrize("name", CONFIGS)
def test_weights_have_the_names_shapes_and_places_of_a_base_of_floats(name: str, form: Quantisation) -> None:
    base, floats = quantised_base_of(name, form), tiny_base(name)
    mine, theirs = base.parameters(), floats.parameters()
    assert list(mine) == list(theirs)
    assert {n: t.shape for n, t in mine.items()} == {n: t.shape for n, t in theirs.items()}
    assert mine.count() == theirs.count() == sum(p.numel() for p in floats.model.parameters())
    assert theirs.quantised == frozenset()
    for place in base.places:
        if place.site.role in LINEAR_ROLES:
            name_here, rows = base.weight_of(place.site)
            assert name_here in mine.quantised
            assert rows.of(mine[name_here]).shape == (place.site.d_out, place.site.d_in)
            own_name, own_rows = floats.weight_of(place.site)
            assert (name_here, rows.transposed, rows.fused) == (own_name, own_rows.transposed, own_rows.fused)
    for n in mine:
        assert torch.equal(mine[n], theirs[n]) == (n not in mine.quantised), n


@each
@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2"])
def test_a_base_takes_the_bytes_it_should(name: str, form: Quantisation) -> None:
    base, floats = quantised_base_of(name, form), tiny_base(name)
    modules = [m for m in base.model.modules() if isinstance(m, QuantisedLinear)]
    saved = sum(4 * m.out_features * m.in_features - codes_bytes(form, m.out_features, m.in_features) for m in modules)
    assert len(modules) == len(base.parameters().quantised)
    assert base.bytes == floats.bytes - saved
    assert base.bytes < 0.7 * floats.bytes


@each
def test_maps_of_one_input_lie_in_one_tensor_and_a_copy_in_its_own(form: Quantisation) -> None:
    base = quantised_base_of("llama", form)
    copied = Base(copy.deepcopy(base.model), base.tokenizer, "copied", base.digests)
    for model in (base.model, copied.model):
        attention = model.get_submodule("model.layers.0.self_attn")
        maps = [attention.get_submodule(f"{name}_proj") for name in "qkv"]
        assert len({m.get_buffer("codes").untyped_storage().data_ptr() for m in maps}) == 1
    wanted = packed_logits(base, ROWS)
    copied.model.get_submodule("model.layers.0.self_attn.v_proj").get_buffer("scales").zero_()
    changed = packed_logits(copied, ROWS)
    assert all(not torch.equal(a, b) for a, b in zip(changed, wanted, strict=True))
    copied.twins = False
    for fast, slow in zip(changed, packed_logits(copied, ROWS), strict=True):
        torch.testing.assert_close(fast, slow, rtol=1e-4, atol=3e-5)
    for again, before in zip(packed_logits(base, ROWS), wanted, strict=True):
        assert torch.equal(again, before)


@each
def test_the_float_weights_are_gone(form: Quantisation) -> None:
    model = nn.Sequential(linear(16, 8), nn.ReLU(), linear(8, 16))
    watched = [weakref.ref(layer.weight) for layer in model if isinstance(layer, nn.Linear)]
    put_quantised(model, [layer for layer in model if isinstance(layer, nn.Linear)], form)
    gc.collect()
    assert [type(layer) for layer in model] == [QuantisedLinear, nn.ReLU, QuantisedLinear]
    assert [weight() for weight in watched] == [None, None]


@each
@torch.no_grad()
def test_in_bfloat16_it_computes_with_the_rounded_weights(form: Quantisation) -> None:
    base, wanted = (tiny_base("llama", dtype=torch.bfloat16, quantise=q) for q in (form, None))
    weights = base.parameters()
    assert {t.dtype for t in weights.values()} == {torch.bfloat16}
    for name, parameter in wanted.parameters().items():
        parameter.copy_(weights[name])
    for got, row in zip(packed_logits(base, ROWS), packed_logits(wanted, ROWS), strict=True):
        assert float((got - row).square().mean().sqrt()) < 2e-2 * float(row.std())


@each
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_codes_are_of_the_weights_in_the_file_whatever_is_computed_in(
    form: Quantisation, stored: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Codes of rounded weights would be others: what was trained in bf16 could not be checked or used in fp32."""
    monkeypatch.setenv("TRITUNE_CACHE", str(tmp_path / "cache"))
    base = tiny_base("qwen2")
    base.save_pretrained(tmp_path / "base", {name: t.to(stored) for name, t in base.parameters().items()})
    bases = [load_base(tmp_path / "base", dtype=d, device="cpu", quantise=form) for d in ("float32", "bfloat16")]
    for wide, narrow in zip(*(base.model.modules() for base in bases), strict=True):
        if isinstance(wide, QuantisedLinear):
            for name, buffer in wide.named_buffers():
                assert torch.equal(buffer, narrow.get_buffer(name))
    for base, dtype in zip(bases, ("float32", "bfloat16"), strict=True):
        plain = load_base(tmp_path / "base", dtype=dtype, device="cpu").parameters()
        mine = base.parameters()
        assert {n: t.dtype for n, t in mine.items()} == {n: t.dtype for n, t in plain.items()}
        assert all(torch.equal(mine[n], plain[n]) for n in mine if n not in mine.quantised)
        # parts of a mapped file cannot be resized, and would keep all of the file in memory
        assert all(p.untyped_storage().resizable() for p in base.model.parameters())


# --- methods ---


def loss_and_gradients(base: Base, kind: str, variant: int) -> tuple[float, dict[str, Tensor]]:
    delta = Case(method(kind), method(kind).variants[variant], base).moved()
    with base.bind(delta):
        loss = batch_loss(base, training_batch(training_rows()))
        loss.backward()
    return float(loss.detach()), {n: p.grad for n, p in delta.trainable().items() if p.grad is not None}


def learns_in_codes(kind: str, variant: int) -> bool:
    config = method(kind).variants[variant]
    return isinstance(config, Full) and config.parts != ("norms",)


@pytest.mark.parametrize(("name", "form"), [("llama-tied", "nf4"), ("gpt2", "int8"), ("gemma2", "nf4")])
@pytest.mark.parametrize(("kind", "variant"), [cell for cell in kinds_and_variants() if not learns_in_codes(*cell)])
def test_methods_learn_as_on_the_dequantised_weights(kind: str, variant: int, name: str, form: Quantisation) -> None:
    loss, gradients = loss_and_gradients(quantised_base_of(name, form), kind, variant)
    wanted_loss, wanted = loss_and_gradients(dequantised_base_of(name, form), kind, variant)
    assert loss == pytest.approx(wanted_loss, rel=1e-5)
    assert gradients.keys() == wanted.keys()
    assert gradients
    for parameter, gradient in gradients.items():
        torch.testing.assert_close(
            gradient, wanted[parameter], rtol=1e-3, atol=1e-4 * float(wanted[parameter].abs().max())
        )


@each
@pytest.mark.parametrize("variant", [i for i in range(len(method("full").variants)) if learns_in_codes("full", i)])
def test_full_fine_tuning_of_codes_is_refused(variant: int, form: Quantisation) -> None:
    base = quantised_base_of("llama", form)
    for attempt in (method("full").budget, lambda c, b: method("full").init(c, b, torch.Generator())):
        with pytest.raises(Mismatch, match=rf"weights: are {form} codes(.|\n)*Load it without quantise"):
            attempt(method("full").variants[variant], base)


# --- the library ---


def test_importing_the_library_asks_no_hub(tmp_path: Path) -> None:
    """On some CPUs bitsandbytes fetches a kernel through the package `kernels` as soon as it is imported."""
    (tmp_path / "kernels.py").write_text("raise SystemExit('kernels was imported')")
    code = """
import sys
import torch
from tritune.models.quantised import QuantisedLinear

class Watch:  # what the part of the library that fetches kernels would find
    def find_spec(self, name, path=None, target=None):
        if name == "bitsandbytes.backends.cpu.ops":
            seen.append(sys.modules.get("kernels", "there for the taking"))

seen = []
sys.meta_path.insert(0, Watch())
QuantisedLinear(torch.nn.Linear(4, 4), "nf4")
print(seen, "kernels" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.strip() == "[None] False"
    assert done.stderr == ""


def test_without_the_library_the_error_says_what_to_install() -> None:
    code = """
import sys
sys.modules["bitsandbytes"] = None
import torch
from tritune.errors import Unavailable
from tritune.models.quantised import QuantisedLinear
try:
    QuantisedLinear(torch.nn.Linear(4, 4), "int8")
except Unavailable as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install 'tritune[quantised]'" in done.stdout
