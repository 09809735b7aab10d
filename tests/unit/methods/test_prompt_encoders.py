"""Encoders of p-tuning by origin: the sizes and the functions of the code bases they are named after."""

from __future__ import annotations

import pytest
import torch

from tests.oracles import PROMPT_NETS, base_of
from tests.unit.methods.test_placement import moved
from tritune.errors import BadSettings
from tritune.methods.prompt_encoders import ENCODERS, PromptEncoder
from tritune.methods.ptuning import PTuning, PTuningDelta

D, H = 8, 6


def test_every_encoder_is_written_down_here() -> None:
    assert PROMPT_NETS.keys() == ENCODERS.keys()


@pytest.mark.parametrize("name", PROMPT_NETS, ids=" ".join)
def test_an_encoder_is_the_net_of_its_origin(name: tuple[str, str]) -> None:
    written, widths = PROMPT_NETS[name](D, H), ENCODERS[name](D, H)  # type: ignore[index]
    ours = PromptEncoder(D, widths)
    ours.load_state_dict(written.state_dict())
    assert widths.size(D) == sum(p.numel() for p in ours.parameters())
    table = torch.randn(5, D)
    torch.testing.assert_close(ours(table), written(table))


@pytest.mark.parametrize(
    ("name", "d", "h", "n", "trained"),
    [
        (("peft", "mlp"), 3072, 3072, 20, 28_382_208),  # the file that PEFT's own comparison keeps
        (("peft", "lstm"), 768, 768, 20, 27_174_144),
        (("nemo", "mlp"), 768, 768, 20, 1_196_544),
        (("thudm-lama", "lstm"), 768, 768, 9, 8_278_272),
        (("thudm-fewshot", "lstm"), 768, 768, 20, 25_403_904),
    ],
    ids=str,
)
def test_known_numbers_of_trained_parameters(name: tuple[str, str], d: int, h: int, n: int, trained: int) -> None:
    assert n * d + ENCODERS[name](d, h).size(d) == trained  # type: ignore[index]


@pytest.mark.parametrize(
    "bad",
    [
        {"origin": "thudm-lama"},
        {"origin": "nemo", "encoder": "none"},
        {"origin": "thudm-fewshot", "hidden": 4},
        {"origin": "nvidia"},
    ],
    ids=str,
)
def test_what_an_origin_has_not_is_refused(bad: dict[str, object]) -> None:
    with pytest.raises(BadSettings, match=r"origin|thudm"):
        PTuning(**bad)  # type: ignore[arg-type]


def test_one_lstm_runs_over_the_groups_of_all_places() -> None:
    """As in the paper: groups around the text are one sequence to the encoder."""
    base = base_of("llama")
    config = PTuning(tokens=4, encoder="lstm", origin="thudm-lama", placement="around", front=1)
    delta = moved(config, base)
    assert isinstance(delta, PTuningDelta)
    before = delta.prompt_PD().detach()
    with torch.no_grad():
        delta.get_parameter("table")[3] += 1
    moved_too = (delta.prompt_PD().detach() - before).abs().amax(1)
    assert bool((moved_too > 0).all())
    assert [len(s.embeddings_PD) for s in delta.segments()] == [1, 3]
