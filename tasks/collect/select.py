"""Choose workloads: no two alike, few that differ much."""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from tasks.ops.base import Row

_NAMESPACE = uuid.UUID("6f1d7b4e-3f0f-5d52-9d0c-6a6a7b0f7c11")
"""Any fixed value: it makes the same content give the same workload uuid everywhere."""


@dataclass(frozen=True)
class Candidate:
    """A distinct workload and the calls it was seen in."""

    uuid: str
    row: Row


def content_uuid(definition_name: str, row: Row) -> str:
    """Return a uuid made of what the workload is: axes, stored tensors and scalars."""
    digest = hashlib.sha256(definition_name.encode())
    for axis, size in sorted(row.axes.items()):
        digest.update(f"|{axis}={size}".encode())
    for name, scalar in sorted(row.scalars.items()):
        digest.update(f"|{name}={scalar.value!r}".encode())
    for name, values in sorted(row.tensors.items()):
        digest.update(f"|{name}:{values.dtype.str}{values.shape}".encode())
        digest.update(np.ascontiguousarray(values).tobytes())
    return str(uuid.uuid5(_NAMESPACE, digest.hexdigest()))


def distinct(definition_name: str, rows: Iterable[Row]) -> list[Candidate]:
    """Merge rows of equal content, keeping all their calls, in order of first appearance."""
    found: dict[str, Row] = {}
    for row in rows:
        key = content_uuid(definition_name, row)
        known = found.get(key)
        found[key] = replace(known, calls=(*known.calls, *row.calls)) if known else row
    return [Candidate(key, row) for key, row in found.items()]


def most_diverse(candidates: Sequence[Candidate], limit: int) -> list[Candidate]:
    """Choose `limit` candidates that lie far apart, in the order of the candidates.

    Farthest-point selection over the logarithms of the var axes, starting from the largest, in
    O(n * limit) time.
    """
    if len(candidates) <= limit:
        return list(candidates)
    axes = sorted(candidates[0].row.axes)
    points = np.log2(1 + np.array([[c.row.axes[a] for a in axes] for c in candidates], dtype=float))
    chosen = [int(points.sum(axis=1).argmax())]
    distance = np.linalg.norm(points - points[chosen[0]], axis=1)
    while len(chosen) < limit:
        distance[chosen[-1]] = -1.0
        chosen.append(int(distance.argmax()))
        distance = np.minimum(distance, np.linalg.norm(points - points[chosen[-1]], axis=1))
    return [candidates[index] for index in sorted(chosen)]
