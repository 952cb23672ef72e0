"""What is kept of drained calls: every call, and the data of the tensors that rows need.

One SQLite file. Calls and the reasons of unreadable dumps are kept under the id of their folder, so
that nothing counts twice, however often a folder is drained; tensors are kept by content, so that
tensor-parallel ranks share theirs. A crash loses at most the transaction it came in, and others may
read while one process writes.
"""

from __future__ import annotations

import hashlib
import json
import math
import sqlite3
import threading
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from tasks.collect.dumps import (
    CallLog,
    DumpedCall,
    Reads,
    Unreadable,
    dump_folder,
    known_reads,
)
from tasks.errors import CollectError
from tasks.ops.base import DumpError, Tensor

_FORMAT = 1
_SCHEMA = """
CREATE TABLE calls (
    number INTEGER PRIMARY KEY,
    id TEXT NOT NULL UNIQUE,
    name TEXT NOT NULL,
    process TEXT NOT NULL,
    self_id INTEGER,
    captured INTEGER NOT NULL,
    "values" TEXT NOT NULL,
    versions TEXT NOT NULL,
    thinned INTEGER NOT NULL DEFAULT 0
);
CREATE TABLE arguments (
    call INTEGER NOT NULL REFERENCES calls,
    parameter TEXT NOT NULL,
    shape TEXT NOT NULL,
    dtype TEXT NOT NULL,
    content BLOB,
    lost TEXT NOT NULL,
    PRIMARY KEY (call, parameter)
) WITHOUT ROWID;
CREATE TABLE contents (
    content BLOB PRIMARY KEY,
    size INTEGER NOT NULL,
    data BLOB NOT NULL
);
CREATE TABLE unreadable (id TEXT NOT NULL, reason TEXT NOT NULL, PRIMARY KEY (id, reason));
CREATE TABLE logs (
    path TEXT PRIMARY KEY,
    file TEXT NOT NULL,
    position INTEGER NOT NULL
);
CREATE TABLE notices (kind TEXT PRIMARY KEY, count INTEGER NOT NULL);
"""
_MOST_JOURNAL = 64 << 20
_WAIT = 60.0
"""Seconds to wait for another process's transaction."""
_FULL = "its tensors were not kept (the store was full)"
_ROOM = 0.75
"""Share of the limit that thinning leaves in use: it need not be done again for every new call."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor argument of a stored call."""

    store: CallStore
    shape: tuple[int, ...]
    dtype: str
    content: bytes | None
    lost: str
    """Why there is no data."""

    def load(self) -> np.ndarray:
        """Read the data.

        Raises:
            DumpError: it was not kept, or could not be read from the dump.
        """
        data = self.store.data(self.content) if self.content else None
        if data is None:
            raise DumpError(self.lost or _FULL)
        try:
            return np.frombuffer(bytearray(data), dtype=_dtype(self.dtype)).reshape(self.shape)
        except (ValueError, TypeError) as error:
            raise DumpError("a stored tensor is damaged") from error


@dataclass
class Summary:
    """What a store holds, in numbers."""

    fired: dict[str, dict[str, int]] = field(default_factory=dict)
    """Dumped name -> process -> calls that ran when they were made."""
    captured: Counter[str] = field(default_factory=Counter)
    """Dumped name -> replays of calls that CUDA graphs recorded."""
    versions: dict[str, list[str]] = field(default_factory=dict)
    """Package -> its versions in the processes that were dumped."""
    unreadable: Counter[str] = field(default_factory=Counter)
    notices: Counter[str] = field(default_factory=Counter)
    """What FlashInfer's own log said about dumps it did not write."""
    thinned: int = 0
    """Calls whose tensors were given up because the store was full."""


class CallStore:
    """Drained calls in one file."""

    def __init__(self, path: Path, *, reads: Reads | None = None) -> None:
        """Open the store, or make it.

        Args:
            path: its file.
            reads: dumped name -> parameters whose data to keep; without it, what op modules need.

        Raises:
            CollectError: the file cannot be opened, is a link, or is no such store.
        """
        self._path = path
        self.reads = known_reads() if reads is None else reads
        self._lock = threading.RLock()
        if path.is_symlink():
            raise CollectError(f"{path}: a symbolic link; give the folder that the store is in")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(
                path, timeout=_WAIT, isolation_level=None, check_same_thread=False
            )
            self._prepare()
        except (sqlite3.Error, OSError) as error:
            raise CollectError(f"{path}: cannot be opened as a store of calls ({error})") from error

    def _prepare(self) -> None:
        self._db.execute(f"PRAGMA journal_size_limit = {_MOST_JOURNAL}")
        if self._format() == 0:
            self._db.execute("PRAGMA auto_vacuum = INCREMENTAL")
            self._db.execute("PRAGMA journal_mode = WAL")
            with self._transaction():
                # Another process may have been faster.
                if self._format() == 0:
                    for statement in _SCHEMA.split(";"):
                        self._db.execute(statement)
                    self._db.execute(f"PRAGMA user_version = {_FORMAT}")
        if self._format() != _FORMAT:
            raise sqlite3.DatabaseError(f"format {self._format()}, expected {_FORMAT}")

    def _format(self) -> int:
        return int(self._db.execute("PRAGMA user_version").fetchone()[0])

    @contextmanager
    def _transaction(self, kind: str = "IMMEDIATE") -> Iterator[None]:
        with self._lock:
            try:
                self._db.execute(f"BEGIN {kind}")
                yield
                self._db.execute("COMMIT")
            except sqlite3.Error as error:
                raise CollectError(f"{self._path}: the store of calls fails ({error})") from error
            finally:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")

    def _all(self, query: str, *values: Any) -> list[Any]:
        with self._lock:
            try:
                return self._db.execute(query, values).fetchall()
            except sqlite3.Error as error:
                raise CollectError(f"{self._path}: the store of calls fails ({error})") from error

    def close(self) -> None:
        """Close the file; tensors can no longer be loaded."""
        with self._lock:
            self._db.close()

    def __enter__(self) -> CallStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def add(self, results: Iterable[DumpedCall | Unreadable]) -> tuple[int, Counter[str]]:
        """Keep calls and reasons in one transaction; what is known by its id stays as it is.

        Returns:
            How many calls are new, and the reasons that are.
        """
        calls, reasons = 0, Counter[str]()
        with self._transaction():
            for result in results:
                if isinstance(result, DumpedCall):
                    calls += self._add_call(result)
                elif self._add_reason(result):
                    reasons[result.reason] += 1
        return calls, reasons

    def _add_reason(self, unreadable: Unreadable) -> bool:
        added = self._db.execute(
            "INSERT OR IGNORE INTO unreadable VALUES (?, ?)", (unreadable.id, unreadable.reason)
        )
        return added.rowcount == 1

    def _add_call(self, call: DumpedCall) -> bool:
        added = self._db.execute(
            'INSERT OR IGNORE INTO calls (id, name, process, self_id, captured, "values", versions)'
            " VALUES (?, ?, ?, ?, ?, ?, ?)",
            (
                *(call.id, call.name, call.process, call.self_id, call.captured),
                *(json.dumps(call.values), json.dumps(call.versions)),
            ),
        )
        if added.rowcount != 1:
            return False
        wanted = self.reads.get(call.name, ())
        self._db.executemany(
            "INSERT INTO arguments VALUES (?, ?, ?, ?, ?, ?)",
            [
                (
                    *(added.lastrowid, parameter, json.dumps(tensor.shape), tensor.dtype),
                    *self._keep(parameter, tensor, parameter in wanted),
                )
                for parameter, tensor in call.tensors.items()
            ],
        )
        return True

    def _keep(self, parameter: str, tensor: Tensor, wanted: bool) -> tuple[bytes | None, str]:
        """Store a tensor's data; return its content's name, or why there is none."""
        if not wanted:
            return None, f"tensor {parameter} was not kept (no row needs it)"
        try:
            values = np.ascontiguousarray(tensor.load())
        except DumpError as error:
            return None, str(error)
        data = values.tobytes()
        content = hashlib.sha256(f"{tensor.dtype}{tensor.shape}".encode() + data).digest()
        self._db.execute(
            "INSERT OR IGNORE INTO contents VALUES (?, ?, ?)", (content, len(data), data)
        )
        return content, ""

    def knows(self, identity: str) -> bool:
        """Return whether the folder of this id was drained: stored, or counted as unreadable."""
        query = "SELECT 1 FROM calls WHERE id = ?1 UNION ALL SELECT 1 FROM unreadable WHERE id = ?1"
        return bool(self._all(query, identity))

    def knows_within(self, identity: str) -> bool:
        """Return whether anything below the folder of this id was drained."""
        query = "SELECT 1 FROM {0} WHERE id > ?1 || '/' AND id < ?1 || '0'"
        both = " UNION ALL ".join(query.format(table) for table in ("calls", "unreadable"))
        return bool(self._all(both, identity))

    def calls(self) -> list[DumpedCall]:
        """Return the calls in the order in which they were made; their tensors load lazily.

        Raises:
            CollectError: what is stored is damaged.
        """
        try:
            return sorted(self._calls(), key=_order)
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise CollectError(f"{self._path}: the store of calls is damaged ({error})") from error

    def _calls(self) -> list[DumpedCall]:
        with self._transaction("DEFERRED"):
            arguments: defaultdict[int, dict[str, Tensor]] = defaultdict(dict)
            shapes = _Parsed()
            for number, parameter, shape, dtype, content, lost in self._db.execute(
                "SELECT * FROM arguments"
            ):
                arguments[number][parameter] = StoredTensor(
                    *(self, tuple(shapes[shape]), dtype, content, lost)
                )
            rows = self._db.execute("SELECT * FROM calls").fetchall()
        texts = _Parsed()
        return [
            DumpedCall(
                id=identity,
                name=name,
                process=process,
                tensors=arguments[number],
                values=texts[values],
                versions=texts[versions],
                self_id=self_id,
                captured=bool(captured),
            )
            for number, identity, name, process, self_id, captured, values, versions, _ in rows
        ]

    def log(self) -> CallLog:
        """Return everything as a reader of the dumps themselves would."""
        return CallLog(self.calls(), self.unreadable())

    def data(self, content: bytes) -> bytes | None:
        """Return a tensor's bytes, or nothing if they were given up."""
        rows = self._all("SELECT data FROM contents WHERE content = ?", content)
        return rows[0][0] if rows else None

    def unreadable(self) -> Counter[str]:
        """Return why dumps were no calls, counted over all drains."""
        return Counter(dict(self._all("SELECT reason, count(*) FROM unreadable GROUP BY reason")))

    def size(self) -> int:
        """Return the bytes of tensor data that are stored."""
        return int(self._all("SELECT coalesce(sum(size), 0) FROM contents")[0][0])

    def file_size(self) -> int:
        """Return the bytes of the file, records of the calls included, once all is written."""
        ((size,),) = self._all(
            "SELECT page_count * page_size FROM pragma_page_count, pragma_page_size"
        )
        return int(size)

    def summary(self) -> Summary:
        """Count what the store holds."""
        fired: dict[str, dict[str, int]] = {}
        for name, process, count in self._all(
            "SELECT name, process, count(*) FROM calls WHERE NOT captured "
            "GROUP BY name, process ORDER BY 1, 2"
        ):
            fired.setdefault(name, {})[process] = count
        replayed = self._all("SELECT name, count(*) FROM calls WHERE captured GROUP BY name")
        versions: defaultdict[str, set[str]] = defaultdict(set)
        for (text,) in self._all("SELECT DISTINCT versions FROM calls"):
            for package, version in json.loads(text).items():
                versions[package].add(version)
        return Summary(
            fired=fired,
            captured=Counter(dict(replayed)),
            versions={package: sorted(found) for package, found in sorted(versions.items())},
            unreadable=self.unreadable(),
            notices=Counter(dict(self._all("SELECT kind, count FROM notices"))),
            thinned=int(self._all("SELECT coalesce(sum(thinned), 0) FROM calls")[0][0]),
        )

    def keep_within(self, limit_bytes: int) -> int:
        """Thin to about half of `limit_bytes` if the file has grown beyond it.

        The calls' own records, about 1 KB each, count too. They are never given up, and however
        many there are, a quarter of the limit is left to tensors.

        Returns:
            How many calls lost their tensors.
        """
        size = self.file_size()
        if size <= limit_bytes:
            return 0
        records = size - self.size()
        return self.thin(max(limit_bytes // 2 - records, limit_bytes // 4))

    def thin(self, limit_bytes: int) -> int:
        """Give up tensors of the least diverse calls if more than `limit_bytes` are stored.

        Calls of the same function and integer arguments are ordered so that the first are spread
        over all sizes; of every such group, the first stay. The calls themselves stay
        all, as evidence. The same store is always thinned in the same way.

        Returns:
            How many calls lost their tensors.
        """
        with self._transaction():
            if self.size() <= limit_bytes:
                return 0
            given_up = self._least_diverse(int(limit_bytes * _ROOM))
            self._db.executemany(
                "UPDATE arguments SET content = NULL, lost = ? "
                "WHERE call = ? AND content IS NOT NULL",
                [(_FULL, number) for number in given_up],
            )
            self._db.executemany(
                "UPDATE calls SET thinned = 1 WHERE number = ?",
                [(number,) for number in given_up],
            )
            self._db.execute(
                "DELETE FROM contents WHERE content NOT IN "
                "(SELECT content FROM arguments WHERE content IS NOT NULL)"
            )
        with self._lock:
            # A step of it frees one page, and `execute` makes only one.
            self._db.executescript("PRAGMA incremental_vacuum")
        return len(given_up)

    def _least_diverse(self, room: int) -> list[int]:
        """Return the numbers of calls whose tensors do not fit into `room` bytes."""
        kept: defaultdict[int, list[tuple[bytes, int, str]]] = defaultdict(list)
        for number, content, size, shape in self._db.execute(
            "SELECT call, content, size, shape FROM arguments JOIN contents USING (content) "
            "ORDER BY call, parameter"
        ):
            kept[number].append((content, size, shape))
        groups: defaultdict[str, list[tuple[str, int]]] = defaultdict(list)
        for number, identity, name, values in self._db.execute(
            'SELECT number, id, name, "values" FROM calls ORDER BY id'
        ):
            if number in kept:
                groups[_group(name, json.loads(values), kept[number])].append((identity, number))
        ranked = sorted(
            (rank, group, number)
            for group, members in groups.items()
            for rank, number in enumerate(_far_apart([n for _, n in members], kept))
        )
        stored: set[bytes] = set()
        given_up = []
        for _, _, number in ranked:
            new = {content: size for content, size, _ in kept[number] if content not in stored}
            if sum(new.values()) <= room:
                room -= sum(new.values())
                stored |= new.keys()
            else:
                given_up.append(number)
        return given_up

    def log_position(self, path: str, file: str) -> int:
        """Return up to where a log file was read; 0 if it is another file by now."""
        rows = self._all("SELECT position FROM logs WHERE path = ? AND file = ?", path, file)
        return int(rows[0][0]) if rows else 0

    def add_notices(self, path: str, file: str, position: int, notices: Mapping[str, int]) -> None:
        """Add what a log file said, and up to where it was read, in one transaction."""
        with self._transaction():
            self._db.execute("INSERT OR REPLACE INTO logs VALUES (?, ?, ?)", (path, file, position))
            self._db.executemany(
                "INSERT INTO notices VALUES (?, ?) "
                "ON CONFLICT (kind) DO UPDATE SET count = count + excluded.count",
                list(notices.items()),
            )


class _Parsed(dict[str, Any]):
    """JSON by its text; calls that say the same share it."""

    def __missing__(self, text: str) -> Any:
        value = self[text] = json.loads(text)
        return value


def _dtype(name: str) -> np.dtype[Any]:
    return np.dtype(getattr(ml_dtypes, name, None) or name)


def _order(call: DumpedCall) -> tuple[Any, ...]:
    folder = dump_folder(call.id)
    return tuple(folder) if folder else ("", call.id)


def _group(name: str, values: Mapping[str, Any], tensors: Sequence[tuple[bytes, int, str]]) -> str:
    """Return what calls have in common whose shapes can be compared."""
    integers = {key: value for key, value in values.items() if type(value) is int}
    ranks = [len(json.loads(shape)) for _, _, shape in tensors]
    return json.dumps([name, integers, ranks], sort_keys=True)


def _far_apart(
    numbers: Sequence[int], tensors: Mapping[int, Sequence[tuple[bytes, int, str]]]
) -> list[int]:
    """Order calls so that the first of them, however many, are spread over all shapes.

    One of each shape comes before a second of any; shapes are sorted by size and taken by halving:
    the largest, the middle, the quarters (the places in the order of their reversed bits).
    O(n log n), for sessions have many thousands of calls.
    """
    alike: defaultdict[tuple[str, ...], list[int]] = defaultdict(list)
    for number in numbers:
        alike[tuple(shape for _, _, shape in tensors[number])].append(number)

    def size(shapes: tuple[str, ...]) -> tuple[float, tuple[str, ...]]:
        return (-sum(math.log2(1 + n) for shape in shapes for n in json.loads(shape)), shapes)

    bits = len(alike).bit_length()
    halving = sorted(range(len(alike)), key=lambda place: f"{place:0{bits}b}"[::-1])
    ordered = sorted(alike, key=size)
    ranked = [
        (repeat, turn, number)
        for turn, place in enumerate(halving)
        for repeat, number in enumerate(alike[ordered[place]])
    ]
    return [number for _, _, number in sorted(ranked)]
