"""From dumped calls to the chosen workloads of one definition, and what they were made of."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks import ops
from tasks.collect.dumps import CallLog, read_calls
from tasks.collect.place import Place
from tasks.collect.realism import Realism, realism
from tasks.collect.rows import Form, Found, find, form_of
from tasks.collect.select import Candidate, most_diverse
from tasks.errors import CollectError, InputError
from tasks.ops.base import KernelSpec

if TYPE_CHECKING:
    from tasks.collect.session import Session

_NAMED = 5
"""Files and folders that a message names."""
_LISTED_REASONS = 50
"""Reasons may have numbers in them, so that there can be as many as there are calls."""


def open_calls(root: Path) -> CallLog:
    """Read the calls of a folder of dumps, or of a store that a session was drained into.

    Raises:
        CollectError: it is neither, or the store is damaged.
        InputError: there is nothing in it.
    """
    place = Place(root)
    if not os.path.lexists(place.store):
        log = read_calls(root)
        _check_found(root, log)
        return log
    if place.store.is_file() and not place.store.stat().st_size:
        raise InputError(f"{place.store}: is empty: the session that made it drained no call")
    return place.calls()


def _check_found(root: Path, log: CallLog) -> None:
    if log.calls or log.unreadable:
        return
    listed = sorted(path.name for path in root.iterdir())
    shown = ", ".join(listed[:_NAMED]) + (", ..." if len(listed) > _NAMED else "")
    raise InputError(
        f"{root}: no dumped call was found ({f'only {shown}' if listed else 'it is empty'}); "
        "expected FlashInfer's folders, such as 20261120_180224_001_pid7_rmsnorm_call0001 with "
        "metadata.jsonl in it, there or in folders within it, or a session's calls.sqlite"
    )


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
    """Sessions, parallelism, versions, scalars with their source, each workload's calls, what
    could not be read, and the realism report."""

    @property
    def realism(self) -> Realism:
        """How real the rows look."""
        return Realism.model_validate(self.provenance["realism"])

    def named(self, uuids: Mapping[str, str]) -> Collected:
        """Return it with its workloads under the uuids that the dataset has for them."""
        workloads = {
            uuids.get(uuid, uuid): seen for uuid, seen in self.provenance["workloads"].items()
        }
        return replace(self, provenance={**self.provenance, "workloads": workloads})


def sanitize(
    spec: KernelSpec,
    definition: dict[str, Any],
    log: CallLog,
    max_workloads: int,
    *,
    sessions: Sequence[Session] = (),
) -> tuple[list[Candidate], Collected]:
    """Choose the workloads of one definition from a session's calls.

    Args:
        spec: the kernel, with the scalars that no dump carries.
        definition: its definition.
        log: the calls.
        max_workloads: how many to choose at most.
        sessions: what was served, where that is known.

    Raises:
        CollectError: no call is a workload; the text has the counted reasons.
    """
    form = form_of(definition, spec.name)
    found = find(spec, form, log)
    if not found.candidates:
        raise CollectError(f"{spec.name}: {why_none(found, log)}")
    return choose(spec, form, found, log, max_workloads, sessions=sessions)


def choose(
    spec: KernelSpec,
    form: Form,
    found: Found,
    log: CallLog,
    max_workloads: int,
    *,
    sessions: Sequence[Session] = (),
) -> tuple[list[Candidate], Collected]:
    """Choose from the distinct workloads of a definition; there may be none.

    Arguments are those of `sanitize`, and what `form_of` and `find` returned.
    """
    placement = ops.op_module(spec.op_type).placement
    axes = [axis for axis in form.variable if axis not in placement]
    chosen = most_diverse(found.candidates, axes, max_workloads)
    report = realism(form.name, [c.extent for c in chosen], [c.extent for c in found.candidates])
    served = [s for s in sessions if spec.name in s.definitions] or list(sessions)
    provenance = {
        "sessions": [
            s.model_dump(mode="json", include={"id", "model", "sglang", "tp", "ep", "flags"})
            for s in served
        ],
        "tp": list(spec.tp),
        "ep": list(spec.ep),
        "versions": versions_of(log) if chosen else {},
        "scalars": {
            name: scalar.model_dump()
            for candidate in chosen[:1]
            for name, scalar in sorted(candidate.scalars.items())
        },
        "workloads": {c.uuid: {"calls": c.calls, "count": c.count} for c in chosen},
        "unreadable": table(log.unreadable),
        "realism": report.model_dump(mode="json"),
    }
    collected = Collected(
        rows=len(chosen),
        distinct=len(found.candidates),
        calls=found.calls,
        rejected=table(found.rejected),
        provenance=provenance,
    )
    return chosen, collected


def why_none(found: Found, log: CallLog) -> str:
    """Say why no call is a workload, with the counted reasons."""
    reasons = ", ".join(f"{count} x {reason}" for reason, count in found.rejected.most_common(3))
    seen = ", ".join(sorted({call.name for call in log.calls})) or "none"
    return (
        f"none of {len(log.calls)} recorded calls is a workload "
        f"({reasons or 'its API was never called'}; APIs seen: {seen})"
    )


def table(reasons: Counter[str]) -> dict[str, int]:
    """Return reasons and how often, the most frequent first, not too many of them."""
    # Equal counts stay in alphabetic order, however the calls were ordered.
    ordered = sorted(reasons.items(), key=lambda item: (-item[1], item[0]))
    listed = dict(ordered[:_LISTED_REASONS])
    rest = sum(count for _, count in ordered[_LISTED_REASONS:])
    return {**listed, **({"other reasons": rest} if rest else {})}


def versions_of(log: CallLog) -> dict[str, list[str]]:
    """Return package -> the versions that the calls were dumped with."""
    # Calls of a process say the same, so they are mostly one.
    seen = {tuple(call.versions.items()) for call in log.calls}
    found: dict[str, set[str]] = {}
    for versions in seen:
        for name, version in versions:
            found.setdefault(name, set()).add(version)
    return {name: sorted(versions) for name, versions in sorted(found.items())}
