"""A comparison that was stopped goes on: what was measured is taken over, and the figures are those of a straight run."""

from __future__ import annotations

import json
import random
import shutil
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import tritune as tt
from tests.oracles import base_of
from tritune.comparison import Plan, compare
from tritune.errors import Mismatch
from tritune.evaluate.record import Comparison, Entry
from tritune.progress import Silent
from tritune.run import Training
from tritune.tasks.base import Split
from tritune.tasks.classification import Classification
from tritune.text.encode import Encoder

BASE = "qwen3"
PLAN = Plan(
    methods=("lora", "ptuning"),
    seeds=(0, 1, 2),
    shots=2,
    rates=(1.0, 3.0),
    training=Training(epochs=1, batch_tokens=400, evaluations=2),
)
#: of the machine, not of the result
TIMES = {"train_seconds", "train_tokens_per_second", "train_peak_bytes", "eval_peak_bytes", "seconds_per_1000_rows"}
MEASURED = ["zero-shot-0", "few-shot-0", *(f"{kind}-{seed}" for kind in PLAN.methods for seed in PLAN.seeds)]


def task_of(seed: int = 0) -> Classification:
    rng = random.Random(seed)
    rows = [{"text": f"{rng.choice('+-')}{i:03d}", "label": ("no", "yes")[i % 2]} for i in range(36)]
    return tt.classification(train=rows[:18], dev=rows[18:24], test=rows[24:], template="{{ text }}=")  # type: ignore[no-any-return]


class StopsAfter(Silent):
    """Ctrl-C in the middle of the work that follows so many measurements."""

    def __init__(self, out: Path, measured: int) -> None:
        self.out, self.measured = out, measured
        self.said: list[str] = []

    def say(self, message: str) -> None:
        self.said.append(message)

    def advance(self, amount: float, **figures: float | None) -> None:
        if len(list(self.out.glob("entries/*.json"))) >= self.measured:
            raise KeyboardInterrupt


def results(found: tuple[Comparison, Any]) -> list[dict[str, Any]]:
    return [what_was_found(entry) for entry in found[0].entries]


def what_was_found(entry: Entry) -> dict[str, Any]:
    document = entry.model_dump(mode="json", exclude=TIMES)
    document["adaptation"] = document["adaptation"] and Path(document["adaptation"]).name
    for point in document["curve"]:
        point.pop("seconds")
    return document


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> tuple[Comparison, Any]:
    return compare(base_of(BASE), task_of(), PLAN, tmp_path_factory.mktemp("straight"))


@pytest.mark.parametrize("measured", [1, 2, 3, 4, 7])
def test_stopped_anywhere_it_goes_on_to_the_same_figures(
    straight: tuple[Comparison, Any], tmp_path: Path, measured: int
) -> None:
    stops = StopsAfter(tmp_path, measured)
    with pytest.raises(KeyboardInterrupt):
        compare(base_of(BASE), task_of(), PLAN, tmp_path, progress=stops)
    kept = {path.stem: path.stat().st_mtime_ns for path in tmp_path.glob("entries/*.json")}
    assert sorted(kept) == sorted(MEASURED[:measured])
    goes_on = StopsAfter(tmp_path, 99)
    found = compare(base_of(BASE), task_of(), PLAN, tmp_path, progress=goes_on)
    assert "taken over" in goes_on.said[0]
    assert f"{MEASURED[measured - 1][:-2]}, seed {MEASURED[measured - 1][-1]}" in goes_on.said[0]
    assert all((tmp_path / "entries" / f"{name}.json").stat().st_mtime_ns == at for name, at in kept.items())
    assert results(found) == results(straight)
    assert found[1] == straight[1]
    assert found[0].pairs == straight[0].pairs


def test_a_finished_comparison_trains_nothing_again_and_may_have_been_moved(
    straight: tuple[Comparison, Any], tmp_path: Path
) -> None:
    folder = Path(str(straight[0].entries[-1].adaptation)).parent.parent
    shutil.copytree(folder, tmp_path / "elsewhere")
    found = compare(base_of(BASE), task_of(), PLAN, tmp_path / "elsewhere", progress=StopsAfter(tmp_path, 0))
    assert results(found) == results(straight)
    adaptation = found[0].entries[-1].adaptation
    assert adaptation is not None
    assert Path(adaptation).parent == tmp_path / "elsewhere" / "adaptations"


def test_seeds_after_the_first_share_passes_as_the_rates_did(straight: tuple[Comparison, Any]) -> None:
    trained = [entry for entry in straight[0].entries if entry.strategy != "prompting"]
    assert [entry.trained_beside for entry in trained] == [0, 1, 1, 0, 1, 1]
    assert [entry.train_peak_bytes is None for entry in trained] == [False, True, True, False, True, True]


def test_rows_to_learn_from_are_made_into_ids_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the number of methods, rates and seeds; test rows once more for each answer, as in use."""
    made: Counter[str] = Counter()
    encode = Encoder.encode

    def counted(self: Encoder, prompts: Any, ids: list[str], where: Any) -> Any:
        made.update(ids)
        return encode(self, prompts, ids, where)

    monkeypatch.setattr(Encoder, "encode", counted)
    task = task_of()
    compare(base_of(BASE), task, PLAN, tmp_path)
    for split, times in ((Split.TRAIN, 1), (Split.DEV, 1), (Split.TEST, 2 + len(MEASURED))):
        assert {made[row.id] for row in task.examples(split)} == {times}, split


def problems_of(out: Path, task: Classification, plan: Plan, base: str = BASE) -> Mapping[str, str]:
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    with pytest.raises(Mismatch) as caught:
        compare(base_of(base), task, plan, out)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    return {problem.where: problem.what for problem in caught.value.problems}


def test_another_comparison_is_refused_with_every_difference(straight: tuple[Comparison, Any], tmp_path: Path) -> None:
    out = Path(str(straight[0].entries[-1].adaptation)).parent.parent
    training = PLAN.training.model_copy(update={"epochs": 2.0})
    other = PLAN.model_copy(
        update={"seeds": (0, 3), "training": training, "configs": {"lora": tt.LoRA(rank=2)}, "methods": ("lora",)}
    )
    found = problems_of(out, task_of(seed=1), other, base="llama")
    wanted = {"plan.seeds", "plan.training.epochs", "plan.methods", "configs.lora.rank", "configs.ptuning"}
    wanted |= {"data.train", "data.dev", "data.test", "base.digests.weights"}
    assert wanted <= set(found)
    assert found["plan.training.epochs"] == "was 1.0, is 2.0"
    document = json.loads((out / "plan.json").read_text())
    shutil.copytree(out, tmp_path / "older")
    document["environment"]["torch"] = "1.0"
    (tmp_path / "older" / "plan.json").write_text(json.dumps(document))
    assert set(problems_of(tmp_path / "older", task_of(), PLAN)) == {"environment.torch"}


@pytest.mark.parametrize("damage", ["adaptation", "examples"])
@pytest.mark.parametrize("seed", [1, 2])
def test_what_is_not_whole_is_measured_again(
    straight: tuple[Comparison, Any], tmp_path: Path, damage: str, seed: int
) -> None:
    """And stands where it stood, to the bit."""
    out = tmp_path / "run"
    entry = next(e for e in straight[0].entries if (e.method, e.seed) == ("ptuning", seed))
    shutil.copytree(Path(str(entry.adaptation)).parent.parent, out)
    if damage == "adaptation":
        shutil.rmtree(out / "adaptations" / Path(str(entry.adaptation)).name)
    else:
        (out / "examples" / f"ptuning-{seed}.jsonl").write_text("")
    said = StopsAfter(tmp_path, 99)
    found = compare(base_of(BASE), task_of(), PLAN, out, progress=said)
    assert f"ptuning-{seed} is not whole" in said.said[0]
    assert results(found) == results(straight)


def test_a_setting_that_came_later_is_no_difference(straight: tuple[Comparison, Any], tmp_path: Path) -> None:
    """A plan of a version before it goes on, and one that means something else is still refused."""
    out = tmp_path / "run"
    shutil.copytree(Path(str(straight[0].entries[-1].adaptation)).parent.parent, out)
    plan = json.loads((out / "plan.json").read_text())
    assert plan["configs"]["ptuning"].pop("placement") == "prefix"
    (out / "plan.json").write_text(json.dumps(plan))
    assert results(compare(base_of(BASE), task_of(), PLAN, out)) == results(straight)
    (out / "plan.json").write_text(json.dumps(plan))
    other = PLAN.model_copy(update={"configs": {"ptuning": tt.PTuning(placement="suffix")}})
    found = problems_of(out, task_of(), other)
    assert found == {"configs.ptuning.placement": "was 'prefix', is 'suffix'"}


def test_a_folder_in_which_nothing_was_measured_is_begun_anew(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        compare(base_of(BASE), task_of(), PLAN, tmp_path, progress=StopsAfter(tmp_path, 0))
    prompting = PLAN.model_copy(update={"methods": (), "seeds": (3,)})
    assert len(compare(base_of(BASE), task_of(), prompting, tmp_path)[0].entries) == 2
