"""A user's way in Python: data in, any method of the table, an answer out, saved and loaded; and a new method's way in."""

from __future__ import annotations

import gc
import random
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import tritune as tt
from tests.oracles import base_of
from tritune.adaptation import Adaptation
from tritune.comparison import Plan, compare
from tritune.errors import BadData, Mismatch, TrituneError
from tritune.methods import METHODS, method
from tritune.models.base import LINEAR_ROLES, Role
from tritune.models.pretrained import Base
from tritune.models.tiny import tiny_base
from tritune.run import Training
from tritune.spec import MethodConfig
from tritune.store import registry
from tritune.tasks.base import Split
from tritune.tasks.classification import Classification
from tritune.train.state import TrainState
from tritune.trial import Trial

Row = Mapping[str, str]
#: the family whose random weights learn soonest
BASE = "qwen3"


def rows(n: int, seed: int) -> list[Row]:
    """A sign somewhere among letters decides."""
    drawn = random.Random(seed)
    made = []
    for _ in range(n):
        positive = drawn.random() < 0.5
        before, after = ("".join(drawn.choices("abcdefgh", k=drawn.randint(*size))) for size in ((2, 6), (0, 2)))
        sign = "+" if positive else "-"
        made.append({"text": f"{before}{sign}{after}{drawn.randint(100, 999)}", "label": "yes" if positive else "no"})
    return made


def task_of(train: int = 160, dev: int = 60, test: int = 60, **options: Any) -> Classification:
    given = {"template": "{{ text }}=", "allow_duplicates": True, **options}
    return tt.classification(  # type: ignore[no-any-return]
        train=rows(train, 1), dev=rows(dev, 2) if dev else None, test=rows(test, 3) if test else None, **given
    )


@pytest.fixture(scope="module")
def task() -> Classification:
    return task_of()


TRAINING = Training(epochs=20, batch_tokens=600, evaluations=4)
QUICK = Training(epochs=1, batch_tokens=600, evaluations=1)

#: per method: a config and rate for eighty steps on a random base, and the accuracy on dev that it must reach; None: a
#: prompt alone can steer a base only towards what it knows, and a random one knows nothing
EFFORT: Mapping[str, tuple[MethodConfig, float, float | None]] = {
    "full": (tt.Full(), 3e-3, 0.9),
    "ptuning": (tt.PTuning(tokens=16), 3e-2, None),
    "prefix": (tt.Prefix(tokens=16), 3e-2, None),
    "bottleneck": (tt.Bottleneck(reduction_factor=0.5, placement="double_seq", nonlinearity="gelu"), 3e-2, 0.9),
    "ia3": (tt.IA3(output_roles=LINEAR_ROLES, input_roles=(Role.ATTN_O, Role.MLP_DOWN)), 1e-1, None),
    "lora": (tt.LoRA(rank=8), 2e-2, 0.9),
}


#: these share what one of them trained
one_worker = pytest.mark.xdist_group("adapted")


@pytest.fixture(scope="module")
def adapted(task: Classification) -> dict[str, Adaptation]:
    """Filled by the first test that needs a method."""
    return {}


def learn(kind: str, task: Classification, adapted: dict[str, Adaptation]) -> Adaptation:
    if kind not in adapted:
        config, rate, _ = EFFORT[kind]
        training = TRAINING.model_copy(update={"learning_rate": rate})
        adapted[kind] = tt.adapt(base_of(BASE), task, method=config, training=training, seed=0)
    return adapted[kind]


def test_every_method_of_the_table_is_tried_here() -> None:
    assert set(EFFORT) == set(METHODS)


@one_worker
@pytest.mark.parametrize("kind", METHODS)
def test_every_method_learns(kind: str, task: Classification, adapted: dict[str, Adaptation]) -> None:
    before = {name: p.clone() for name, p in base_of(BASE).parameters().items()}
    config, rate, wanted = EFFORT[kind]
    trial = Trial(base_of(BASE), task, config, TRAINING, rate, 0)
    losses = [e.point.train_loss for e in trial.events() if e.point.train_loss is not None]
    assert sum(losses[-5:]) / 5 < losses[0] / 2
    adapted[kind] = trial.adaptation()
    score = adapted[kind].evaluate(split=Split.DEV).score
    assert trial.best is not None
    assert score == trial.best.dev_score, "the best step on dev is what is served"
    if wanted is not None:
        assert score >= wanted
        assert adapted[kind].evaluate().score >= wanted - 0.05, "and rows never seen are answered too"
    assert all(torch.equal(p, before[name]) for name, p in base_of(BASE).parameters().items())


@one_worker
@pytest.mark.parametrize("kind", METHODS)
def test_what_is_measured_is_what_is_predicted(kind: str, task: Classification, adapted: dict[str, Adaptation]) -> None:
    found = learn(kind, task, adapted)
    test = task.examples(Split.TEST)
    evaluation = found.evaluate()
    predictions = found.predict([row.fields["text"] for row in test])
    assert [p.label for p in predictions] == [r.predicted for r in evaluation.results]
    assert evaluation.n == len(test)
    right = sum(p.label == row.label for p, row in zip(predictions, test, strict=True))
    assert evaluation.score == pytest.approx(right / len(test))
    assert evaluation.low <= evaluation.score <= evaluation.high
    for prediction in predictions:
        assert sum(prediction.probabilities.values()) == pytest.approx(1)
        assert prediction.label == max(prediction.probabilities, key=lambda k: prediction.probabilities[k])
    one_by_one = [found.predict([row.fields["text"]])[0].label for row in test[:10]]
    assert one_by_one == [p.label for p in predictions[:10]]


@one_worker
@pytest.mark.parametrize("kind", METHODS)
def test_saved_and_loaded_it_is_the_same(
    kind: str, task: Classification, adapted: dict[str, Adaptation], tmp_path: Path
) -> None:
    found = learn(kind, task, adapted)
    stored = found.save(tmp_path / "mine")
    loaded = tt.load(tmp_path / "mine", base=base_of(BASE), task=task)
    assert loaded.evaluate() == found.evaluate()
    assert loaded.config == found.config
    assert loaded.origin == found.origin
    assert registry.read(tmp_path / "mine").id == stored.id
    assert found.save_below(tmp_path / "below").id == stored.id
    assert tt.load(tmp_path / "below" / stored.id[:12], base=base_of(BASE)).predict(["ab+12"]) == found.predict(
        ["ab+12"]
    )


@pytest.mark.parametrize("kind", METHODS)
def test_the_same_run_again_is_the_same_adaptation(kind: str, task: Classification, tmp_path: Path) -> None:
    """Bit for bit: the content hash covers every byte that was learned."""
    config, rate, _ = EFFORT[kind]
    training = QUICK.model_copy(update={"learning_rate": rate})
    ids = []
    for seed, noise in ((0, 1), (0, 2), (1, 3)):
        torch.manual_seed(noise)
        found = tt.adapt(base_of(BASE), task, method=config, training=training, seed=seed)
        ids.append(found.save_below(tmp_path).id)
    assert ids[0] == ids[1]
    assert ids[0] != ids[2]


def test_a_method_by_name_has_its_own_defaults(task: Classification) -> None:
    found = tt.adapt(base_of(BASE), task, method="lora", training=QUICK)
    assert found.config == tt.LoRA()
    assert found.origin.learning_rate == method("lora").learning_rate
    with pytest.raises(Mismatch, match="Did you mean 'lora'"):
        tt.adapt(base_of(BASE), task, method="loar", training=QUICK)


def test_labels_of_many_tokens_in_russian_are_learned_and_told() -> None:
    words = {"yes": "верно", "no": "нет"}
    task = task_of(160, 40, 40, label_words=words)
    training = TRAINING.model_copy(update={"learning_rate": 2e-2})
    found = tt.adapt(base_of(BASE), task, method=tt.LoRA(rank=8), training=training)
    assert found.evaluate().score >= 0.9
    (prediction,) = found.predict(["abc+de123"])
    assert set(prediction.probabilities) == {"yes", "no"}
    assert prediction.label in words


def test_a_state_that_was_taken_over_is_not_kept(task: Classification) -> None:
    """Of full fine-tuning it holds every weight: kept, it would count as memory of the training."""
    states: list[TrainState] = []
    first = Trial(base_of(BASE), task, tt.Full(), QUICK, 1e-3, 0)
    list(first.events(until=1, save=lambda state: states.append(state.kept())))
    second = Trial(base_of(BASE), task, tt.Full(), QUICK, 1e-3, 0, resume=states.pop())
    assert second.resume is not None
    weights = [weakref.ref(t) for name, t in second.resume.tensors.items() if name.startswith("delta/")]
    assert len(weights) == len(base_of(BASE).parameters())
    events = second.events()
    assert next(events).step == 2
    gc.collect()
    assert not [ref for ref in weights if ref() is not None]
    events.close()  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", METHODS)
def test_in_bf16_too_what_dev_saw_in_training_is_what_is_served(kind: str, task: Classification) -> None:
    """Learned in fp32, computed in bf16: exported and loaded, every likelihood is still the same number."""
    base = tiny_base(BASE, dtype=torch.bfloat16)
    config, rate, _ = EFFORT[kind]
    trial = Trial(base, task, config, QUICK, rate, 0)
    narrow = {n for n, p in trial.delta.trainable().items() if p.dtype is not torch.float32}
    assert narrow == set(trial.delta.rests()), "a master, or a half of one"
    list(trial.events())
    assert trial.best is not None
    found = trial.adaptation().evaluate(split=Split.DEV)
    losses = [-r.log_likelihoods[task.labels.index(r.gold)] for r in found.results]
    assert found.score == trial.best.dev_score
    assert sum(losses) / len(losses) == trial.best.dev_loss


@pytest.mark.parametrize("config", [tt.Full(parts=("norms",)), tt.Full(top_layers=1)], ids=["norms", "last layer"])
def test_of_full_fine_tuning_in_parts_the_parts_are_stored(
    config: MethodConfig, task: Classification, tmp_path: Path
) -> None:
    """No second base on disk; loaded, it answers together with the base it was taken from, and with no other."""
    found = tt.adapt(base_of(BASE), task, method=config, training=QUICK.model_copy(update={"learning_rate": 1e-2}))
    stored = found.save(tmp_path / "parts")
    assert {path.name for path in stored.folder.iterdir()} == {"manifest.json", "adaptation.safetensors"}
    assert set(stored.tensors()) == set(config.chosen(base_of(BASE)))  # type: ignore[attr-defined]
    assert stored.bytes < 4 * sum(p.numel() for p in base_of(BASE).parameters().values()) / 2
    assert tt.load(tmp_path / "parts", base=base_of(BASE), task=task).evaluate() == found.evaluate()
    with pytest.raises(Mismatch, match="weights of the base"):
        tt.load(tmp_path / "parts", base=tiny_base(BASE, seed=1), task=task)


# --- what cannot work says so before it trains ---


def test_without_dev_rows_it_says_what_to_do() -> None:
    task = task_of(dev=0, dev_fraction=0.0)
    with pytest.raises(Mismatch, match="no dev rows"):
        tt.adapt(base_of(BASE), task, training=QUICK)
    found = tt.adapt(base_of(BASE), task, training=QUICK.model_copy(update={"evaluations": 0}))
    assert found.evaluate().n == 60


def test_without_training_rows_it_says_so() -> None:
    task = tt.classification(test=rows(5, 0), template="{{ text }}=")
    with pytest.raises(BadData, match="no train rows"):
        tt.adapt(base_of(BASE), task, training=QUICK)


def test_without_test_rows_it_adapts_and_predicts_but_does_not_evaluate() -> None:
    found = tt.adapt(base_of(BASE), task_of(test=0), training=QUICK)
    assert len(found.predict(["ab+1"])) == 1
    with pytest.raises(Mismatch, match="no test rows"):
        found.evaluate()


def test_a_run_from_remembered_texts_goes_on_bit_for_bit() -> None:
    """Behind a text, where nothing of it is learned: the text goes through the base once per run, stop or no stop."""
    training = Training(epochs=3, batch_tokens=200, evaluations=2)
    config, task = tt.PTuning(tokens=4, hidden=6, placement="suffix"), task_of(60, 20, 0)

    def trial(resume: TrainState | None = None) -> Trial:
        return Trial(base_of(BASE), task, config, training, 1e-2, 0, resume)

    straight, stopped = trial(), trial()
    computed: list[int] = []
    first = base_of(BASE).model.model.layers[0].mlp
    handle = first.register_forward_hook(lambda _, args, __: computed.append(args[0].shape[-2]))
    try:
        steps = sum(event.kind == "step" for event in straight.events())
    finally:
        handle.remove()
    texts = {row.context for row in (*straight._train.encoded, *straight._dev.encoded)}
    behind = 3 * sum(4 + len(row.target) - 1 for row in straight._train.encoded)
    assert steps > 10
    scored = 2 * sum(4 + sum(len(choice) - 1 for choice in row.choices) for row in straight._dev.encoded)
    assert sum(computed) == sum(map(len, texts)) + behind + scored, "every text once, whatever the epochs"
    states: list[TrainState] = []
    list(stopped.events(until=steps - 4, save=lambda state: states.append(state.kept())))
    resumed = trial(states[-1])
    list(resumed.events())
    for name, tensor in straight.delta.state().items():
        assert torch.equal(tensor, resumed.delta.state()[name]), name


def test_rows_that_are_too_long_are_listed_before_anything_is_trained() -> None:
    """The limit leaves room for the virtual tokens; a hair too long is too long."""
    base = base_of(BASE)
    text = "a" * (base.max_positions - len("= yes"))
    for virtual, fits in ((0, True), (3, False)):
        given = [*rows(20, 1), {"text": text[: len(text) - 0], "label": "no"}, {"text": text, "label": "yes"}]
        task = tt.classification(train=given, dev=rows(9, 2), template="{{ text }}=", allow_duplicates=True)
        config = tt.PTuning(tokens=virtual) if virtual else tt.LoRA(rank=1)
        if fits:
            assert Trial(base, task, config, QUICK, 1e-3, 0).total_steps > 0
        else:
            with pytest.raises(BadData) as caught:
                Trial(base, task, config, QUICK, 1e-3, 0)
            assert len(caught.value.problems) == 2
            assert f"the limit is {base.max_positions - 3}" in str(caught.value)


def test_a_rate_cannot_be_chosen_without_looking_at_dev(tmp_path: Path) -> None:
    never = QUICK.model_copy(update={"evaluations": 0})
    plan = Plan(methods=("lora",), shots=0, rates=(1.0, 3.0), training=never)
    with pytest.raises(Mismatch, match="evaluations"):
        compare(base_of(BASE), task_of(20, 10, 10), plan, tmp_path / "run")
    one = plan.model_copy(update={"rates": (1.0,)})
    comparison, _ = compare(base_of(BASE), task_of(20, 10, 10), one, tmp_path / "one")
    assert {entry.method for entry in comparison.entries} == {"zero-shot", "lora"}


def test_a_row_too_long_to_predict_is_refused_not_cut() -> None:
    found = tt.adapt(base_of(BASE), task_of(20, 10, 0), training=QUICK)
    with pytest.raises(BadData, match="tokens long"):
        found.predict(["short", "x" * 1000])


def test_a_base_is_free_again_whatever_happens(task: Classification) -> None:
    base = base_of(BASE)
    trial = Trial(base, task, tt.LoRA(rank=1), QUICK, 1e30, 0)
    with pytest.raises(TrituneError, match="not finite"):
        list(trial.events())
    assert tt.adapt(base, task_of(20, 10, 0), training=QUICK).predict(["ab+1"])


CHAT = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}<bot>"


def test_a_chat_template_needs_nothing_more_than_a_base_that_has_one(tmp_path: Path) -> None:
    base = tiny_base(BASE)
    template = tt.TemplateSpec(kind="chat", context="{{ text }}")
    with pytest.raises(Mismatch, match="no chat template"):
        tt.adapt(base, task_of(20, 10, 10, template=template), method=tt.LoRA(rank=1), training=QUICK)
    base.tokenizer.chat_template = CHAT
    found = tt.adapt(base, task_of(20, 10, 10, template=template), method=tt.LoRA(rank=1), training=QUICK)
    assert found.evaluate().n == 10
    found.save(tmp_path / "mine")
    loaded = tt.load(tmp_path / "mine", base=base)
    assert loaded.predict(["ab+1"]) == found.predict(["ab+1"])


@one_worker
def test_a_base_serves_one_adaptation_after_another(task: Classification, adapted: dict[str, Adaptation]) -> None:
    """Each answers as if it were alone on the base, in any order."""
    texts = [row.fields["text"] for row in task.examples(Split.TEST)]
    alone = {kind: learn(kind, task, adapted).predict(texts) for kind in METHODS}
    for kind in reversed(METHODS):
        assert adapted[kind].predict(texts) == alone[kind]
    assert len({tuple(p.probabilities["yes"] for p in predictions) for predictions in alone.values()}) == len(METHODS)


def test_a_base_that_is_used_is_still_the_bare_base() -> None:
    base: Base = base_of(BASE)
    assert not base.model.training
    assert not any(p.requires_grad for p in base.model.parameters())
