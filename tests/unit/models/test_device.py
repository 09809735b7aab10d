"""A device that is not there is an error that says which ones are, before anything is loaded."""

from __future__ import annotations

import pytest
import torch

from tritune.errors import Mismatch
from tritune.models.device import available, device_named
from tritune.models.load import load_base


@pytest.mark.parametrize("name", ["nope", "cuda:99", "cuda:x", "meta"])
def test_what_torch_does_not_have_is_refused(name: str) -> None:
    with pytest.raises(Mismatch, match=f"device '{name}'(.|\n)*cpu"):
        device_named(name)


def test_it_is_refused_before_the_base_is_looked_for() -> None:
    with pytest.raises(Mismatch, match="device 'nope'"):
        load_base("no-such-base", device="nope")


def test_what_is_there_is_taken() -> None:
    assert [device_named(name) for name in available()] == list(available())
    assert device_named(None) == ("cuda" if torch.cuda.is_available() else "cpu")
