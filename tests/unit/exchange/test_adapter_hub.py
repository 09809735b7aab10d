"""adapter-hub's folders: recorded from the package itself (tests/fixtures/record_adapter_hub.py), read and written.

With TRITUNE_ADAPTERS_PYTHON naming a Python that has the package, as in `make parity`, it also answers, in its own process.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.oracles import base_of, packed_logits
from tests.parity.seen import SEEN, family_of
from tests.unit.exchange.conftest import (
    REAL,
    ROWS,
    adapted,
    assert_equal_answers,
    assert_same_tensors,
    incoming,
    ours,
    problems,
)
from tritune.errors import Mismatch
from tritune.exchange import format_named, recognise
from tritune.exchange.adapter_hub import CONFIG, PICKLE, TENSORS
from tritune.exchange.adapter_hub.older import older
from tritune.exchange.format import SCRIPTS
from tritune.exchange.inward import import_folder
from tritune.exchange.outward import export
from tritune.exchange.weights import read_weights
from tritune.methods.bottleneck import Bottleneck
from tritune.methods.lora import LoRA
from tritune.methods.ptuning import PTuning
from tritune.models.base import Role
from tritune.models.pretrained import Base
from tritune.spec import MethodConfig

HUB = format_named("adapters")
RECORDED = Path(__file__).parents[2] / "fixtures" / "adapter_hub"
REFUSED = {"ia3": "config.composition_mode", "seq_bn_inv": "config.inv_adapter"}
READ = sorted(path.name for path in RECORDED.iterdir() if path.name not in REFUSED)
PYTHON = os.environ.get("TRITUNE_ADAPTERS_PYTHON")


def base_for(case: str) -> Base:
    return base_of(json.loads((RECORDED / case / "answer.json").read_text())["base"])


@pytest.mark.parametrize("case", READ)
def test_we_answer_as_the_package_did(case: str) -> None:
    answer = json.loads((RECORDED / case / "answer.json").read_text())
    base = base_for(case)
    assert recognise(RECORDED / case) is HUB
    found = HUB.read(RECORDED / case, base)
    mine = incoming(base, found.config, found.tensors)
    with torch.no_grad(), base.bind(mine.delta):
        (logits,) = packed_logits(base, [answer["row"]])
    wanted, got = torch.tensor(answer["logits"]), logits[answer["at"]]
    SEEN.note([got], [wanted], family_of(base))
    assert float((got - wanted).abs().max()) <= 1e-4 * float(wanted.abs().max())
    with torch.no_grad():
        (bare,) = packed_logits(base, [answer["row"]])
    assert float((got - bare[answer["at"]]).abs().max()) > 0.1
    assert found.notes == ()


@pytest.mark.parametrize("case", READ)
def test_what_came_in_goes_out_with_every_byte(case: str, tmp_path: Path) -> None:
    base = base_for(case)
    found = HUB.read(RECORDED / case, base)
    HUB.write(incoming(base, found.config, found.tensors), tmp_path)
    theirs = {name.replace(".mine.", ".tritune."): t for name, t in weights(RECORDED / case).items()}
    assert_same_tensors(load_file(tmp_path / TENSORS), theirs)
    before, after = (json.loads((folder / CONFIG).read_text()) for folder in (RECORDED / case, tmp_path))
    same = {key: after["config"][key] for key in after["config"] if key in before["config"]}
    assert same == {key: before["config"][key] for key in same}
    assert after.keys() == before.keys()
    again = HUB.read(tmp_path, base)
    assert again.config == found.config
    assert_same_tensors(again.tensors, found.tensors)


def weights(folder: Path) -> dict[str, Tensor]:
    return read_weights(folder, TENSORS, PICKLE)


OURS: Mapping[str, tuple[str, MethodConfig]] = {
    "seq": ("llama-tied", Bottleneck(reduction_factor=8.0)),
    "double_seq": ("gpt2", Bottleneck(placement="double_seq", nonlinearity="swish", init="bert", scaling=0.5)),
    "par": ("mistral", Bottleneck(placement="par", nonlinearity="gelu", reduction_factor=3.0, scaling="learned")),
    "presets": ("gpt2", Bottleneck(preset="scaled_par_bn", reduction_factor=8.0)),
    "layers left out, widths by layer": (
        "llama-tied",
        Bottleneck(
            preset="double_seq_bn", leave_out=(0,), reduction_factor={"1": 4.0, "default": 8.0}, nonlinearity="gelu_new"
        ),
    ),
    "the last layers": ("llama-tied", Bottleneck(reduction_factor={"2": 4.0}, top_layers=2, leave_out=(1,))),
    "lora in the last layers": ("gpt2", LoRA(rank=3, roles=(Role.ATTN_Q, Role.ATTN_V, Role.MLP_UP), top_layers=2)),
    "norms of its own, a scale per channel": (
        "mistral",
        Bottleneck(
            ln_before=True, ln_after=True, scaling="channel", dropout=0.3, nonlinearity="leakyrelu", init="houlsby"
        ),
    ),
    "a norm of the sum": (
        "gpt2",
        Bottleneck(placement="double_seq", blocks=("attn",), ln_after=True, adapter_residual_before_ln=True),
    ),
    "on the whole stream": (
        "llama-tied",
        Bottleneck(placement="double_seq", original_ln_before=True, nonlinearity="tanh"),
    ),
    "on the output": ("mistral", Bottleneck(original_ln_before=False, nonlinearity="sigmoid")),
    "the stream as residual": ("gpt2", Bottleneck(original_ln_after=False, residual_before_ln=False)),
    "beside, without the stream": ("llama-tied", Bottleneck(placement="par", original_ln_after=False)),
    "beside both": ("mistral", Bottleneck(placement="par", blocks=("attn", "mlp"), ln_before=True)),
    "lora": ("llama-tied", LoRA(rank=3, alpha=5.0, roles=(Role.ATTN_Q, Role.ATTN_V, Role.MLP_UP))),
    "stabilised lora": ("mistral", LoRA(rank=3, alpha=5.0, rank_stabilised=True, roles=(Role.ATTN_K,))),
    "lora of other ranks": (
        "gpt2",
        LoRA(
            rank=2,
            roles=(Role.ATTN_Q, Role.ATTN_V, Role.MLP_UP),
            ranks={Role.ATTN_V: 3, Role.MLP_UP: 1},
            alphas={Role.ATTN_Q: 2.0},
        ),
    ),
    "pissa": ("llama-tied", LoRA(rank=2, roles=(Role.ATTN_K, Role.MLP_DOWN), start="pissa")),
    "lora on gpt2": ("gpt2", LoRA(rank=2, roles=(Role.ATTN_Q, Role.ATTN_K, Role.ATTN_V, Role.MLP_DOWN))),
    "seq on the real base": (REAL, Bottleneck(preset="seq_bn")),
    "par on the real base": (REAL, Bottleneck(preset="scaled_par_bn", reduction_factor=16.0)),
    "lora on the real base": (REAL, LoRA(rank=4, roles=(Role.ATTN_Q, Role.ATTN_V, Role.MLP_DOWN))),
}


@pytest.mark.parametrize("case", OURS)
def test_ours_comes_back_with_every_byte(case: str, tmp_path: Path) -> None:
    """Where its LoRA has one rank and one scale for all, the bytes of others are not kept, and the answers are."""
    name, config = OURS[case]
    mine = adapted(base_of(name), config)
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    HUB.write(mine, first)
    back = HUB.read(first, mine.base)
    if isinstance(config, LoRA) and config.ranks:
        assert_equal_answers(ours(incoming(mine.base, back.config, back.tensors)), ours(mine), mine.base)
    else:
        assert_same_tensors(back.tensors, mine.delta.export())
    HUB.write(incoming(mine.base, back.config, back.tensors), second)
    if not isinstance(config, LoRA):  # an alpha may be rounded in its last digits
        assert (first / CONFIG).read_text() == (second / CONFIG).read_text(), "said in other words it is the same there"
    assert_same_tensors(load_file(second / TENSORS), load_file(first / TENSORS))


with_package = pytest.mark.skipif(PYTHON is None, reason="TRITUNE_ADAPTERS_PYTHON names no Python that has the package")


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, list[Tensor]]:
    """The package's answers to `ROWS` from every folder that we write, in one process."""
    root = tmp_path_factory.mktemp("package")

    @cache
    def place(name: str) -> Path:
        base, own, older = base_of(name), root / name, root / f"{name} of older form"
        if base.located is not None:
            own = base.located.folder
        else:
            base.save_pretrained(own, base.parameters())
        older.mkdir()
        return HUB.for_reference(root, base, own, older)[1]

    jobs = []
    for i, (name, config) in enumerate(OURS.values()):
        folder = root / f"case {i}"
        folder.mkdir()
        HUB.write(adapted(base_of(name), config), folder)
        job = {"folder": folder, "base": place(name), "out": folder / "logits.safetensors"}
        jobs.append({key: str(path) for key, path in job.items()} | {"rows": ROWS, "dtype": "float32", "device": "cpu"})
    (root / "jobs.json").write_text(json.dumps(jobs))
    command = [PYTHON, Path(__file__).with_name("answer_many.py"), SCRIPTS / HUB.script, root / "jobs.json"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    subprocess.run(list(map(str, command)), check=True, env=environment)
    found = [load_file(str(job["out"])) for job in jobs]
    return {case: [logits[str(i)] for i in range(len(ROWS))] for case, logits in zip(OURS, found, strict=True)}


@with_package
@pytest.mark.parametrize("case", OURS)
def test_the_package_itself_answers_as_we_do(case: str, package: Mapping[str, list[Tensor]]) -> None:
    name, config = OURS[case]
    mine = adapted(base_of(name), config)
    assert_equal_answers(package[case], ours(mine), mine.base)


@with_package
def test_there_and_back_with_the_package(tmp_path: Path) -> None:
    mine = adapted(base_of("llama-tied"), Bottleneck(reduction_factor=8.0))
    done = export(mine, "adapters", tmp_path / "out", python=PYTHON)
    assert done.verdict.by.startswith("adapters ")
    assert done.verdict.difference < 1e-4 < 0.1 < done.verdict.effect
    assert import_folder(tmp_path / "out", mine.base, python=PYTHON).verdict is not None


def test_older_versions_are_told_how_positions_rotate() -> None:
    """transformers 4 passes "rope_parameters" over without a word, and rotates by its defaults."""
    scaled = {"rope_type": "llama3", "factor": 8.0, "rope_theta": 5e5}
    assert older({"rope_parameters": scaled}) == {
        "rope_parameters": scaled,
        "rope_theta": 5e5,
        "rope_scaling": {"rope_type": "llama3", "factor": 8.0},
    }
    plain = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e5}}
    assert older(plain) == {**plain, "rope_theta": 1e5}
    assert older({"n_embd": 3}) == {"n_embd": 3}


# --- what does not fit ---


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return shutil.copytree(RECORDED / "lora", tmp_path / "lora")


def change(folder: Path, inner: Mapping[str, Any], **outer: Any) -> None:
    path = folder / CONFIG
    document = json.loads(path.read_text()) | outer
    path.write_text(json.dumps(document | {"config": document["config"] | dict(inner)}))


def refused(read: Callable[[], object]) -> dict[str, str]:
    with pytest.raises(Mismatch) as caught:
        read()
    return problems(caught.value)


@pytest.mark.parametrize("case", REFUSED)
def test_other_kinds_are_refused_by_name(case: str) -> None:
    assert REFUSED[case] in refused(lambda: HUB.read(RECORDED / case, base_for(case)))


def test_what_adapter_hubs_lora_cannot_hold_is_named(tmp_path: Path) -> None:
    config = LoRA(rank=2, dora=True, roles=(Role.ATTN_Q, Role.ATTN_O, Role.EMBED, Role.HEAD))
    with pytest.raises(Mismatch) as caught:
        HUB.write(adapted(base_of("llama"), config), tmp_path)
    assert set(problems(caught.value)) == {"dora", "role 'attn.o'", "role 'embed'", "role 'head'"}


def test_one_error_names_every_setting(folder: Path) -> None:
    wrong = {
        "use_dora": True,
        "use_gating": True,
        "vera_d": 0.1,
        "r": 0,
        "alpha": "8",
        "attn_matrices": ["o"],
        "new": 1,
    }
    change(folder, wrong, hidden_size=64, model_type="bert")
    found = refused(lambda: HUB.read(folder, base_of("llama-tied")))
    assert set(found) == {*(f"config.{key}" for key in wrong), "hidden_size", "model_type"}


def test_one_error_names_every_tensor(folder: Path) -> None:
    tensors = load_file(folder / TENSORS)
    first, second, third = sorted(tensors)[:3]
    del tensors[first]
    tensors |= {second: torch.zeros(3), "more": torch.zeros(1), third: torch.full_like(tensors[third], float("nan"))}
    save_file(tensors, folder / TENSORS)
    found = refused(lambda: HUB.read(folder, base_of("llama-tied")))
    assert set(found) == {first, second, third, "more"}


BAD_BOTTLENECK: Mapping[str, object] = {
    "adapter_residual_before_ln": "post",
    "dropout": 1.0,
    "init_weights": "zeros",
    "leave_out": "1",
    "ln_after": "yes",
    "non_linearity": "mish",
    "output_adapter": False,
    "phm_layer": True,
    "reduction_factor": -1,
    "scaling": "by layer",
    "use_gating": True,
}


def test_one_error_names_every_setting_of_a_bottleneck(tmp_path: Path) -> None:
    shutil.copytree(RECORDED / "seq_bn", tmp_path / "x")
    change(tmp_path / "x", BAD_BOTTLENECK)
    found = refused(lambda: HUB.read(tmp_path / "x", base_of("llama-tied")))
    assert set(found) == {f"config.{key}" for key in BAD_BOTTLENECK}


@pytest.mark.parametrize(
    ("wrong", "where"),
    [
        ({"residual_before_ln": "post_add"}, {"residual_before_ln"}),
        ({"leave_out": [3], "reduction_factor": {"1": 8}}, {"leave_out, layer 3", "reduction_factor, layer 0"}),
    ],
)
def test_settings_that_mean_nothing_on_this_base(wrong: Mapping[str, Any], where: set[str], tmp_path: Path) -> None:
    shutil.copytree(RECORDED / "seq_bn", tmp_path / "x")
    change(tmp_path / "x", wrong)
    assert where <= set(refused(lambda: HUB.read(tmp_path / "x", base_of("llama-tied"))))


def test_a_norm_that_is_kept_twice_is_one(tmp_path: Path) -> None:
    HUB.write(adapted(base_of("llama-tied"), Bottleneck(ln_before=True)), tmp_path)
    tensors = load_file(tmp_path / TENSORS)
    again = next(name for name in tensors if name.endswith("adapter_down.0.bias"))
    tensors[again][0] += 1
    save_file(tensors, tmp_path / TENSORS)
    assert set(refused(lambda: HUB.read(tmp_path, base_of("llama-tied")))) == {again}


def test_old_loras_were_trained_with_another_scale(folder: Path) -> None:
    """adapters PR 770: before 1.1 the scale was 1, whatever alpha said."""
    base = base_of("llama-tied")
    now = HUB.read(folder, base)
    change(folder, {}, version="adapters.1.0.1")
    then = HUB.read(folder, base)
    assert isinstance(now.config, LoRA)
    assert isinstance(then.config, LoRA)
    assert (now.config.scale, then.config.scale) == (3.0, 1.0)
    assert then.notes
    assert not now.notes


def test_names_of_a_bare_model(folder: Path) -> None:
    """Saved from LlamaModel instead of LlamaForCausalLM, names lack their first part."""
    base = base_of("llama-tied")
    wanted = HUB.read(folder, base).tensors
    tensors = load_file(folder / TENSORS)
    save_file({name.removeprefix("model."): t for name, t in tensors.items()}, folder / TENSORS)
    assert_same_tensors(HUB.read(folder, base).tensors, wanted)


class Harmful:
    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(Harmful.target),))

    target = Path()


def test_a_pickle_with_more_than_tensors_runs_nothing(folder: Path, tmp_path: Path) -> None:
    (folder / TENSORS).unlink()
    Harmful.target = tmp_path / "made by a pickle"
    (folder / PICKLE).write_bytes(pickle.dumps({"x": Harmful()}, protocol=2))
    assert set(refused(lambda: HUB.read(folder, base_of("llama-tied")))) == {PICKLE}
    torch.save({"x": Harmful()}, folder / PICKLE)
    assert set(refused(lambda: HUB.read(folder, base_of("llama-tied")))) == {PICKLE}
    assert not Harmful.target.exists()


@pytest.mark.parametrize("content", [b"", b"nonsense", [torch.zeros(1)]])
def test_a_pickle_that_is_none(content: object, folder: Path) -> None:
    (folder / TENSORS).unlink()
    if isinstance(content, bytes):
        (folder / PICKLE).write_bytes(content)
    else:
        torch.save(content, folder / PICKLE)
    assert set(refused(lambda: HUB.read(folder, base_of("llama-tied")))) == {PICKLE}


@pytest.mark.parametrize(
    ("name", "config", "where"),
    [
        ("llama-tied", LoRA(rank=2), {"role 'attn.o'", "role 'mlp.gate'"}),
        ("qwen3", LoRA(rank=2), {"family"}),
        ("qwen3", PTuning(tokens=2, encoder="none"), {"family", "method"}),
    ],
)
def test_what_has_no_place_there(name: str, config: MethodConfig, where: set[str], tmp_path: Path) -> None:
    mine = adapted(base_of(name), config)
    assert set(refused(lambda: HUB.write(mine, tmp_path))) == where
