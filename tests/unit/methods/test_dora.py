"""DoRA's norms against the matrix itself, its gradient against its definition, and LoRA at both ends of a base."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.laws.conftest import outputs, training_rows
from tests.oracles import base_of, packed_logits, rows_of, stock_logits, stock_of
from tests.parity.test_peft import moved
from tritune.errors import Mismatch
from tritune.methods import dora
from tritune.methods.base import Bank
from tritune.methods.lora import METHOD, LoRA, LoraDelta
from tritune.methods.ptuning import PTuning
from tritune.models.base import BARE, Role
from tritune.models.matrix import SiteMatrix
from tritune.models.sites import Rows
from tritune.models.tiny import tiny_base
from tritune.text.pack import training_batch
from tritune.train.loop import batch_loss

ROWS = rows_of((7, 12, 3, 5))
ENDS = (Role.EMBED, Role.HEAD)
EVERYWHERE = (Role.EMBED, Role.ATTN_Q, Role.MLP_DOWN, Role.HEAD)


# --- the norms ---


@settings(max_examples=40, deadline=None)
@given(
    d=st.integers(1, 40),
    e=st.integers(1, 12),
    rank=st.integers(1, 5),
    transposed=st.booleans(),
    fused=st.booleans(),
    scale=st.floats(0.1, 4.0),
    seed=st.integers(0, 2**31),
)
def test_norms_are_those_of_the_matrix(
    d: int, e: int, rank: int, transposed: bool, fused: bool, scale: float, seed: int
) -> None:
    """In fp32 within 1e-5, relative; random terms of the size of the matrix, every layout that families have."""
    generator = torch.Generator().manual_seed(seed)
    stored = torch.randn(2 * e if fused else e, d, generator=generator)
    columns = torch.randperm(2 * e, generator=generator)[:e] if fused else None
    matrix = matrix_of(stored.T.contiguous() if transposed else stored, Rows(columns, transposed))
    own = stored if columns is None else stored[columns]
    A, B = (0.3 * torch.randn(shape, generator=generator) for shape in ((rank, d), (e, rank)))
    wanted = (own.double() + scale * (B.double() @ A.double())).norm(dim=1)
    torch.testing.assert_close(dora.reference_norms(matrix, A, B, scale).double(), wanted, rtol=1e-5, atol=1e-6)
    # What cancels is relative to the row of W: only where the sum is far shorter than that do digits go.
    atol = 1e-5 * float((own.norm(dim=1) + (scale * (B @ A)).norm(dim=1)).max())
    torch.testing.assert_close(dora.norms(matrix, A, B, scale).double(), wanted, rtol=1e-5, atol=atol)


def matrix_of(weight: Tensor, rows: Rows) -> SiteMatrix:
    module = nn.Module()
    module.register_parameter("weight", nn.Parameter(weight, requires_grad=False))
    return SiteMatrix(module, weight.dtype, None, rows)


def test_rows_as_long_as_a_vocabulary_lose_no_digits() -> None:
    """An embedding's row is its whole vocabulary, and strided: in fp32 lengths were 1e-5 off, gradients 2e-4."""
    generator = torch.Generator().manual_seed(0)
    stored = torch.randn(49152, 8, generator=generator)
    matrix = matrix_of(stored, Rows(None, transposed=True))
    A, B = 0.1 * torch.randn(3, 49152, generator=generator), 0.1 * torch.randn(8, 3, generator=generator)
    wanted = (stored.T.double() + 2 * (B.double() @ A.double())).norm(dim=1)
    torch.testing.assert_close(matrix.squared_norms_E.sqrt(), stored.double().norm(dim=0).float(), rtol=2e-7, atol=0)
    torch.testing.assert_close(dora.norms(matrix, A, B, 2.0).double(), wanted, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt-neox", "gemma2"])
def test_over_bf16_they_are_right_to_bf16s_digits(name: str) -> None:
    base = tiny_base(name, dtype=torch.bfloat16)
    delta = moved(LoRA(rank=3, dora=True, roles=EVERYWHERE), base)
    for site in delta.sites():
        matrix, A, B = base.matrix_of(site), delta.part(site, "A"), delta.part(site, "B")
        got, wanted = dora.norms(matrix, A, B, 2.0), dora.reference_norms(matrix, A, B, 2.0)
        assert got.dtype is torch.float32
        torch.testing.assert_close(got, wanted, rtol=1e-2, atol=0)
        assert delta.part(site, "m").dtype is torch.float32


def test_a_row_of_zeros_stays_one() -> None:
    """Heads have rows for tokens that nobody trained. PEFT 0.21 divides zero by zero there."""
    weight = torch.randn(4, 6)
    weight[2] = 0
    matrix = matrix_of(weight, Rows(None, transposed=False))
    m = matrix.squared_norms_E.sqrt().requires_grad_()
    c = dora.norms(matrix, torch.randn(2, 6), torch.zeros(4, 2), 1.0)
    y = dora.lengthened(matrix, torch.randn(3, 6) @ weight.T, m / c)
    y.sum().backward()
    assert bool(y.isfinite().all())
    assert not y[:, 2].any()
    assert m.grad is not None
    assert bool(m.grad.isfinite().all())


def test_the_norms_of_the_base_are_computed_once() -> None:
    base = base_of("llama")
    site = base.site("layers.1.mlp.down")
    first, second = (METHOD.init(LoRA(dora=True), base, torch.Generator()) for _ in range(2))
    assert isinstance(first, LoraDelta)
    assert base.matrix_of(site) is base.matrix_of(site)
    assert base.matrix_of(site).squared_norms_E is base.matrix_of(site).squared_norms_E
    assert first.part(site, "m").data_ptr() != second.part(site, "m").data_ptr(), "what is learned is each one's own"


# --- the gradient ---


def test_the_gradient_is_that_of_the_loss_with_the_norms_as_constants() -> None:
    """And visibly not that of the loss with the norms moving along, so that the law about gradients says something."""
    base = tiny_base("llama", dtype=torch.float64)
    delta = moved(LoRA(rank=3, dora=True, roles=EVERYWHERE), base).double()
    batch = training_batch(training_rows(6))
    with base.bind(delta):
        batch_loss(base, batch).backward()
        generator = torch.Generator().manual_seed(0)
        along = {n: torch.randn(p.shape, generator=generator).double() for n, p in delta.trainable().items()}
        slope = sum(float((p.grad * along[n]).sum()) for n, p in delta.trainable().items() if p.grad is not None)

        @torch.no_grad()
        def loss_at(step: float) -> float:
            for name, parameter in delta.trainable().items():
                parameter += step * along[name]
            loss = float(batch_loss(base, batch))
            for name, parameter in delta.trainable().items():
                parameter -= step * along[name]
            return loss

        with delta.constants_held():
            constant = (loss_at(1e-5) - loss_at(-1e-5)) / 2e-5
        moving = (loss_at(1e-5) - loss_at(-1e-5)) / 2e-5
    assert constant == pytest.approx(slope, rel=1e-4)
    assert abs(moving - slope) > 0.05 * abs(slope)


# --- both ends ---


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "opt-post-norm"])
def test_every_row_has_its_own_ends_beside_prompts(name: str) -> None:
    """Virtual tokens in front of some rows and behind others move every token's place; its slot goes with it."""
    base = base_of(name)
    deltas = {
        0: moved(LoRA(rank=2, roles=ENDS), base),
        1: moved(PTuning(tokens=4, encoder="none"), base),
        2: moved(LoRA(rank=3, dora=True, roles=EVERYWHERE), base),
        3: moved(PTuning(tokens=2, encoder="none", placement="suffix"), base),
    }
    for slots in ((2, 0, 1, 3), (3, 2, 0, 2), (0, 3, 2, 1)):
        mixed = outputs(base, Bank(deltas), ROWS, slots)
        bare = outputs(base, Bank(deltas), ROWS, (BARE,) * 4)
        for row, slot, got, plain in zip(ROWS, slots, mixed, bare, strict=True):
            (wanted,) = outputs(base, deltas[slot], [row])
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=3e-5)
            assert not torch.allclose(got, plain, atol=1e-2)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3", "opt-post-norm"])
@torch.no_grad()
def test_at_the_embedding_it_is_another_table(name: str) -> None:
    """Also where the family multiplies what it looks up (Gemma). The head of a tied base keeps its matrix."""
    base = base_of(name)
    delta = moved(LoRA(rank=3, alpha=4.0, roles=(Role.EMBED,)), base)
    site = base.site("embed")
    term = 4.0 / 3 * (delta.part(site, "B") @ delta.part(site, "A"))
    with base.bind(delta):
        got = packed_logits(base, ROWS)
    model = stock_of(name)
    embedding = model.get_input_embeddings()
    for row, logits in zip(ROWS, got, strict=True):
        table = embedding.weight + term.T
        given = torch.nn.functional.embedding(torch.tensor([row]), table) * getattr(embedding, "embed_scale", 1.0)
        wanted = model(inputs_embeds=given, use_cache=False).logits[0]
        torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=3e-5)
        assert not torch.allclose(logits, stock_logits(model, row), atol=1e-2)


def test_the_head_is_asked_for_scored_positions_alone() -> None:
    base, seen = base_of("llama"), []

    class Counting(LoraDelta):
        def edit(self, site: object, x_ND: Tensor, y_NE: Tensor, slot_N: Tensor | None) -> Tensor:
            seen.append(len(x_ND))
            return super().edit(site, x_ND, y_NE, slot_N)  # type: ignore[arg-type]

    plain = moved(LoRA(rank=2, roles=(Role.HEAD,)), base)
    delta = Counting(LoRA(rank=2, roles=(Role.HEAD,)), plain.sites(), plain.export())
    batch = training_batch(training_rows(4))
    assert batch.labels_N is not None
    with base.bind(delta):
        batch_loss(base, batch)
    assert seen == [int((batch.labels_N >= 0).sum())]
    assert seen[0] < len(batch.tokens_N)


def test_ends_take_part_only_where_they_are_named() -> None:
    adapted = {site.role for site in METHOD.init(LoRA(), base_of("llama"), torch.Generator()).sites()}
    assert not adapted & set(ENDS)


def test_a_sub_layer_has_no_matrix_to_measure() -> None:
    with pytest.raises(Mismatch, match="no matrix of its own") as caught:
        METHOD.init(LoRA(dora=True, roles=(Role.BLOCK_MLP, Role.ATTN_Q)), base_of("llama"), torch.Generator())
    assert [problem.where for problem in caught.value.problems] == ["role 'block.mlp'"]
