"""Check a definition's workload rows, and the tensors they refer to."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from tasks import constraints
from tasks.dataset import DefinitionFiles
from tasks.errors import InputError
from tasks.files import safe_name
from tasks.validate import blobs
from tasks.validate.findings import Findings
from tasks.validate.listing import BadFileError, parse_object

Json = dict[str, Any]
_LARGEST_GPU_GB = 288


class _RowError(Exception):
    """A row is wrong; the first argument is the field."""

    def __init__(self, where: str, message: str) -> None:
        super().__init__(message)
        self.where = where


def lines_of(text: str) -> Iterator[tuple[int, str]]:
    """Yield the lines that are not blank, numbered from 1."""
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield number, line


@dataclass
class Blobs:
    """The blob files of the dataset, each header read once."""

    root: Path
    present: frozenset[PurePosixPath]
    used: set[PurePosixPath] = field(default_factory=set)
    _headers: dict[PurePosixPath, dict[str, blobs.Tensor] | str] = field(default_factory=dict)
    _digests: dict[tuple[PurePosixPath, str], str | None] = field(default_factory=dict)

    def header(self, path: PurePosixPath) -> dict[str, blobs.Tensor]:
        """Return the tensors of a file.

        Raises:
            BadFileError: it is no whole safetensors file.
        """
        if path not in self._headers:
            try:
                self._headers[path] = blobs.read_header(self.root, path)
            except BadFileError as error:
                self._headers[path] = str(error)
        found = self._headers[path]
        if isinstance(found, str):
            raise BadFileError(found)
        return found

    def digest(self, path: PurePosixPath, key: str) -> str | None:
        """Return a hash of a tensor's bytes; None if there are too many to read."""
        if (path, key) not in self._digests:
            self._digests[path, key] = blobs.digest(self.root, path, self.header(path)[key])
        return self._digests[path, key]


@dataclass
class Rows:
    """Checks the rows of one definition."""

    definition: Json
    place: DefinitionFiles
    blobs: Blobs
    findings: Findings
    uuids: set[str] = field(default_factory=set)
    count: int = 0
    evaluated: int = 0
    """Constraints, row by row."""
    not_evaluated: Counter[str] = field(default_factory=Counter)
    _alike: dict[str, list[tuple[int, Json]]] = field(default_factory=dict)

    @cached_property
    def _constant(self) -> dict[str, int]:
        axes = self.definition["axes"].items()
        return {name: axis["value"] for name, axis in axes if axis["type"] == "const"}

    @cached_property
    def _variable(self) -> set[str]:
        return set(self.definition["axes"]) - set(self._constant)

    def check(self, text: str) -> None:
        """Check all rows of a file."""
        for number, line in lines_of(text):
            self.count += 1
            try:
                self._row(number, parse_object(line))
            except _RowError as error:
                self._error(number, error.where, str(error))
            except BadFileError as error:
                self._error(number, "", str(error))
        self._duplicates()

    def orphans(self, present: Iterator[PurePosixPath]) -> None:
        """Report the blobs that no row refers to."""
        for path in present:
            if path not in self.blobs.used:
                self.findings.error(self.place.name, path, "", "orphan blob: no row refers to it")

    def _error(self, number: int, where: str, message: str) -> None:
        shown = f"line {number}: {where}" if where else f"line {number}"
        self.findings.error(self.place.name, self.place.workloads, shown, message)

    def _warn(self, number: int, where: str, message: str) -> None:
        shown = f"line {number}: {where}" if where else f"line {number}"
        self.findings.warn(self.place.name, self.place.workloads, shown, message)

    def _row(self, number: int, row: Json) -> None:
        workload = row.get("workload")
        if not isinstance(workload, dict):
            raise _RowError("workload", "missing, or not an object")
        uuid = workload.get("uuid")
        if not isinstance(uuid, str) or not uuid:
            raise _RowError("workload.uuid", "missing, or not a string")
        if uuid in self.uuids:
            self._error(number, "workload.uuid", f"{uuid!r} appears twice")
        self.uuids.add(uuid)
        if row.get("definition") != self.place.name:
            self._error(
                number,
                "definition",
                f"{row.get('definition')!r}, but the path says {self.place.name!r}",
            )
        for key in ("solution", "evaluation"):
            if row.get(key) is not None:
                self._error(number, key, "a workload row has none")
        before = len(self.findings.errors)
        axes = self._constant | self._axes(number, workload)
        inputs = self._inputs(number, workload, axes)
        if len(self.findings.errors) == before:
            self._memory(number, axes, inputs)
            self._constraints(number, axes, inputs)
            self._remember(number, axes, inputs)

    def _axes(self, number: int, workload: Json) -> dict[str, int]:
        axes = workload.get("axes")
        if not isinstance(axes, dict):
            raise _RowError("workload.axes", "missing, or not an object")
        for name in sorted(self._variable - axes.keys()):
            self._error(number, f"workload.axes.{name}", "missing")
        for name in sorted(axes.keys() - self._variable):
            self._error(number, f"workload.axes.{name}", "is no variable axis of the definition")
        good = {}
        for name in sorted(axes.keys() & self._variable):
            value = axes[name]
            if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 1 << 63:
                self._error(number, f"workload.axes.{name}", f"{value!r} is no positive integer")
            else:
                good[name] = value
        return good

    def _inputs(self, number: int, workload: Json, axes: Mapping[str, int]) -> dict[str, Json]:
        inputs, declared = workload.get("inputs"), self.definition["inputs"]
        if not isinstance(inputs, dict):
            raise _RowError("workload.inputs", "missing, or not an object")
        for name in inputs.keys() - declared.keys():
            self._error(number, f"workload.inputs.{name}", "is no input of the definition")
        for name, spec in declared.items():
            where = f"workload.inputs.{name}"
            if name not in inputs:
                if spec.get("optional"):
                    self._warn(number, where, "missing: flashinfer-bench makes up random values")
                else:
                    self._error(number, where, "missing")
                continue
            try:
                self._input(inputs[name], spec, axes)
            except _RowError as error:
                self._error(number, where + error.where, str(error))
            except BadFileError as error:
                self._error(number, f"{where}.path", f"{inputs[name].get('path')}: {error}")
        return inputs

    def _input(self, given: Any, spec: Json, axes: Mapping[str, int]) -> None:
        kind = given.get("type") if isinstance(given, dict) else None
        if kind not in ("random", "scalar", "safetensors"):
            raise _RowError(".type", f"{kind!r} is not random, scalar or safetensors")
        if (kind == "scalar") != (spec.get("shape") is None):
            expected = "a scalar" if spec.get("shape") is None else "a tensor"
            raise _RowError(".type", f"is {kind}, the definition says {expected}")
        if kind == "scalar":
            _scalar(given.get("value"), spec["dtype"])
        elif kind == "safetensors":
            self._tensor(given, spec, axes)

    def _tensor(self, given: Json, spec: Json, axes: Mapping[str, int]) -> None:
        path, key = self._path(given.get("path")), given.get("tensor_key")
        self.blobs.used.add(path)
        if path not in self.blobs.present:
            raise BadFileError("does not exist, or is not a regular file")
        tensors = self.blobs.header(path)
        if not isinstance(key, str) or key not in tensors:
            raise _RowError(".tensor_key", f"{key!r} is not in {path}")
        tensor = tensors[key]
        if tensor.dtype not in blobs.STORED_AS[spec["dtype"]]:
            raise _RowError("", f"{path}: dtype {tensor.dtype}, should be {spec['dtype']}")
        sizes = [axes.get(axis) for axis in spec["shape"]]
        if None not in sizes and list(tensor.shape) != sizes:
            raise _RowError("", f"{path}: shape {list(tensor.shape)}, should be {sizes}")

    def _path(self, text: Any) -> PurePosixPath:
        """Return the file a row refers to.

        Raises:
            _RowError: it is not in the definition's own folder.
        """
        if not isinstance(text, str) or not text:
            raise _RowError(".path", "missing, or not a string")
        parts = text.removeprefix("./").split("/")
        folder = self.place.blobs
        try:
            safe_name(parts[-1], "file")
        except InputError as error:
            raise _RowError(".path", f"{text!r}: {error}") from error
        if tuple(parts[:-1]) != folder.parts or not parts[-1].endswith(".safetensors"):
            raise _RowError(".path", f"{text!r} is no safetensors file of {folder}/")
        return folder / parts[-1]

    def _memory(self, number: int, axes: Mapping[str, int], inputs: Mapping[str, Json]) -> None:
        bits = sum(
            math.prod(axes[axis] for axis in spec["shape"]) * blobs.BITS[spec["dtype"]]
            for name, spec in self.definition["inputs"].items()
            if name in inputs and spec.get("shape") is not None
        )
        if bits / 8e9 > _LARGEST_GPU_GB:
            message = f"the inputs take more than {_LARGEST_GPU_GB} GB, the most any GPU has"
            self._warn(number, "workload.axes", message)

    def _constraints(
        self, number: int, axes: Mapping[str, int], inputs: Mapping[str, Json]
    ) -> None:
        declared = self.definition["inputs"]

        def shape(name: str) -> tuple[int, ...] | None:
            spec = declared.get(name, {})
            return tuple(axes[axis] for axis in spec["shape"]) if spec.get("shape") else None

        def element(name: str, index: int) -> int | None:
            given = inputs.get(name, {})
            if given.get("type") != "safetensors":
                return None
            path = self._path(given["path"])
            tensor = self.blobs.header(path)[given["tensor_key"]]
            return blobs.read_integer(self.blobs.root, path, tensor, index)

        for constraint in self.definition.get("constraints", []):
            answer = constraints.holds(constraint, axes, shape, element)
            if answer is None:
                self.not_evaluated[constraint] += 1
                continue
            self.evaluated += 1
            if not answer:
                self._error(number, "workload", f"the constraint {constraint!r} does not hold")

    def _remember(self, number: int, axes: Mapping[str, int], inputs: dict[str, Json]) -> None:
        plain = {
            name: given if given["type"] != "safetensors" else None
            for name, given in inputs.items()
        }
        key = json.dumps([axes, plain], sort_keys=True)
        self._alike.setdefault(key, []).append((number, inputs))

    def _duplicates(self) -> None:
        """Report rows that have the same axes and the same inputs, whatever their uuid."""
        for group in self._alike.values():
            if len(group) < 2:
                continue
            seen: dict[tuple[str | None, ...], int] = {}
            for number, inputs in group:
                content = tuple(
                    self.blobs.digest(self._path(given["path"]), given["tensor_key"])
                    for _, given in sorted(inputs.items())
                    if given["type"] == "safetensors"
                )
                first = seen.setdefault(content, number)
                if first != number and None not in content:
                    self._warn(number, "workload", f"the same as line {first}")


def _scalar(value: Any, dtype: str) -> None:
    """Check that a scalar has the Python type of its dtype.

    Raises:
        _RowError: it has not.
    """
    kind: type = float
    if dtype == "bool":
        kind = bool
    elif dtype.startswith("int"):
        kind = int
    if type(value) is not kind:
        raise _RowError(".value", f"{value!r} is no {kind.__name__}, the dtype is {dtype}")
    if isinstance(value, float) and not math.isfinite(value):
        raise _RowError(".value", f"{value!r} is not finite")
