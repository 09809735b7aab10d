"""From single measurements to the one JSON object of `make bench`: ratios of medians. Plain numbers; knows no library."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

#: what the last line of `make bench` always names, in this order; null where there is nothing to measure yet
TRAINED = ("lora", "full", "ptuning", "ptuning-suffix-cached", "bottleneck")
SEVERAL = "several-at-once"


@dataclass(frozen=True, slots=True)
class Measurement:
    """One run of one side.

    Attributes:
        method: the line of the table it belongs to.
        role: "ours", "best" (the best-tuned peer) or "default" (the peer as installed).
        tokens: real tokens of the timed steps.
        flops: necessary operations of the timed steps; 0 for a peer.
        matrix_rate: operations per second that the machine made in the same process, in its faster format.
    """

    method: str
    role: str
    seconds: float
    tokens: int
    peak_bytes: int
    flops: int = 0
    matrix_rate: float = 1.0

    @property
    def rate(self) -> float:
        """Real tokens per second."""
        return self.tokens / self.seconds

    @property
    def mfu(self) -> float:
        """Share of the machine's matrix rate that went into necessary work."""
        return self.flops / self.seconds / self.matrix_rate


def line(found: Sequence[Measurement]) -> dict[str, float | None] | None:
    """One method's line: tokens/s against each peer, use of the machine, peak memory against the best peer."""
    by_role = {role: [m for m in found if m.role == role] for role in ("ours", "best", "default")}
    ours = by_role["ours"]
    if not ours:
        return None
    rate = median(m.rate for m in ours)
    peak = median(m.peak_bytes for m in ours)
    best, default = by_role["best"], by_role["default"]
    return {
        "vs_best": _rounded(rate / median(m.rate for m in best)) if best else None,
        "vs_default": _rounded(rate / median(m.rate for m in default)) if default else None,
        "mfu": _rounded(median(m.mfu for m in ours)),
        "peak_vs_best": _rounded(peak / median(m.peak_bytes for m in best)) if best else None,
        "tokens_per_second": _rounded(rate),
    }


def assemble(
    found: Iterable[Measurement], several: Mapping[str, float] | None = None
) -> dict[str, Mapping[str, float | None] | None]:
    """The whole object. A method that was not measured, or does not exist yet, is null."""
    measurements = list(found)
    names = [*TRAINED, *sorted({m.method for m in measurements} - set(TRAINED))]
    lines: dict[str, Mapping[str, float | None] | None] = {
        name: line([m for m in measurements if m.method == name]) for name in names
    }
    return {**lines, SEVERAL: several}


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")
