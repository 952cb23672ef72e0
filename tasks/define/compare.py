"""Compare two definitions of one kernel: their form, field by field, prose left out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

Json = dict[str, Any]


class Difference(NamedTuple):
    """One field in which two definitions differ; `None` stands for an absent one."""

    field: str
    ours: Any
    theirs: Any


def differences(ours: Json, theirs: Json) -> Iterator[Difference]:
    """Yield where two definitions differ in axes, inputs, outputs, constraints and `fi_api` tags.

    The order of inputs and outputs counts: values are passed by position. That of axes and of
    constraints does not.
    """
    yield from _axes(ours["axes"], theirs["axes"])
    for part in ("inputs", "outputs"):
        yield from _tensors(part, ours[part], theirs[part])
    constraints = [d.get("constraints") or [] for d in (ours, theirs)]
    if sorted(constraints[0]) != sorted(constraints[1]):
        yield Difference("constraints", *constraints)
    apis = [[tag for tag in d.get("tags", []) if tag.startswith("fi_api:")] for d in (ours, theirs)]
    if apis[0] != apis[1]:
        yield Difference("tags.fi_api", *(", ".join(tags) or None for tags in apis))


def _axes(ours: Json, theirs: Json) -> Iterator[Difference]:
    for name in dict.fromkeys((*ours, *theirs)):
        said = [
            axis.get("value", axis.get("type")) if (axis := axes.get(name)) else None
            for axes in (ours, theirs)
        ]
        if said[0] != said[1]:
            yield Difference(f"axes.{name}", *said)


def _tensors(part: str, ours: Json, theirs: Json) -> Iterator[Difference]:
    if list(ours) != list(theirs):
        yield Difference(part, list(ours), list(theirs))
    for name in ours:
        if name not in theirs:
            continue
        for key, absent in (("shape", None), ("dtype", None), ("optional", False)):
            said = [tensors[name].get(key, absent) for tensors in (ours, theirs)]
            if said[0] != said[1]:
                yield Difference(f"{part}.{name}.{key}", *said)
