"""On which bases every variant must have been compared, checked from what was seen; and which are excepted, and why."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from tests.parity.seen import POST_NORM, Seen, Variant

#: families that a variant is compared on beside that of SmolLM2-135M
FAMILIES = 4
#: what has no gradients to compare
WITHOUT_GRADIENTS = ("merge",)
EXCEPTIONS: Mapping[Variant, str] = {
    Variant("bottleneck", "added after the sum", "adapters"): "Has a meaning only where a family norms after the sum.",
    Variant("bottleneck", "no stream", "adapters"): "Refused where a family norms after the sum.",
    Variant("bottleneck", "the stream as residual", "adapters"): "Refused where a family norms after the sum.",
    Variant("full", "biases", "transformers"): "SmolLM2-135M has no biases.",
    Variant(
        "full", "the head", "transformers"
    ): "SmolLM2-135M and OPT have no head of their own: it is their embedding.",
    Variant("lora", "on a fused matrix", "PEFT"): "Only GPT-2, GPT-NeoX and Phi-3 have one.",
    Variant("lora", "on a transposed matrix", "PEFT"): "Only GPT-2 has one.",
}
#: the same for all variants of a method beside a reference
GROUPS: Mapping[tuple[str, str], str] = {
    (
        "bottleneck",
        "formula",
    ): "A second oracle beside adapter-hub's package, which computes these variants on all bases.",
}


def breaches(seen: Seen) -> Iterator[str]:
    """What the rule says of a whole run: variants that lack bases, and exceptions that nothing needs."""
    variants = sorted({variant for variant, _ in seen.variants})
    for variant in variants:
        if (missing := lacking(seen, variant)) and reason_for(variant) is None:
            yield f"{told(variant)}: was not compared on {'; '.join(missing)}"
    for variant in EXCEPTIONS:
        if variant not in variants or not lacking(seen, variant):
            yield f"{told(variant)}: is excepted, but was compared on everything or not at all"


def lacking(seen: Seen, variant: Variant) -> list[str]:
    """What this variant was not compared on."""
    tiny, real = (seen.variants.get((variant, is_tiny)) for is_tiny in (True, False))
    bases = set() if tiny is None else tiny.bases
    families = {base.removesuffix("-post-norm") for base in bases} - {"llama"}
    found = [] if real else ["SmolLM2-135M"]
    if len(families) < FAMILIES:
        found.append(f"{FAMILIES} families beside llama (only {', '.join(sorted(families)) or 'none'})")
    if POST_NORM not in bases:
        found.append(POST_NORM)
    if variant.method not in WITHOUT_GRADIENTS:
        for gaps, where in ((tiny, "tiny bases"), (real, "SmolLM2-135M")):
            if gaps is not None and gaps.gradients is None:
                found.append(f"gradients of {where}")
    return found


def reason_for(variant: Variant) -> str | None:
    """Why it may lack some; None: it may not."""
    return EXCEPTIONS.get(variant) or GROUPS.get((variant.method, variant.reference))


def told(variant: Variant) -> str:
    return f"{variant.method}, {variant.name} ({variant.reference})"


def footnotes() -> str:
    """The exceptions as docs/parity.md lists them."""
    alone = [f"- {told(variant)}: {reason}" for variant, reason in EXCEPTIONS.items()]
    grouped = [f"- {method}, all variants ({reference}): {reason}" for (method, reference), reason in GROUPS.items()]
    return "\n".join([*grouped, *alone])
