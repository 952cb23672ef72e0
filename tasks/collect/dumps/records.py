"""One dumped call from the last line of its `metadata.jsonl`.

Everything in that line is checked: it is as foreign as the folder it lies in. What does not hold is
a `DumpError`, whose text is one of few, as it is counted.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from tasks.collect.dumps.folders import DumpFolder
from tasks.collect.dumps.pickled import TorchFile, TorchFiles
from tasks.collect.dumps.tensors import SafetensorsFile, opened
from tasks.ops.base import DumpError, Tensor

Json = dict[str, Any]

METADATA = "metadata.jsonl"
_MOST_LINE = 1 << 20
"""Bytes a record may have; FlashInfer's have some thousand."""
_MOST_SIGNATURE = 20_000
_MOST_ELEMENTS = 1 << 50
# Both come to be in reasons.
_KEY = re.compile(r"arg_(\d{1,4})((?:__\w{1,80})?)|kwarg_(\w{1,80})", re.ASCII)
_DTYPE = re.compile(r"torch\.(\w{1,40})", re.ASCII)
_OPENING, _CLOSING = "([{<", ")]}>"
_FORM = f"{METADATA} is not of the expected form"
_TRUNCATED = f"{METADATA} is truncated"


class UnfinishedError(DumpError):
    """The dump may still be being written."""


class CapturedError(UnfinishedError):
    """A CUDA graph captured the call: it ran when the graph was replayed, not when it was made."""

    def __init__(self) -> None:
        super().__init__("the call was captured into a CUDA graph and no replay of it was dumped")


@dataclass(frozen=True, slots=True)
class DumpedTensor:
    """A tensor argument of a dumped call; its data is read only when asked for."""

    file: SafetensorsFile | TorchFile
    key: str
    """Its name in the file."""
    shape: tuple[int, ...]
    dtype: str

    def load(self) -> np.ndarray:
        """Read the data as an array.

        Raises:
            DumpError: the file is missing, damaged, or disagrees with the metadata.
        """
        return self.file.load(self.key, self.shape, self.dtype)


@dataclass(frozen=True, slots=True)
class DumpedCall:
    """One call, its arguments under their parameter names."""

    id: str
    name: str
    process: str
    tensors: Mapping[str, Tensor]
    values: Mapping[str, Any]
    versions: Mapping[str, str]
    self_id: int | None = None
    captured: bool = False
    prefill: str = ""


def last_record(folder: Path) -> Json:
    """Return the last record of a dump folder.

    Raises:
        UnfinishedError: there is none yet, or only a part of its line.
        DumpError: it cannot be read, or is no record.
    """
    line = _last_line(folder)
    try:
        record = json.loads(line.decode(), object_pairs_hook=_distinct)
    except UnicodeDecodeError as error:
        raise DumpError(f"{METADATA} cannot be read (not UTF-8)") from error
    except (ValueError, RecursionError) as error:
        raise UnfinishedError(_TRUNCATED) from error
    if not isinstance(record, dict):
        raise DumpError(_FORM)
    if rb"\ud" in line.lower():
        _check_text(line.decode())
    return record


def same_record(folder: Path, other: Path) -> bool:
    """Whether two dump folders have the same last record, so that one is a copy of the other."""
    try:
        return _last_line(folder) == _last_line(other)
    except DumpError:
        return False


def _last_line(folder: Path) -> bytes:
    try:
        with opened(f"{folder}/{METADATA}") as (handle, size):
            offset = max(0, size - _MOST_LINE - 1)
            raw = os.pread(handle, size - offset, offset)
    except FileNotFoundError as error:
        raise UnfinishedError(f"{METADATA} cannot be read (not there)") from error
    except OSError as error:
        raise DumpError(f"{METADATA} cannot be read") from error
    line = raw.rstrip().rpartition(b"\n")[2]
    if len(line) > _MOST_LINE:
        raise DumpError(f"{METADATA} cannot be read (too large)")
    return line


def _distinct(pairs: list[tuple[str, Any]]) -> Json:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise DumpError(f"{METADATA} has a key twice")
    return found


def _check_text(line: str) -> None:
    """Check that no string of a JSON text has half a surrogate pair; it could not be stored."""
    try:
        json.dumps(json.loads(line), ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise DumpError(_FORM) from error


def make_call(
    root: Path,
    folder: DumpFolder,
    record: Json,
    torch_files: TorchFiles,
    *,
    prefix: str,
    incomplete: bool,
) -> DumpedCall:
    """Return the call that a folder's last record describes.

    Args:
        root: what the folder's path is relative to.
        folder: the folder.
        record: its last record.
        torch_files: what reads `.pt` files.
        prefix: what goes before the call's id and process.
        incomplete: whether a call counts of which only the inputs were saved.

    Raises:
        UnfinishedError: the call has not completed, or was captured and counts by its replays.
        DumpError: it is no record of a call of this folder.
    """
    try:
        if record["function_name"] != folder.function or record["process_id"] != folder.pid:
            raise DumpError(f"{METADATA} is of another call than its folder")
        captured = record.get("graph_capture", False)
        if type(captured) is not bool:
            raise DumpError(_FORM)
        if captured and not folder.flush:
            raise CapturedError
        _check_status(record, replay=folder.flush > 0, incomplete=incomplete)
        names = _parameters(record["function_signature"])
        tensors = _tensors(root, folder, record, names, torch_files)
        return DumpedCall(
            id=prefix + folder.relative,
            name=_shared(folder.function),
            process=_shared(f"{(prefix + folder.parent).rstrip('/') or '.'}:{folder.pid}"),
            tensors=tensors,
            values=_values(record["input_metadata"], names, tensors),
            versions=_versions(tuple(record["versions"].items())),
            self_id=_self_id(record.get("self_id")),
            captured=captured,
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DumpError(_FORM) from error


@lru_cache(maxsize=1024)
def _shared(text: str) -> str:
    """Return the first string of this content: thousands of calls have the same few."""
    return text


def _check_status(record: Json, *, replay: bool, incomplete: bool) -> None:
    status = record["execution_status"]
    # A replay is dumped after it ran; where the API returns no tensor, no more is written.
    saved = incomplete or (replay and record.get("graph_capture_flushed") is True)
    if status == "completed" or (status == "inputs_saved" and saved):
        return
    if status == "inputs_saved":
        raise UnfinishedError("the call did not complete (inputs_saved)")
    raise DumpError("the call did not complete (of unknown status)")


def _self_id(value: object) -> int | None:
    if value is None or (type(value) is int and 0 <= value < 1 << 63):
        return value
    raise DumpError("self_id is not an object's id")


@lru_cache(maxsize=64)
def _versions(items: tuple[tuple[str, object], ...]) -> Mapping[str, str]:
    return {key: str(value)[:200] for key, value in items}


@lru_cache(maxsize=256)
def _parameters(signature: str) -> tuple[str, ...]:
    """Return the positional parameter names of a dumped signature.

    It is no Python: defaults stand there as they print (`<WeightLayout.MajorK: 0>`).

    Raises:
        DumpError: its brackets or quotes do not match.
    """
    names = []
    for parameter in _split(signature):
        name = re.match(r"\s*(\*{0,2})(\w*)", parameter)
        if name is None or name[1]:
            break
        if name[2]:
            names.append(name[2])
    return tuple(names)


def _split(signature: str) -> list[str]:
    """Split a signature's parameter list at the commas outside of any brackets and quotes."""
    if not signature.startswith("(") or len(signature) > _MOST_SIGNATURE:
        raise DumpError("function_signature cannot be parsed")
    parts: list[str] = []
    open_brackets, quote, start = "", "", 1
    for index, char in enumerate(signature):
        if quote:
            quote = "" if char == quote else quote
        elif char in "'\"":
            quote = char
        elif char in _OPENING:
            open_brackets += char
        elif char in _CLOSING:
            if open_brackets[-1:] != _OPENING[_CLOSING.index(char)]:
                break
            open_brackets = open_brackets[:-1]
            if not open_brackets:
                return [*parts, signature[start:index]]
        elif char == "," and open_brackets == "(":
            parts.append(signature[start:index])
            start = index + 1
    raise DumpError("function_signature cannot be parsed")


@lru_cache(maxsize=4096)
def _parameter(key: str, names: tuple[str, ...]) -> str:
    """Return the parameter that `arg_3`, `arg_2__0` or `kwarg_name` stands for.

    Of `*args` only the place is known: they keep their key (`arg_10`).
    """
    match = _KEY.fullmatch(key)
    if match is None:
        raise DumpError(_FORM)
    index, within, keyword = match.groups()
    if keyword:
        return str(keyword)
    if int(index) < len(names):
        return names[int(index)] + str(within)
    return key


@lru_cache(maxsize=256)
def _dtype(name: str) -> str:
    match = _DTYPE.fullmatch(name)
    if match is None:
        raise DumpError("a tensor's dtype is not one of torch's")
    return match[1]


def _shape(sizes: tuple[int, ...]) -> tuple[int, ...]:
    # Checked for every tensor: a cache takes (True,) for (1,).
    sized = all(type(n) is int and 0 <= n < _MOST_ELEMENTS for n in sizes)
    if not sized or len(sizes) > 32 or math.prod(sizes) > _MOST_ELEMENTS:
        raise DumpError("a tensor's shape is impossible")
    return _shared_shape(sizes)


@lru_cache(maxsize=1024)
def _shared_shape(sizes: tuple[int, ...]) -> tuple[int, ...]:
    return sizes


def _tensors(
    root: Path,
    folder: DumpFolder,
    record: Json,
    names: tuple[str, ...],
    torch_files: TorchFiles,
) -> Mapping[str, DumpedTensor]:
    place, kind = f"{root}/{folder.relative}", record.get("tensor_format", "safetensors")
    file: SafetensorsFile | TorchFile
    if kind == "safetensors":
        file = SafetensorsFile(f"{place}/inputs.safetensors")
    elif kind == "torch":
        file = TorchFile(f"{place}/inputs.pt", torch_files)
    else:
        raise DumpError("the dump is in neither safetensors nor torch format")
    details, tensors = record["tensor_details"], {}
    keys = record["tensor_info"]["input_tensor_keys"]
    for key in keys:
        detail, parameter = details[key], _parameter(key, names)
        tensors[parameter] = DumpedTensor(
            file, _shared(key), _shape(tuple(detail["shape"])), _dtype(detail["dtype"])
        )
    if len(tensors) != len(keys):
        raise DumpError("two arguments are for one parameter")
    if isinstance(file, TorchFile):
        torch_files.expect(file.path, folder.function, tensors)
    return tensors


def _values(
    recorded: Json, names: tuple[str, ...], tensors: Mapping[str, DumpedTensor]
) -> Mapping[str, Any]:
    values = {_parameter(key, names): value for key, value in recorded.items()}
    if len(values) != len(recorded) or not values.keys().isdisjoint(tensors):
        raise DumpError("two arguments are for one parameter")
    # How the object prints is different for every process; which it is says `self_id`.
    if names[:1] == ("self",):
        values.pop("self", None)
    return _same_values(json.dumps(values))


@lru_cache(maxsize=4096)
def _same_values(text: str) -> Mapping[str, Any]:
    """Return values from their JSON text; most calls differ from others in tensors only."""
    values: Json = json.loads(text)
    return values
