"""One fusion in its run folder: begin or go on, as any training run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tritune.cli import folders
from tritune.cli.loading import base_ref_for, load_adaptations, load_task, require, stored_at
from tritune.cli.run_folder import OWN, RunFolder
from tritune.cli.training import carry_out
from tritune.errors import Mismatch, Problem
from tritune.progress import Progress
from tritune.recipes.settings import FuseSettings
from tritune.store.registry import MANIFEST, TENSORS

if TYPE_CHECKING:
    from tritune.report.words import Lang


def run(
    settings: FuseSettings,
    base: str | None,
    folder: RunFolder,
    progress: Progress,
    lang: Lang,
    command: str,
    *,
    resume: bool,
    overwrite: bool,
) -> None:
    """Train the attention and store the result; with `resume`, from the newest state.

    Args:
        base: where the adapters' base is now; None: where their training found it.

    Raises:
        Mismatch: with every reason why these cannot be fused; something is missing or in the way; or this is not the run that
            was begun here.
        BadData: with everything that is wrong with the data.
        Interrupted: stopped by the user; the state is saved.
        Diverged: a loss or gradient was not finite.
    """
    require(settings, "train")
    if not resume:
        # what a single adaptation would be, too: it must not be mistaken for the result
        own = OWN | {MANIFEST, TENSORS}
        folders.check_free(folder.path, own, overwrite=overwrite, hint="Go on with it by --resume. ")

    from tritune.composition.fusing import fusion_of
    from tritune.composition.parts import check_stored
    from tritune.methods.fusion import METHOD, why_not
    from tritune.trial import check_rows

    missing = () if settings.adaptations else [Problem("ADAPTATION...", "not given")]
    Mismatch.check("Something is missing.", missing, "Name the finished adapters.")
    every = [stored_at(ref) for ref in settings.adaptations]
    check_stored("fused", every, why_not, task_named=True)
    task = load_task(settings, progress)
    check_rows(task, settings.training())
    state = folder.load() if resume else None
    parts = load_adaptations(every, progress, base=base, device=settings.device)
    # The rate is written out: a resumed run reads it from its folder, and both must be the same document.
    rate = settings.learning_rate or METHOD.learning_rate
    training = settings.training().model_copy(update={"learning_rate": rate})
    trial = fusion_of(parts, task, value=settings.value, training=training, seed=settings.seed, resume=state)
    found = {"adaptations": tuple(str(one.folder.absolute()) for one in every), "base": base_ref_for(every[0], base)}
    resolved = settings.model_copy(update=found)
    carry_out(trial, resolved, folder, progress, lang, command, resume=resume, again="tritune compose fuse --resume")
