"""Reading a server's log while it is written, and picking from it what an operator wants to see."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tasks.errors import CollectError

_LONGEST = 1 << 14  # bytes of a line; the rest of a longer one is left out
_TAIL = 1 << 20


class LogFollower:
    """Reads what is added to a log file, line by line."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0
        self._inside = False

    def lines(self) -> list[str]:
        """Return the lines completed since the last call; none if there is no file yet.

        Bytes that are no UTF-8 are replaced, the end of a very long line is left out, and of a
        line that overwrites itself (a progress bar) the last state is given.

        Raises:
            CollectError: the file cannot be read.
        """
        found: list[str] = []
        try:
            with self._path.open("rb") as stream:
                stream.seek(self._offset)
                while piece := stream.readline(_LONGEST):
                    ended = piece.endswith(b"\n")
                    if not ended and len(piece) < _LONGEST:
                        break  # still being written
                    self._offset += len(piece)
                    if not self._inside:
                        found.append(_text(piece))
                    self._inside = not ended
        except FileNotFoundError:
            pass
        except OSError as error:
            raise CollectError(f"{self._path}: cannot be read ({error.strerror})") from error
        return found


def tail(path: Path, lines: int) -> str:
    """Return the last lines of a log, at most its last MiB; empty if there is no file.

    Raises:
        CollectError: the file cannot be read.
    """
    try:
        with path.open("rb") as stream:
            stream.seek(max(0, stream.seek(0, os.SEEK_END) - _TAIL))
            return "\n".join(_text(line) for line in stream.read(_TAIL).splitlines()[-lines:])
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise CollectError(f"{path}: cannot be read ({error.strerror})") from error


def _text(line: bytes) -> str:
    return line.decode(errors="replace").rstrip().rsplit("\r", 1)[-1]


@dataclass(frozen=True)
class _Kind:
    """Lines of one kind: the first few count, and then every nth."""

    pattern: re.Pattern[str]
    first: int
    every: int = 0


def _kind(pattern: str, first: int, every: int = 0) -> _Kind:
    return _Kind(re.compile(pattern), first, every)


# In SGLang 0.5.17's words: model_runner.py, memory_pool.py, cuda_graph_setup.py, scheduler.py,
# metrics_reporter.py, http_server.py. The first kind that fits counts.
_KINDS = (
    _kind(r"Load weight (?:begin|end)\.", 4),
    _kind(r"KV Cache is allocated\.|KV cache allocated\.", 4),
    _kind(r"Capture .*(?:begin|end)\. ", 4),
    _kind(r"max_total_num_tokens=", 2),
    _kind(r"The server is fired up and ready to roll!", 2),
    _kind(r"Decode batch", 1, 100),
    _kind(r"Prefill batch", 1, 200),
    _kind(r"KV cache pool is full\. Retract requests\.", 3, 100),
    _kind(
        r"Received sigquit|Scheduler hit an exception|watchdog timeout|crashed with exit", 5, 100
    ),
    _kind(r"^(?:[A-Za-z_]\w*\.)*\w*(?:Error|Exception)\b", 10, 500),
    _kind(r"out of memory", 5, 500),
)
_WIDEST = 300


class Milestones:
    """Picks from a server's log the few lines that an operator wants to see."""

    def __init__(self) -> None:
        self._seen: Counter[_Kind] = Counter()

    def pick(self, lines: Iterable[str]) -> list[str]:
        """Return the milestones among the log's next lines, shortened to 300 characters.

        Weights loaded, KV cache allocated, server ready, errors, and every so often the
        throughput: of each kind the first few, and of those that go on every 100th or less.
        """
        return [line[:_WIDEST] for line in lines if self._counts(line)]

    def _counts(self, line: str) -> bool:
        for kind in _KINDS:
            if kind.pattern.search(line[:_WIDEST]):
                self._seen[kind] += 1
                seen = self._seen[kind]
                return seen <= kind.first or bool(kind.every and seen % kind.every == 0)
        return False
