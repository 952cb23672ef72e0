"""Write workload rows into a dataset, so that every row has its blob whenever somebody looks."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from pydantic import BaseModel, ValidationError
from safetensors import SafetensorError, deserialize
from safetensors.numpy import save

from tasks import files
from tasks.collect.rows import Form, Number, form_of, uuid_of
from tasks.collect.select import Candidate, Stored, content_uuid
from tasks.dataset import DefinitionFiles
from tasks.errors import CollectError, first_problem
from tasks.ops.base import DumpError

Json = dict[str, Any]
_DTYPES = {
    "BOOL": "bool",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    **{f"F{bits}": f"float{bits}" for bits in (16, 32, 64)},
    **{f"I{bits}": f"int{bits}" for bits in (8, 16, 32, 64)},
}
"""What safetensors calls a definition's dtypes."""


@dataclass(frozen=True)
class Written:
    """What became of the rows of a definition's file."""

    rows: int
    """Rows that the file has now."""
    added: int
    """Of them, those that were not there."""
    uuids: dict[str, str]
    """Chosen workload -> its uuid in the dataset: that of an equal row which was there."""
    changed: bool


def write_workloads(
    dataset: Path, definition: Json, chosen: Sequence[Candidate], *, replace: bool = False
) -> Written:
    """Write rows and blobs into the dataset: blobs first, then the rows that name them.

    Rows that are there already (of another model that has the kernel too) stay; one of the same
    content, whoever made it, is not added again. A crash in between leaves no row without its blob;
    blobs that no row names are removed, and so are the definition's traces if its rows change.

    Args:
        dataset: the dataset's folder.
        definition: the definition.
        chosen: its workloads.
        replace: whether the rows that are there are dropped, unless they are chosen again.

    Raises:
        CollectError: a row that is there cannot be read, or a dump changed since it was read.
        InputError: a path leads out of the dataset, or it cannot be written.
    """
    form = form_of(definition, str(definition.get("name")))
    place = DefinitionFiles(form.op_type, form.name)
    with files.locked(dataset):
        files.check_inside(dataset, place.workloads, place.blobs, place.traces)
        earlier = [] if replace else list(_rows(dataset, place))
        uuids = _known(dataset, place, form, earlier, chosen)
        added = [candidate for candidate in chosen if candidate.uuid not in uuids]
        # One that has the uuid of an added row and not its content lost its blob.
        ours = {candidate.uuid for candidate in added}
        earlier = [row for row in earlier if row.workload.uuid not in ours]
        lines = [row.line for row in earlier] + [_line(form, place, c) for c in added]
        text = "".join(f"{line}\n" for line in lines)
        path = dataset / place.workloads
        changed = not path.exists() or path.read_bytes() != text.encode()
        if changed:
            (dataset / place.traces).unlink(missing_ok=True)
        wanted = {name for row in earlier for name in row.blobs}
        for candidate in added:
            if candidate.stored:
                blob = place.blob(candidate.uuid)
                _write_blob(dataset / blob, form, candidate)
                wanted.add(blob.name)
        if changed:
            files.write_text(path, text)
        _remove_orphans(dataset / place.blobs, wanted)
    uuids = {candidate.uuid: uuids.get(candidate.uuid, candidate.uuid) for candidate in chosen}
    return Written(rows=len(lines), added=len(added), uuids=uuids, changed=changed)


class _Workload(BaseModel):
    uuid: str
    axes: dict[str, int]
    inputs: dict[str, Json]


class _Line(BaseModel):
    workload: _Workload


@dataclass(frozen=True)
class _Row:
    """A row that is in the dataset already."""

    line: str
    workload: _Workload

    @property
    def stored(self) -> dict[str, Json]:
        return {
            name: given
            for name, given in self.workload.inputs.items()
            if given.get("type") == "safetensors"
        }

    @property
    def blobs(self) -> set[str]:
        """The names of its files; other tools name them otherwise than we do."""
        return {str(given.get("path")).rpartition("/")[2] for given in self.stored.values()}

    @property
    def scalars(self) -> dict[str, Number]:
        return {
            name: given["value"]
            for name, given in self.workload.inputs.items()
            if given.get("type") == "scalar" and isinstance(given.get("value"), Number)
        }


def _rows(dataset: Path, place: DefinitionFiles) -> Iterator[_Row]:
    path = dataset / place.workloads
    if not path.exists():
        return
    # Not splitlines: JSON may have other line ends in its texts.
    for number, line in enumerate(files.read_text(path, "the workloads").split("\n"), 1):
        if line.strip():
            try:
                yield _Row(line.rstrip("\r"), _Line.model_validate_json(line).workload)
            except ValidationError as error:
                field, reason = first_problem(error)
                where = f"line {number}: {field}" if field else f"line {number}"
                raise CollectError(f"{path}: {where}: {reason}") from error


def _known(
    dataset: Path,
    place: DefinitionFiles,
    form: Form,
    rows: Sequence[_Row],
    chosen: Sequence[Candidate],
) -> dict[str, str]:
    """Return chosen workload -> uuid of the row there of the same content."""

    def key(axes: Mapping[str, int], inputs: Sequence[str]) -> str:
        return json.dumps([axes, sorted(inputs)], sort_keys=True)

    alike = {key(c.axes, c.stored) for c in chosen}
    wanted, known = {c.uuid for c in chosen}, dict[str, str]()
    for row in rows:
        # Nothing is opened unless everything outside the blob is the same.
        if key(row.workload.axes, list(row.stored)) in alike:
            uuid = _content(dataset, place, form, row)
            if uuid in wanted:
                known.setdefault(uuid, row.workload.uuid)
    return known


def _content(dataset: Path, place: DefinitionFiles, form: Form, row: _Row) -> str | None:
    """Return the uuid of a row's content; None if it cannot be read."""
    blobs: dict[str, dict[str, Stored]] = {}
    try:
        tensors = {}
        for name, given in row.stored.items():
            path = str(given["path"])
            if path not in blobs:
                blobs[path] = _read_blob(dataset, place, path)
            tensors[name] = blobs[path][given["tensor_key"]]
        scalars = form.rounded(row.scalars)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, OverflowError):
        return None
    return content_uuid(form.name, row.workload.axes, scalars, tensors)


def _read_blob(dataset: Path, place: DefinitionFiles, path: str) -> dict[str, Stored]:
    """Read a blob of the definition's own folder.

    Raises:
        ValueError: it is elsewhere, a link, or has a dtype that no definition has.
    """
    file = PurePosixPath(path)
    if file.parent != place.blobs or (dataset / file).is_symlink():
        raise ValueError(path)
    found = deserialize((dataset / file).read_bytes())  # type: ignore[no-untyped-call]
    return {
        key: Stored(_DTYPES[tensor["dtype"]], tuple(tensor["shape"]), bytes(tensor["data"]))
        for key, tensor in found
    }


def _line(form: Form, place: DefinitionFiles, candidate: Candidate) -> str:
    inputs: dict[str, Json] = {}
    for name in form.inputs:
        if name in candidate.stored:
            path = f"./{place.blob(candidate.uuid)}"
            inputs[name] = {"type": "safetensors", "path": path, "tensor_key": name}
        elif name in candidate.scalars:
            inputs[name] = {"type": "scalar", "value": candidate.scalars[name].value}
        else:
            inputs[name] = {"type": "random"}
    axes = {name: candidate.axes[name] for name in form.variable}
    workload = {"uuid": candidate.uuid, "axes": axes, "inputs": inputs}
    return json.dumps(
        {"definition": form.name, "workload": workload, "solution": None, "evaluation": None}
    )


def _write_blob(path: Path, form: Form, candidate: Candidate) -> None:
    """Write a workload's tensors, unless they are there.

    Raises:
        CollectError: the dump does not say any more what it said.
    """
    try:
        row = form.check(candidate.remake())
        same = uuid_of(form, row) == candidate.uuid
    except DumpError:
        same = False
    if not same:
        raise CollectError(f"{form.name}: the dump of call {candidate.calls[0]} changed meanwhile")
    # `save` takes the bytes as they lie in memory.
    data = save({name: np.asarray(v, order="C") for name, v in sorted(row.tensors.items())})
    if not path.is_file() or path.is_symlink() or path.read_bytes() != data:
        files.write_bytes(path, data)


def _remove_orphans(folder: Path, wanted: set[str]) -> None:
    for blob in sorted(folder.iterdir()) if folder.is_dir() else ():
        if blob.name not in wanted and not blob.is_dir():
            blob.unlink()
