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
        role: "ours", "equal" (ours in steps as large as the best peer's), "best" (the best-tuned peer) or "default" (the peer
            as installed).
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
    """One method's line: tokens/s against each peer, use of the machine, peak memory against the best peer; speed and peak
    memory in its steps."""
    rates, peaks = {}, {}
    for role in ("ours", "equal", "best", "default"):
        if here := [m for m in found if m.role == role]:
            rates[role] = median(m.rate for m in here)
            peaks[role] = median(m.peak_bytes for m in here)
    if not {"ours", "equal"} & set(rates):
        return None
    mfus = [m.mfu for m in found if m.role == "ours"]
    return {
        "vs_best": _ratio(rates, "ours", "best"),
        "vs_default": _ratio(rates, "ours", "default"),
        "mfu": _rounded(median(mfus)) if mfus else None,
        "peak_vs_best": _ratio(peaks, "ours", "best"),
        "tokens_per_second": _rounded(rates["ours"]) if "ours" in rates else None,
        "equal_steps_vs_best": _ratio(rates, "equal", "best"),
        "equal_steps_peak_vs_best": _ratio(peaks, "equal", "best"),
    }


def _ratio(of: Mapping[str, float], role: str, other: str) -> float | None:
    return _rounded(of[role] / of[other]) if role in of and other in of else None


def assemble(
    found: Iterable[Measurement],
    several: Mapping[str, float] | None = None,
    also: Mapping[str, str] | None = None,
) -> dict[str, Mapping[str, float | None] | None]:
    """The whole object. A method that was not measured, or does not exist yet, is null.

    Args:
        also: methods that are held against the best peer of another one as well, and which that is.
    """
    measurements = list(found)
    names = [*TRAINED, *sorted({m.method for m in measurements} - set(TRAINED))]
    lines: dict[str, Mapping[str, float | None] | None] = {
        name: line([m for m in measurements if m.method == name]) for name in names
    }
    for name, other in (also or {}).items():
        if own := lines.get(name):
            lines[name] = {**own, f"vs_best_{other}": _against(measurements, name, other)}
    return {**lines, SEVERAL: several}


def _against(found: Sequence[Measurement], name: str, other: str) -> float | None:
    """Tokens/s of a method's own steps by those of another one's best peer."""
    own = [m.rate for m in found if (m.method, m.role) == (name, "ours")]
    peer = [m.rate for m in found if (m.method, m.role) == (other, "best")]
    return _rounded(median(own) / median(peer)) if own and peer else None


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")
