"""One GGUF file from another: header and vocabulary as they are, chosen weights replaced or dequantised."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

#: header fields that a writer makes itself, or that say how all weights are stored
_OWN = ("GGUF.", "general.architecture", "general.file_type")


def copy(source: Path, target: Path, changed: Mapping[str, Any] | None = None, *, dequantised: bool = False) -> None:
    """Write `target`.

    Args:
        changed: new weights by name, as float32 arrays.
        dequantised: all other weights in float32 too; else with the bytes they have.
    """
    from gguf import GGUFReader, GGUFWriter
    from gguf.quants import dequantize

    reader = GGUFReader(source)
    writer = GGUFWriter(target, reader.fields["general.architecture"].contents())
    for field in reader.fields.values():
        if not field.name.startswith(_OWN):
            inner = field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=inner)
    for tensor in reader.tensors:
        if changed and tensor.name in changed:
            writer.add_tensor(tensor.name, changed[tensor.name])
        elif dequantised:
            writer.add_tensor(tensor.name, dequantize(tensor.data, tensor.tensor_type))
        else:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
