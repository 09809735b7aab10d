"""The defects that the guards guard against, each built into a copy of the code: one line of the table per defect.

`broken.py` applies them and asks the named tests, which must fail. Data only.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Mutation:
    """One change of one file of `src/tritune`.

    Attributes:
        defect: what the code then does.
        file: below `src/tritune`.
        old, new: text of the file, found there exactly once, and what stands there instead.
        red: the tests of `tests/guards` that must fail, by the end of their ids: file::test or file::test[case].
    """

    defect: str
    file: str
    old: str
    new: str
    red: tuple[str, ...]


def _tests(*names: str, file: str = "test_public_defects.py") -> tuple[str, ...]:
    return tuple(f"{file}::{name}" for name in names)


def _cases(name: str, *cases: str) -> Iterator[str]:
    return (f"{name}[{case}]" for case in cases)


MUTATIONS = (
    Mutation(
        "what goes on after a pause has a fresh prompt encoder (peft#1247)",
        "methods/base.py",
        "tensor for name, tensor in state.items()})",
        'tensor for name, tensor in state.items() if not name.startswith("encoder.")}, strict=False)',
        _tests(*_cases("test_p_tuning_resumes_with_its_encoder", "mlp", "lstm")),
    ),
    Mutation(
        "what is stored of a prompt is the table before its encoder (peft#2043)",
        "methods/ptuning.py",
        'return {"prompt": self.prompt_PD().detach().clone()}',
        'return {"prompt": self.get_parameter("table").detach().clone()}',
        _tests(*_cases("test_a_stored_prompt_answers_as_the_encoder_did", "mlp", "lstm")),
    ),
    Mutation(
        "behind a prompt, positions count from where the longest row of the batch begins (peft#54, peft#1093)",
        "models/layout.py",
        "torch.arange(past[i], past[i] + spans[i].length)",
        "torch.arange(past[i], past[i] + spans[i].length)"
        " + (max(s.length for s in spans) - spans[i].length if front and past[i] else 0)",
        _tests("test_a_row_answers_alone_as_in_any_batch"),
    ),
    Mutation(
        "of rows that are packed together only the first sees its prompt (trl)",
        "models/pieces.py",
        "parents = (*_of(own, first), ",
        "parents = (*(_of(own, first) if i == 0 else ()), ",
        _tests("test_packed_rows_each_see_their_own_prompt", "test_a_row_answers_alone_as_in_any_batch"),
    ),
    Mutation(
        "a layer that runs again in the backward finds its prefix used up (peft#869)",
        "models/past.py",
        "        return torch.cat([*(kv[0] for kv in given), k_NKd])",
        "        self._given = tuple((*of[:layer], 0 * of[layer], *of[layer + 1 :]) for of in self._given)\n"
        "        return torch.cat([*(kv[0] for kv in given), k_NKd])",
        _tests(
            *_cases(
                "test_activation_checkpointing_changes_no_gradient_of_a_prompt",
                *("deep-llama-None", "deep-gpt2-None", "deep-llama-nf4"),
            )
        ),
    ),
    Mutation(
        "merging a prompt is not refused (peft#2538)",
        "methods/ptuning.py",
        "        raise NotMergeable(NO_WEIGHT)",
        "        return {}",
        _tests("test_a_prompt_that_is_to_be_merged_is_one_named_error"),
    ),
    Mutation(
        "a LoRA is merged without its scale (unsloth#5410)",
        "methods/lora.py",
        'term_ED = self.config.scale_at(site) * (self.part(site, "B") @ self.part(site, "A")).detach()',
        'term_ED = (self.part(site, "B") @ self.part(site, "A")).detach()',
        _tests(*_cases("test_merged_answers_as_unmerged", "llama-tied", "gpt2", "gpt-neox", "phi3", "gemma2")),
    ),
    Mutation(
        "places that the base lacks are passed over (vllm#34186)",
        "methods/base.py",
        "absent = [role for role in roles if all(site.role != role for site in base.sites)]",
        "absent: list[Role] = []",
        _tests("test_an_adaptation_that_matches_no_site_is_an_error"),
    ),
    Mutation(
        "tensors of a folder that belong nowhere are passed over (vllm#34186)",
        "exchange/problems.py",
        'found.append(Problem(name, "no place of this base and this config has it"))',
        "continue",
        _tests("test_an_adaptation_that_matches_no_site_is_an_error"),
    ),
    Mutation(
        "the base of a stored adaptation is not compared (peft#1932)",
        "store/manifest.py",
        "return ref_misfits(manifest.base, name, digests)",
        "return []",
        _tests(
            *_cases(
                "test_another_base_of_the_same_shape_is_refused",
                *("full", "ptuning", "prefix", "bottleneck", "lora", "ia3"),
            )
        ),
    ),
    Mutation(
        "the base that a folder of PEFT's names is not compared (peft#1932)",
        "exchange/inward.py",
        'return [Problem("name of the base", what)]',
        "return []",
        _tests("test_another_base_of_the_same_shape_is_refused_when_it_comes_in"),
    ),
    Mutation(
        "what an evaluation computed without gradients is used in training (litgpt#1287)",
        "methods/base.py",
        "        assert parameter is not None\n        return parameter\n",
        "        assert parameter is not None\n"
        '        if name in ("A", "down.weight", "out"):\n'
        '            kept = self.__dict__.setdefault("kept", {})\n'
        "            if not torch.is_grad_enabled():\n"
        "                kept[site.key] = parameter.detach()\n"
        "            return kept.get(site.key, parameter)\n"
        "        return parameter\n",
        _tests(*_cases("test_an_evaluation_stops_no_weight_from_training", "lora", "bottleneck", "ia3")),
    ),
    Mutation(
        "what was imported is loaded but not applied (transformers#36480)",
        "exchange/inward.py",
        "adaptation = Adaptation(base, known, incoming.config, incoming.tensors, origin)",
        "adaptation = Adaptation(\n"
        "        base, known, incoming.config, {name: 0 * t for name, t in incoming.tensors.items()}, origin\n"
        "    )",
        _tests("test_an_imported_adaptation_is_the_one_that_was_trained"),
    ),
    Mutation(
        "two DoRA adaptations of one module share the norm of the first (peft#3608)",
        "methods/lora.py",
        "        return dora.norms(\n"
        '            self._matrices[site.key], self.part(site, "A"), self.part(site, "B"), self.config.scale_at(site)\n'
        "        )",
        "        shared = self._matrices[site.key].__dict__\n"
        '        if "first" not in shared:\n'
        '            shared["first"] = dora.norms(\n'
        '                self._matrices[site.key], self.part(site, "A"), self.part(site, "B"), self.config.scale_at(site)\n'
        "            )\n"
        '        found: Tensor = shared["first"]\n'
        "        return found",
        _tests(*_cases("test_dora_of_two_adaptations_is_exact", "llama-tied", "gpt2", "gpt-neox")),
    ),
    Mutation(
        "a combination counts the scale of a LoRA twice (peft#3761)",
        "composition/merging.py",
        "return LowRank(at_least_float32(A_rD.detach()), at_least_float32(B_Er.detach()), scale)",
        "return LowRank(at_least_float32(A_rD.detach()), at_least_float32(B_Er.detach()) * scale, scale)",
        _tests(
            *_cases("test_one_lora_combined_with_weight_one_is_itself", "True-linear", "False-svd"),
            "test_a_weighted_combination_is_the_weighted_sum_of_what_each_adds",
        ),
    ),
)
