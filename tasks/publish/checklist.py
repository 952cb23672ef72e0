"""What has to hold before a pull request is opened; what does not is not opened.

Every item is a function of what is about to be published that says what it found. What an item says
where it does not hold tells how to fix it. Some items only warn.
"""

from __future__ import annotations

import ast
import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

from tasks import files, git, ops, syntax
from tasks.coverage_doc import PATH as COVERAGE_PATH
from tasks.coverage_doc import CoverageDocument
from tasks.define.staged import fingerprint, prove_again
from tasks.errors import DefinitionError, InputError, OnboardError
from tasks.manifest import Route
from tasks.ops.base import FlashInferApi
from tasks.publish.base import LARGEST_FILE, Branch, Checklist, Finding, Post
from tasks.publish.collection_log import collection_log
from tasks.publish.hooks import hook_problems, unknown_hooks
from tasks.publish.markdown import one_line, scrubbed
from tasks.publish.render import Subject, coverage_status
from tasks.publish.requested import is_public, public_address
from tasks.validate.dataset import validate
from tasks.validate.findings import Report

Json = dict[str, Any]
C = TypeVar("C")

_MOST_NAMED = 5
_COUNTS = frozenset({"count", "summary"})


class Verdict(NamedTuple):
    """What an item found."""

    ok: bool
    message: str
    blocks: bool = True


def _right(message: str) -> Verdict:
    return Verdict(True, message)


def _wrong(message: str) -> Verdict:
    return Verdict(False, message)


def _doubtful(message: str) -> Verdict:
    return Verdict(False, message, blocks=False)


def _named(items: list[str]) -> str:
    """Return the first few of some texts, and how many more there are."""
    more = len(items) - _MOST_NAMED
    return ", ".join(items[:_MOST_NAMED]) + (f" and {more} more" if more > 0 else "")


def _lines(path: Path, what: str) -> list[Json]:
    """Read the objects of a file with one on each line.

    Raises:
        InputError: it cannot be read, or a line is no object.
    """
    found = []
    for number, line in enumerate(files.read_text(path, what).splitlines(), 1):
        try:
            value = json.loads(line) if line.strip() else {}
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}: line {number} is not JSON ({error})") from error
        if not isinstance(value, dict):
            raise InputError(f"{path}: line {number} is no object")
        found += [value] if value else []
    return found


@dataclass(frozen=True)
class Staged:
    """What is staged of a definition; everything is read once, when an item asks for it."""

    subject: Subject

    @property
    def name(self) -> str:
        """The definition's name."""
        return self.subject.entry.definition_name

    @cached_property
    def paths(self) -> tuple[PurePosixPath, ...]:
        """Its files in the dataset."""
        return tuple(self.subject.files.staged(self.subject.dataset))

    @cached_property
    def definition(self) -> Json:
        """The definition as it is staged."""
        path = self.subject.dataset / self.subject.files.definition
        return files.read_json_object(path, "the definition")

    @cached_property
    def test(self) -> str:
        """The text of its reference test."""
        path = self.subject.dataset / self.subject.files.reference_test
        return files.read_text(path, "the reference test")

    @cached_property
    def rows(self) -> list[Json]:
        """Its workload rows."""
        return self._of(self.subject.files.workloads, "the workloads")

    @cached_property
    def traces(self) -> list[Json]:
        """What its baseline's evaluation left."""
        return self._of(self.subject.files.traces, "the traces")

    def _of(self, path: PurePosixPath, what: str) -> list[Json]:
        return _lines(self.subject.dataset / path, what) if path in self.paths else []

    @cached_property
    def solutions(self) -> dict[PurePosixPath, Json]:
        """Its baseline solutions."""
        return {
            path: files.read_json_object(self.subject.dataset / path, "the solution")
            for path in self.paths
            if path.parent == self.subject.files.solutions
        }

    @cached_property
    def collected(self) -> Json:
        """What the rows were made of; empty if nothing says so."""
        path = self.subject.collected
        return files.read_json_object(path, "the collection's provenance") if path.exists() else {}

    @cached_property
    def provenance(self) -> Json:
        """Sessions, versions and calls of the rows."""
        return dict(self.collected.get("provenance") or {})

    @cached_property
    def log(self) -> str:
        """The whole log of the sessions, fit to publish."""
        subject = self.subject
        log = collection_log(subject.collected.parent / "sessions", self.name)
        models = (str(session["model"]) for session in self.provenance["sessions"])
        folders = {model: "MODEL" for model in models if model.startswith("/")}
        return scrubbed(log, subject.known_secrets, {**subject.places, **folders})

    @cached_property
    def report(self) -> Report:
        """What the validator says of it."""
        # FlashInfer-Bench's models have seen a definition when it was proved; not its rows.
        seen = self.is_proved and not self.rows
        return validate(self.subject.dataset, [self.name], ask_bench=not seen)

    def errors(self, *parts: str) -> list[str]:
        """Return what the validator refuses in files below some of the dataset's folders."""
        return [
            ": ".join(text for text in (found.file, found.field, found.message) if text)
            for found in self.report.errors
            if found.file.partition("/")[0] in parts
        ]

    @cached_property
    def is_proved(self) -> bool:
        """Whether the manifest's proof is of what is staged."""
        entry = self.subject.entry
        staged = fingerprint(self.definition, self.test)
        return bool(entry.phase2_proof) and entry.phase2_fingerprint == staged

    @cached_property
    def proof(self) -> tuple[list[str], bool]:
        """The cases in which the reference was right, and whether they were run again for this."""
        spec = self.subject.spec
        if self.is_proved:
            return self.subject.entry.phase2_proof or [], False
        if spec is None:
            raise DefinitionError("nothing records that it passed, and no op module can run it")
        return prove_again(self.definition, self.test, spec), True


# Items of every dataset pull request.


def _names(staged: Staged) -> Verdict:
    place = staged.subject.files
    folders = (place.definition.parent, place.blobs, place.solutions, place.traces.parent)
    files.check_inside(staged.subject.dataset, *folders, place.workloads.parent)
    return _right(f"{len(staged.paths)} files, all below the dataset's folders")


def _definition(staged: Staged) -> Verdict:
    place = staged.subject.files.definition
    if place not in staged.paths:
        return _wrong(f"{staged.subject.dataset / place} is not staged; run onboard define")
    if errors := staged.errors("definitions", ""):
        return _wrong(f"{_named(errors)}; correct it, or run onboard define again")
    return _right(f"{place} is valid")


def _tags(staged: Staged) -> Verdict:
    subject = staged.subject
    tags, spec = staged.definition.get("tags") or [], subject.spec
    lacking = subject.entry.route is Route.REQUEST_KERNEL
    wanted = ["status:unverified" if lacking else "status:verified"]
    wanted.append(f"model:{subject.manifest.model_slug}")
    if spec is not None:
        wanted += [f"tp:{size}" for size in spec.tp] + [f"ep:{size}" for size in spec.ep]
    missing = [tag for tag in wanted if tag not in tags]
    by_an_api = isinstance(subject.provider, FlashInferApi) or (
        spec is None and subject.entry.fi_status == "fi_supported"
    )
    if by_an_api and not any(str(tag).startswith("fi_api:") for tag in tags):
        missing.append("fi_api:...")
    others = [tag for tag in tags if str(tag).startswith("status:") and tag != wanted[0]]
    if missing or others:
        says = [f"lacks {_named(missing)}"] * bool(missing) + [f"has {_named(others)}"] * bool(
            others
        )
        return _wrong(f"the definition {' and '.join(says)}; run onboard define again")
    return _right(", ".join(map(str, tags)))


def _reference_test(staged: Staged) -> Verdict:
    place = staged.subject.files.reference_test
    if place not in staged.paths:
        return _wrong(f"{place} is not staged; run onboard define")
    if errors := staged.errors("tests"):
        return _wrong(f"{_named(errors)}; run onboard define again")
    try:
        cases, again = staged.proof
    except DefinitionError as error:
        return _wrong(f"is not green: {error}; correct the reference, or run onboard define")
    if not cases:
        return _wrong(f"{place} has no cases; run onboard define again")
    when = "run for this pull request" if again else "when the definition was made"
    return _right(f"green in {len(cases)} cases, {when}")


def _provenance(staged: Staged) -> Verdict:
    run, entry = staged.subject.manifest, staged.subject.entry
    shas = {"SGLang": run.repo_shas.sglang, "FlashInfer": run.repo_shas.flashinfer}
    unknown = [f"{name}'s commit" for name, sha in shas.items() if not sha]
    if unknown:
        return _wrong(f"{_named(unknown)} is not in the manifest; run phases 0 and 1 again")
    if not entry.phase2_versions:
        return _wrong("the manifest has no versions it was proved with; run onboard define again")
    commits = ", ".join(f"{name} {sha}" for name, sha in shas.items())
    return _right(f"{staged.subject.model}, {commits}{_parallelism(staged)}")


def _parallelism(staged: Staged) -> str:
    spec = staged.subject.spec
    sizes = {"tp": spec.tp, "ep": spec.ep} if spec else {}
    return "".join(f", {key}={'/'.join(map(str, of))}" for key, of in sizes.items() if of)


def _sizes(staged: Staged) -> Verdict:
    sizes = {path: (staged.subject.dataset / path).stat().st_size for path in staged.paths}
    large = [f"{path} ({size} bytes)" for path, size in sizes.items() if size > LARGEST_FILE]
    if large:
        return _wrong(
            f"{_named(large)}: the Hub takes {LARGEST_FILE} bytes; collect fewer or smaller rows "
            "(--max-workloads, --batch-sizes, --isl)"
        )
    return _right(f"{sum(sizes.values()) / 1e6:.1f} MB in all")


# Items of a definition with workloads.


def _workloads(staged: Staged) -> Verdict:
    place = staged.subject.files.workloads
    if not staged.rows:
        return _wrong(f"{place} has no rows; run onboard collect")
    if errors := staged.errors("workloads"):
        return _wrong(f"{_named(errors)}; collect again")
    there = {row["workload"]["uuid"] for row in staged.rows}
    lost = sorted((staged.provenance.get("workloads") or {}).keys() - there)
    if lost:
        return _wrong(f"{place} lacks the collected rows {_named(lost)}; collect again")
    return _right(f"{len(staged.rows)} rows of {staged.name}")


def _blobs(staged: Staged) -> Verdict:
    folder = staged.subject.files.blobs
    there = {path for path in staged.paths if path.parent == folder}
    named = {
        PurePosixPath(str(given.get("path")).removeprefix("./"))
        for row in staged.rows
        for given in row["workload"]["inputs"].values()
        if given.get("type") == "safetensors"
    }
    if missing := sorted(map(str, named - there)):
        return _wrong(f"rows name {_named(missing)}, which is not there; collect again")
    if unused := sorted(map(str, there - named)):
        return _wrong(f"no row names {_named(unused)}; remove it")
    if errors := staged.errors("blob"):
        return _wrong(f"{_named(errors)}; collect again")
    return _right(f"{len(there)} blobs, each at the path that its row names")


def _baseline(staged: Staged) -> Verdict:
    if not staged.solutions:
        if _has_no_baseline(staged):
            return _doubtful("there is none: FlashInfer's API takes other tensors than a row has")
        return _wrong(f"{staged.subject.files.solutions}/ is empty; run onboard collect again")
    if errors := staged.errors("solutions"):
        return _wrong(f"{_named(errors)}; run onboard collect again")
    for path, solution in staged.solutions.items():
        if wrong := _not_a_wrapper(path.name, solution, staged.definition["reference"]):
            return _wrong(f"{path} {wrong}; run onboard collect again")
    return _right(", ".join(f"{path.stem}" for path in staged.solutions))


def _not_a_wrapper(file: str, solution: Json, reference: str) -> str:
    """Say why a solution is no wrapper of FlashInfer's API; empty if it is one."""
    sources = [str(item["content"]) for item in solution["sources"]]
    if not file.startswith("flashinfer_wrapper_"):
        return "is not named flashinfer_wrapper_*"
    if not any(map(_imports_flashinfer, sources)):
        return "does not import flashinfer"
    return "is the reference itself" if _shape(reference) in map(_shape, sources) else ""


def _has_no_baseline(staged: Staged) -> bool:
    spec = staged.subject.spec
    return spec is not None and ops.op_module(spec.op_type).baseline(spec) is None


def _imports_flashinfer(source: str) -> bool:
    names: list[str] = []
    for node in ast.walk(syntax.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.append(node.module)
    return any(name.partition(".")[0] == "flashinfer" for name in names)


def _shape(source: str) -> str:
    """Return what Python text does, however it is set."""
    return ast.dump(syntax.parse(source))


def _traces(staged: Staged) -> Verdict:
    said = staged.subject.entry.baseline_status or "not evaluated (nothing is recorded)"
    if not staged.traces:
        if said.startswith("not evaluated"):
            return _doubtful(f"{said}; onboard evaluate does it on a GPU")
        return _wrong(f"{staged.subject.files.traces} is not staged; run onboard evaluate")
    if errors := staged.errors("traces"):
        return _wrong(f"{_named(errors)}; run onboard evaluate")
    ended = Counter(str(trace["evaluation"]["status"]) for trace in staged.traces)
    if set(ended) != {"PASSED"}:
        failed = [f"{count} x {status}" for status, count in ended.items() if status != "PASSED"]
        return _wrong(f"{_named(failed)} of {len(staged.traces)} traces; see {said}")
    evaluated = {trace["workload"]["uuid"] for trace in staged.traces}
    left = [row["workload"]["uuid"] for row in staged.rows]
    left = [uuid for uuid in left if uuid not in evaluated]
    if left:
        return _wrong(f"rows {_named(left)} have no trace; run onboard evaluate")
    return _right(f"all {len(staged.traces)} PASSED")


def _collection(staged: Staged) -> Verdict:
    if not staged.collected:
        return _wrong(
            f"nothing says where the rows are from ({staged.subject.collected} is not "
            "there); collect again"
        )
    counts = [seen["count"] for seen in staged.provenance["workloads"].values()]
    if not counts or min(counts) < 1 or not staged.provenance["versions"]:
        return _wrong("some rows are of no recorded call; collect again")
    sessions = [session["id"] for session in staged.provenance["sessions"]]
    if not sessions:
        return _doubtful(
            f"the rows are of {staged.collected['calls']} calls that somebody recorded; there is "
            "no log of SGLang with them"
        )
    if not staged.log:
        return _wrong(
            f"the logs of {_named(sessions)} are gone from "
            f"{staged.subject.collected.parent / 'sessions'}; collect again"
        )
    lines = len(staged.log.splitlines())
    return _right(f"{lines} lines, of {_named(sessions)}; {staged.collected['calls']} calls")


def _diverse(staged: Staged) -> Verdict:
    realism = staged.provenance.get("realism")
    if not realism:
        return _wrong("nothing says how real the rows look; collect again")
    kept = realism["kept"]
    if warnings := [str(text) for text in realism["warnings"]]:
        # A kernel that was called in one way only has one row, however it was served.
        verdict = _doubtful if realism["distinct"]["rows"] == 1 else _wrong
        return verdict(
            f"{_named(warnings)}; collect again with other --batch-sizes, --isl and --osl"
        )
    batches, lengths = kept["batch_sizes"], kept["kv_lengths"]
    shown = [
        f"{found['distinct']} {what} ({found['percentiles']['smallest']} to "
        f"{found['percentiles']['largest']})"
        for what, found in (("batch sizes", batches), ("KV lengths", lengths))
        if found
    ]
    return _right(", ".join(shown))


# The item of a definition that is published alone.


def _alone(staged: Staged) -> Verdict:
    place = staged.subject.files
    more = [
        str(path) for path in staged.paths if path not in (place.definition, place.reference_test)
    ]
    if more:
        return _wrong(f"nothing runs this kernel, and there is {_named(more)}; remove it")
    return _right("no workloads, baseline or traces")


def _not_ready(staged: Staged) -> Verdict:
    entry = staged.subject.entry
    state = staged.subject.manifest.state(entry).replace("_", " ")
    return _wrong(f"{entry.definition_name} is {state}: there is nothing to publish of it yet")


# Items of a coverage pull request.


@dataclass(frozen=True)
class Marked:
    """An edit of the coverage document that is about to be published."""

    subject: Subject
    post: Post
    branch: Branch
    dataset_pr: str
    """URL of the dataset pull request; empty if it is not open yet."""
    upstream: bool
    """Whether it is opened upstream, where links into the outbox lead nowhere."""

    @cached_property
    def before(self) -> CoverageDocument:
        """The document of the clone's commit."""
        text = git.run("show", f"{self.branch.base}:{COVERAGE_PATH}", cwd=self.branch.clone)
        try:
            return CoverageDocument.parse(text.decode())
        except UnicodeDecodeError as error:
            raise InputError(f"{COVERAGE_PATH}: is not UTF-8 text (byte {error.start})") from error

    @cached_property
    def after(self) -> CoverageDocument:
        """The document of the branch."""
        return CoverageDocument.read(self.branch.files[PurePosixPath(COVERAGE_PATH)])

    @cached_property
    def heading(self) -> str | None:
        """The model's section."""
        return self.after.model(self.subject.manifest.model_slug, self.subject.model)


def _one_file(marked: Marked) -> Verdict:
    changed = sorted(map(str, marked.branch.files))
    if changed != [COVERAGE_PATH]:
        return _wrong(f"it changes {_named(changed)}; it may change {COVERAGE_PATH} only")
    return _right(f"only {COVERAGE_PATH} is changed")


def _document(marked: Marked) -> Verdict:
    known, now = marked.before.models(), marked.after.models()
    lost = [heading for heading in known if heading not in now]
    if lost:
        return _wrong(f"the sections of {_named(lost)} are gone")
    return _right(f"the document parses, with {len(now)} models")


def _row(marked: Marked) -> Verdict:
    entry, heading = marked.subject.entry, marked.heading
    wanted = coverage_status(entry)
    marks = marked.after.statuses(heading) if heading else {}
    if marks.get(entry.definition_name) != wanted:
        return _wrong(f"its row is {marks.get(entry.definition_name, 'not there')}, not {wanted}")
    ours = (heading, entry.definition_name)
    before, after = (
        {(row.model, row.name, row.status) for row in document.rows()}
        for document in (marked.before, marked.after)
    )
    others = sorted({name for model, name, _ in before ^ after if (model, name) != ours})
    if others:
        return _wrong(f"it changes the rows of {_named(others)} too")
    if not before ^ after:
        return _doubtful(f"{heading} has it as {wanted} already: there is nothing to change")
    return _right(f"marked {wanted} for {heading}")


def _counts(marked: Marked) -> Verdict:
    known = _miscounts(marked.before, marked.heading)
    wrong = [text for text in _miscounts(marked.after, marked.heading) if text not in known]
    if wrong:
        return _wrong(f"{_named(wrong)}; correct it with onboard coverage")
    return _right("counts and summary agree with the rows")


def _miscounts(document: CoverageDocument, heading: str | None) -> list[str]:
    """Return which of a section's counts are wrong; none if there is no such section."""
    if heading is None or heading not in document.models():
        return []
    found = document.findings(heading)
    return [finding.message for finding in found if finding.kind in _COUNTS]


def _clean(marked: Marked) -> Verdict:
    """What the repository's pre-commit hooks want of the text, as far as they are known."""
    clone, path = marked.branch.clone, PurePosixPath(COVERAGE_PATH)
    if problems := hook_problems(clone, path, marked.after.render()):
        return _wrong(f"{_named(problems)}; correct {COVERAGE_PATH} upstream, or the hook")
    if unknown := unknown_hooks(clone, path):
        return _doubtful(f"hooks that are not known here may want more: {_named(unknown)}")
    return _right("the repository's hooks would leave it as it is")


def _links_dataset(marked: Marked) -> Verdict:
    if not marked.dataset_pr:
        return _doubtful("the dataset pull request is opened first, and linked then")
    return _linked(marked, marked.dataset_pr, "the dataset pull request")


def _links_request(marked: Marked) -> Verdict:
    url = marked.subject.entry.fi_issue_url
    if not marked.dataset_pr and not (is_public(url) if marked.upstream else url):
        return _doubtful("the kernel request is opened first, and linked then")
    if not url:
        return _wrong("the kernel was not requested from FlashInfer; run onboard publish")
    return _linked(marked, url, "the kernel request")


def _linked(marked: Marked, url: str, what: str) -> Verdict:
    address = public_address(url, marked.subject.workspace)
    if address not in marked.post.body:
        return _wrong(f"the text does not link {what} ({address})")
    if marked.upstream and urlsplit(address).scheme not in ("http", "https"):
        return _wrong(
            f"{what} is in the outbox ({address}), where nobody upstream finds it; open it first, "
            "and record its URL in the manifest"
        )
    return _right(address)


Checks = Mapping[str, Callable[[C], Verdict]]

_OF_ALL: Checks[Staged] = {
    "names": _names,
    "definition": _definition,
    "tags": _tags,
    "reference test": _reference_test,
    "provenance": _provenance,
    "file sizes": _sizes,
}
_ALONE: Checks[Staged] = {**_OF_ALL, "nothing else": _alone}
_COLLECTED: Checks[Staged] = {
    **_OF_ALL,
    "workloads": _workloads,
    "blobs": _blobs,
    "baseline": _baseline,
    "traces": _traces,
    "collection log": _collection,
    "diversity": _diverse,
}
_NOT_READY: Checks[Staged] = {"something to publish": _not_ready}
DATASET: Mapping[Route, Checks[Staged]] = {
    Route.COLLECT: _COLLECTED,
    Route.REQUEST_KERNEL: _ALONE,
    Route.DEFINITION_ONLY: _ALONE,
    Route.AWAIT_SGLANG: _NOT_READY,
    Route.NOTHING: _NOT_READY,
}
"""The checklist of a dataset pull request, by the branch that its kernel takes."""

_COVERAGE: Checks[Marked] = {
    "single file": _one_file,
    "document": _document,
    "row": _row,
    "counts": _counts,
    "clean": _clean,
    "dataset pull request": _links_dataset,
}
COVERAGE: Mapping[Route, Checks[Marked]] = {
    **dict.fromkeys(Route, _COVERAGE),
    Route.REQUEST_KERNEL: {**_COVERAGE, "kernel request": _links_request},
}
"""The checklist of a coverage pull request."""


def _run(checks: Checks[C], about: C) -> tuple[Finding, ...]:
    """Run all items; what one cannot read, it does not hold for."""
    found = []
    for item, check in checks.items():
        try:
            verdict = check(about)
        except OnboardError as error:
            verdict = _wrong(str(error))
        except (KeyError, TypeError, AttributeError, ValueError, SyntaxError) as error:
            verdict = _wrong(
                f"cannot be checked, a file is damaged ({type(error).__name__}: {error})"
            )
        found.append(Finding(item, verdict.ok, one_line(verdict.message), verdict.blocks))
    return tuple(found)


def check_dataset(subject: Subject) -> Checklist:
    """Go through the checklist of a definition's dataset pull request; nothing is changed.

    Args:
        subject: the kernel, with what is staged of it.
    """
    staged, entry = Staged(subject), subject.entry
    findings = _run(DATASET[entry.route], staged)
    checked = Checklist(entry.definition_name, "dataset", findings)
    if checked.failed:
        return checked
    cases, again = staged.proof
    collects = entry.route is Route.COLLECT
    return Checklist(
        definition=entry.definition_name,
        kind="dataset",
        findings=findings,
        validation=tuple(_validation(staged.report)),
        reference_test=_shown_proof(staged, cases, again=again),
        log=staged.log if collects and staged.provenance.get("sessions") else "",
    )


def _shown_proof(staged: Staged, cases: list[str], *, again: bool) -> str:
    when = "run again for this pull request" if again else "run when the definition was made"
    versions = staged.subject.entry.phase2_versions or {}
    lines = [
        f"{staged.subject.files.reference_test}: {when}, on CPU, the reference in a sandbox",
        *(f"{name} {version}" for name, version in versions.items()),
        *(f"  {case}: right" for case in cases),
        f"{len(cases)} cases, {len(cases)} right",
    ]
    return "\n".join(lines)


def _validation(report: Report) -> list[str]:
    """Return what the validator did and what it has to say, a line each."""
    done = report.checks
    lines = [f"{count} {what}" for what, count in done["counts"].items()]
    shown = [", ".join(lines), f"reference: {done['reference_build']}"]
    bench = done["flashinfer_bench"]
    shown.append(f"flashinfer-bench {bench['version'] or ''}: models {bench['models']}")
    if bench.get("validate") not in (None, "not there"):
        shown.append(f"flashinfer-bench validate: {bench['validate']}")
    shown.append(f"{len(report.errors)} errors, {len(report.warnings)} warnings")
    shown += [
        f"warning: {': '.join(text for text in (found.file, found.field, found.message) if text)}"
        for found in report.warnings[:_MOST_NAMED]
    ]
    return [one_line(line) for line in shown]


def check_coverage(
    subject: Subject, post: Post, branch: Branch, dataset_pr: str, *, upstream: bool = False
) -> Checklist:
    """Go through the checklist of a coverage pull request; nothing is changed.

    Args:
        subject: the kernel.
        post: the rendered pull request.
        branch: the edited document, on the clone's commit.
        dataset_pr: URL of the dataset pull request; empty if it is not open yet.
        upstream: whether it is opened upstream, and not in the outbox.
    """
    marked = Marked(subject, post, branch, dataset_pr, upstream)
    entry = subject.entry
    return Checklist(entry.definition_name, "coverage", _run(COVERAGE[entry.route], marked))
