"""Products in floats of 8 bits: those of what was rounded, summed as exactly as bf16 can say, and near enough to learn by.

The oracle rounds the same numbers and multiplies them in float64. A processor has no unit for such products; torch's own
function (since some version after 2.11) counts them out there, so that what is proven here is all but the unit.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.laws.conftest import Case, training_rows
from tests.oracles import dequantised_base_of
from tritune.methods import method
from tritune.models import fp8
from tritune.models.pretrained import Base
from tritune.models.probe import TOLERANCE, probe
from tritune.models.quantised import FORMS, Codes, Native
from tritune.models.tiny import tiny_base
from tritune.text.pack import training_batch
from tritune.train.loop import batch_loss

widths = st.sampled_from([16, 32, 80])


def spread(found: Tensor, wanted: Tensor) -> float:
    """Root mean square of the difference, as a share of that of what is wanted."""
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def dequantised(x_ND: Tensor) -> Tensor:
    codes, scales_N1 = fp8.rounded(x_ND)
    return codes.double() * scales_N1.double()


@given(st.integers(1, 7), widths, widths, st.integers(-12, 12), st.integers(0, 10**6))
def test_a_product_is_that_of_what_was_rounded(n: int, d: int, e: int, power: int, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    weight_ED = torch.randn(e, d, generator=draw) * torch.logspace(-3, 3, e)[:, None]
    codes, scales_E = fp8.pack(weight_ED)
    matrix_ED = fp8.unpack(codes, scales_E, (e, d), torch.float64)
    x = (torch.randn(1, n, d, generator=draw) * 10.0**power).bfloat16()
    g = (torch.randn(1, n, e, generator=draw) * 10.0**power).bfloat16()
    product = fp8.product(x, codes, scales_E)
    slope = fp8.slope(g, codes, scales_E)
    assert product.dtype is slope.dtype is torch.bfloat16
    assert (product.shape, slope.shape) == ((1, n, e), (1, n, d))
    wanted = dequantised(x[0]) @ matrix_ED.T
    assert spread(product[0], wanted) < 2**-8
    # the matrix of codes alone: their scales are in what enters
    wanted = dequantised(g[0].float() * scales_E) @ codes.view(fp8.FORMAT).double()
    assert spread(slope[0], wanted) < 2**-8
    assert spread(slope[0], g[0].double() @ matrix_ED) < 0.1, "and near the gradient that it stands for"


def test_rows_know_nothing_of_each_other() -> None:
    """One row's large numbers would otherwise round another's away, and packed neighbours would matter."""
    codes, scales_E = fp8.pack(torch.randn(32, 48, generator=torch.Generator().manual_seed(0)))
    rows = torch.randn(3, 48, generator=torch.Generator().manual_seed(1)).bfloat16() * torch.tensor(
        [[1.0], [1e6], [0.0]]
    )
    rows = rows.bfloat16()
    together = fp8.product(rows, codes, scales_E)
    for i in range(3):
        assert torch.equal(together[i : i + 1], fp8.product(rows[i : i + 1], codes, scales_E))
    assert not bool(together[2].any())


def test_codes_of_a_transposed_weight_lie_row_by_row() -> None:
    weight_ED = torch.randn(48, 32, generator=torch.Generator().manual_seed(0)).T
    codes, scales_E = fp8.pack(weight_ED)
    assert codes.is_contiguous()
    plain, plain_scales = fp8.pack(weight_ED.contiguous())
    assert torch.equal(codes, plain)
    assert torch.equal(scales_E, plain_scales)


def test_the_probe_asks_how_rows_are_packed_and_not_how_8_bits_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed and alone, rows round elsewhere in attention; 8 bits make so much of it that a base would be refused."""
    products: list[int] = []

    def product(x: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
        products.append(1)
        return fp8.product(x, codes, scales)

    base = quantised()
    form = replace(FORMS["fp8"], native=Native(lambda x, codes: True, product, fp8.slope))
    monkeypatch.setitem(FORMS, "fp8", form)  # type: ignore[misc]
    assert probe(base) <= TOLERANCE[torch.bfloat16]
    assert base.twins
    assert not products
    base.logits(training_batch(training_rows()), torch.arange(3))
    assert products


def test_codes_stay_codes_when_a_module_changes_its_floats() -> None:
    base = quantised()
    before = {name: t.clone() for name, t in base.model.named_buffers() if name.endswith("codes")}
    base.model.to(torch.float16)
    after = dict(base.model.named_buffers())
    assert before
    assert all(torch.equal(after[name], codes) for name, codes in before.items())


def quantised() -> Base:
    return tiny_base("llama", dtype=torch.bfloat16, quantise="fp8")


@pytest.mark.parametrize("kind", ["lora", "bottleneck", "ptuning", "prefix", "ia3"])
def test_methods_learn_nearly_as_with_exact_products(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways through the base, in the place where a GPU would take them."""
    found: list[tuple[float, Tensor]] = []
    products: list[int] = []

    def product(x: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
        products.append(1)
        return fp8.product(x, codes, scales)

    in_8_bits = Native(lambda x, codes: True, product, fp8.slope)
    for base, used in ((dequantised_base_of("llama", "fp8"), None), (quantised(), in_8_bits)):
        delta = Case(method(kind), method(kind).variants[0], base).moved()
        monkeypatch.setattr(Codes, "native", lambda self, x, used=used: used)
        with base.bind(delta):
            loss = batch_loss(base, training_batch(training_rows()))
            loss.backward()
        gradients = [p.grad.flatten() for p in delta.trainable().values() if p.grad is not None]
        found.append((float(loss.detach()), torch.cat(gradients).float()))
    assert products, "nothing was multiplied in 8 bits"
    (loss, gradient), (rough_loss, rough) = found
    assert rough_loss == pytest.approx(loss, rel=0.05)
    # the tiny base makes much of little: seen were 0.28 to 0.49, a cosine of 0.88 and more
    assert 0 < spread(rough, gradient) < 0.65
