"""Frozen linear maps whose weights are kept in 8 or 4 bits: the base takes less memory, nothing learns in these weights.

bitsandbytes turns weights into codes and back, for fp8 torch does. The product is ours: the codes become a matrix in
the number format of the inputs, which is used and dropped, forward and again backward. So a quantised base computes
exactly what a float base with the dequantised weights computes, and its gradients are that base's gradients. (The
library's own 8-bit product rounds the inputs to 8 bits too, and a graph that keeps dequantised matrices would hold the
whole base in floats.) One thing is left to the machine, as number formats are: fp8 in a base that computes in bf16, on
a GPU with a unit for it, multiplies codes.
Knows modules; no family, no method. Shapes: D and E input and output width of a map, B blocks.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from tritune.errors import Unavailable
from tritune.models import fp8
from tritune.spec import Quantisation

#: weights that share one scale in nf4 (QLoRA, Dettmers et al. 2023, arXiv:2305.14314); their scales stay in fp32
BLOCK = 64


@dataclass(frozen=True, slots=True)
class Native:
    """Products without a matrix of floats: x Wᵀ of inputs, codes and scales, and g W; and where there are such products."""

    runs_here: Callable[[Tensor, Tensor], bool]
    product: Callable[[Tensor, Tensor, Tensor], Tensor]
    slope: Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Form:
    """How a matrix (E, D) becomes codes and scales, and back."""

    pack: Callable[[Tensor], tuple[Tensor, Tensor]]
    unpack: Callable[[Tensor, Tensor, tuple[int, int], torch.dtype], Tensor]
    #: how codes are multiplied as they are; None: they never are
    native: Native | None = None
    #: so many numbers in a row share a scale with no others
    unit: int = 1
    #: whether bitsandbytes makes the codes
    library: bool = True


def _pack_int8(weight_ED: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (E, D) and one scale (E) per output: its largest weight (LLM.int8, arXiv:2208.07339, without outliers)."""
    codes_ED, scales_E, _ = _library().int8_vectorwise_quant(weight_ED.half())  # on a GPU it takes nothing else
    return codes_ED, scales_E


def _unpack_int8(codes_ED: Tensor, scales_E: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    unpacked_ED: Tensor = _library().int8_vectorwise_dequant(codes_ED, scales_E)
    return unpacked_ED.to(dtype)


def _pack_nf4(weight_ED: Tensor) -> tuple[Tensor, Tensor]:
    """Two codes in a byte, and one scale (B) per block of weights that follow each other: its largest."""
    codes, state = _library().quantize_4bit(weight_ED.contiguous(), blocksize=BLOCK, quant_type="nf4")
    return codes, state.absmax


def _unpack_nf4(codes: Tensor, scales_B: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    known = dtype if dtype in (torch.float32, torch.bfloat16, torch.float16) else torch.float32
    library = _library()
    # As one row: where a processor has AVX-512, bitsandbytes 0.50.2 takes other blocks' scales in rows that do not end with a
    # block (of 96 or 160 numbers, say).
    flat = torch.Size((prod(shape),))
    state = library.QuantState(scales_B, flat, blocksize=BLOCK, quant_type="nf4", dtype=known)
    unpacked: Tensor = library.dequantize_4bit(codes, state)
    return unpacked.view(shape).to(dtype)


FORMS: Mapping[Quantisation, Form] = {
    "int8": Form(_pack_int8, _unpack_int8),
    "nf4": Form(_pack_nf4, _unpack_nf4, unit=BLOCK),
    "fp8": Form(fp8.pack, fp8.unpack, Native(fp8.runs_here, fp8.product, fp8.slope), library=False),
}


class _Use:
    native = True


@contextmanager
def multiplied_as_numbers() -> Iterator[None]:
    """Inside, every product is one of dequantised weights: for comparisons in which the rounding of codes' own products would
    hide what is looked for."""
    before, _Use.native = _Use.native, False
    try:
        yield
    finally:
        _Use.native = before


@dataclass(frozen=True, slots=True)
class Codes:
    """A matrix (E, D) in codes, and how it is multiplied: the matrix is there only while it is used, or not at all."""

    form: Quantisation
    codes: Tensor
    scales: Tensor
    shape: tuple[int, int]

    def matrix(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """(E, D), dequantised anew."""
        return FORMS[self.form].unpack(self.codes, self.scales, self.shape, dtype)

    def native(self, x: Tensor) -> Native | None:
        """How codes are multiplied as they are, where this machine does that with such inputs."""
        native = FORMS[self.form].native
        return native if native is not None and _Use.native and native.runs_here(x, self.codes) else None

    def product(self, x: Tensor) -> Tensor:
        """x Wᵀ (..., E)."""
        native = self.native(x)
        return F.linear(x, self.matrix(x.dtype)) if native is None else native.product(x, self.codes, self.scales)

    def slope(self, g: Tensor) -> Tensor:
        """g W (..., D)."""
        native = self.native(g)
        return g @ self.matrix(g.dtype) if native is None else native.slope(g, self.codes, self.scales)


class QuantisedLinear(nn.Module):
    """A frozen `nn.Linear`, or GPT-2's transposed kind of it, with its matrix in codes. A bias stays as it is.

    It has no `weight`, so that nobody takes codes for numbers, or keeps a dequantised matrix by accident.
    """

    def __init__(self, source: nn.Module, form: Quantisation) -> None:
        super().__init__()
        self.form = form
        self.transposed = not isinstance(source, nn.Linear)
        stored = source.get_parameter("weight").detach()
        weight_ED = stored.T if self.transposed else stored
        self.out_features, self.in_features = weight_ED.shape
        codes, scales = FORMS[form].pack(weight_ED)
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)
        self.bias: nn.Parameter | None
        self.register_parameter("bias", dict(source.named_parameters(recurse=False)).get("bias"))

    @property
    def kept(self) -> Codes:
        shape = (self.out_features, self.in_features)
        return Codes(self.form, self.get_buffer("codes"), self.get_buffer("scales"), shape)

    @property
    def joinable(self) -> bool:
        """Whether codes of another one can follow in the same tensor."""
        return self.out_features * self.in_features % FORMS[self.form].unit == 0

    def matrix(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """(E, D), dequantised anew."""
        return self.kept.matrix(dtype)

    def stored(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The matrix as the family keeps it: (D, E) where it is transposed."""
        matrix_ED = self.matrix(dtype)
        return matrix_ED.T.contiguous() if self.transposed else matrix_ED

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _Product.apply(x, self.kept)  # type: ignore[no-untyped-call]
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, form={self.form}"


class _Product(torch.autograd.Function):
    """A product that keeps nothing for its backward. `F.linear` on `matrix` is the slow twin."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, codes: Codes) -> Tensor:
        ctx.codes = codes
        return codes.product(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        codes: Codes = ctx.codes
        return codes.slope(g), None


def put_quantised(model: nn.Module, modules: Iterable[nn.Module], form: Quantisation) -> None:
    """Put a `QuantisedLinear` in the place of each of these linear modules of a model, one after the other: at no time are
    there both all weights and all codes.

    Raises:
        Unavailable: bitsandbytes is not installed, and this form needs it.
    """
    wanted = set(modules)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if child in wanted:
                setattr(parent, name, QuantisedLinear(child, form))


class Weights(Mapping[str, Tensor]):
    """Every weight of a model once (a tied one under its first name), by transformers' own name and in its order.

    Quantised ones are dequantised when they are asked for, to numbers of `dtype`, and not kept. `quantised` names them.

    Args:
        changed: what stands in the place of some of them.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype, changed: Mapping[str, Tensor] | None = None) -> None:
        self._dtype = dtype
        self._changed = changed or {}
        self._own: dict[str, nn.Parameter | QuantisedLinear] = {}
        seen: set[nn.Parameter] = set()
        for path, module in model.named_modules():
            if isinstance(module, QuantisedLinear):
                self._own[f"{path}.weight"] = module
            for name, parameter in module.named_parameters(recurse=False):
                if parameter not in seen:
                    seen.add(parameter)
                    self._own[f"{path}.{name}" if path else name] = parameter

    def __getitem__(self, name: str) -> Tensor:
        own = self._changed.get(name, self._own[name])
        return own.stored(self._dtype) if isinstance(own, QuantisedLinear) else own

    def __iter__(self) -> Iterator[str]:
        return iter(self._own)

    def __len__(self) -> int:
        return len(self._own)

    @property
    def quantised(self) -> frozenset[str]:
        return frozenset(name for name, own in self._own.items() if isinstance(own, QuantisedLinear))

    def count(self) -> int:
        """How many numbers they are; nothing is dequantised."""
        return sum(
            own.in_features * own.out_features if isinstance(own, QuantisedLinear) else own.numel()
            for own in self._own.values()
        )


def resident_bytes(model: nn.Module) -> int:
    """Bytes of everything a model keeps: weights, codes, scales, tables. What lies in one place is counted once."""
    places = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in (*model.parameters(), *model.buffers())
    }
    return sum(places.values())


def check_library(form: Quantisation) -> None:
    """
    Raises:
        Unavailable: bitsandbytes is not installed, and this form needs it.
    """
    if FORMS[form].library:
        _library()


@cache
def _library() -> Any:
    """bitsandbytes' functions.

    Raises:
        Unavailable: it is not installed.
    """
    try:
        with _no_kernels_from_the_hub():
            import bitsandbytes.functional
    except ImportError as error:
        raise Unavailable(
            f"A quantised base needs bitsandbytes: pip install 'tritune[quantised]' ({error})."
        ) from error
    return bitsandbytes.functional


@contextmanager
def _no_kernels_from_the_hub() -> Iterator[None]:
    """On CPUs with AVX512-BF16 the import of bitsandbytes 0.50 fetches a kernel from the Hub and loads it, if the package
    `kernels` is there. It is hidden meanwhile: the kernel is for products that are not used here."""
    name, log = "kernels", logging.getLogger("bitsandbytes")
    before, level = sys.modules.get(name), log.level
    sys.modules[name] = None  # type: ignore[assignment]  # Python's way to say: there is no such module
    log.setLevel(logging.ERROR)  # it warns that there is no kernel
    try:
        yield
    finally:
        log.setLevel(level)
        if before is None:
            del sys.modules[name]
        else:
            sys.modules[name] = before
