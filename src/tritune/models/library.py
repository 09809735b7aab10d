"""The only door to transformers: its names that are used here, in the command imported without what comes along and is not.

Knows what transformers imports, no base.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch  # noqa: F401  # its attributes are among what waits

from tritune import process
from tritune.waiting import waiting

_SYMBOLS = "torch.fx.experimental.symbolic_shapes"
#: imported by transformers, or by torch where transformers builds a model without numbers, and seldom used. A class that is
#: among them is defined in its module or below.
SELDOM = (
    "torch._dynamo",
    "torch.distributed.tensor",
    "torch.distributed._composable",
    "torch.distributed.fsdp",
    "torch.distributed.checkpoint",
    "torch.nn.attention.flex_attention",
    _SYMBOLS,
    "transformers.distributed.tensor_parallel",
    "transformers.distributed.expert_parallel",
    "sympy",
    "scipy",
    "sklearn",
    "accelerate",
)
#: decorators that tell torch's compiler what to do with a function
MARKS = (
    "torch._dynamo.allow_in_graph",
    "torch._dynamo.assume_constant_result",
    "torch._dynamo.disable",
    "torch._dynamo.disallow_in_graph",
)
#: What functions among them say of plain numbers and truths, as long as nobody has imported them, and so nothing can be a
#: symbol. torch calls them to work out shapes.
MEANWHILE: Mapping[str, Callable[..., Any]] = {
    f"{_SYMBOLS}.expect_true": lambda truth, skip=0: truth,
    f"{_SYMBOLS}.guard_or_false": bool,
    f"{_SYMBOLS}.guard_or_true": bool,
    f"{_SYMBOLS}.is_nested_int": lambda number: False,
    f"{_SYMBOLS}.statically_known_true": bool,
    f"{_SYMBOLS}.sym_and": lambda *truths: all(truths),
    f"{_SYMBOLS}.sym_eq": lambda a, b: tuple(a) == tuple(b) if isinstance(a, tuple | list) else a == b,
    f"{_SYMBOLS}.sym_or": lambda *truths: any(truths),
}


@contextmanager
def lean() -> Iterator[None]:
    """Inside, what transformers imports and tritune seldom uses waits until it is used, where the process is tritune's own.
    Others may do with transformers what they like."""
    if not process.is_own():
        yield
        return
    with waiting(SELDOM, importers=("torch", "transformers"), marks=MARKS, meanwhile=MEANWHILE):
        yield


MODELS = "transformers.modeling_layers"  # and all that models need with it

try:
    with lean():
        import_module(MODELS)
except (AttributeError, ImportError, KeyError, RuntimeError, TypeError, ValueError):
    import_module(MODELS)  # a release that does more with these names than stand-ins can

from transformers import (  # noqa: E402  # after what it imports
    CONFIG_MAPPING,
    AttentionInterface,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    __version__,
)

__all__ = [
    "CONFIG_MAPPING",
    "AttentionInterface",
    "AutoConfig",
    "AutoModelForCausalLM",
    "AutoTokenizer",
    "PreTrainedConfig",
    "PreTrainedModel",
    "PreTrainedTokenizerBase",
    "PreTrainedTokenizerFast",
    "__version__",
    "lean",
]
