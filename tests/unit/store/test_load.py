"""`tritune.load`: an adaptation answers on its own base as it did, and everything that does not fit is one error."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import tritune as tt
from tests.oracles import packed_logits
from tritune.adaptation import Adaptation, Origin
from tritune.errors import BadData, Mismatch
from tritune.methods import METHODS, method, method_of
from tritune.models.base import Role
from tritune.models.load import load_base
from tritune.models.pretrained import Base
from tritune.models.tiny import tiny_base
from tritune.run import Training
from tritune.spec import MethodConfig, digest
from tritune.store.registry import MANIFEST, TENSORS, WHOLE_BASE
from tritune.tasks.base import Split
from tritune.tasks.classification import Classification
from tritune.trial import Trial

TEXTS = ["good one", "bad one", "so good", "very bad", "good good", "bad bad bad"]
ROWS = [{"text": text, "label": "yes" if "good" in text else "no"} for text in TEXTS]


def task_of(**options: Any) -> Classification:
    return tt.classification(test=ROWS, **options)  # type: ignore[arg-type, no-any-return]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Folders of tiny bases, as anybody would have them."""
    root = tmp_path_factory.mktemp("bases")
    patch = pytest.MonkeyPatch()
    patch.setenv("TRITUNE_CACHE", str(root / "cache"))
    for name, seed in (("llama-tied", 0), ("llama-tied", 1), ("gpt2", 0)):
        base = tiny_base(name, seed=seed)
        base.save_pretrained(root / f"{name}-{seed}", base.parameters())
    yield root
    patch.undo()


def open_base(folder: Path) -> Base:
    return load_base(folder, dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def base(bases: Path) -> Base:
    return open_base(bases / "llama-tied-0")


def adaptation(base: Base, config: MethodConfig, task: Classification | None = None) -> Adaptation:
    """As after training, without the training."""
    generator = torch.Generator().manual_seed(3)
    delta = method_of(config).init(config, base, generator)
    with torch.no_grad():
        for parameter in delta.trainable().values():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    origin = Origin(Training(), 1e-3, 0, 7, {"train": "rows"})
    return Adaptation(base, task or task_of(), config, delta.export(), origin)


LORA = tt.LoRA(rank=2, roles=(Role.ATTN_Q, Role.ATTN_V, Role.MLP_GATE))


# --- it answers as it did ---


@pytest.mark.parametrize("kind", METHODS)
def test_loaded_from_a_folder_it_answers_as_it_did(kind: str, base: Base, bases: Path, tmp_path: Path) -> None:
    saved = adaptation(base, method(kind).variants[0])
    stored = saved.save(tmp_path / "mine")
    loaded = tt.load(tmp_path / "mine", base=str(bases / "llama-tied-0"), task=task_of())
    assert loaded.base is not base
    assert loaded.evaluate() == saved.evaluate()
    assert loaded.predict(TEXTS) == saved.predict(TEXTS)
    assert stored.manifest.method == kind
    assert loaded.save(tmp_path / "again").id == stored.id, "saved, loaded and saved it is still the same thing"


def test_it_predicts_without_any_data(base: Base, tmp_path: Path) -> None:
    saved = adaptation(base, LORA)
    saved.save(tmp_path / "mine")
    loaded = tt.load(tmp_path / "mine", base=base)
    assert loaded.predict(TEXTS) == saved.predict(TEXTS)
    with pytest.raises(BadData, match="no rows"):
        loaded.predict([])
    with pytest.raises(Mismatch, match="no test rows"):
        loaded.evaluate(split=Split.TEST)


def test_what_was_learned_shows(base: Base, tmp_path: Path) -> None:
    """An adaptation that was asked for and not applied would answer as the bare base."""
    saved = adaptation(base, LORA)
    saved.save(tmp_path / "mine")
    bare = Adaptation(base, task_of(), LORA, method("lora").init(LORA, base, torch.Generator()).export(), saved.origin)
    loaded = tt.load(tmp_path / "mine", base=base)
    assert [p.probabilities for p in loaded.predict(TEXTS)] != [p.probabilities for p in bare.predict(TEXTS)]


# --- everything that does not fit ---


def forge(folder: Path, change: Callable[[dict[str, torch.Tensor]], None], *, sign: bool) -> None:
    """Change the tensors; with `sign`, the manifest says that it was always so."""
    tensors = load_file(folder / TENSORS)
    change(tensors)
    save_file(tensors, folder / TENSORS)
    if sign:
        document = unsigned(folder)
        document["files"][TENSORS] = hashlib.sha256((folder / TENSORS).read_bytes()).hexdigest()
        (folder / MANIFEST).write_text(json.dumps(document))


def unsigned(folder: Path) -> dict[str, Any]:
    """The manifest as a document without its own content hash, so that a change is not noticed by that alone."""
    document: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
    del document["id"]
    return document


def spoil(tensors: dict[str, torch.Tensor]) -> None:
    """One missing, one surplus, one misshapen, one without numbers."""
    del tensors["layers.0.attn.q.A"]
    tensors["layers.7.attn.q.A"] = torch.zeros(2)
    tensors["layers.1.attn.q.A"] = torch.zeros(5, 5)
    tensors["layers.2.attn.v.B"][0, 0] = float("nan")


SPOILED = {
    "layers.0.attn.q.A": "missing",
    "layers.7.attn.q.A": "does not belong",
    "layers.1.attn.q.A": "(5, 5)",
    "layers.2.attn.v.B": "not finite",
}


def problems_of(load: Callable[[], object]) -> Mapping[str, str]:
    with pytest.raises(Mismatch) as caught:
        load()
    found = {problem.where: problem.what for problem in caught.value.problems}
    assert all(where in str(caught.value) for where in found)
    return found


@pytest.mark.parametrize("sign", [True, False], ids=["with a manifest to match", "as a damaged file"])
def test_one_error_names_everything(base: Base, bases: Path, tmp_path: Path, sign: bool) -> None:
    """Another base (weights and tokenizer), another prompt, other labels, four bad tensors: all of it at once."""
    adaptation(base, LORA).save(tmp_path / "mine")
    forge(tmp_path / "mine", spoil, sign=sign)
    other = Base(base.model, base.tokenizer, "other", open_base(bases / "llama-tied-1").digests)
    other.digests = other.digests.model_copy(update={"tokenizer": "0" * 64})
    task = task_of(template="{{ text }} is", label_words={"yes": "ja", "no": "nein"})
    found = problems_of(lambda: tt.load(tmp_path / "mine", base=other, task=task))
    assert set(SPOILED) < set(found)
    for name, what in SPOILED.items():
        assert what in found[name]
    others = {"weights of the base", "tokenizer of the base", "prompt template", "labels"}
    assert set(found) - set(SPOILED) == (others if sign else {*others, TENSORS})


def test_another_base_alone_is_told_by_its_weights(base: Base, bases: Path, tmp_path: Path) -> None:
    adaptation(base, LORA).save(tmp_path / "mine")
    found = problems_of(lambda: tt.load(tmp_path / "mine", base=str(bases / "llama-tied-1")))
    assert set(found) == {"weights of the base"}
    assert "llama-tied-1" in found["weights of the base"]
    assert "llama-tied-0" in found["weights of the base"]


def test_a_base_of_another_family_is_told_by_everything(base: Base, bases: Path, tmp_path: Path) -> None:
    """The roles that it lacks come in the same error as the digests, not instead of them."""
    adaptation(base, LORA).save(tmp_path / "mine")
    found = problems_of(lambda: tt.load(tmp_path / "mine", base=str(bases / "gpt2-0")))
    assert {"weights of the base", "config of the base", "role 'mlp.gate'"} <= set(found)


@pytest.mark.parametrize("kind", METHODS)
def test_every_method_refuses_another_base_of_its_own_family(
    kind: str, base: Base, bases: Path, tmp_path: Path
) -> None:
    adaptation(base, method(kind).variants[0]).save(tmp_path / "mine")
    found = problems_of(lambda: tt.load(tmp_path / "mine", base=str(bases / "llama-tied-1")))
    assert "weights of the base" in found


def test_the_same_base_elsewhere_is_the_same_base(base: Base, bases: Path, tmp_path: Path) -> None:
    """Moved, renamed and saved again by transformers: the content is what counts."""
    from transformers import AutoModelForCausalLM

    adaptation(base, LORA).save(tmp_path / "mine")
    moved = tmp_path / "somewhere" / "else"
    model = AutoModelForCausalLM.from_pretrained(bases / "llama-tied-0")
    model.save_pretrained(moved, max_shard_size="20KB")
    base.tokenizer.save_pretrained(moved)
    assert len(list(moved.glob("*.safetensors"))) > 1
    assert tt.load(tmp_path / "mine", base=str(moved)).predict(TEXTS) == tt.load(tmp_path / "mine", base=base).predict(
        TEXTS
    )


def test_a_template_changed_inside_the_manifest_is_noticed(base: Base, tmp_path: Path) -> None:
    adaptation(base, LORA).save(tmp_path / "mine")
    document = unsigned(tmp_path / "mine")
    document["task"]["template"]["context"] = "{{ text }} sells"
    (tmp_path / "mine" / MANIFEST).write_text(json.dumps(document))
    assert set(problems_of(lambda: tt.load(tmp_path / "mine", base=base))) == {"prompt template"}


CHAT = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}<assistant>"


@pytest.mark.parametrize("kind", ["chat", "jinja"])
def test_another_chat_template_is_refused_where_it_writes_the_prompts(kind: Any, tmp_path: Path) -> None:
    """And only there: to any other prompt it means nothing."""
    base = tiny_base("llama-tied")
    base.tokenizer.chat_template = CHAT
    task = task_of(template=tt.TemplateSpec(kind=kind, context="{{ text }}:"))
    saved = adaptation(base, LORA, task)
    saved.save(tmp_path / "mine")
    assert tt.load(tmp_path / "mine", base=base).predict(TEXTS) == saved.predict(TEXTS)
    run = Trial(base, with_training(task), LORA, Training(), 1e-3, 0).document()
    base.tokenizer.chat_template = CHAT.replace("<assistant>", "<bot>")
    again = Trial(base, with_training(task), LORA, Training(), 1e-3, 0).document()
    if kind == "jinja":
        assert tt.load(tmp_path / "mine", base=base).predict(TEXTS) == saved.predict(TEXTS)
        assert run == again
    else:
        for given in (None, task):
            found = problems_of(lambda given=given: tt.load(tmp_path / "mine", base=base, task=given))
            assert set(found) == {"chat template of the base"}
        assert run.fingerprint() != again.fingerprint(), "no run is gone on with either"


def with_training(task: Classification) -> Classification:
    return tt.classification(  # type: ignore[no-any-return]
        train=[{**row, "text": f"{i} {row['text']}"} for i, row in enumerate(ROWS * 4)], template=task.spec.template
    )


def test_what_was_stored_before_later_fields_were_known_keeps_its_name(base: Base, tmp_path: Path) -> None:
    stored = adaptation(base, LORA).save_below(tmp_path)
    document = unsigned(stored.folder)
    del document["chat_template"], document["made"]  # known since later
    (stored.folder / MANIFEST).write_text(json.dumps(document))
    assert tt.load(stored.folder, base=base).predict(TEXTS)
    assert digest(document) == stored.id


@pytest.mark.parametrize("eighth", range(8))
def test_a_file_cut_off_anywhere_is_one_error_with_the_rest(
    base: Base, bases: Path, tmp_path: Path, eighth: int
) -> None:
    adaptation(base, LORA).save(tmp_path / "mine")
    path = tmp_path / "mine" / TENSORS
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) * eighth // 8])
    found = problems_of(lambda: tt.load(tmp_path / "mine", base=str(bases / "llama-tied-1")))
    assert set(found) == {"weights of the base", TENSORS}


def test_a_flipped_bit_is_noticed_though_every_number_is_finite(base: Base, tmp_path: Path) -> None:
    adaptation(base, LORA).save(tmp_path / "mine")
    path = tmp_path / "mine" / TENSORS
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    assert set(problems_of(lambda: tt.load(tmp_path / "mine", base=base))) == {TENSORS}


def test_a_missing_file_is_named(base: Base, tmp_path: Path) -> None:
    adaptation(base, LORA).save(tmp_path / "mine")
    (tmp_path / "mine" / TENSORS).unlink()
    assert problems_of(lambda: tt.load(tmp_path / "mine", base=base)) == {TENSORS: "missing"}


def test_a_method_nobody_knows_is_named(base: Base, tmp_path: Path) -> None:
    adaptation(base, LORA).save(tmp_path / "mine")
    document = unsigned(tmp_path / "mine") | {"method": "loar"}
    (tmp_path / "mine" / MANIFEST).write_text(json.dumps(document))
    with pytest.raises(Mismatch, match=r"'loar'(?s:.*)Did you mean 'lora'"):
        tt.load(tmp_path / "mine", base=base)


# --- a full fine-tune is a plain folder of transformers ---


@pytest.mark.parametrize("name", ["llama-tied", "gpt2", "gemma3", "phi3", "gpt-neox", "opt-post-norm"])
def test_a_full_fine_tune_loads_with_transformers_alone(name: str, tmp_path: Path) -> None:
    """Equal logits; a tied head is stored once; nothing in there names this package."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = tiny_base(name)
    saved = adaptation(base, tt.Full())
    saved.save(tmp_path / "mine")
    stored = load_file(tmp_path / "mine" / WHOLE_BASE)
    assert set(stored) == set(base.parameters()), "every weight once, by transformers' own name"
    assert "tritune" not in (tmp_path / "mine" / "config.json").read_text()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "mine", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "mine")
    ids = torch.tensor([tokenizer("a good one")["input_ids"]])
    assert ids.tolist() == [base.tokenizer("a good one")["input_ids"]]
    with torch.no_grad(), base.bind(saved.delta):
        (wanted,) = packed_logits(base, ids.tolist())
        torch.testing.assert_close(model(ids).logits[0], wanted, rtol=1e-4, atol=2e-5)
    (bare,) = packed_logits(base, ids.tolist())
    assert not torch.allclose(wanted, bare, atol=1e-2)


def test_a_bf16_full_fine_tune_stores_what_it_computed_with(tmp_path: Path) -> None:
    base = tiny_base("llama-tied", dtype=torch.bfloat16)
    saved = adaptation(base, tt.Full())
    saved.save(tmp_path / "mine")
    stored = load_file(tmp_path / "mine" / WHOLE_BASE)
    assert {t.dtype for t in stored.values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "mine" / "config.json").read_text())["dtype"] == "bfloat16"
    loaded = tt.load(tmp_path / "mine", base=base, task=task_of())
    assert loaded.evaluate() == saved.evaluate()
