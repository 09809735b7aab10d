"""Settings made in Python: what is wrong with them is told in our words, all of it, and as a ValueError."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
from pydantic import ValidationError

import tritune as tt
from tritune.errors import BadSettings, TrituneError
from tritune.methods.lora import LoRA
from tritune.run import Training
from tritune.spec import Given


def refused(kind: type[Given], **settings: Any) -> BadSettings:
    with pytest.raises(BadSettings) as caught:
        kind(**settings)
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, TrituneError)
    assert "pydantic" not in str(caught.value)
    return caught.value


def test_every_setting_that_does_not_fit_is_named() -> None:
    error = refused(LoRA, rank=0, alpha="x", rnak=3)
    told = {problem.where: problem.what for problem in error.problems}
    assert told.keys() == {"rank", "alpha", "rnak"}
    assert told["rank"] == "Input should be greater than or equal to 1, found 0"
    assert "did you mean 'rank'" in told["rnak"]
    assert "rank (8)" in error.hint
    assert str(error).startswith("LoRA cannot be made of these settings.")


@pytest.mark.parametrize(
    ("kind", "settings", "said"),
    [
        (tt.PTuning, {"placement": "around"}, "PTuning: 'front' goes with placement"),
        (tt.Training, {"epochs": 0}, "epochs: Input should be greater than 0"),
        (tt.Plan, {"seeds": ()}, "seeds: "),
        (tt.TemplateSpec, {}, "context: not given"),
        (tt.Stack, {"parts": [LoRA(), tt.Full()]}, "Stack: part 2 (full)"),
    ],
)
def test_so_is_what_people_make_in_python(kind: type[Given], settings: dict[str, Any], said: str) -> None:
    assert said in str(refused(kind, **settings))


def test_documents_are_read_as_before() -> None:
    """Who catches pydantic's own error there still gets it, and what fits is made as ever."""
    with pytest.raises(ValidationError):
        LoRA.model_validate({"rank": 0})
    with pytest.raises(ValidationError):
        LoRA.model_validate_json('{"rank": 0}')
    with pytest.raises(TypeError):
        LoRA(8)  # type: ignore[misc]
    assert LoRA.model_validate({"rank": 4}) == LoRA(rank=4) == pickle.loads(pickle.dumps(LoRA(rank=4)))  # noqa: S301
    assert Training(epochs=2.0).model_copy(update={"epochs": 3.0}) == Training()
