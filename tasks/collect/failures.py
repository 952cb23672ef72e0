"""Why a server did not start, or did not live, and what to change for the next attempt.

The texts are those of SGLang 0.5.17, torch, FlashInfer, transformers, huggingface_hub and argparse.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

LEAST_TOKENS = 16_384
"""Smallest KV pool that is tried: a request of 8,192 + 1,024 tokens has room in it."""
LEAST_CONCURRENCY = 1 / 16
"""Smallest share of the planned concurrent requests that is tried."""

_FIRST_CAP = 131_072
_LONGEST_REASON = 300


class Kind(StrEnum):
    """What went wrong."""

    OUT_OF_MEMORY = "out of GPU memory"
    NO_ROOM_FOR_KV = "no GPU memory left for the KV cache"
    POOL_TOO_SMALL = "KV cache too small for the requests"
    BAD_FLAG = "bad flag"
    MODEL_NOT_FOUND = "model not found, or no access"
    NETWORK = "network"
    UNSUPPORTED = "not supported"
    PORT_IN_USE = "port in use"
    NO_DEVICE = "no such GPU"
    NOT_FREE = "no GPU was free in time"
    DEVICE = "CUDA or NCCL error"
    JIT = "kernel compilation failed"
    IMPORT_ERROR = "missing package"
    DISK_FULL = "disk full"
    WRONG_KERNELS = "other kernels ran"
    TIMEOUT = "too slow"
    KILLED = "killed by a signal"
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class Failure:
    """Why a server failed."""

    kind: Kind
    reason: str
    """One line, of the log where it has one that tells."""
    retryable: bool
    """Whether another attempt can help, with the same settings or adjusted ones."""
    advice: str
    """What a person can do about it."""
    pool_tokens: int | None = None
    """Tokens that the server's KV pool had room for, if the log says so."""

    def __str__(self) -> str:
        """Describe it in one line."""
        return f"{self.kind}: {self.reason} ({self.advice})"


@dataclass(frozen=True)
class _Rule:
    """Log lines that tell one kind of failure."""

    kind: Kind
    pattern: re.Pattern[str]
    raised: bool = False
    """Only exceptions count: the same words in a warning are harmless."""


_ADVICE = {
    Kind.OUT_OF_MEMORY: "use a smaller KV pool, more GPUs (tp) or fewer requests at a time",
    Kind.NO_ROOM_FOR_KV: "use more GPUs (tp), or a higher --mem-fraction-static",
    Kind.POOL_TOO_SMALL: "send fewer requests at a time, or allow a larger KV pool",
    Kind.BAD_FLAG: "flags differ between SGLang versions; see its --help",
    Kind.MODEL_NOT_FOUND: "check the name and revision; ONBOARD_HF_TOKEN must be able to read it",
    Kind.NETWORK: "check the connection to the hub, or download the model first",
    Kind.UNSUPPORTED: "choose another backend, tp or SGLang version for this model and GPU",
    Kind.PORT_IN_USE: "another process was faster; a new attempt takes another port",
    Kind.NO_DEVICE: "check nvidia-smi, the driver and the configured GPU ids",
    Kind.NOT_FREE: "run it again when they are free, or allow more time (collect.lease_seconds)",
    Kind.DEVICE: "if it stays, check the GPU's health (nvidia-smi, dmesg)",
    Kind.JIT: "FlashInfer compiles kernels: install nvcc and ninja, set CUDA_HOME; "
    "lower MAX_JOBS if the compiler was killed",
    Kind.IMPORT_ERROR: "install it in the worker's environment",
    Kind.DISK_FULL: "free space where the log, the caches and the dumps are (/dev/shm too)",
    Kind.WRONG_KERNELS: "check the session's flags against this SGLang version",
    Kind.TIMEOUT: "allow more time: weights may load, and kernels compile, for minutes",
    Kind.KILLED: "SIGKILL without a reason in the log is often the host's memory: see dmesg",
    Kind.UNKNOWN: "read the session's log",
}
_NOT_RETRYABLE = {
    Kind.BAD_FLAG,
    Kind.MODEL_NOT_FOUND,
    Kind.UNSUPPORTED,
    Kind.NO_DEVICE,
    Kind.NOT_FREE,
    Kind.JIT,
    Kind.IMPORT_ERROR,
    Kind.DISK_FULL,
    Kind.WRONG_KERNELS,
}


def _rule(kind: Kind, *patterns: str, raised: bool = False) -> _Rule:
    return _Rule(kind, re.compile("|".join(patterns)), raised)


# The first rule with a line in the log decides, so causes stand before their consequences.
_RULES = (
    _rule(Kind.DISK_FULL, r"\[Errno 28\]", r"No space left on device"),
    _rule(
        Kind.NO_ROOM_FOR_KV,
        r"Not enough memory\. Please try to increase --mem-fraction-static",
        r"leave no GPU memory for the KV cache",  # SGLang 0.5.17
    ),
    _rule(
        Kind.POOL_TOO_SMALL,
        r"(?:Decode|Prefill) out of memory\. Try to lower your batch size",
        r"Out of memory\. Try to lower your batch size",
        r"alloc_req_slots runs out of memory",
        r"Not enough GPU memory for hybrid \(mamba",
    ),
    _rule(
        Kind.OUT_OF_MEMORY,
        r"OutOfMemoryError\b",
        r"CUDA out of memory",
        r"CUDA error: out of memory",
        r"Cuda failure (?:2 )?'out of memory'",
        r"cudaErrorMemoryAllocation",
        r"CUBLAS_STATUS_ALLOC_FAILED",
    ),
    _rule(
        Kind.BAD_FLAG,
        r"^[\w .-]+: error: (?:unrecognized arguments|argument |ambiguous option)",
        r"^[\w .-]+: error: the following arguments are required",
    ),
    _rule(Kind.BAD_FLAG, r"__init__\(\) got an unexpected keyword argument", raised=True),
    _rule(
        Kind.NETWORK,
        r"We couldn't connect to '",
        r"(?:429|5\d\d) (?:Client|Server) Error",
        r"429 Too Many Requests",
        r"HTTPSConnectionPool\(.*Max retries exceeded",  # SGLang asks itself without TLS
        r"^(?:httpx|httpcore)\.(?:Connect|Read|Remote|Pool)\w+",
        raised=True,
    ),
    _rule(
        Kind.MODEL_NOT_FOUND,
        r"is not a local folder (?:and is not a valid model identifier|or a valid repository)",
        r"(?:Repository|Revision|LocalEntry)NotFoundError|GatedRepoError|DisabledRepoError",
        r"(?:401|403) Client Error",
        r"gated repo",
        r"is not a valid git identifier",
        r"does not appear to have (?:a file|files) named",
        r"Could not locate \S+ inside",
        r"OfflineModeIsEnabled",
        r"Cannot find any model weights",
        raised=True,
    ),
    _rule(
        Kind.PORT_IN_USE,
        r"[Aa]ddress already in use",
        r"EADDRINUSE",
        r"Port is already in use\.",
        r"_port \d+ is already in use",
        r"port\w* at \d+ is not available in \d+ seconds",
    ),
    _rule(
        Kind.NO_DEVICE,
        r"invalid device ordinal",
        r"CUDA error:? 101\b",
        r"[Nn]o CUDA GPUs are available",
        r"no CUDA-capable device is detected",
        r"No supported accelerator \(CUDA/XPU\) available",
        r"Duplicate GPU detected",
        r"Torch not compiled with CUDA enabled",
        r"CUDA driver version is insufficient",
        r"Found no NVIDIA driver",
    ),
    _rule(
        Kind.UNSUPPORTED,
        r"no kernel image is available for execution",
        r"does not recognize this architecture",
        r"Unrecognized model in ",
    ),
    _rule(
        Kind.JIT,
        r"Could not find nvcc",
        r"nvcc not found",
        r"CUDA_HOME environment variable is not set",
        r"Ninja build failed",
        r"Ninja is required to load C\+\+ extensions",
        r"No such file or directory: '\S*(?:nvcc|ninja)'",
        r"\bnvcc fatal\b",
    ),
    _rule(
        Kind.DEVICE,
        r"(?:NCCL|CUDA|CUDART|CUBLAS|cuBLAS) error",
        r"Cuda failure",
        r"DistBackendError",
        r"CUDA driver initialization failed",
        r"CUDA unknown error",
        r"Watchdog caught collective operation timeout",
    ),
    _rule(Kind.DEVICE, r"The memory capacity is unbalanced\.", raised=True),
    _rule(
        Kind.UNSUPPORTED,
        r"not supported|[Uu]nsupported|not support\b|are supported\b|supports only",
        r"can only be used with|only be used for|cannot serve|not compatible with",
        r"is not divisible by|must be divisible by",
        r"requires (?:SM|MP|compute capability)",
        r"^NotImplementedError",
        raised=True,
    ),
    _rule(Kind.IMPORT_ERROR, r"^(?:ModuleNotFoundError|ImportError)\b", raised=True),
    _rule(Kind.TIMEOUT, r"watchdog timeout \("),
)
# Says nothing when an exception of that process stands in the log.
_DIED = re.compile(r"\(exit code: -\d+\)|crashed with exit code -\d+")
_RANK = re.compile(r"\[rank\d+\]:\s?")
_RAISED = re.compile(
    r"(?:[A-Za-z_]\w{0,80}\.){0,8}[A-Z]\w{0,80}(?:Error|Exception|Timeout|IsEnabled)\b"
)
_FRAME = re.compile(r'\s*File "([^"]+)", line \d+')
_POOL = re.compile(r"(?:max_total_num_tokens=|#tokens: )(\d{1,12})\b")
# SGLang refuses combinations of flags while it reads them.
_FLAG_FILES = ("/sglang/srt/server_args.py", "/sglang/srt/arg_groups/")


@dataclass(frozen=True)
class _Line:
    text: str
    raised: bool
    file: str
    """Where it was raised, if it was and the traceback says so."""


def failure_of(kind: Kind, reason: str, *, pool_tokens: int | None = None) -> Failure:
    """Return a failure of a known kind."""
    return Failure(
        kind=kind,
        reason=" ".join(reason.split())[:_LONGEST_REASON],
        retryable=kind not in _NOT_RETRYABLE,
        advice=_ADVICE[kind],
        pool_tokens=pool_tokens,
    )


def classify(log: str, status: int | None) -> Failure:
    """Say why a server failed.

    Args:
        log: the end of its log; some hundred lines, so that the first of several errors is there.
        status: its exit status, negative for a signal; None if it had to be stopped because it was
            not ready, or not done, in time.
    """
    lines = list(_lines(log))
    kind, reason = _told(lines) or _from_status(lines, status)
    pools = [int(tokens) for tokens in _POOL.findall(log)]
    return failure_of(kind, reason, pool_tokens=pools[-1] if pools else None)


def _lines(log: str) -> Iterator[_Line]:
    file = ""
    for text in log.splitlines():
        shown = _RANK.sub("", text[: 4 * _LONGEST_REASON], count=1)
        raised = _RAISED.match(shown) is not None
        if frame := _FRAME.match(shown):
            file = frame[1]
        if shown.strip():
            yield _Line(shown, raised, file if raised else "")
        if raised:
            file = ""


def _told(lines: Sequence[_Line]) -> tuple[Kind, str] | None:
    """Return the failure that the log tells of."""
    for rule in _RULES:
        for line in lines:
            if (line.raised or not rule.raised) and rule.pattern.search(line.text):
                return rule.kind, line.text
    for line in lines:
        if any(part in line.file for part in _FLAG_FILES):
            return Kind.BAD_FLAG, line.text
    return None


def _from_status(lines: Sequence[_Line], status: int | None) -> tuple[Kind, str]:
    last = lines[-1].text if lines else "its log is empty"
    died = next((line.text for line in lines if _DIED.search(line.text)), None)
    raised = next(
        (line.text for line in lines if line.raised and not _DIED.search(line.text)), None
    )
    if status is None:
        return Kind.TIMEOUT, f"not done in time; {raised or died or last}"
    if raised is None and (died or status < 0):
        return Kind.KILLED, died or f"ended by {_signal_name(-status)}; {last}"
    return Kind.UNKNOWN, raised or f"ended with status {status}; {last}"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


@dataclass(frozen=True)
class Adjustment:
    """What differs between attempts at the same session."""

    max_total_tokens: int | None
    """Tokens of the KV pool; None leaves it to SGLang."""
    tp: int
    concurrency: float
    """Share of the planned number of concurrent requests."""


@dataclass(frozen=True)
class _Limits:
    tp_choices: tuple[int, ...]
    least_tokens: int
    least_concurrency: float


_Step = Callable[[Adjustment, Failure, _Limits], Adjustment | None]


def _smaller_pool(used: Adjustment, failure: Failure, limits: _Limits) -> Adjustment | None:
    """Halve the pool; one that SGLang chose is halved from what it said, or capped."""
    before = used.max_total_tokens or failure.pool_tokens or 2 * _FIRST_CAP
    tokens = max(before // 2, limits.least_tokens)
    return replace(used, max_total_tokens=tokens) if tokens < before else None


def _larger_tp(used: Adjustment, _: Failure, limits: _Limits) -> Adjustment | None:
    larger = [tp for tp in limits.tp_choices if tp > used.tp]
    return replace(used, tp=min(larger)) if larger else None


def _fewer_requests(used: Adjustment, _: Failure, limits: _Limits) -> Adjustment | None:
    share = used.concurrency / 2
    return replace(used, concurrency=share) if share >= limits.least_concurrency else None


_STEPS: dict[Kind, tuple[_Step, ...]] = {
    Kind.OUT_OF_MEMORY: (_smaller_pool, _larger_tp, _fewer_requests),
    # A pool that has no room is not helped by a smaller one, nor a full one.
    Kind.NO_ROOM_FOR_KV: (_larger_tp,),
    Kind.POOL_TOO_SMALL: (_fewer_requests, _larger_tp),
}
_AGAIN = {Kind.TIMEOUT: 1, Kind.UNKNOWN: 1}
_AGAIN_AT_MOST = 2


def next_adjustment(
    history: Sequence[tuple[Adjustment, Failure]],
    tp_choices: Sequence[int],
    gpus: int,
    *,
    least_tokens: int = LEAST_TOKENS,
    least_concurrency: float = LEAST_CONCURRENCY,
) -> Adjustment | None:
    """Return the settings of the next attempt, or None to give up.

    Out of memory: a smaller KV pool, then a larger tp, then fewer concurrent requests. What else is
    worth another attempt gets the same settings again: twice in a session, once for what was too
    slow or is not understood. Each step shrinks the pool or the requests or grows tp, so it ends.

    Args:
        history: the attempts so far with how they failed, oldest first; at least one.
        tp_choices: under which every kernel of the session has the same shapes.
        gpus: how many GPUs there are.
        least_tokens: the KV pool is not made smaller than this.
        least_concurrency: the share of concurrent requests is not made smaller than this.
    """
    used, failure = history[-1]
    if not failure.retryable:
        return None
    limits = _Limits(tuple(tp for tp in tp_choices if tp <= gpus), least_tokens, least_concurrency)
    if failure.kind in _STEPS:
        steps = (step(used, failure, limits) for step in _STEPS[failure.kind])
        return next((adjusted for adjusted in steps if adjusted), None)
    again = sum(past.retryable and past.kind not in _STEPS for _, past in history)
    return used if again <= _AGAIN.get(failure.kind, _AGAIN_AT_MOST) else None
