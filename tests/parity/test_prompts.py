"""Virtual tokens against PEFT, and where PEFT has none of the kind against the encoder as its origin writes it down, with the
prompt written between the embeddings of every row's words: logits and gradients, given the same weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from tests import oracles
from tests.oracles import base_of
from tests.parity.seen import SEEN
from tests.parity.test_peft import (
    REAL,
    ROWS,
    assert_close,
    assert_given_ours_it_agrees,
    assert_gradients_close,
    move,
    moved,
    run_peft,
    slopes,
    theirs,
    weighted_sum,
)
from tritune.methods.base import Bank
from tritune.methods.prefix import Prefix
from tritune.methods.prompt_encoders import PromptEncoder
from tritune.methods.prompt_table import PromptTable
from tritune.methods.ptuning import PTuning, PTuningDelta
from tritune.models.base import Batch, Edits, Span
from tritune.models.pretrained import Base
from tritune.models.tiny import CONFIGS

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's and transformers' own


# --- p-tuning ---

HIDDEN = 10
BASES = (REAL, "llama-tied", "gpt2", "opt-post-norm", "gpt-neox", "gemma3")


def peft_prompt(base: Base, config: PTuning) -> Any:
    shape = {
        "task_type": "CAUSAL_LM",
        "num_virtual_tokens": config.tokens,
        "token_dim": base.d_embedding,
        "num_transformer_submodules": 1,
        "num_attention_heads": base.config.num_attention_heads,
        "num_layers": base.config.num_hidden_layers,
    }
    if config.encoder == "none":
        given = peft.PromptTuningConfig(**shape)
    else:
        given = peft.PromptEncoderConfig(
            **shape, encoder_reparameterization_type=config.encoder.upper(), encoder_hidden_size=HIDDEN
        )
    model = peft.get_peft_model(oracles.stock(base), given)
    return model.eval()


@torch.no_grad()
def near_a_token(base: Base, encoder: PromptEncoder) -> None:
    """As trained prompts are. Behind random vectors SmolLM2 loses digits: PEFT in float32 is 1e-4 off PEFT in float64."""
    encoder.last.bias += base.embedding.weight[500]


@pytest.mark.parametrize("encoder", ["mlp", "lstm", "none"])
@pytest.mark.parametrize("name", BASES)
def test_p_tuning_is_pefts_p_tuning(name: str, encoder: str) -> None:
    base = base_of(name)
    hidden = None if encoder == "none" else HIDDEN
    config = PTuning(tokens=4, encoder=encoder, hidden=hidden, start="random")  # type: ignore[arg-type]
    SEEN.comparing("ptuning", {"none": "no encoder (prompt tuning)"}.get(encoder, f"{encoder} encoder"), base)
    delta = moved(config, base)
    if name == REAL and isinstance(delta, PTuningDelta) and delta.encoder is not None:
        near_a_token(base, delta.encoder)
    model = peft_prompt(base, config)
    prompt = model.prompt_encoder["default"]
    pairs = {"table": prompt.embedding.weight}
    if encoder == "mlp":
        pairs |= {f"encoder.mlp.{n}": p for n, p in prompt.mlp_head.named_parameters()}
    if encoder == "lstm":
        pairs |= {f"encoder.lstm.{n}": p for n, p in prompt.lstm_head.named_parameters()}
        pairs |= {f"encoder.mlp.{n}": p for n, p in prompt.mlp_head.named_parameters()}
    assert pairs.keys() == delta.trainable().keys(), "the same nets"
    assert sum(p.numel() for p in pairs.values()) == sum(p.numel() for p in model.parameters() if p.requires_grad)

    def forward(row: Sequence[int]) -> Tensor:
        return model(input_ids=torch.tensor([list(row)])).logits[0, config.tokens :]

    assert_given_ours_it_agrees(name, delta, pairs, lambda: theirs(forward))
    stored = model.get_prompt_embedding_to_save("default")
    torch.testing.assert_close(delta.export()["prompt"], stored.detach(), rtol=1e-5, atol=1e-6)


# --- prefix tuning ---


def peft_prefix(base: Base, config: Prefix) -> Any:
    given = peft.PrefixTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=config.tokens,
        prefix_projection=config.hidden is not None,
        encoder_hidden_size=config.hidden,
    )
    return peft.get_peft_model(oracles.stock(base), given).eval()


def peft_order(layers_n2PKd: Tensor) -> Tensor:
    """(P, n 2 K d): layer 0 keys, layer 0 values, layer 1 keys, ..."""
    return layers_n2PKd.permute(2, 0, 1, 3, 4).flatten(1)


@pytest.mark.parametrize("hidden", [None, HIDDEN], ids=["direct", "network"])
@pytest.mark.parametrize("name", [REAL, *CONFIGS])
def test_prefix_tuning_is_pefts_prefix_tuning(name: str, hidden: int | None) -> None:
    """Every family: grouped heads, sliding windows shorter than the rows, learned and rotary positions."""
    base = base_of(name)
    # a real base loses digits behind random keys and values (`near_a_token`): there they begin at those of tokens
    config = Prefix(tokens=4, hidden=hidden, start="vocabulary" if name == REAL and hidden is None else "random")
    SEEN.comparing("prefix", "keys and values" if hidden is None else "a network", base)
    delta = moved(config, base)
    model = peft_prefix(base, config)
    encoder = model.prompt_encoder["default"]
    pairs = {"table": encoder.embedding.weight}
    if hidden is not None:
        pairs |= {f"network.mlp.{n}": p for n, p in encoder.transform.named_parameters()}
    assert pairs.keys() == delta.trainable().keys(), "the same nets"

    def as_theirs(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {n: peft_order(t) if n == "table" and hidden is None else t for n, t in tensors.items()}

    assert {n: p.shape for n, p in as_theirs(delta.trainable()).items()} == {n: p.shape for n, p in pairs.items()}
    assert_given_ours_it_agrees(name, delta, pairs, lambda: run_peft(model), as_theirs)
    their_export = model.get_prompt_embedding_to_save("default")
    torch.testing.assert_close(peft_order(delta.export()["prefix"]), their_export, rtol=1e-5, atol=1e-6)


# --- encoders and places that PEFT has not ---

#: so many tokens at the end of every row are an answer, and the rest its text
ANSWER = 2
PROMPTS = {
    "nemo's mlp encoder": PTuning(tokens=4, origin="nemo", hidden=HIDDEN, start="random"),
    "nemo's lstm encoder": PTuning(tokens=4, encoder="lstm", origin="nemo", hidden=HIDDEN, start="random"),
    "thudm-lama's lstm encoder": PTuning(tokens=4, encoder="lstm", origin="thudm-lama", start="random"),
    "thudm-fewshot's lstm encoder": PTuning(tokens=4, encoder="lstm", origin="thudm-fewshot", start="random"),
    "thudm-fewshot's mlp encoder": PTuning(tokens=4, origin="thudm-fewshot", start="random"),
    "added to embeddings of tokens": PTuning(tokens=4, hidden=HIDDEN),
    "added to embeddings of a text": PTuning(tokens=5, hidden=HIDDEN, start="text", text="abc"),
    "behind the text": PTuning(tokens=3, hidden=HIDDEN, start="random", placement="suffix"),
    "around the text, one lstm": PTuning(
        tokens=5, encoder="lstm", origin="thudm-lama", start="random", placement="around", front=2
    ),
    "around the text, no encoder": PTuning(tokens=5, encoder="none", placement="around", front=3),
}


def answered(base: Base, edits: Edits, slots: tuple[int, ...] | None = None) -> list[Tensor]:
    """Logits of what follows every row's text, and of the answer's tokens."""
    spans: list[Span] = []
    asked: list[int] = []
    at = 0
    for row in ROWS:
        spans.append(Span(at, len(row), (), len(row) - ANSWER))
        at += len(row)
        asked += range(at - ANSWER - 1, at)
    batch = Batch(torch.tensor([i for row in ROWS for i in row]), tuple(spans), None, slots)
    with base.bind(edits):
        return list(base.logits(batch, torch.tensor(asked)).split(ANSWER + 1))


def written_out(
    model: Any, row: Sequence[int], front_PD: Tensor | None = None, behind_PD: Tensor | None = None
) -> Tensor:
    return oracles.logits_beside(model, row[:-ANSWER], row[-ANSWER:], front_PD, behind_PD)


def written_net(base: Base, config: PTuning, parameters: Mapping[str, Tensor]) -> nn.Module:
    """The encoder as its origin writes it down, with these weights."""
    net = oracles.PROMPT_NETS[config.origin, config.encoder](base.d_embedding, config.hidden or base.d_embedding)
    net.load_state_dict({n.removeprefix("encoder."): p for n, p in parameters.items() if n.startswith("encoder.")})
    return net


def start_of(base: Base, delta: PTuningDelta) -> Tensor:
    """What the encoder adds to: embeddings of a text's tokens, over and over, or of those that were drawn."""
    if delta.config.text is not None:
        ids = base.tokenizer(delta.config.text, add_special_tokens=False)["input_ids"]
        found: Tensor = base.embedding(torch.tensor((ids * delta.config.tokens)[: delta.config.tokens]))
        return found.detach()
    return torch.zeros(1) if delta.start is None else delta.start


@pytest.mark.parametrize("case", PROMPTS)
@pytest.mark.parametrize("name", BASES)
def test_a_prompt_is_that_of_its_origin_written_out(name: str, case: str) -> None:
    base, config = base_of(name), PROMPTS[case]
    SEEN.comparing("ptuning", case, base, "formula")
    delta = moved(config, base)
    assert isinstance(delta, PTuningDelta)
    if name == REAL and config.start == "random" and delta.encoder is not None:
        near_a_token(base, delta.encoder)
    leaves = {n: p.detach().clone().requires_grad_(True) for n, p in delta.trainable().items()}
    prompt_PD, parameters = leaves["table"], {"table": leaves["table"]}
    if config.encoder != "none":
        net = written_net(base, config, leaves)
        prompt_PD = net(prompt_PD) + start_of(base, delta)
        parameters |= {f"encoder.{n}": p for n, p in net.named_parameters()}
    n = {"prefix": config.tokens, "suffix": 0, "around": config.front}[config.placement]
    model = oracles.stock_of(name)
    wanted = theirs(lambda row: written_out(model, row, prompt_PD[:n], prompt_PD[n:]))
    got = answered(base, delta)
    weighted_sum(got).backward()
    with torch.no_grad():
        assert_close(got, wanted, [written_out(model, row) for row in ROWS])
    assert_gradients_close(
        slopes(delta.trainable()),
        slopes(parameters),
    )


@pytest.mark.parametrize("name", BASES)
def test_a_prompt_table_is_one_encoder_with_a_table_per_task(name: str) -> None:
    """Two tasks in one batch: to the encoder both matter."""
    base, config = base_of(name), PTuning(tokens=4, encoder="lstm", hidden=HIDDEN)
    SEEN.comparing("ptuning", "a prompt table of two tasks", base, "formula")
    table = PromptTable(config, base, torch.Generator().manual_seed(0))
    tasks = [table.add(task, torch.Generator().manual_seed(i)) for i, task in enumerate("ab")]
    for delta in tasks:
        move(delta, 0.2 if name != REAL else 0.02)
    net = written_net(base, config, tasks[0].trainable())
    tables = [delta.get_parameter("table").detach().clone().requires_grad_(True) for delta in tasks]
    slots, model = (0, 1, 0), oracles.stock_of(name)
    prompts = [net(t) + start_of(base, delta) for t, delta in zip(tables, tasks, strict=True)]
    wanted = [written_out(model, row, prompts[slot]) for row, slot in zip(ROWS, slots, strict=True)]
    weighted_sum(wanted).backward()
    got = answered(base, Bank(dict(enumerate(tasks))), slots)
    weighted_sum(got).backward()
    with torch.no_grad():
        assert_close(got, wanted, [written_out(model, row) for row in ROWS])
    found = {f"table {i}": delta.get_parameter("table") for i, delta in enumerate(tasks)}
    found |= dict(table.encoder.named_parameters())
    parameters = {f"table {i}": t for i, t in enumerate(tables)} | dict(net.named_parameters())
    assert_gradients_close(
        slopes(found),
        slopes(parameters),
    )
