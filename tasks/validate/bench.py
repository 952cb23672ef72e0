"""Ask what takes torch: do references build, and what does FlashInfer-Bench say of the dataset.

Of FlashInfer-Bench, where it is installed, that is its data models and its own `validate`.
"""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from tasks import files, sandbox
from tasks.errors import InputError
from tasks.validate.findings import Findings
from tasks.validate.listing import BadFileError, parse_object, read_text

_CHILD_SECONDS, _VALIDATE_SECONDS = 700, 900
_MEMORY_GB = 64
"""Address space, not resident memory: torch maps far more than it touches."""
_SAID_BY = "flashinfer-bench validate: "


@dataclass(frozen=True)
class Text:
    """One JSON text that a model should accept."""

    model: Literal["Definition", "Trace", "Solution"]
    definition: str
    file: str
    line: int | None
    text: str


class _Answer(BaseModel):
    model_config = ConfigDict(extra="forbid")

    missing: str = ""
    version: str = ""
    has_validate: bool = False
    refused: list[tuple[int, str, str]] = []
    no_builds: str = ""
    built: list[int] = []
    unbuilt: list[tuple[int, str]] = []
    late: int = 0
    """References there was no time to build."""


class _Message(BaseModel):
    level: str
    message: str


class _Check(BaseModel):
    messages: list[_Message] = []


class UpstreamReport(BaseModel):
    """What FlashInfer-Bench's `validate` writes; its `status` and the settings are not used."""

    definitions: dict[str, dict[str, str | _Check | None]]


def ask(
    root: Path, texts: Sequence[Text], names: Sequence[str], findings: Findings
) -> dict[str, Any]:
    """Add what is found; return what was done.

    Args:
        root: the dataset.
        texts: its JSON texts.
        names: the definitions to check; empty for all.
        findings: where errors and warnings go.
    """
    with tempfile.TemporaryDirectory(prefix="onboard-validate-") as folder:
        scratch = Path(folder)
        answer = _child(scratch, texts)
        for index, message in answer.unbuilt:
            text = texts[index]
            findings.error(text.definition, text.file, "reference", f"does not build: {message}")
        bench: dict[str, Any] = {"version": answer.version or None, "validate": "not there"}
        done = {"reference_build": _builds_done(answer), "flashinfer_bench": bench}
        if answer.missing:
            bench["models"] = f"not applied: {answer.missing}"
            return done
        for index, where, message in answer.refused:
            _refused(texts[index], where, message, findings)
        bench["models"] = f"applied to {len(texts)} texts"
        if answer.has_validate:
            built = [texts[index] for index in answer.built]
            bench["validate"] = _validate(root, scratch, names, findings)
            bench["validate_build"] = _validate_build(built, scratch, findings)
    return done


def _builds_done(answer: _Answer) -> str:
    if answer.no_builds:
        return f"not run: {answer.no_builds}"
    done = f"{len(answer.built)} built, {len(answer.unbuilt)} failed"
    return f"{done}, no time for {answer.late}" if answer.late else done


def _child(scratch: Path, texts: Sequence[Text]) -> _Answer:
    request, answer = scratch / "request.jsonl", scratch / "answer.json"
    with request.open("w", encoding="utf-8") as stream:
        stream.writelines(json.dumps((item.model, item.text)) + "\n" for item in texts)
    outcome = sandbox.run_python(
        ["-m", "tasks.validate.child", str(request), str(answer)],
        timeout=_CHILD_SECONDS,
        memory_gb=_MEMORY_GB,
        cwd=scratch,
    )
    why = f"the child process {outcome.reason}"
    if outcome.ok:
        try:
            return _Answer.model_validate(files.read_json_object(answer, "the answer"))
        except (InputError, ValidationError) as error:
            why = f"the child process wrote no answer ({error})"
    return _Answer(missing=why, no_builds=why)


def _refused(text: Text, where: str, message: str, findings: Findings) -> None:
    """Add what a model refuses, unless an error of our own says it already."""
    if findings.error_at(text.file, text.line):
        return
    if text.line is not None:
        where = f"line {text.line}: {where}" if where else f"line {text.line}"
    findings.error(
        text.definition, text.file, where, f"flashinfer_bench.data.{text.model}: {message}"
    )


def _validate(root: Path, scratch: Path, names: Sequence[str], findings: Findings) -> str:
    """Run FlashInfer-Bench's `validate` so that it builds nothing, and merge it."""
    arguments = [*_command(root.absolute(), scratch), "--disable-gpu"]
    only = ["--definitions", *names] if names else []
    return _run_validate(["-m", "flashinfer_bench", *arguments, *only], scratch, findings)


def _validate_build(built: Sequence[Text], scratch: Path, findings: Findings) -> str:
    """Let it build the references that the jail saw no harm in, and merge what it says.

    It sees only these definitions, copied; `_validate` has compared their other files with them.
    """
    if not built:
        return "not run: no reference has been built"
    confined = scratch / "confined"
    for text in built:
        file = confined / "dataset" / text.file
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text.text, encoding="utf-8")
    arguments = [*_command(confined / "dataset", confined), "--checks", "layout,definition"]
    module = ["-m", "tasks.validate.upstream", str(confined)]
    return _run_validate([*module, *arguments], confined, findings)


def _command(dataset: Path, scratch: Path) -> list[str]:
    reports = ("--outputs", "json", "--output-folder", str(scratch / "reports"))
    return ["validate", "--dataset", str(dataset), *reports]


def _run_validate(arguments: Sequence[str], scratch: Path, findings: Findings) -> str:
    outcome = sandbox.run_python(
        arguments, timeout=_VALIDATE_SECONDS, memory_gb=_MEMORY_GB, cwd=scratch
    )
    reports = scratch / "reports"
    written = sorted(path.name for path in reports.glob("*.json"))
    if not outcome.ok or not written:
        return f"failed: {outcome.reason or 'it wrote no report'}"
    try:  # a reference may have written it
        text = read_text(reports, PurePosixPath(written[0]))
        found = UpstreamReport.model_validate(parse_object(text))
    except (BadFileError, ValidationError) as error:
        return f"failed: its report {error}"
    counts = Counter(message.level for _, _, message in _messages(found))
    merge(found, findings)
    return f"{counts['error']} errors, {counts['warning']} warnings"


def _messages(report: UpstreamReport) -> Iterator[tuple[str, str, _Message]]:
    for name, checks in report.definitions.items():
        for check, result in checks.items():
            if isinstance(result, _Check):
                yield from ((name, check, message) for message in result.messages)


def merge(report: UpstreamReport, findings: Findings) -> None:
    """Add what FlashInfer-Bench says and has not been said."""
    said = set()
    for found in (*findings.errors, *findings.warnings):
        message = found.message.removeprefix(_SAID_BY)
        said.add((found.definition, message))
        said.add((found.definition, f"{message}: {found.field}"))
    for name, check, item in _messages(report):
        if item.level in ("error", "warning") and (name, item.message) not in said:
            add = findings.error if item.level == "error" else findings.warn
            add(name, "", check, f"{_SAID_BY}{item.message}")
