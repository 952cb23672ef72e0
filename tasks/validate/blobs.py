"""Safetensors files: their headers, without the tensors behind them."""

from __future__ import annotations

import hashlib
import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from tasks.validate.listing import BadFileError, open_file, parse_object

_LARGEST_HEADER = 16 << 20
_LARGEST_COMPARED = 64 << 20
_BITS = dict.fromkeys(("F64", "I64", "U64"), 64)
_BITS |= dict.fromkeys(("F32", "I32", "U32"), 32)
_BITS |= dict.fromkeys(("F16", "BF16", "I16", "U16"), 16)
_BITS |= dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 8)
_BITS["F4"] = 4
STORED_AS = {
    "float32": ("F32",),
    "float16": ("F16",),
    "bfloat16": ("BF16",),
    "float8_e4m3fn": ("F8_E4M3",),
    "float8_e5m2": ("F8_E5M2",),
    "float4_e2m1": ("F4", "U8", "I8"),
    "int64": ("I64",),
    "int32": ("I32",),
    "int16": ("I16",),
    "int8": ("I8",),
    "bool": ("BOOL",),
}
"""How a dataset's dtypes are called in safetensors; two packed 4-bit numbers are a byte."""
BITS = {dtype: _BITS[stored[0]] for dtype, stored in STORED_AS.items()}
_INTEGERS = {"I64": "<q", "I32": "<i", "I16": "<h", "I8": "<b"}


@dataclass(frozen=True)
class Tensor:
    """One tensor of a file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    """Of its bytes, in the file."""
    size: int


def read_header(root: Path, path: PurePosixPath) -> dict[str, Tensor]:
    """Return the tensors of a file.

    Raises:
        BadFileError: it is no whole safetensors file.
    """
    with open_file(root, path) as stream:
        size = os.fstat(stream.fileno()).st_size
        start = stream.read(8)
        if start == b"version ":
            raise BadFileError("is a Git LFS pointer; fetch the file itself (git lfs pull)")
        if len(start) < 8:
            raise BadFileError(f"is {size} bytes long, no safetensors file")
        (length,) = struct.unpack("<Q", start)
        if length > _LARGEST_HEADER:
            raise BadFileError(f"its header would be {length} bytes long")
        if length > size - 8:
            raise BadFileError(f"is truncated: a header of {length} bytes in a file of {size}")
        data = stream.read(length)
    try:
        entries = parse_object(data.decode())
    except UnicodeDecodeError as error:
        raise BadFileError("its header is not UTF-8 text") from error
    except BadFileError as error:
        raise BadFileError(f"its header {error}") from error
    entries.pop("__metadata__", None)
    tensors = {key: _tensor(key, entry, 8 + length) for key, entry in entries.items()}
    end = 8 + length
    for tensor in sorted(tensors.values(), key=lambda item: (item.start, item.size)):
        if tensor.start != end:
            raise BadFileError("data_offsets overlap or leave a gap")
        end += tensor.size
    if end > size:
        raise BadFileError(f"is truncated: its tensors end at byte {end}, the file at {size}")
    if end < size:
        raise BadFileError(f"has {size - end} bytes after its tensors")
    return tensors


def _natural(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63


def _tensor(key: str, entry: Any, offset: int) -> Tensor:
    try:
        dtype, shape, (start, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        naturals = all(_natural(value) for value in (*shape, start, end))
    except (TypeError, KeyError, ValueError) as error:
        raise BadFileError(f"{key}: no dtype, shape and data_offsets") from error
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise BadFileError(f"{key}: dtype {dtype!r} is unknown")
    if not naturals or len(shape) > 16:
        raise BadFileError(f"{key}: shape or data_offsets are no natural numbers")
    if (end - start) * 8 != math.prod(shape) * _BITS[dtype]:
        raise BadFileError(
            f"{key}: {end - start} bytes are not those of {dtype} of shape {tuple(shape)}"
        )
    return Tensor(dtype, tuple(shape), offset + start, end - start)


def read_integer(root: Path, path: PurePosixPath, tensor: Tensor, index: int) -> int | None:
    """Return an element of a vector of integers, counted from the end if negative."""
    form = _INTEGERS.get(tensor.dtype)
    if form is None or len(tensor.shape) != 1 or not -tensor.shape[0] <= index < tensor.shape[0]:
        return None
    width = struct.calcsize(form)
    with open_file(root, path) as stream:
        stream.seek(tensor.start + (index % tensor.shape[0]) * width)
        data = stream.read(width)
    return int(struct.unpack(form, data)[0]) if len(data) == width else None


def digest(root: Path, path: PurePosixPath, tensor: Tensor) -> str | None:
    """Return a hash of a tensor's bytes; None if there are too many to read."""
    if tensor.size > _LARGEST_COMPARED:
        return None
    with open_file(root, path) as stream:
        stream.seek(tensor.start)
        return hashlib.sha256(stream.read(tensor.size)).hexdigest()
