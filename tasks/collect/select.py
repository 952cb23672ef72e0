"""Choose workloads: no two alike, few that differ much."""

from __future__ import annotations

import hashlib
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from tasks.collect.realism import Extent
from tasks.ops.base import Row, Scalar

LISTED_CALLS = 20
"""How many of the calls that gave a workload are named; all are counted."""
_NAMESPACE = uuid.UUID("6f1d7b4e-3f0f-5d52-9d0c-6a6a7b0f7c11")
"""Any fixed value: it makes the same content give the same workload uuid everywhere."""


@dataclass(slots=True)
class Candidate:
    """A distinct workload, without its tensors, and the calls it was seen in."""

    uuid: str
    axes: Mapping[str, int]
    scalars: Mapping[str, Scalar]
    stored: tuple[str, ...]
    """Inputs whose values are stored, sorted."""
    extent: Extent
    remake: Callable[[], Row]
    """Makes the row with its tensors again, from the dump."""
    calls: list[str]
    """The first of the calls it was seen in."""
    count: int = 1
    """How many calls it was seen in."""

    def seen_again(self, calls: Iterable[str]) -> None:
        """Count another call with the same content."""
        self.count += 1
        room = LISTED_CALLS - len(self.calls)
        self.calls += list(calls)[: max(room, 0)]


@dataclass(frozen=True)
class Stored:
    """A stored tensor's content, whoever wrote it."""

    dtype: str
    """As definitions have it."""
    shape: tuple[int, ...]
    data: bytes
    """In row-major order, little-endian."""


@cache
def dtype_name(dtype: np.dtype[Any]) -> str:
    """Return a dtype's name as definitions have it; numpy makes it anew each time."""
    return dtype.name


def stored(values: np.ndarray) -> Stored:
    """Return an array's content."""
    return Stored(dtype_name(values.dtype), values.shape, values.tobytes())


def content_uuid(
    name: str,
    axes: Mapping[str, int],
    scalars: Mapping[str, int | float | bool],
    tensors: Mapping[str, Stored],
) -> str:
    """Return a uuid made of what a workload is.

    Args:
        name: the definition's.
        axes: its var axes.
        scalars: the values, each as its kernel gets it (`Form.rounded`).
        tensors: the stored inputs.
    """
    digest = hashlib.sha256(name.encode())
    for axis, size in sorted(axes.items()):
        digest.update(f"|{axis}={size}".encode())
    for key, value in sorted(scalars.items()):
        digest.update(f"|{key}={value!r}".encode())
    for key, tensor in sorted(tensors.items()):
        digest.update(f"|{key}:{tensor.dtype}{tensor.shape}".encode())
        digest.update(tensor.data)
    return str(uuid.uuid5(_NAMESPACE, digest.hexdigest()))


def most_diverse(
    candidates: Sequence[Candidate], axes: Sequence[str], limit: int
) -> list[Candidate]:
    """Choose `limit` candidates that lie far apart, in the order of the candidates.

    Farthest-point selection over the logarithms of axes, starting from the largest candidate, in
    O(n * limit) time. As long as there are batch sizes that no chosen candidate has, only
    candidates of those are looked at: each is represented, if there are no more of them than
    `limit`. The sizes of the most calls, half as many as `limit`, come first: a server that is
    kept busy passes through others only as requests come and go.

    Args:
        candidates: what to choose from.
        axes: the var axes that say how much data there is (`OpModule.placement`: not where).
        limit: how many to choose, at least 1.
    """
    if len(candidates) <= limit:
        return list(candidates)
    sizes = [[c.axes[axis] for axis in axes] for c in candidates]
    points = np.log2(1 + np.array(sizes, dtype=float).reshape(len(candidates), len(axes)))
    batches = np.array([c.extent.batch_size for c in candidates])
    chosen = [int(points.sum(axis=1).argmax())]
    distance = np.linalg.norm(points - points[chosen[0]], axis=1)
    fresh = batches != batches[chosen[0]]
    sustained = np.isin(batches, _most_called(candidates, max(1, limit // 2)))
    while len(chosen) < limit:
        distance[chosen[-1]] = -1.0
        open_to = next((among for among in (fresh & sustained, fresh) if among.any()), None)
        best = int((distance if open_to is None else np.where(open_to, distance, -1.0)).argmax())
        chosen.append(best)
        distance = np.minimum(distance, np.linalg.norm(points - points[best], axis=1))
        fresh &= batches != batches[best]
    return [candidates[index] for index in sorted(chosen)]


def _most_called(candidates: Sequence[Candidate], count: int) -> list[int]:
    """Return the batch sizes of the most calls, smaller ones first among equals."""
    calls: Counter[int] = Counter()
    for candidate in candidates:
        calls[candidate.extent.batch_size] += candidate.count
    ordered = sorted(calls.items(), key=lambda item: (-item[1], item[0]))
    return [size for size, _ in ordered[:count]]
