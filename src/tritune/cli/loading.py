"""Settings -> a task with its data, a base, a stored adaptation on its base. Imports torch only when a base is wanted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tritune.cli.given import option
from tritune.errors import Mismatch, Problem, Unavailable
from tritune.models.locate import PACKAGED_BASES
from tritune.progress import Progress
from tritune.recipes import documents
from tritune.recipes.settings import Settings
from tritune.report import units
from tritune.report.told import told
from tritune.tasks.base import Split
from tritune.tasks.classification import Classification, classification
from tritune.tasks.sources import has_own_splits

if TYPE_CHECKING:
    from tritune.adaptation import Adaptation
    from tritune.models.dtype import Dtype
    from tritune.models.pretrained import Base
    from tritune.report.words import Lang
    from tritune.spec import MethodConfig, Quantisation, Quantise
    from tritune.store.registry import Found, Stored

RUN = "run.yaml"
#: so many labels are named when data was read
SHOWN_LABELS = 20


def require(settings: Settings, *names: str) -> None:
    """
    Raises:
        Mismatch: a setting that the command cannot do without was not given; names all of them.
    """
    found = [name for name in names if getattr(settings, name) is None]
    if has_own_splits(settings.train):
        found = [name for name in found if name != "test"]
    problems = [Problem(option(name), "not given") for name in found]
    Mismatch.check("Something is missing.", problems, "Give it here, or in a recipe with --config.")


def load_task(settings: Settings, progress: Progress) -> Classification:
    """The task with its data, all of it read and checked.

    Raises:
        BadData: with everything that is wrong with the rows of all files.
        Mismatch, Unavailable: as `classification`.
    """
    progress.stage(told("read_data", progress.lang), 0, "rows")
    task = classification(
        train=settings.train,
        test=settings.test,
        dev=settings.dev,
        text=settings.text_field,
        label=settings.label_field,
        labels=settings.labels,
        label_words=settings.label_words,
        template=settings.template,
        dev_fraction=settings.dev_fraction,
        train_rows=settings.train_rows,
        dev_rows=settings.dev_rows,
        test_rows=settings.test_rows,
        seed=settings.data_seed,
        allow_duplicates=settings.allow_duplicates,
        progress=progress.say,
    )
    progress.say(told("labels", progress.lang, labels=_counted(task, progress.lang)))
    return task


def _counted(task: Classification, lang: Lang) -> str:
    """Every label with its training rows: a class that nobody meant is seen before anything is trained."""
    counts = Counter(example.label for example in task.examples(Split.TRAIN))
    shown = [f"{label} {units.whole(counts[label], lang)}" for label in task.labels[:SHOWN_LABELS]]
    return ", ".join([*shown, *(["…"] if len(task.labels) > SHOWN_LABELS else [])])


def check_alone(settings: Mapping[str, Mapping[str, object]]) -> None:
    """Whether methods, by name, can be trained with these settings: some are made of others.

    Raises:
        Mismatch: names every method that cannot, and which command makes one.
    """
    from tritune.methods import not_alone

    problems = [problem for kind, own in settings.items() for problem in not_alone(kind, own)]
    Mismatch.check("A method that is made of others is not trained by its name alone.", problems)


def check_form(configs: Mapping[str, MethodConfig], form: Quantisation | None) -> None:
    """Whether methods, by name, can be trained on a base in this form; what a certain base adds is asked of it later.

    Raises:
        Mismatch: names every method that cannot.
    """
    if form is None:
        return
    from tritune.methods import method_of

    moving = [kind for kind, config in configs.items() if method_of(config).moves_codes(config)]
    problems = [Problem(kind, f"moves weights that are {form} codes here, which learn nothing") for kind in moving]
    others = ",".join(kind for kind in configs if kind not in moving)
    hint = (
        f"Those that do: --methods {others}"
        if others
        else "Leave --quantise out, or take a method that freezes the base."
    )
    Mismatch.check("Not every method works on a quantised base.", problems, hint)


def base_of(settings: Settings, progress: Progress) -> Base:
    """The base that is to be trained on, in the way that was asked for."""
    return load_base(
        settings.base,
        settings.dtype,
        settings.device,
        progress,
        settings.quantise,
        compiled=settings.compiled,
        cuda_graphs=settings.cuda_graphs,
    )


def load_base(
    ref: str,
    dtype: Dtype | None,
    device: str | None,
    progress: Progress,
    quantise: Quantisation | None = None,
    *,
    compiled: bool = False,
    cuda_graphs: bool = False,
) -> Base:
    """The base, without the bars and warnings of the library below."""
    progress.stage(told("load", progress.lang, name=Path(ref).name), 0, "")

    from transformers.utils import logging

    from tritune.models import load

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    base = load.load_base(
        ref,
        dtype=dtype,
        device=device,
        quantise=quantise,
        compiled=compiled,
        cuda_graphs=cuda_graphs,
        progress=progress.say,
    )
    facts = {
        "name": base.name,
        "size": units.count(base.parameters().count(), progress.lang),
        "dtype": base.dtype_name if base.quantised is None else f"{base.quantised}, {base.dtype_name}",
        "bytes": units.size(base.bytes, progress.lang),
        "device": base.device.type,
    }
    progress.say(told("base", progress.lang, **facts))
    if not base.twins:
        progress.say(told("own_modules", progress.lang))
    return base


def stored_at(ref: str) -> Stored:
    """The adaptation meant: its folder, the folder of its run, or its content hash.

    Raises:
        Mismatch: none, or several; or its manifest cannot be used.
    """
    from tritune.store import registry

    folder = Path(ref)
    if folder.is_dir() and not (folder / registry.MANIFEST).is_file():
        inside = registry.survey((folder,))
        if len(inside) == 1:
            return registry.read(inside[0].folder)
        if inside:
            problems = [Problem(str(each.folder), _what(each)) for each in inside]
            raise Mismatch(f"{folder} holds several adaptations.", problems, "Give one of these folders.")
        raise Mismatch(f"There is no adaptation in {folder}.", hint="`tritune list` shows those that are there.")
    return registry.find(ref)


def _what(found: Found) -> str:
    return found.stored.manifest.method if found.stored else "damaged"


def load_adaptation(
    stored: Stored,
    task: Callable[[Stored], Classification],
    progress: Progress,
    *,
    base: str | None = None,
    device: str | None = None,
    quantise: Quantise | None = None,
) -> Adaptation:
    """A stored adaptation on its base, with a task made for it.

    Args:
        base: where the base is now; None: where its run found it, else by its name.
        quantise: the form of its weights; None: that of the training.

    Raises:
        Mismatch: something does not fit; one error names all of it.
        Unavailable: the base could not be fetched.
    """
    wanted = task(stored)  # the data's problems first: no base is needed to see them
    problems = list(stored.visible_damage())
    Mismatch.check(f"{stored.folder} is damaged.", problems, "Get a fresh copy.")

    from tritune.adaptation import config_of, form_of, load

    config_of(stored)
    form = form_of(stored.manifest.base, quantise)
    found = _base_for(stored, base, device, progress, form)
    if form != stored.manifest.base.quantised:
        trained = stored.manifest.base.quantised or "none"
        progress.say(told("other_form", progress.lang, trained=trained, used=form or "none"))
    return load(stored.folder, base=found, task=wanted, quantise=quantise)


def load_adaptations(
    every: Sequence[Stored], progress: Progress, *, base: str | None = None, device: str | None = None
) -> list[Adaptation]:
    """Stored adaptations on the first one's base, which is loaded once.

    Raises:
        Mismatch: something does not fit, of any of them.
        Unavailable: the base could not be fetched.
    """
    from tritune.adaptation import load

    found = _base_for(every[0], base, device, progress, every[0].manifest.base.quantised)
    return [load(stored.folder, base=found) for stored in every]


def _base_for(
    stored: Stored, base: str | None, device: str | None, progress: Progress, form: Quantisation | None
) -> Base:
    try:
        return load_base(base_ref_for(stored, base), stored.manifest.base.dtype, device, progress, form)
    except Unavailable as error:
        raise Unavailable(f"{error}\nIf the base lies in a folder here, give that with --base.") from None


def base_ref_for(stored: Stored, base: str | None) -> str:
    """Where the base of an adaptation is: as said, else where its run found it, else by its name."""
    return base or _base_of_run(stored.folder) or stored.manifest.base.name


def _base_of_run(folder: Path) -> str | None:
    """The base in the run.yaml that an adaptation was made under: a folder's name alone says not where it is."""
    for parent in list(folder.absolute().parents)[:2]:
        if (parent / RUN).is_file():
            ref = documents.parse((parent / RUN).read_text(encoding="utf-8"), str(parent / RUN)).get("base")
            return ref if isinstance(ref, str) and (ref in PACKAGED_BASES or Path(ref).exists()) else None
    return None


def settled(settings: Settings) -> dict[str, object]:
    """Settings as a document that means the same in every folder: paths of files here are made absolute."""
    fields = type(settings).model_fields
    whole = settings.model_dump(mode="json")
    document = {name: value for name, value in whole.items() if value is not None or fields[name].default is not None}
    names = [name for name in ("base", "train", "test", "dev") if name in document]
    for name in names:
        ref = str(document[name])
        if ref not in PACKAGED_BASES and not has_own_splits(ref) and Path(ref).expanduser().exists():
            document[name] = str(Path(ref).expanduser().absolute())
    return document
