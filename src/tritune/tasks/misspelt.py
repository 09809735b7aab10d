"""Labels that look like another label misspelt: each would silently become a class of its own. Knows labels and counts."""

from __future__ import annotations

import re
from collections.abc import Mapping

#: a label that is one letter off another one is taken for a misspelling of it, where the other has this many times its rows
TIMES = 5
#: shorter words differ by a letter for good reason: VBD and VBN, class A and class B
LETTERS = 5

_BETWEEN_WORDS = re.compile(r"(?<=[^\W_])[\s_-]+(?=[^\W_])")


def misspelt(counts: Mapping[str, int]) -> dict[str, str]:
    """Label -> the more frequent label that it is probably meant to be.

    Two labels are one where only case, or what stands between words, differs ("not-spam", "Not spam"); single letters are
    not. Otherwise they are taken for one where in one word a single letter after the first is missing, added, changed, or
    stands one place too early or late, and the one has at most a fifth of the other's rows.

    Args:
        counts: how many rows every label has.
    """
    ranked = sorted(counts, key=lambda label: (-counts[label], label))
    words = {label: _BETWEEN_WORDS.sub(" ", label.lower()).split(" ") for label in ranked}
    spelt: dict[tuple[str, ...], str] = {}
    found: dict[str, str] = {}
    for label in ranked:
        first = spelt.setdefault(tuple(words[label]), label)
        if first != label and len(label) > 1:
            found[label] = first
    frequent = [label for label in ranked if counts[label] >= TIMES and label not in found]
    for label in ranked:
        enough = (other for other in frequent if counts[label] * TIMES <= counts[other])
        if label not in found and (meant := next((o for o in enough if _a_slip(words[label], words[o])), None)):
            found[label] = meant
    return found


def _a_slip(one: list[str], two: list[str]) -> bool:
    """Whether a single slip of a letter in one word makes the one of the other."""
    different = [(a, b) for a, b in zip(one, two, strict=False) if a != b]
    return len(one) == len(two) and len(different) == 1 and _a_letter_off(*different[0])


def _a_letter_off(one: str, two: str) -> bool:
    """First letters carry meaning: moral and amoral."""
    short, long = sorted((one, two), key=len)
    if len(long) < LETTERS or len(long) - len(short) > 1 or short[:1] != long[:1]:
        return False
    at = next((i for i, (a, b) in enumerate(zip(short, long, strict=False)) if a != b), len(short))
    swapped = len(short) == len(long) and short[at : at + 2] == long[at : at + 2][::-1]
    if swapped and short[at + 2 :] == long[at + 2 :]:
        return short[at : at + 2].isalpha()
    in_short = short[at : at + 1] if len(short) == len(long) else ""
    return short[at + len(in_short) :] == long[at + 1 :] and (in_short + long[at]).isalpha()
