"""The plots of a comparison as SVG text for a page: learning curves, and what a score costs.

Pure functions of the record; the same record gives the same bytes. A method keeps its colour in every plot. Letters
are drawn as outlines, so that any script shows everywhere, and each plot carries a title and a description for those
who cannot see it. Knows nothing of the page around it. matplotlib is imported only when something is drawn.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from tritune.evaluate.record import Comparison, CurvePoint
from tritune.report import units
from tritune.report.rows import Row, rows
from tritune.report.words import Lang, words

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: told apart with every common kind of colour blindness (after Okabe and Ito 2008, without yellow, darkened for text)
COLOURS = ("#0072b2", "#d55e00", "#00845f", "#b5588f", "#8a6d00", "#3f4fa8", "#7a3b00", "#4d8fb8")
GREYS = ("#969696", "#666666", "#b8b8b8", "#404040")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
#: curves with more points than this are drawn without markers
MARKED_POINTS = 30
SVG = "http://www.w3.org/2000/svg"

STYLE: dict[str, Any] = {
    "font.family": ["DejaVu Sans"],
    "font.size": 10,
    "svg.fonttype": "path",
    "svg.hashsalt": "tritune",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#8a8a8a",
    "axes.labelcolor": "#3a3a3a",
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "xtick.color": "#5a5a5a",
    "ytick.color": "#5a5a5a",
    "legend.frameon": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "text.parse_math": False,
}


def colour(row: Row) -> str:
    """The row's colour, everywhere: by its place in the comparison, greys for prompting. The ninth begins anew."""
    palette = GREYS if row.is_baseline else COLOURS
    return palette[row.index % len(palette)]


def dev_curves(comparison: Comparison, lang: Lang = "en") -> str:
    """Dev score against training rows seen, one line per seed. Empty if no dev score was recorded."""
    return _curves(comparison, lang, "dev", lambda point: point.dev_score, words(lang)["dev_score"])


def loss_curves(comparison: Comparison, lang: Lang = "en") -> str:
    """Training loss against training rows seen, one line per seed. Empty if no training loss was recorded."""
    return _curves(comparison, lang, "loss", lambda point: point.train_loss, words(lang)["train_loss"])


def score_by_bytes(comparison: Comparison, lang: Lang = "en") -> str:
    """Score with its interval against stored bytes (logarithmic). Empty if nothing was stored."""
    texts = words(lang)
    return _scatter(
        comparison, lang, "bytes", lambda row: row.stored_bytes, (texts["by_bytes"], texts["bytes_axis"]), log=True
    )


def score_by_seconds(comparison: Comparison, lang: Lang = "en") -> str:
    """Score with its interval against training time. Empty if nothing was trained."""
    texts = words(lang)
    return _scatter(
        comparison,
        lang,
        "seconds",
        lambda row: row.train_seconds,
        (texts["by_seconds"], texts["seconds_axis"]),
        log=False,
    )


def standalone(svg: str) -> str:
    """The same plot as the content of an .svg file of its own."""
    return svg.replace("<svg ", f'<svg xmlns="{SVG}" ', 1)


def _scatter(
    comparison: Comparison, lang: Lang, name: str, cost: Callable[[Row], float], labels: tuple[str, str], *, log: bool
) -> str:
    every = rows(comparison)
    costs = [cost(row) for row in every if cost(row) > 0]
    if not costs:
        return ""
    with _figure() as (figure, axes):
        for row in every:
            _point(axes, row, cost(row))
        axes.set_xlabel(labels[1])
        _localise(axes.yaxis, lang)
        if log:
            axes.set_xscale("log")
            axes.set_xlim(min(costs) / 3, max(costs) * 3)
            _bytes_ticks(axes, lang)
        else:
            axes.set_xlim(0, max(costs) * 1.1)
            _localise(axes.xaxis, lang)
        _legend(figure, axes)
        described = "; ".join(f"{row.method}: {units.score(row.score, lang)}" for row in every)
        return _svg(figure, name, labels[0], described)


def _point(axes: Axes, row: Row, cost: float) -> None:
    """A row that costs nothing has no place on the axis: it is a dashed line across it."""
    if cost > 0:
        errors = [[max(0.0, row.score - row.low)], [max(0.0, row.high - row.score)]]
        marker = _marker(row)
        axes.errorbar([cost], [row.score], errors, fmt=marker, capsize=3, ms=7, color=colour(row), label=row.method)
    else:
        dashes = (0, (4, 2 + 2 * row.index))
        axes.axhline(row.score, linestyle=dashes, linewidth=1.4, color=colour(row), label=row.method)


def _curves(
    comparison: Comparison, lang: Lang, name: str, value: Callable[[CurvePoint], float | None], title: str
) -> str:
    lines = [
        (row, entry is row.entries[0], known)
        for row in rows(comparison)
        for entry in row.entries
        if (known := [(point.rows, shown) for point in entry.curve if (shown := value(point)) is not None])
    ]
    if not lines:
        return ""
    with _figure() as (figure, axes):
        for row, first, known in lines:
            label = row.method if first else None
            marker = _marker(row) if len(known) <= MARKED_POINTS else ""
            x, y = [place for place, _ in known], [shown for _, shown in known]
            axes.plot(x, y, color=colour(row), marker=marker, markersize=4, linewidth=1.5, label=label)
        axes.set_xlabel(words(lang)["rows_seen"])
        axes.set_xlim(left=0)
        _localise(axes.xaxis, lang)
        _localise(axes.yaxis, lang)
        _legend(figure, axes)
        last = "; ".join(f"{row.method}: {units.score(known[-1][1], lang)}" for row, _, known in lines)
        return _svg(figure, name, title, last)


def _marker(row: Row) -> str:
    return MARKERS[row.index % len(MARKERS)]


def _legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 4), fontsize=9, columnspacing=1.2)


def _localise(axis: Any, lang: Lang) -> None:
    """Tick labels with equally many decimals, in the decimal sign of the language."""
    from matplotlib.ticker import ScalarFormatter

    class Localised(ScalarFormatter):
        def __call__(self, x: float, pos: int | None = None) -> str:
            return units.number(super().__call__(x, pos).replace("\u2212", "-"), lang)

    formatter = Localised(useOffset=False)
    formatter.set_scientific(False)
    axis.set_major_formatter(formatter)


def _bytes_ticks(axes: Axes, lang: Lang) -> None:
    from matplotlib.ticker import FuncFormatter, NullFormatter

    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: units.size(round(value), lang)))
    axes.xaxis.set_minor_formatter(NullFormatter())


@contextmanager
def _figure() -> Iterator[tuple[Figure, Axes]]:
    """A figure of its own, outside pyplot's global list, drawn in this module's style whatever the user's is."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        parameters: Any = matplotlib.rcParams  # its stubs know no plain dict
        parameters.update(STYLE)
        figure = Figure(figsize=(5.2, 4), layout="constrained")
        FigureCanvasSVG(figure)
        yield figure, figure.subplots()


def _svg(figure: Figure, name: str, title: str, description: str) -> str:
    """The figure as an element for a page: no prolog, no fixed size, ids of its own, a title and a description."""
    written = io.BytesIO()
    figure.savefig(written, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    root = ElementTree.fromstring(written.getvalue())
    for parent in root.iter():
        for child in [child for child in parent if child.tag == f"{{{SVG}}}metadata"]:
            parent.remove(child)
    for element in root.iter():
        _unprefix(element, name)
    for length in ("width", "height", "version"):
        root.attrib.pop(length, None)
    root.set("role", "img")
    root.set("aria-labelledby", f"{name}-title {name}-description")
    for place, (tag, text) in enumerate((("title", title), ("desc", description))):
        element = ElementTree.Element(tag, {"id": f"{name}-title" if tag == "title" else f"{name}-description"})
        element.text = text
        root.insert(place, element)
    return ElementTree.tostring(root, encoding="unicode")


def _unprefix(element: ElementTree.Element, name: str) -> None:
    """Plain tags as HTML wants them, and ids that cannot meet those of another plot on the page."""
    element.tag = element.tag.rpartition("}")[2]
    for key, value in list(element.attrib.items()):
        del element.attrib[key]
        key = key.rpartition("}")[2]
        if key == "id":
            value = f"{name}-{value}"
        elif key == "href":
            value = value.replace("#", f"#{name}-", 1)
        element.set(key, value.replace("url(#", f"url(#{name}-"))
