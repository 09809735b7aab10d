"""What an evaluation leaves behind, as documents: per example, per entry of a comparison, and the comparison whole.

Pure data: `report` draws from it, statistics are computed from it, tests compare it. No torch, no files.
"""

from __future__ import annotations

from collections.abc import Mapping

from tritune.spec import Frozen


class ExampleResult(Frozen):
    """One example, answered once."""

    id: str
    text: str
    gold: str
    predicted: str
    score: float
    log_likelihoods: tuple[float, ...] = ()


class CurvePoint(Frozen):
    """A point of a learning curve. `seconds` counts training time only, without evaluations."""

    step: int
    rows: int
    tokens: int
    seconds: float
    train_loss: float | None = None
    dev_loss: float | None = None
    dev_score: float | None = None


class SearchPoint(Frozen):
    """One learning rate that was tried, and what it reached on dev after `steps`; nothing, if it diverged before."""

    learning_rate: float
    steps: int
    dev_loss: float | None
    dev_score: float | None
    chosen: bool


class Entry(Frozen):
    """One line of a comparison: one method with one seed (or one way of prompting), measured on the test set.

    `forgetting`: rise of the loss on general text, in nats per token (`forgetting.ForgettingProbe`); None where the base
    stays as it is. `trained_beside`: so many runs shared its passes over the base; its seconds are its share of theirs,
    by tokens, and its memory is not known.
    """

    method: str
    strategy: str
    seed: int
    metric: str
    score: float
    low: float
    high: float
    n: int
    trainable_parameters: int
    stored_bytes: int
    train_seconds: float
    train_tokens_per_second: float | None
    train_peak_bytes: int | None
    eval_peak_bytes: int
    seconds_per_1000_rows: float
    adaptation: str | None
    forgetting: float | None = None
    learning_rate: float | None = None
    config: Mapping[str, object] = {}
    train_rows: int = 0
    trained_beside: int = 0
    best_step: int | None = None
    search: tuple[SearchPoint, ...] = ()
    curve: tuple[CurvePoint, ...] = ()


#: a difference counts as shown when its corrected p lies below this
ALPHA = 0.05


class Pair(Frozen):
    """Two methods on the same examples (seed by seed pooled), and what may be said of the difference.

    `difference` is a's score less b's, [`low`, `high`] its own 95 % interval. `p_adjusted` is `p_by_example` after
    Holm's correction over all pairs of the comparison. `better` names the winner; None: no difference shown.
    """

    a: str
    b: str
    difference: float
    low: float
    high: float
    p_by_example: float
    p_by_seed: float | None
    n: int
    seeds: int
    verdict: str
    p_adjusted: float | None = None
    better: str | None = None


class Caveat(Frozen):
    """One limit of a comparison: which message, and what stands in its gaps. `caveats.caveat_text` says it in words."""

    key: str
    values: Mapping[str, str | int | float] = {}


class Comparison(Frozen):
    """Everything a comparison found. `comparison.json` is exactly this document.

    `caveats` are English sentences; `caveat_keys` are the same ones, in the same order, for other languages.
    """

    entries: tuple[Entry, ...]
    pairs: tuple[Pair, ...]
    caveats: tuple[str, ...]
    caveat_keys: tuple[Caveat, ...] = ()
    base: Mapping[str, object] = {}
    task: Mapping[str, object] = {}
    training: Mapping[str, object] = {}
    environment: Mapping[str, object] = {}
    command: str = ""
