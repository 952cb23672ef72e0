"""From dumped calls to the workload rows of one definition."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.numpy import save

from tasks import files, ops
from tasks.collect.dumps import CallLog
from tasks.collect.select import Candidate, distinct, most_diverse
from tasks.dataset import DefinitionFiles
from tasks.errors import CollectError
from tasks.ops.base import KernelSpec, Rejected, Row

_FLOATS = ("float", "bfloat")


@dataclass(frozen=True)
class Collected:
    """What became of a definition's calls."""

    rows: int
    distinct: int
    calls: int
    """Calls that are rows or duplicates of one."""
    rejected: dict[str, int]
    """Reason -> calls."""
    provenance: dict[str, Any]


def sanitize(
    spec: KernelSpec, definition: dict[str, Any], log: CallLog, max_workloads: int
) -> tuple[list[Candidate], Collected]:
    """Choose the workloads of one definition from a session's calls.

    Raises:
        CollectError: no call is a workload; the text has the counted reasons.
    """
    rows: list[Row] = []
    rejected: Counter[str] = Counter()
    for result in ops.op_module(spec.op_type).rows(spec, log.calls):
        if isinstance(result, Rejected):
            rejected[result.reason] += 1
        else:
            rows.append(result)
    candidates = distinct(spec.name, rows)
    if not candidates:
        reasons = ", ".join(f"{count} x {reason}" for reason, count in rejected.most_common(3))
        seen = ", ".join(sorted({call.name for call in log.calls})) or "none"
        raise CollectError(
            f"{spec.name}: none of {len(log.calls)} recorded calls is a workload "
            f"({reasons or 'its API was never called'}; APIs seen: {seen})"
        )
    chosen = most_diverse(candidates, max_workloads)
    collected = Collected(
        rows=len(chosen),
        distinct=len(candidates),
        calls=len(rows),
        rejected=dict(rejected.most_common()),
        provenance={
            "versions": _versions(log),
            "scalars": {
                name: value.model_dump() for name, value in sorted(chosen[0].row.scalars.items())
            },
            "workloads": {c.uuid: {"calls": list(c.row.calls)} for c in chosen},
            "unreadable": dict(log.unreadable.most_common()),
        },
    )
    _check_inputs(definition, chosen)
    return chosen, collected


def _versions(log: CallLog) -> dict[str, list[str]]:
    names = {name for call in log.calls for name in call.versions}
    return {
        name: sorted({call.versions[name] for call in log.calls if name in call.versions})
        for name in sorted(names)
    }


def _check_inputs(definition: dict[str, Any], chosen: list[Candidate]) -> None:
    """Check rows against the definition they are for.

    Raises:
        CollectError: an axis or an input that must not be random is missing.
    """
    name, inputs = definition["name"], definition["inputs"]
    variable = {a for a, axis in definition["axes"].items() if axis["type"] == "var"}
    for candidate in chosen:
        row = candidate.row
        if set(row.axes) != variable:
            raise CollectError(
                f"{name}: rows have the axes {sorted(row.axes)}, the definition {sorted(variable)}"
            )
        for key, spec in inputs.items():
            stored = key in row.tensors or key in row.scalars
            if not stored and (spec["shape"] is None or not spec["dtype"].startswith(_FLOATS)):
                raise CollectError(f"{name}: input {key} ({spec['dtype']}) has no recorded value")
            if key in row.tensors:
                _check_shape(name, key, definition, row)


def _check_shape(name: str, key: str, definition: dict[str, Any], row: Row) -> None:
    axes = {a: axis.get("value", row.axes.get(a)) for a, axis in definition["axes"].items()}
    expected = tuple(axes[a] for a in definition["inputs"][key]["shape"])
    if row.tensors[key].shape != expected:
        raise CollectError(
            f"{name}: {key} has shape {row.tensors[key].shape}, the definition says {expected}"
        )


def _line(definition: dict[str, Any], candidate: Candidate, place: DefinitionFiles) -> str:
    row = candidate.row
    inputs: dict[str, Any] = {}
    for name in definition["inputs"]:
        if name in row.tensors:
            path = f"./{place.blob(candidate.uuid)}"
            inputs[name] = {"type": "safetensors", "path": path, "tensor_key": name}
        elif name in row.scalars:
            inputs[name] = {"type": "scalar", "value": row.scalars[name].value}
        else:
            inputs[name] = {"type": "random"}
    axes = {name: row.axes[name] for name in definition["axes"] if name in row.axes}
    workload = {"uuid": candidate.uuid, "axes": axes, "inputs": inputs}
    return json.dumps(
        {
            "definition": definition["name"],
            "workload": workload,
            "solution": None,
            "evaluation": None,
        }
    )


def write_workloads(dataset: Path, definition: dict[str, Any], chosen: list[Candidate]) -> None:
    """Write rows and blobs into the dataset: blobs first, then the rows that name them.

    Rows that are there already (of another model that has the kernel too) stay. A crash in between
    leaves no row without its blob; blobs no row names are removed.
    """
    place = DefinitionFiles(definition["op_type"], definition["name"])
    path = dataset / place.workloads
    lines = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        lines[json.loads(line)["workload"]["uuid"]] = line
    wanted = {place.blob(uuid).name for uuid in lines}
    for candidate in chosen:
        if candidate.row.tensors:
            blob = dataset / place.blob(candidate.uuid)
            files.write_bytes(blob, save(dict(candidate.row.tensors)))
            wanted.add(blob.name)
        lines[candidate.uuid] = _line(definition, candidate, place)
    files.write_text(path, "\n".join(lines.values()) + "\n")
    folder = dataset / place.blobs
    for orphan in folder.iterdir() if folder.is_dir() else ():
        if orphan.name not in wanted:
            orphan.unlink()
