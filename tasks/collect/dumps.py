"""Read FlashInfer's level-10 dumps.

One folder per call, with `metadata.jsonl` (its last line counts) and `inputs.safetensors`.
Arguments come back under their parameter names. Nothing is loaded until a row asks for it, no
pickle is ever opened, and whatever cannot be read is a counted reason.
"""

from __future__ import annotations

import ast
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from tasks.errors import CollectError
from tasks.ops.base import DumpError

_METADATA = "metadata.jsonl"


@dataclass(frozen=True)
class DumpedTensor:
    """A tensor in a dump folder's safetensors file."""

    file: Path
    key: str
    shape: tuple[int, ...]

    def load(self) -> np.ndarray:
        """Read the data.

        Raises:
            DumpError: the file is missing, truncated, or disagrees with the metadata.
        """
        try:
            with safe_open(self.file, framework="numpy") as stored:
                values: np.ndarray = stored.get_tensor(self.key)
        except (OSError, SafetensorError, TypeError, ValueError) as error:
            raise DumpError(f"tensor {self.key} cannot be read ({type(error).__name__})") from error
        if values.shape != self.shape:
            raise DumpError(f"tensor {self.key} has shape {values.shape}, metadata {self.shape}")
        return values


@dataclass(frozen=True)
class DumpedCall:
    """One call, its arguments under their parameter names."""

    id: str
    name: str
    process: str
    tensors: Mapping[str, DumpedTensor]
    values: Mapping[str, Any]
    versions: Mapping[str, str]


@dataclass
class CallLog:
    """All readable calls of a dump folder, and why the others are not."""

    calls: list[DumpedCall] = field(default_factory=list)
    unreadable: Counter[str] = field(default_factory=Counter)


@lru_cache(maxsize=256)
def _parameters(signature: str) -> tuple[str, ...]:
    """Return the positional parameter names of a dumped signature string."""
    try:
        tree = ast.parse(f"def f{signature}: ...")
    except SyntaxError as error:
        raise DumpError("function_signature cannot be parsed") from error
    function = tree.body[0]
    if not isinstance(function, ast.FunctionDef):
        raise DumpError("function_signature is not a signature")
    return tuple(a.arg for a in (*function.args.posonlyargs, *function.args.args))


def _parameter(key: str, names: tuple[str, ...]) -> str:
    """Return the parameter that `arg_3` or `kwarg_name` stands for."""
    if key.startswith("kwarg_"):
        return key.removeprefix("kwarg_")
    index = key.removeprefix("arg_")
    if index.isdigit() and int(index) < len(names):
        return names[int(index)]
    return key


def _read(folder: Path, root: Path) -> DumpedCall:
    try:
        lines = (folder / _METADATA).read_text(encoding="utf-8").splitlines()
        record = json.loads(lines[-1])
        status = record["execution_status"]
        names = _parameters(record["function_signature"])
        details, values = record["tensor_details"], record["input_metadata"]
        inputs = set(record["tensor_info"]["input_tensor_keys"])
        name, process = str(record["function_name"]), int(record["process_id"])
        versions = {key: str(value) for key, value in record["versions"].items()}
        tensors = {
            _parameter(key, names): DumpedTensor(
                folder / "inputs.safetensors", key, tuple(int(n) for n in details[key]["shape"])
            )
            for key in inputs
        }
    except (OSError, UnicodeError) as error:
        raise DumpError(f"{_METADATA} cannot be read") from error
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise DumpError(f"{_METADATA} is truncated or not of the expected form") from error
    if status != "completed":
        raise DumpError(f"the call did not complete ({status})")
    if record.get("graph_capture"):
        raise DumpError("the call was captured into a CUDA graph")
    if record.get("tensor_format", "safetensors") != "safetensors":
        raise DumpError("the dump is not in safetensors format (FLASHINFER_DUMP_SAFETENSORS=1)")
    return DumpedCall(
        id=folder.relative_to(root).as_posix(),
        name=name,
        process=f"{folder.parent.relative_to(root).as_posix()}:{process}",
        tensors=tensors,
        values={_parameter(key, names): value for key, value in values.items()},
        versions=versions,
    )


def read_calls(root: Path) -> CallLog:
    """Read every call dumped below `root`, in the order of their folder names.

    Raises:
        CollectError: `root` is no folder.
    """
    if not root.is_dir():
        raise CollectError(f"{root}: no such folder of dumps")
    log = CallLog()
    for folder in sorted(path for path in root.rglob("*_call[0-9]*") if path.is_dir()):
        if folder.is_symlink():
            log.unreadable["a symbolic link"] += 1
            continue
        try:
            log.calls.append(_read(folder, root))
        except DumpError as error:
            log.unreadable[str(error)] += 1
    return log
