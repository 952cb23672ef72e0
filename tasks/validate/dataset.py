"""Check a whole dataset folder."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tasks.dataset import DefinitionFiles
from tasks.errors import InputError
from tasks.validate import bench, definition, results
from tasks.validate.findings import Findings, Report
from tasks.validate.listing import BadFileError, Place, parse_object, place_of, read_text, scan
from tasks.validate.rows import Blobs, Rows, lines_of

Json = dict[str, Any]
_MOST_LINES = 100_000


def validate(root: Path, only: Sequence[str] = (), *, ask_bench: bool = True) -> Report:
    """Check a dataset folder, or some of its definitions; nothing in it is changed.

    Nothing in it is run but the references' modules, in the jail and then by FlashInfer-Bench; no
    reference is called.

    Args:
        root: the dataset.
        only: the definitions to check; all if empty.
        ask_bench: whether FlashInfer-Bench's models look at everything, and references are built.

    Raises:
        InputError: it is no dataset, or has none of the definitions.
    """
    if not (root / "definitions").is_dir():
        raise InputError(f"{root}: has no definitions/ folder; it should be the dataset")
    findings = Findings()
    files = [place for path in scan(root, findings) if (place := place_of(path, findings))]
    known = {place.name for place in files if place.part == "definitions"}
    unknown = sorted(set(only) - known)
    if unknown:
        raise InputError(f"--only: {root} has no definition named {', '.join(unknown)}")
    chosen = sorted(set(only) or known)
    checking = _Checking(root, files, findings)
    for name in chosen:
        checking.check(name)
    if not only:
        checking.strays(known)
    texts = checking.texts
    asked = bench.ask(root, texts, chosen if only else (), findings) if ask_bench else _NOT_ASKED
    if only:
        findings.errors = [found for found in findings.errors if found.definition in only]
        findings.warnings = [found for found in findings.warnings if found.definition in only]
    checks = {
        "run": ["layout", "definition", "reference test", "workload", "solution", "trace"],
        "reference": "arity, compile() and, if reference_build says so, its module run in the jail",
        "counts": dict(checking.counts),
        "constraints_not_evaluated": dict(sorted(checking.not_evaluated.items())),
        **asked,
    }
    return Report(len(chosen), _sorted(findings.errors), _sorted(findings.warnings), checks)


_NOT_ASKED: dict[str, Any] = {
    "reference_build": "not run again",
    "flashinfer_bench": {"version": None, "models": "not applied again"},
}


def _sorted(found: list[Any]) -> list[Any]:
    return sorted(found, key=lambda item: (item.definition, item.file))


@dataclass
class _Checking:
    """Checks one definition after the other."""

    root: Path
    files: list[Place]
    findings: Findings
    texts: list[bench.Text] = field(default_factory=list)
    """For the data models."""
    counts: Counter[str] = field(default_factory=Counter)
    not_evaluated: Counter[str] = field(default_factory=Counter)
    """Constraints, and in how many rows."""

    def __post_init__(self) -> None:
        self._of: dict[str, dict[str, list[Place]]] = {}
        for place in self.files:
            parts = self._of.setdefault(place.name, {})
            parts.setdefault(place.part, []).append(place)
        present = frozenset(place.path for place in self.files if place.part == "blob")
        self._blobs = Blobs(self.root, present)
        self.counts.update(
            dict.fromkeys(("definitions", "tests", "rows", "solutions", "evaluations"), 0)
        )
        self.counts["constraints evaluated"] = 0

    def check(self, name: str) -> None:
        """Check all files of one definition."""
        parts = self._of[name]
        first, *others = parts["definitions"]
        for other in others:
            self.findings.error(name, other.path, "name", f"{first.path} has the same name")
        for part in ("workloads", "blob", "solutions", "traces"):
            for place in parts.get(part, ()):
                if place.op_type != first.op_type:
                    self.findings.error(
                        name, place.path, "", f"the definition's op type is {first.op_type!r}"
                    )
        self.counts["definitions"] += 1
        spec = self._definition(first)
        self._test(name, parts.get("tests", []))
        if spec is not None:
            self._results(spec, first, parts)

    def strays(self, known: set[str]) -> None:
        """Report the files of definitions that are not there."""
        for place in self.files:
            if place.name not in known:
                add = self.findings.warn if place.part == "tests" else self.findings.error
                add(place.name, place.path, "", "there is no such definition")

    def _read(self, place: Place) -> str | None:
        try:
            return read_text(self.root, place.path)
        except BadFileError as error:
            self.findings.error(place.name, place.path, "", str(error))
            return None

    def _object(self, place: Place, model: Literal["Definition", "Solution"]) -> Json | None:
        text = self._read(place)
        if text is None:
            return None
        try:
            value = parse_object(text)
        except BadFileError as error:
            self.findings.error(place.name, place.path, "", str(error))
            return None
        self.texts.append(bench.Text(model, place.name, str(place.path), None, text))
        return value

    def _lines(self, place: Place) -> str | None:
        text = self._read(place)
        if text is not None and text.count("\n") > _MOST_LINES:
            message = f"has more than {_MOST_LINES} lines"
            self.findings.error(place.name, place.path, "", message)
            return None
        for number, line in lines_of(text or ""):
            self.texts.append(bench.Text("Trace", place.name, str(place.path), number, line))
        return text

    def _definition(self, place: Place) -> Json | None:
        spec = self._object(place, "Definition")
        if spec is None or not definition.check(spec, place, self.findings):
            return None
        return spec

    def _test(self, name: str, tests: list[Place]) -> None:
        if not tests:
            self.findings.warn(name, f"tests/references/test_{name}.py", "", "no reference test")
        for place in tests:
            self.counts["tests"] += 1
            text = self._read(place)
            if text is not None:
                definition.check_test(text, place, self.findings)

    def _results(self, spec: Json, first: Place, parts: dict[str, list[Place]]) -> None:
        """Check workloads, blobs, solutions and traces."""
        name = first.name
        unverified = "status:unverified" in spec.get("tags", [])
        if not unverified and "workloads" not in parts:
            self.findings.warn(name, first.path, "", "no workload file found")
        if not unverified and all(s.author != "baseline" for s in parts.get("solutions", ())):
            self.findings.warn(name, first.path, "", "no baseline solution")
        rows = Rows(spec, DefinitionFiles(first.op_type, name), self._blobs, self.findings)
        whole = True
        for place in parts.get("workloads", ()):
            text = self._lines(place)
            whole = whole and text is not None
            rows.check(text or "")
            if text is not None and not rows.count:
                self.findings.error(name, place.path, "", "has no rows")
        if whole:
            rows.orphans(place.path for place in parts.get("blob", ()))
        self.counts["rows"] += rows.count
        self.counts["constraints evaluated"] += rows.evaluated
        self.not_evaluated.update(rows.not_evaluated)
        solutions = set()
        for place in parts.get("solutions", ()):
            self.counts["solutions"] += 1
            solution = self._object(place, "Solution")
            if solution is not None:
                results.check_solution(solution, place, spec, self.findings)
                solutions.add(place.path.stem)
        for place in parts.get("traces", ()):
            text = self._lines(place)
            if text is not None:
                self.counts["evaluations"] += results.check_traces(
                    text, place, rows.uuids, solutions, self.findings
                )
