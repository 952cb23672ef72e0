"""Evaluate baselines on the collected workloads with flashinfer-bench, where there is a GPU."""

from __future__ import annotations

import importlib.util
import logging
import os
import re
import shutil
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePosixPath
from statistics import median
from typing import Any

from pydantic import BaseModel, ValidationError

from tasks import files, ops, sandbox
from tasks.collect.baseline import write_baseline
from tasks.collect.lease import lease, visible_gpus
from tasks.collect.place import Say
from tasks.dataset import DefinitionFiles
from tasks.errors import CollectError, DefinitionError, first_problem
from tasks.ops.base import Effort, KernelSpec
from tasks.settings import CollectSettings

Json = dict[str, Any]
_log = logging.getLogger(__name__)
NO_TRACE, MALFORMED = "NO_TRACE", "MALFORMED"

_COMMAND = "from flashinfer_bench.cli.main import cli; cli()"
_START_SECONDS = 1800
"""For importing torch and compiling FlashInfer's kernels, where nothing is cached."""


_DEFAULT = Effort()
_ROW_SECONDS = 300
"""Flashinfer-bench's own limit for one workload."""
_BUILD_ENVIRONMENT = (
    "CC",
    "CPATH",
    "CPLUS_INCLUDE_PATH",
    "CUDA_DEVICE_ORDER",
    "CUDA_PATH",
    "CUTE_DSL_ARCH",
    "CUTE_DSL_CACHE_DIR",
    "CXX",
    "C_INCLUDE_PATH",
    "FLASHINFER_CUBIN_DIR",
    "FLASHINFER_CUDA_ARCH_LIST",
    "FLASHINFER_DISABLE_VERSION_CHECK",
    "FLASHINFER_EXTRA_CFLAGS",
    "FLASHINFER_EXTRA_CUDAFLAGS",
    "FLASHINFER_EXTRA_LDFLAGS",
    "FLASHINFER_NVCC",
    "FLASHINFER_NVCC_THREADS",
    "FLASHINFER_WORKSPACE_BASE",
    "LIBRARY_PATH",
    "MAX_JOBS",
    "TORCH_CUDA_ARCH_LIST",
    "TORCH_EXTENSIONS_DIR",
    "TRITON_CACHE_DIR",
    "TRITON_PTXAS_PATH",
    "XDG_CACHE_HOME",
)
"""What compiling kernels may need. Not FlashInfer's log and dump settings: they cost time."""
_LONGEST_REASON, _MOST_SHOWN = 300, 5
_EXCEPTION = re.compile(r"(?:[A-Za-z_]\w*\.)*[A-Z]\w*(?:Error|Exception|Interrupt)\b.*")


@dataclass(frozen=True)
class Failure:
    """One workload that a baseline did not pass."""

    uuid: str
    """Empty for a line of the traces that cannot be read."""
    solution: str
    status: str
    """flashinfer-bench's, or `NO_TRACE`, or `MALFORMED`."""
    reason: str


@dataclass(frozen=True)
class Evaluation:
    """What came of evaluating the baselines of one definition."""

    definition: str
    op_type: str
    workloads: int = 0
    solutions: tuple[str, ...] = ()
    statuses: Mapping[str, int] = field(default_factory=dict)
    """How many evaluations ended so; with one solution, one for each workload."""
    failures: tuple[Failure, ...] = ()
    not_evaluated: str = ""
    """Why nothing was evaluated; empty if something was."""
    latency_ms: float | None = None
    """Median over the evaluations that passed."""
    speedup: float | None = None
    """Over the definition's reference; median over the evaluations that passed."""
    hardware: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    """Of the flashinfer-bench process, which may have evaluated other definitions too."""
    kept: Path | None = None
    """Folder with the traces and the log of a failed evaluation."""

    @property
    def passed(self) -> bool:
        """Whether every workload passed."""
        return not self.not_evaluated and not self.failures and self.statuses.get("PASSED", 0) > 0

    @property
    def incomplete(self) -> bool:
        """Whether flashinfer-bench came to no verdict on some workload."""
        return NO_TRACE in self.statuses

    def __str__(self) -> str:
        """What came of it, as people read it."""
        if self.not_evaluated:
            return f"not evaluated ({self.not_evaluated})"
        if self.passed:
            return f"PASSED on {self.workloads} workloads"
        counted = ", ".join(f"{n} x {s}" for s, n in self.statuses.items() if s != "PASSED")
        shown = list(self._reasons())
        more = len(shown) - _MOST_SHOWN
        if more > 0:
            shown[_MOST_SHOWN:] = [f"and {more} more"]
        if self.kept:
            shown.append(f"traces and log are in {self.kept}")
        head = f"the baseline did not pass ({counted}; {self.workloads} workloads)"
        return f"{head}: {'; '.join(shown)}"

    def _reasons(self) -> Iterator[str]:
        """Yield each reason once, with the workloads that failed for it."""
        grouped: dict[tuple[str, str], list[str]] = {}
        for failure in self.failures:
            grouped.setdefault((failure.status, failure.reason), []).append(failure.uuid)
        for (status, reason), uuids in grouped.items():
            named = [uuid for uuid in uuids[:_MOST_SHOWN] if uuid]
            if len(uuids) > _MOST_SHOWN:
                named.append(f"{len(uuids) - _MOST_SHOWN} more")
            of = f" of {', '.join(named)}" if named else ""
            yield f"{status}{of}: {reason}"

    def as_json(self) -> Json:
        """Return it as JSON has it."""
        kept = str(self.kept) if self.kept else None
        return {**asdict(self), "passed": self.passed, "kept": kept}


def evaluate(
    dataset: Path,
    op_type: str,
    name: str,
    *,
    effort: Effort = _DEFAULT,
    kept: Path | None = None,
    gpu: str | None = None,
) -> str:
    """Run the baseline of one definition and store its traces in the dataset.

    Args:
        dataset: the dataset.
        op_type: the definition's op type.
        name: the definition.
        effort: how long a workload may take and how often it is timed, where not as its op
            module says.
        kept: folder for the traces and the log of a failed evaluation.
        gpu: `CUDA_VISIBLE_DEVICES` of the evaluation; by default the first device visible here.

    Returns:
        What came of it, as people read it; without a GPU or flashinfer-bench, why nothing did.

    Raises:
        CollectError: a workload did not pass, or there are none.
        InputError: a file of the definition is damaged.
    """
    place = DefinitionFiles(op_type, name)
    [result] = evaluate_all(dataset, [place], effort=effort, kept=kept, gpu=gpu)
    if not result.passed and not result.not_evaluated:
        raise CollectError(f"{name}: {result}")
    return str(result)


@contextmanager
def leased_gpu(options: CollectSettings, say: Say, session: str) -> Iterator[str | None]:
    """Hold a GPU to evaluate on while the block runs, where there is one.

    Args:
        options: which GPUs, where their locks are, how long to wait.
        say: told who holds them while waiting.
        session: shown to others who wait.

    Raises:
        CollectError: none was free in time, or the locks cannot be tried.
        InputError: a configured GPU is none.
    """
    if unavailable():
        yield None
        return
    gpus, limit = visible_gpus(options.gpus), options.lease_seconds
    with lease(options.lease_dir, gpus, 1, on_wait=say, timeout=limit, session=session) as held:
        yield held[0]


def effort_of(options: CollectSettings) -> Effort:
    """Return what the settings ask for."""
    return Effort(
        row_seconds=options.row_seconds, iterations=options.iterations, trials=options.trials
    )


def unavailable() -> str:
    """Say why nothing can be evaluated here; empty if it can."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    if hidden or not any(Path("/dev").glob("nvidia[0-9]*")):
        return "no CUDA device on this host"
    if importlib.util.find_spec("flashinfer_bench") is None:
        return "flashinfer-bench is not installed"
    return ""


def evaluate_all(
    dataset: Path,
    places: Sequence[DefinitionFiles],
    *,
    effort: Effort = _DEFAULT,
    kept: Path | None = None,
    gpu: str | None = None,
    say: Say = _log.info,
) -> list[Evaluation]:
    """Run the baselines of definitions, in as few processes as flashinfer-bench allows.

    Works on copies of their files. The traces of a definition come into the dataset, in place of
    earlier ones, as soon as all its workloads have passed; a failed evaluation changes nothing
    there. A definition on which a shared process came to no verdict (it crashed, ran out of time,
    or an earlier definition broke the device) is evaluated once more by itself.

    Args:
        dataset: the dataset.
        places: the definitions; a baseline that is missing is written first.
        effort: how long a workload may take and how often it is timed, where not as the op
            modules say.
        kept: folder for `{name}.traces.jsonl` and `{name}.log` of those that fail.
        gpu: `CUDA_VISIBLE_DEVICES` of the evaluation; by default the first device visible here.
        say: told what is being done.

    Returns:
        One outcome for each of `places`, in order.

    Raises:
        CollectError: a definition has no workloads, or rows that cannot be read.
        DefinitionError: a file is a symbolic link.
        InputError: a file or folder of a definition is damaged, or leads out of the dataset.
    """
    jobs, results = [], {}
    for place in places:
        spec = _spec(dataset, place)
        if _has_baseline(dataset, place, spec):
            jobs.append(_job(dataset, place, _effort(spec).under(effort)))
        else:
            why = "the kernel has no baseline"
            results[place] = Evaluation(place.name, place.op_type, not_evaluated=why)
    why = unavailable() if jobs else ""
    if why:
        results |= {job.place: replace(job.blank, not_evaluated=why) for job in jobs}
        jobs = []
    for result, text, log in _evaluated(dataset, jobs, gpu, say):
        place = DefinitionFiles(result.op_type, result.definition)
        if result.passed:
            files.write_text(dataset / place.traces, text)
        results[place] = _keep(result, text, log, kept)
    return [results[place] for place in places]


@dataclass(frozen=True)
class _Job:
    """One definition to evaluate."""

    place: DefinitionFiles
    uuids: tuple[str, ...]
    """Of its workloads."""
    solutions: tuple[str, ...]
    paths: tuple[PurePosixPath, ...]
    """Of its files, without traces."""
    effort: Effort

    @property
    def blank(self) -> Evaluation:
        """What is known before anything is evaluated."""
        return Evaluation(
            self.place.name, self.place.op_type, len(self.uuids), solutions=self.solutions
        )


@dataclass(frozen=True)
class _Ran:
    """What a flashinfer-bench process left behind."""

    traces: Mapping[str, list[str]]
    """Lines of the traces by definition."""
    outcome: sandbox.Outcome
    seconds: float


def _spec(dataset: Path, place: DefinitionFiles) -> KernelSpec | None:
    """Return the kernel of a definition, unless no op module knows it."""
    files.check_inside(
        dataset, place.definition.parent, place.workloads.parent, place.solutions, place.blobs
    )
    definition = files.read_json_object(dataset / place.definition, "the definition")
    try:
        return ops.op_module(place.op_type).spec_of(definition)
    except DefinitionError:
        return None


def _has_baseline(dataset: Path, place: DefinitionFiles, spec: KernelSpec | None) -> bool:
    """Say whether a definition has a baseline; write it if its op module can."""
    if any((dataset / place.solutions).glob("*.json")):
        return True
    return spec is not None and write_baseline(dataset, spec) is not None


def _effort(spec: KernelSpec | None) -> Effort:
    """Return what evaluating a workload of a kernel may cost by its op module."""
    known = ops.op_module(spec.op_type).effort(spec) if spec else Effort()
    return Effort(row_seconds=_ROW_SECONDS).under(known)


def _job(dataset: Path, place: DefinitionFiles, effort: Effort) -> _Job:
    paths = tuple(path for path in place.staged(dataset) if path != place.traces)
    rows = list(_rows(dataset / place.workloads, paths))
    if not rows:
        raise CollectError(f"{place.name}: there are no workloads to evaluate the baseline on")
    solutions = []
    for path in paths:
        if path.parent == place.solutions:
            solution = files.read_json_object(dataset / path, "the solution")
            solutions.append(str(solution.get("name")))
    return _Job(place, tuple(rows), tuple(solutions), paths, effort)


def _rows(path: Path, staged: Sequence[PurePosixPath]) -> Iterator[str]:
    """Yield the workloads' uuids.

    Raises:
        CollectError: a row is damaged, there twice, or has tensors outside of the definition's.
    """
    seen: set[str] = set()
    text = files.read_text(path, "the workloads") if path.exists() else ""
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            workload = _Row.model_validate_json(line).workload
        except ValidationError as error:
            raise CollectError(f"{path}: line {number}: {_problem(error)}") from error
        if workload.uuid in seen:
            raise CollectError(f"{path}: line {number}: workload {workload.uuid} is there twice")
        for name, given in workload.inputs.items():
            if given.path is not None and PurePosixPath(given.path) not in staged:
                raise CollectError(
                    f"{path}: line {number}: input {name}: {given.path!r} is no file of this "
                    "definition's blobs"
                )
        seen.add(workload.uuid)
        yield workload.uuid


def _problem(error: ValidationError) -> str:
    where, why = first_problem(error)
    return f"{where}: {why}" if where else why


class _Input(BaseModel):
    path: str | None = None


class _RowWorkload(BaseModel):
    uuid: str
    inputs: dict[str, _Input]


class _Row(BaseModel):
    workload: _RowWorkload


class _Performance(BaseModel):
    latency_ms: float
    speedup_factor: float


class _Correctness(BaseModel):
    max_absolute_error: float
    max_relative_error: float


class _Environment(BaseModel):
    hardware: str
    libs: dict[str, str] = {}


class _Verdict(BaseModel):
    status: str
    log: str = ""
    environment: _Environment
    correctness: _Correctness | None = None
    performance: _Performance | None = None

    @property
    def reason(self) -> str:
        """Why it did not pass."""
        found = self.correctness
        if found:
            absolute, relative = found.max_absolute_error, found.max_relative_error
            return f"max absolute error {absolute:.3g}, max relative error {relative:.3g}"
        return excerpt(self.log) or "no reason given"


class _TraceWorkload(BaseModel):
    uuid: str


class _Trace(BaseModel):
    """A line of the traces, as far as it is looked at."""

    definition: str
    workload: _TraceWorkload
    solution: str
    evaluation: _Verdict


def excerpt(log: str) -> str:
    """Return the line of a log that says what went wrong: its last exception, or its last line."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    raised = [line for line in lines if _EXCEPTION.match(line)]
    return (raised or lines or [""])[-1][:_LONGEST_REASON]


def _evaluated(
    dataset: Path,
    jobs: Sequence[_Job],
    gpu: str | None,
    say: Say,
) -> Iterator[tuple[Evaluation, str, str]]:
    """Yield each definition's outcome, the text of its traces, and the log of the process."""
    for batch in _batches(jobs):
        say(f"evaluating {', '.join(job.place.name for job in batch)}")
        ran = _run(dataset, batch, gpu)
        for job in batch:
            result, of = _judge(job, ran), ran
            if result.incomplete and len(batch) > 1:
                say(f"evaluating {job.place.name} by itself: {result.failures[0].reason}")
                of = _run(dataset, [job], gpu)
                result = _judge(job, of)
            lines = of.traces.get(job.place.name, [])
            yield result, "".join(f"{line}\n" for line in lines), of.outcome.output


def _batches(jobs: Sequence[_Job]) -> list[list[_Job]]:
    """Divide jobs so that a batch has one effort, and no two solutions of the same name.

    flashinfer-bench refuses a dataset with such solutions, though published ones are.
    """
    batches: list[list[_Job]] = []
    for job in jobs:
        for batch in batches:
            if job.effort == batch[0].effort and not any(
                set(job.solutions) & set(other.solutions) for other in batch
            ):
                batch.append(job)
                break
        else:
            batches.append([job])
    return batches


def arguments(dataset: Path, names: Sequence[str], effort: Effort) -> list[str]:
    """Return what follows `flashinfer-bench`."""
    options = {
        "--timeout": effort.row_seconds,
        "--warmup-runs": effort.warmups,
        "--iterations": effort.iterations,
        "--num-trials": effort.trials,
    }
    given = [text for name, n in options.items() if n is not None for text in (name, str(n))]
    return ["run", "--local", str(dataset), *given, "--definitions", *names]


def _run(dataset: Path, batch: Sequence[_Job], gpu: str | None) -> _Ran:
    """Evaluate definitions in one process, on copies of their files and of nothing else."""
    effort = batch[0].effort
    with tempfile.TemporaryDirectory(prefix="onboard-evaluate-") as folder:
        copy, scratch = Path(folder) / "dataset", Path(folder) / "scratch"
        scratch.mkdir()
        for job in batch:
            for path in job.paths:
                _link(dataset / path, copy / path)
        started = time.monotonic()
        # The reference runs unguarded in the process itself, as often as the solution.
        rows = sum(len(job.uuids) * len(job.solutions) for job in batch)
        outcome = sandbox.run_python(
            ["-c", _COMMAND, *arguments(copy, [job.place.name for job in batch], effort)],
            timeout=_START_SECONDS + 2 * (effort.row_seconds or _ROW_SECONDS) * rows,
            memory_gb=None,
            cwd=scratch,
            environment=_environment(scratch, gpu),
        )
        traces: defaultdict[str, list[str]] = defaultdict(list)
        for written in sorted((copy / "traces").rglob("*.jsonl")):
            text = written.read_text(encoding="utf-8", errors="replace")
            traces[written.stem] += [line for line in text.split("\n") if line.strip()]
        return _Ran(traces, outcome, time.monotonic() - started)


def _link(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:  # another file system
        shutil.copy2(source, target)


def _environment(scratch: Path, gpu: str | None) -> dict[str, str]:
    """Return what the child needs besides what every child gets."""
    passed = {key: os.environ[key] for key in _BUILD_ENVIRONMENT if key in os.environ}
    # Where the packages come from this variable, the child finds them as this process does.
    entries = [Path(entry) for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    if gpu is None:
        # It would start a process on each device, and use one.
        gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    return passed | {
        "CUDA_VISIBLE_DEVICES": gpu,
        "FIB_CACHE_PATH": str(scratch / "flashinfer_bench"),
        "PYTHONPATH": os.pathsep.join(str(entry.absolute()) for entry in entries),
    }


def _judge(job: _Job, ran: _Ran) -> Evaluation:
    """Compare the traces with the workloads: each must have passed, none may be missing."""
    expected = {(uuid, solution) for uuid in job.uuids for solution in job.solutions}
    traces, failures = [], []
    for number, line in enumerate(ran.traces.get(job.place.name, []), start=1):
        try:
            trace = _Trace.model_validate_json(line)
        except ValidationError as error:
            reason = f"line {number}: {_problem(error)}"
            failures.append(Failure("", "", MALFORMED, reason[:_LONGEST_REASON]))
            continue
        verdict, of = trace.evaluation, (trace.workload.uuid, trace.solution)
        if trace.definition != job.place.name or of not in expected:
            reason = f"line {number}: no workload or baseline of this definition"
            failures.append(Failure(*of, MALFORMED, reason))
            continue
        traces.append(trace)
        if verdict.status != "PASSED":
            failures.append(Failure(*of, verdict.status, verdict.reason))
    judged = {(trace.workload.uuid, trace.solution) for trace in traces}
    failures += [
        Failure(uuid, solution, NO_TRACE, _why_missing(uuid, ran.outcome))
        for uuid in job.uuids
        for solution in job.solutions
        if (uuid, solution) not in judged
    ]
    passed = [trace.evaluation for trace in traces if trace.evaluation.status == "PASSED"]
    failed = [failure.status for failure in failures]
    timed = [verdict.performance for verdict in passed if verdict.performance]
    last = traces[-1].evaluation.environment if traces else None
    return replace(
        job.blank,
        statuses=dict(Counter([*(verdict.status for verdict in passed), *failed])),
        failures=tuple(failures),
        latency_ms=median(item.latency_ms for item in timed) if timed else None,
        speedup=median(item.speedup_factor for item in timed) if timed else None,
        hardware=last.hardware if last else "",
        versions={**_installed(), **last.libs} if last else {},
        seconds=ran.seconds,
    )


def _installed() -> dict[str, str]:
    """Return the versions that traces do not say."""
    found = {}
    for name in ("flashinfer-bench", "flashinfer-python"):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _why_missing(uuid: str, outcome: sandbox.Outcome) -> str:
    """Say why a workload has no trace: flashinfer-bench logs it and goes on.

    The first line that names the workload says what happened, later ones what followed from it.
    """
    for line in outcome.output.splitlines():
        said = line.partition(uuid)[2].lstrip(": ").rstrip()
        if said:
            return said[:_LONGEST_REASON]
    if not outcome.ok:
        return f"flashinfer-bench {outcome.reason}"
    return "flashinfer-bench wrote no trace of it"


def _keep(result: Evaluation, text: str, log: str, kept: Path | None) -> Evaluation:
    """Keep what tells why an evaluation failed; forget what was kept of an earlier one."""
    if kept is None:
        return result
    traces, output = (kept / f"{result.definition}.{end}" for end in ("traces.jsonl", "log"))
    if result.passed:
        traces.unlink(missing_ok=True)
        output.unlink(missing_ok=True)
        return result
    files.write_text(traces, text)
    files.write_text(output, log)
    return replace(result, kept=kept)
