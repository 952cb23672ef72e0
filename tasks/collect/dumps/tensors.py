"""Tensors in safetensors files, read one at a time and never whole files.

A dumped run lies beside gigabytes of KV cache, so only the header and the asked tensor's own bytes
are read. `safetensors` itself refuses bfloat16 and 8-bit floats without torch, and maps the file,
which kills the reader if a writer truncates it meanwhile.
"""

from __future__ import annotations

import errno
import json
import math
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from tasks.ops.base import DumpError

SYMLINK = "a symbolic link"
_MOST_HEADER = 16 << 20
_MOST_BYTES = 1 << 28
_FIRST = 4096
"""Bytes of a file read at once; the whole header of a dump, and often the tensor too."""
_DTYPES: Mapping[str, np.dtype[Any]] = {
    code: np.dtype(kind)
    for code, kind in {
        "BOOL": np.bool_,
        "U8": np.uint8,
        "I8": np.int8,
        "U16": np.uint16,
        "I16": np.int16,
        "U32": np.uint32,
        "I32": np.int32,
        "U64": np.uint64,
        "I64": np.int64,
        "F16": np.float16,
        "F32": np.float32,
        "F64": np.float64,
        "BF16": ml_dtypes.bfloat16,
        "F8_E4M3": ml_dtypes.float8_e4m3fn,
        "F8_E5M2": ml_dtypes.float8_e5m2,
        "F8_E4M3FNUZ": ml_dtypes.float8_e4m3fnuz,
        "F8_E5M2FNUZ": ml_dtypes.float8_e5m2fnuz,
        "F8_E8M0": ml_dtypes.float8_e8m0fnu,
    }.items()
}


@contextmanager
def opened(path: str) -> Iterator[tuple[int, int]]:
    """Open a regular file for reading; yield its descriptor and its size in bytes.

    Links are not followed, and a named pipe is not waited for.

    Raises:
        DumpError: it is a link, or not a regular file.
        OSError: it cannot be opened.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise DumpError(SYMLINK) from error
        raise
    try:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            raise DumpError("not a regular file")
        yield handle, status.st_size
    finally:
        os.close(handle)


@dataclass(frozen=True, slots=True)
class SafetensorsFile:
    """A safetensors file of a dump, opened anew for each tensor."""

    path: str

    def load(self, key: str, shape: tuple[int, ...], dtype: str) -> np.ndarray:
        """Read one tensor.

        Args:
            key: its name in the file.
            shape: its shape, by the dump's metadata.
            dtype: its data type (`int32`), by the dump's metadata.

        Raises:
            DumpError: the file is damaged, lacks the tensor, or disagrees with the metadata.
        """
        try:
            with opened(self.path) as (handle, size):
                return _tensor(handle, size, key, shape, dtype)
        except OSError as error:
            reason = os.strerror(error.errno) if error.errno else type(error).__name__
            raise DumpError(f"tensor {key} cannot be read ({reason})") from error
        except DumpError as error:
            raise DumpError(f"tensor {key} cannot be read ({error})") from error


def _tensor(handle: int, size: int, key: str, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    start, header, first = _header(handle, size)
    begin, end, kind = _place(header.get(key), size - start)
    stored = tuple(header[key]["shape"])
    if stored != shape:
        raise DumpError(f"its shape is {stored}, metadata {shape}")
    if kind.name != dtype:
        raise DumpError(f"its dtype is {kind.name}, metadata {dtype}")
    if end - begin > _MOST_BYTES:
        raise DumpError(f"larger than {_MOST_BYTES >> 20} MiB, as no tensor that a row stores is")
    data = np.empty(end - begin, dtype=np.uint8)
    if start + end <= len(first):
        data[:] = np.frombuffer(first, np.uint8, end - begin, start + begin)
    else:
        _read_into(handle, data, start + begin)
    try:
        return data.view(kind).reshape(shape)
    except ValueError as error:
        raise DumpError("its shape is impossible") from error


def _header(handle: int, size: int) -> tuple[int, dict[str, Any], bytes]:
    """Return where the data begins, the header, and the file's first bytes."""
    first = os.pread(handle, _FIRST, 0)
    length = int.from_bytes(first[:8], "little")
    if len(first) < 8 or length > size - 8:
        raise DumpError("truncated")
    if length > _MOST_HEADER:
        raise DumpError("its header is too large")
    raw = first[8 : 8 + length]
    if len(raw) < length:
        raw = os.pread(handle, length, 8)
    try:
        header = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise DumpError("its header is damaged") from error
    if not isinstance(header, dict):
        raise DumpError("its header is damaged")
    return 8 + length, header, first


def _place(entry: object, available: int) -> tuple[int, int, np.dtype[Any]]:
    """Return where in the data a tensor begins and ends, and its type."""
    if entry is None:
        raise DumpError("not in the file")
    match entry:
        case {"dtype": str(code), "shape": [*shape], "data_offsets": [int(begin), int(end)]} if (
            all(type(n) is int and n >= 0 for n in shape) and 0 <= begin <= end
        ):
            pass
        case _:
            raise DumpError("its header is damaged")
    if end > available:
        raise DumpError("truncated")
    if code not in _DTYPES:
        raise DumpError("its data type is not known")
    if math.prod(shape) * _DTYPES[code].itemsize != end - begin:
        raise DumpError("its header is damaged")
    return begin, end, _DTYPES[code]


def _read_into(handle: int, data: np.ndarray, offset: int) -> None:
    done, view = 0, data.data
    while done < len(data):
        count = os.preadv(handle, [view[done:]], offset + done)
        if not count:
            raise DumpError("truncated")
        done += count
