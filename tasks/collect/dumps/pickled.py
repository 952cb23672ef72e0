"""Tensors of `.pt` dumps, which only torch can read: converted in a limited child process.

One child converts all of a read's files, when the first of their tensors is asked for, and of each
file only the tensors that rows need. A pickle may be hostile: it is loaded with `weights_only`, and
one that kills the child costs its own tensors only.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import tempfile
import weakref
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from tasks import sandbox
from tasks.collect.dumps.tensors import SafetensorsFile
from tasks.ops.base import DumpError

Reads = Mapping[str, Collection[str]]
"""Dumped name -> parameters whose data rows store or check."""

RESULTS = "results.jsonl"
_TIMEOUT = 600.0
_MEMORY_GB = 24.0
"""Address space, of which torch takes some and the mapped file the rest."""
_MOST_DEATHS = 3


class _Described(Protocol):
    @property
    def key(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> str: ...


@dataclass(eq=False)
class TorchFiles:
    """The `.pt` files of one read; those expected by the first load are converted together."""

    reads: Reads
    _waiting: dict[str, dict[str, Any]] = field(default_factory=dict)
    _converted: dict[str, str] = field(default_factory=dict)
    _failed: dict[str, str] = field(default_factory=dict)

    def expect(self, path: str, function: str, tensors: Mapping[str, _Described]) -> None:
        """Note a file, and which of its tensors may be asked for."""
        read = self.reads.get(function, ())
        wanted = {
            tensor.key: {"shape": tensor.shape, "dtype": tensor.dtype}
            for parameter, tensor in tensors.items()
            if parameter in read
        }
        if wanted:
            self._waiting[path] = wanted

    def converted(self, path: str) -> str:
        """Return the safetensors file that was made of a `.pt` file.

        Raises:
            DumpError: it could not be made.
        """
        if path in self._waiting:
            self._convert()
        if path not in self._converted:
            raise DumpError(self._failed.get(path, "inputs.pt was not read (no row needs it)"))
        return self._converted[path]

    def _convert(self) -> None:
        waiting, self._waiting = self._waiting, {}
        if importlib.util.find_spec("torch") is None:
            self._fail(waiting, "inputs.pt needs torch, which is not installed (the bench extra)")
            return
        folder = Path(tempfile.mkdtemp(prefix="dumps-"))
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        for _ in range(_MOST_DEATHS):
            waiting = self._run(folder, waiting)
            if not waiting:
                return
        self._fail(waiting, "inputs.pt was not read (its reader died at others)")

    def _fail(self, paths: Collection[str], reason: str) -> None:
        self._failed.update(dict.fromkeys(paths, reason))

    def _run(self, folder: Path, waiting: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        """Convert files until all are done or one kills the child; return those not tried."""
        order = list(waiting)
        base = len(self._converted) + len(self._failed)
        requests = [
            {"path": str(Path(path).resolve()), "tensors": waiting[path], "out": f"{base + i}"}
            for i, path in enumerate(order)
        ]
        (folder / "requests.json").write_text(json.dumps(requests))
        (folder / RESULTS).write_text("")
        outcome = sandbox.run_python(
            ["-m", "tasks.collect.dumps.pickled_child", str(folder)],
            timeout=_TIMEOUT,
            memory_gb=_MEMORY_GB,
            cwd=folder,
        )
        lines = (folder / RESULTS).read_text().rpartition("\n")[0].splitlines()
        reasons = [json.loads(line) for line in lines]
        for i, reason in enumerate(reasons):
            if reason:
                self._fail([order[i]], str(reason))
            else:
                self._converted[order[i]] = str(folder / f"{base + i}")
        done = len(reasons)
        if done < len(order) and not outcome.ok:
            self._fail([order[done]], "inputs.pt cannot be read (its reader died)")
            done += 1
        return {path: waiting[path] for path in order[done:]}


@dataclass(frozen=True, slots=True)
class TorchFile:
    """A `.pt` file of a dump."""

    path: str
    files: TorchFiles

    def load(self, key: str, shape: tuple[int, ...], dtype: str) -> np.ndarray:
        """Read one tensor.

        Args:
            key: its name in the file.
            shape: its shape, by the dump's metadata.
            dtype: its data type (`int32`), by the dump's metadata.

        Raises:
            DumpError: the file is damaged or hostile, lacks the tensor, or disagrees with the
                metadata; or torch is not installed.
        """
        return SafetensorsFile(self.files.converted(self.path)).load(key, shape, dtype)
