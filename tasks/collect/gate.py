"""Prove that a session ran what it was to run, before its rows count.

SGLang falls back to other kernels with a line in its log at most, so that a session may go well and
show nothing. What is asked here is answered by the recorded calls and by the log.

The whole session fails where the calls cannot be what was asked for: SGLang never said how it runs,
ran another attention backend or page size than its flags ask for, replayed CUDA graphs (which hide
calls), mixed versions, or made none of the expected calls. A definition whose calls alone are
missing fails alone: the others' calls are as true as ever.
"""

from __future__ import annotations

import ast
import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from itertools import zip_longest
from pathlib import Path
from typing import Any

from tasks.collect.failures import Failure, Kind
from tasks.collect.session import Session
from tasks.ops.base import Hint

_SERVER_ARGS = "server_args=ServerArgs("
_GRAPH = re.compile(r"\bCapture\b.{0,80}\bgraph begin|\bcuda graph: True\b", re.IGNORECASE)
_OVERRIDE = re.compile(
    r"chang(?:e|ing) page_size|[Ss]etting page[ _]size|\bfall(?:s|ing)? ?back\b|\bfallback\b"
    r"|backend by default|backend is set to|[Rr]adix cache is (?:disabled|not compatible)"
)
_BACKENDS = {"prefill": "prefill_attention_backend", "decode": "decode_attention_backend"}
_PACKAGES = ("flashinfer", "torch")
_NOTES = 20
_LONGEST_NOTE = 300
_LONGEST_LINE = 1 << 20
_OPENING, _CLOSING = "([{", ")]}"


@dataclass(frozen=True)
class GateReport:
    """What the gate found."""

    failure: Failure | None = None
    """Why no call of the session counts; None if they do."""
    missing: dict[str, str] = field(default_factory=dict)
    """Definition -> why none of its calls was seen, and the likely fix."""
    notes: list[str] = field(default_factory=list)
    """What ran, and the lines in which SGLang says that it changed a setting."""


@dataclass
class _Log:
    """What SGLang's log says."""

    settings: dict[str, str] | None = None
    """Fields of its server arguments as Python writes them; None where it does not print them."""
    graphs: str = ""
    """The first line that tells of a CUDA graph."""
    overrides: dict[str, None] = field(default_factory=dict)

    def setting(self, name: str) -> Any:
        """Return a field's value, or None."""
        try:
            return ast.literal_eval((self.settings or {}).get(name, "None"))
        except (ValueError, SyntaxError, MemoryError, RecursionError, SystemError):
            return None

    def backend(self, phase: str) -> Any:
        """Return the attention backend of a phase, as SGLang chooses between its settings."""
        return self.setting(_BACKENDS[phase]) or self.setting("attention_backend")


@dataclass(frozen=True)
class _Ran:
    """What a session was to be, and all that tells what it was."""

    session: Session
    said: _Log
    fired: Mapping[str, int]
    captured: Mapping[str, int]
    versions: Mapping[str, Sequence[str]]

    def is_on(self, name: str) -> bool:
        """Whether a setting of the server, or a variable of its environment, is on."""
        told = self.session.env.get(name, "")
        return self.said.setting(name) is True or told.lower() in {"true", "1", "yes", "y"}


def check_session(
    session: Session,
    fired: Mapping[str, int],
    captured: Mapping[str, int],
    log: Path,
    versions: Mapping[str, Sequence[str]],
) -> GateReport:
    """Check a session that has been served.

    Args:
        session: what it was to be.
        fired: dumped name -> calls that ran when they were made.
        captured: dumped name -> calls that CUDA graphs recorded.
        log: SGLang's output.
        versions: package -> the versions that the calls' processes had.
    """
    ran = _Ran(session, _read(log), _some(fired), _some(captured), versions)
    missing = {
        definition: _why_missing(definition, names, ran)
        for definition, names in session.expects.items()
        if not any(name in ran.fired for name in names)
    }
    notes = [_what_ran(ran), *ran.said.overrides]
    return GateReport(next(_problems(ran, missing), None), missing, notes)


def _some(counts: Mapping[str, int]) -> dict[str, int]:
    return {name: count for name, count in counts.items() if count > 0}


def _failure(reason: str, advice: str) -> Failure:
    """Return a failure that the same launch would only repeat."""
    return Failure(Kind.WRONG_KERNELS, reason, retryable=False, advice=advice)


def _problems(ran: _Ran, missing: Mapping[str, str]) -> Iterator[Failure]:
    """Yield why no call of the session counts, causes before consequences."""
    if ran.said.settings is None:
        yield _failure(
            "SGLang's log does not say with which arguments it ran (server_args=ServerArgs(...))",
            "keep --log-level at info",
        )
        return
    yield from _wrong_settings(ran.session, ran.said)
    if ran.said.graphs or ran.captured:
        recorded = f"calls recorded in graphs: {_counts(ran.captured)}"
        yield _failure(
            "CUDA graphs ran, whose replays hide calls "
            f"({recorded if ran.captured else ran.said.graphs})",
            "give --disable-cuda-graph, and before SGLang 0.5.14 also "
            "--disable-piecewise-cuda-graph",
        )
    if missing and len(missing) == len(ran.session.expects):
        definition, reason = next(iter(missing.items()))
        yield _failure(
            f"none of the expected calls was made; these were: {_counts(ran.fired)}",
            f"{definition}: {reason}",
        )
    for package in _PACKAGES:
        found = ran.versions.get(package, ())
        if ran.fired and len(found) != 1:
            mixed = f"versions {', '.join(found)} were mixed" if found else "its version is unknown"
            yield _failure(f"{package}: {mixed}", "collect again with one installation")


def _wrong_settings(session: Session, said: _Log) -> Iterator[Failure]:
    asked = _options(session.flags)
    for phase, option in _BACKENDS.items():
        flag = "--" + option.replace("_", "-")
        wanted = asked.get(flag, asked.get("--attention-backend"))
        if wanted is not None and said.backend(phase) != wanted:
            yield _failure(
                f"attention backend for {phase}: {said.backend(phase)}, asked for {wanted}"
                f"{_told(said)}",
                f"see whether SGLang supports {wanted} for this model and GPU, and give "
                f"{flag} {wanted}",
            )
    page_size = said.setting("page_size")
    if page_size != session.page_size:
        yield _failure(
            f"page size: {page_size}, asked for {session.page_size}{_told(said)}",
            "choose an attention backend that takes this page size, or the page size it takes",
        )


def _told(said: _Log) -> str:
    return f" (SGLang: {'; '.join(said.overrides)})" if said.overrides else ""


def _options(flags: Sequence[str]) -> dict[str, str]:
    """Return the options that have a value, the last of each."""
    options = {}
    for word, following in zip_longest(flags, flags[1:], fillvalue="--"):
        name, equals, value = word.partition("=")
        if name.startswith("--") and (equals or not following.startswith("--")):
            options[name] = value if equals else following
    return options


def _counts(calls: Mapping[str, int]) -> str:
    return ", ".join(f"{name} ({count})" for name, count in sorted(calls.items())) or "none at all"


def _what_ran(ran: _Ran) -> str:
    said, versions = ran.said, ran.versions
    parts = [f"attention backend {said.backend(phase)} for {phase}" for phase in _BACKENDS]
    parts.append(f"page size {said.setting('page_size')}")
    parts += [f"{name} {', '.join(versions[name])}" for name in _PACKAGES if name in versions]
    return ", ".join(parts)


# Why a definition's calls are missing


def _why_missing(definition: str, names: Sequence[str], ran: _Ran) -> str:
    """Say why none of a definition's calls was seen: what was, and the likely fix."""
    wanted = " or ".join(names)
    fix = _not_recorded(names, ran.session.record) or _fix(definition, ran)
    return f"{wanted} was never called; these were: {_counts(ran.fired)}; {fix}"


def _not_recorded(names: Sequence[str], record: Sequence[str]) -> str:
    if any(fnmatchcase(name, pattern) for name in names for pattern in record):
        return ""
    alike = [p for p in record if p.endswith(tuple(names))]
    alike += [p for name in names for p in difflib.get_close_matches(name, record)]
    meant = f" (instead of {alike[0]}?)" if alike else ""
    return f"its name is not among the recorded ones: record {' or '.join(names)}{meant}"


def _fix(definition: str, ran: _Ran) -> str:
    hint = ran.session.hints.get(definition, Hint())
    for setting, instead in hint.not_with.items():
        if ran.is_on(setting):
            return f"with {setting} SGLang {instead}: leave it out"
    phases = [phase for phase in _BACKENDS if ran.said.backend(phase) != "flashinfer"]
    if phases:
        return f"give --attention-backend flashinfer: {ran.said.backend(phases[0])} ran"
    return hint.text or "see SGLang's log for what it ran instead"


# SGLang's log


def _read(log: Path) -> _Log:
    said = _Log()
    try:
        with log.open(encoding="utf-8", errors="replace") as stream:
            while line := stream.readline(_LONGEST_LINE):
                _take(said, line)
    except OSError:
        return _Log()
    return said


def _take(said: _Log, line: str) -> None:
    start = line.find(_SERVER_ARGS)
    if start >= 0:
        said.settings = dict(_fields(line[start + len(_SERVER_ARGS) :]))
        return
    if not said.graphs and _GRAPH.search(line):
        said.graphs = line.strip()[:_LONGEST_NOTE]
    if len(said.overrides) < _NOTES and _OVERRIDE.search(line):
        said.overrides[line.strip()[:_LONGEST_NOTE]] = None


def _fields(text: str) -> Iterator[tuple[str, str]]:
    """Yield the fields of a dataclass as Python prints it, up to its closing parenthesis.

    Values of fields are taken as they stand: not all of them can be read back.
    """
    depth, quote, start, skip = 0, "", 0, False
    for place, sign in enumerate(text):
        if skip:
            skip = False
        elif quote:
            skip = sign == "\\"
            quote = "" if sign == quote else quote
        elif sign in "'\"":
            quote = sign
        elif sign in _OPENING:
            depth += 1
        elif sign in _CLOSING and depth:
            depth -= 1
        elif depth == 0 and (sign == "," or sign in _CLOSING):
            name, _, value = text[start:place].partition("=")
            yield name.strip(), value.strip()
            start = place + 1
            if sign != ",":
                return
