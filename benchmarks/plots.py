"""The plots of docs/performance.md, from what was measured: `python -m benchmarks.plots`.

Reads results/training.jsonl, scaling.jsonl and scaling-sizes.jsonl, writes docs/plots/*.svg; the same results give the same
bytes. Knows no torch and measures nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from statistics import median
from typing import TYPE_CHECKING, Any

from benchmarks.records import RESULTS
from tritune.report.plots import COLOURS, GREYS, STYLE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PLOTS = RESULTS.parent.parent / "docs" / "plots"
#: what is varied -> words, and the measured quantity that is drawn with it
SPEED = {
    "batch_tokens": ("tokens of a step", "tokens_per_second"),
    "length": ("tokens of a row", "tokens_per_second"),
    "rank": ("rank of LoRA", "tokens_per_second"),
    "virtual_tokens": ("virtual tokens of p-tuning", "tokens_per_second"),
    "labels": ("labels, classification", "rows_per_second"),
    "threads": ("threads", "tokens_per_second"),
}
SIDES = {"ours": "tritune", "compiled": "tritune --compile", "best": "peer at its best", "default": "peer as installed"}


def lines(name: str) -> list[dict[str, Any]]:
    """Measurements without the header and the summary."""
    path = RESULTS / f"{name}.jsonl"
    found = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return [line for line in found if "command" not in line and "summary" not in line]


def training(found: Iterable[Mapping[str, Any]]) -> Figure:
    """Tokens/s of every method and side: medians, with the range of the turns."""
    rates: dict[str, dict[str, list[float]]] = {}
    for line in found:
        if "tokens_per_second" in line:
            rates.setdefault(line["method"], {}).setdefault(line["role"], []).append(line["tokens_per_second"])
    sides = [side for side in SIDES if any(side in of for of in rates.values())]
    figure, [axes] = _figure(1, (8.5, 3.6))
    for i, side in enumerate(sides):
        here = [(place, of[side]) for place, of in enumerate(rates.values()) if side in of]
        middle = [median(values) for _, values in here]
        spread = [
            [value - min(values) for value, (_, values) in zip(middle, here, strict=True)],
            [max(values) - value for value, (_, values) in zip(middle, here, strict=True)],
        ]
        axes.bar(
            [place + (i - (len(sides) - 1) / 2) * 0.8 / len(sides) for place, _ in here],
            middle,
            0.8 / len(sides),
            yerr=spread,
            label=SIDES[side],
            color=(COLOURS[0], COLOURS[7], GREYS[1], GREYS[2])[list(SIDES).index(side)],
            error_kw={"elinewidth": 0.8},
        )
    axes.set_xticks(range(len(rates)), [name.replace("-suffix-cached", ",\nsuffix, cached") for name in rates])
    axes.set_ylabel("real tokens per second")
    axes.grid(visible=False, axis="x")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(sides))  # above: no bar lies beneath
    return figure


def scaling(found: list[dict[str, Any]]) -> Figure:
    """Speed and peak memory against one size at a time."""
    here = {what: words for what, words in SPEED.items() if any(line["what"] == what for line in found)}
    figure, panels = _figure(len(here), (10, 2.7 * -(-len(here) // 3)))
    for axes, (what, (words, quantity)) in zip(panels, here.items(), strict=True):
        points = [line for line in found if line["what"] == what]
        x = [line["value"] for line in points]
        speed, peak = [line[quantity] for line in points], [line["peak_bytes"] / 2**30 for line in points]
        axes.plot(x, speed, "o-", color=COLOURS[0])
        axes.set_ylim(0, 1.1 * max(speed))
        axes.set_xscale("log", base=2)
        axes.set_xticks(x, [str(value) for value in x], fontsize=7)
        axes.minorticks_off()
        axes.set_xlabel(words)
        axes.set_ylabel(quantity.replace("_", " "), color=COLOURS[0])
        memory = axes.twinx()
        memory.plot(x, peak, "s--", color=COLOURS[1], markersize=4)
        memory.set_ylim(0, 1.1 * max(peak))
        memory.grid(visible=False)
        memory.set_ylabel("peak, GiB", color=COLOURS[1])
    return figure


def rows(found: list[dict[str, Any]]) -> Figure:
    """Time and memory per row against the number of rows."""
    points = [line for line in found if line["what"] == "rows"]
    figure, [time, memory] = _figure(2, (8, 2.8))
    x = [line["value"] for line in points]
    for i, part in enumerate(("read", "encode", "plan")):
        time.plot(x, [line[f"{part}_microseconds_per_row"] for line in points], "o-", color=COLOURS[i], label=part)
    time.set_ylabel("microseconds per row")
    time.legend()
    memory.plot(x, [line["peak_bytes"] / 2**20 for line in points], "s-", color=COLOURS[1])
    memory.set_ylabel("peak, MiB")
    for axes in (time, memory):
        axes.set_ylim(bottom=0)
        axes.set_xscale("log")
        axes.set_xticks(x, [f"{value:,}" for value in x])
        axes.minorticks_off()
        axes.set_xlabel("rows")
    return figure


def _figure(n: int, size: tuple[float, float]) -> tuple[Figure, list[Axes]]:
    from matplotlib import pyplot

    columns = min(n, 3)
    figure, grid = pyplot.subplots(-(-n // columns), columns, figsize=size, squeeze=False, layout="constrained")
    panels = list(grid.flat)
    for spare in panels[n:]:
        spare.remove()
    return figure, panels[:n]


def drawn() -> Iterator[tuple[str, Figure]]:
    if (RESULTS / "training.jsonl").exists():
        yield "training", training(lines("training"))
    if (RESULTS / "scaling.jsonl").exists():
        found = [*lines("scaling"), *lines("scaling-sizes")]
        yield "scaling", scaling(found)
        if any(line["what"] == "rows" for line in found):
            yield "rows", rows(found)


def main() -> None:
    import matplotlib

    matplotlib.use("svg")
    PLOTS.mkdir(exist_ok=True)
    style: Any = STYLE | {"figure.facecolor": "white"}
    with matplotlib.rc_context(style):
        for name, figure in drawn():
            figure.savefig(PLOTS / f"{name}.svg", metadata={"Date": None})
            print(PLOTS / f"{name}.svg")


if __name__ == "__main__":
    main()
