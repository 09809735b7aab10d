"""Where virtual tokens begin: at tokens the base knows. Shared by the methods that learn virtual tokens; learns nothing.

Shapes: P virtual tokens.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from tritune.models.pretrained import Base

Start = Literal["vocabulary", "text", "random"]

#: a prompt starts among so many tokens (Lester et al. 2021 take the 5,000 most common)
FREQUENT = 5000


def check_text(start: Start, text: str | None) -> None:
    """Raises ValueError unless there is a text exactly where the start is one."""
    if (start == "text") != (text is not None):
        raise ValueError('\'text\' goes with start "text", and start "text" needs it')


def start_ids(
    base: Base, tokens: int, text: str | None, rng: torch.Generator | None = None, *, end: bool = False
) -> Tensor:
    """Token ids (P) to start from: those of `text`, repeated or cut, or drawn from the frequent ones.

    Args:
        end: the last ones of the text, where its end is what an answer follows.
    """
    if text is not None:
        ids = base.tokenizer(text, add_special_tokens=False)["input_ids"]
        return torch.tensor([ids[(i - tokens if end else i) % len(ids)] for i in range(tokens)])
    special = set(base.tokenizer.all_special_ids)
    # In most vocabularies the first tokens are the frequent ones.
    frequent = [i for i in range(min(FREQUENT, base.embedding.num_embeddings)) if i not in special]
    return torch.tensor(frequent)[torch.randint(len(frequent), (tokens,), generator=rng)]
