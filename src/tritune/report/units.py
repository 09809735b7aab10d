"""Numbers as people read them: bytes, seconds, counts, scores, p-values, with the decimal sign of the language.

Knows nothing of records. None always becomes a dash. Bytes are counted in thousands (1 MB = 1,000,000 bytes).
"""

from __future__ import annotations

from tritune.report.words import Lang, words

#: joins a number and its unit, so that no line breaks between them
GAP = "\u00a0"


def number(text: str, lang: Lang) -> str:
    """A formatted English number in the signs of the language."""
    return text if lang == "en" else text.replace(",", GAP).replace(".", ",").replace("-", "\u2212")


def score(value: float | None, lang: Lang) -> str:
    """Three decimals: with n = 1,000 the fourth means nothing."""
    return words(lang)["dash"] if value is None else number(f"{value:.3f}", lang)


def signed(value: float | None, lang: Lang) -> str:
    """A difference with its sign; an exact or rounded zero has none."""
    if value is None:
        return words(lang)["dash"]
    text = f"{value:+.3f}"
    return number(text[1:] if float(text) == 0 else text.replace("-", "\u2212"), lang)


def p_value(value: float | None, lang: Lang) -> str:
    if value is None:
        return words(lang)["dash"]
    return number("< 0.001" if value < 0.001 else f"{value:.3f}", lang)


def size(value: int | None, lang: Lang) -> str:
    """Bytes, three significant digits: 9.77 MB."""
    return _scaled(value, words(lang)["units_bytes"].split(" "), lang)


def count(value: int | None, lang: Lang) -> str:
    """A count, three significant digits: 4.88 M."""
    return _scaled(value, words(lang)["units_count"].split(" "), lang)


def whole(value: int | None, lang: Lang) -> str:
    """A count in full: 1,000."""
    return words(lang)["dash"] if value is None else number(f"{value:,}", lang)


def rate(value: float | None, lang: Lang) -> str:
    """Tokens per second, three significant digits at most from 1,000 on."""
    if value is None:
        return words(lang)["dash"]
    return number(f"{float(f'{value:.3g}'):,.0f}" if value >= 10 else f"{value:.2g}", lang)


def seconds(value: float | None, lang: Lang) -> str:
    """A duration: 4.2 s, 95 s, 12 min, 2.5 h. Nothing was spent: a dash."""
    texts = words(lang)
    if value is None or value == 0:
        return texts["dash"]
    if value < 120:
        return number(f"{value:.0f}" if value >= 10 else f"{value:.2g}", lang) + GAP + texts["unit_second"]
    if value < 7200:
        return number(f"{value / 60:.0f}" if value >= 600 else f"{value / 60:.1f}", lang) + GAP + texts["unit_minute"]
    return number(f"{value / 3600:.1f}", lang) + GAP + texts["unit_hour"]


def _scaled(value: int | None, units: list[str], lang: Lang) -> str:
    if value is None:
        return words(lang)["dash"]
    scaled, step = float(value), 0
    while float(f"{scaled:.3g}") >= 1000 and step < len(units) - 1:
        scaled, step = scaled / 1000, step + 1
    digits = f"{scaled:.0f}" if step == 0 or scaled >= 99.95 else f"{scaled:.3g}"
    return number(digits, lang) + (GAP + units[step] if units[step] else "")
