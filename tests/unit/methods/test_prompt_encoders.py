"""Encoders of p-tuning by origin: the sizes and the functions of the code bases they are named after."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from tests.oracles import base_of
from tests.unit.methods.test_placement import moved
from tritune.methods.prompt_encoders import ENCODERS, PromptEncoder
from tritune.methods.ptuning import PTuning, PTuningDelta

D, H = 8, 6

#: each net as its origin writes it down, input width D: an LSTM or none, then the linear layers
WRITTEN = {
    ("peft", "mlp"): (None, [nn.Linear(D, H), nn.ReLU(), nn.Linear(H, H), nn.ReLU(), nn.Linear(H, D)]),
    ("peft", "lstm"): (H, [nn.Linear(2 * H, 2 * H), nn.ReLU(), nn.Linear(2 * H, D)]),
    ("nemo", "mlp"): (None, [nn.Linear(D, H), nn.ReLU(), nn.Linear(H, D)]),
    ("nemo", "lstm"): (H, [nn.Linear(2 * H, 2 * H), nn.ReLU(), nn.Linear(2 * H, D)]),
    ("thudm-lama", "lstm"): (D // 2, [nn.Linear(D, D), nn.ReLU(), nn.Linear(D, D)]),
    ("thudm-fewshot", "lstm"): (D, [nn.Linear(2 * D, D), nn.ReLU(), nn.Linear(D, D)]),
    ("thudm-fewshot", "mlp"): (None, [nn.Linear(D, D), nn.ReLU(), nn.Linear(D, D)]),
}


def test_every_encoder_is_written_down_here() -> None:
    assert WRITTEN.keys() == ENCODERS.keys()


@pytest.mark.parametrize("name", WRITTEN, ids=" ".join)
def test_an_encoder_is_the_net_of_its_origin(name: tuple[str, str]) -> None:
    width, layers = WRITTEN[name]
    mlp = nn.Sequential(*layers)
    lstm = None if width is None else nn.LSTM(D, width, num_layers=2, bidirectional=True, batch_first=True)
    widths = ENCODERS[name](D, H)  # type: ignore[index]
    ours = PromptEncoder(D, widths)
    ours.mlp.load_state_dict(mlp.state_dict())
    if lstm is not None:
        assert ours.lstm is not None
        ours.lstm.load_state_dict(lstm.state_dict())
    assert widths.size(D) == sum(p.numel() for p in ours.parameters())
    table = torch.randn(5, D)

    def theirs() -> Tensor:
        hidden = table[None] if lstm is None else lstm(table[None])[0]
        wanted: Tensor = mlp(hidden)[0]
        return wanted

    torch.testing.assert_close(ours(table), theirs())


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
    with pytest.raises(ValidationError, match=r"origin|thudm"):
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
