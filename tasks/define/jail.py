"""Run hostile Python that may compute on tensors, and do nothing else.

A reference comes from a language model or a stranger. Each call of one runs in a fork of this
process, so torch is imported once and neither memory nor modules are shared back. The fork has a
deadline and limits, and a seccomp filter under which the kernel refuses whatever is not in a short
list: it opens no file (not even to read), starts no process or thread, uses no network, signals
nobody. It has one pipe, on which it answers in JSON and safetensors; what it returns may be wrong,
but it is only tensors and numbers.

What remains open: the fork can read a copy of this process's memory, so keep secrets out of that
(`sandbox.run_python` does), and it can say through its results whatever it found there.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import functools
import importlib
import json
import math
import mmap
import os
import resource
import select
import signal
import socket
import struct
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, ModuleType, TracebackType
from typing import Any, NoReturn

from tasks.errors import DefinitionError
from tasks.sandbox import die_with_parent

_PIPE = 3
_PR_SET_DUMPABLE = 4
_MAX_TEXT = 500
_MAX_HEADER = 1 << 16
_MAX_VALUES = 256
_NOTHING: Mapping[str, Any] = MappingProxyType({})
_INSTALL = (
    "references run only behind a seccomp filter, which needs Linux, the Python package pyseccomp "
    "(pip install pyseccomp) and libseccomp.so.2 (Debian: apt-get install libseccomp2)"
)
_FORBIDDEN = "references may not open files, start processes or threads, or use the network"
_NOT_LOADED = "references may import torch, numpy, einops, math and the like, nothing else"

_ALLOWED = (
    # Memory. Files cannot be mapped: none can be opened.
    *("brk", "mmap", "munmap", "mprotect", "mremap", "madvise"),
    *("futex", "membarrier", "rseq", "set_robust_list", "sched_yield", "restart_syscall"),
    # Its own signal handlers; it cannot send any.
    *("rt_sigaction", "rt_sigprocmask", "rt_sigreturn", "sigaltstack"),
    # What it may know of the machine and the time.
    *("clock_gettime", "clock_getres", "gettimeofday", "time", "nanosleep", "clock_nanosleep"),
    *("getpid", "gettid", "getppid", "getuid", "geteuid", "getgid", "getegid"),
    *("sched_getaffinity", "getcpu", "get_mempolicy", "sysinfo", "uname", "getrusage"),
    *("getrandom", "getrlimit"),
    # oneDNN asks for the AMX registers; the others only change the caller's own registers.
    "arch_prctl",
    # Of the files it has: /dev/null and the pipe.
    *("read", "write", "writev", "close", "poll", "ppoll"),
    *("exit", "exit_group"),
)
_PRELOADED = (
    *("collections", "dataclasses", "enum", "functools", "itertools", "math", "operator"),
    *("typing", "encodings.idna", "numpy", "numpy.fft", "numpy.random", "safetensors.torch"),
    *("torch.nn.functional", "torch.testing", "einops", "einops._torch_specific"),
)


@dataclass(frozen=True)
class Limits:
    """What one call may use."""

    seconds: float = 60.0
    memory_gb: float = 8.0
    """Beyond what this process has; less where RLIMIT_AS is lower."""
    output_mb: int = 1024


_DEFAULT_LIMITS = Limits()


@dataclass(frozen=True)
class _Work:
    """What `run` is given."""

    source: str
    arguments: Sequence[Any]
    constraints: Sequence[str]
    names: Mapping[str, Any]
    limits: Limits


def deny_network() -> None:
    """Forbid this process and its children, for good, all sockets but Unix ones.

    Raises:
        DefinitionError: there is no seccomp here.
    """
    seccomp = _seccomp()
    refuse = seccomp.ERRNO(errno.EPERM)
    try:
        rules = seccomp.SyscallFilter(seccomp.ALLOW)
        rules.set_attr(seccomp.Attr.CTL_TSYNC, 1)  # the threads of NumPy's BLAS too
        rules.add_rule(refuse, "socket", seccomp.Arg(0, seccomp.NE, socket.AF_UNIX))
        rules.add_rule(refuse, "io_uring_setup")  # it can open sockets too
        rules.load()
    except OSError as error:
        raise DefinitionError(f"{_INSTALL}: {error}") from error


def run(
    source: str,
    arguments: Sequence[Any],
    *,
    constraints: Sequence[str] = (),
    names: Mapping[str, Any] = _NOTHING,
    limits: Limits = _DEFAULT_LIMITS,
) -> list[Any]:
    """Call the function `run` that `source` defines, in a fork that can only compute.

    Args:
        source: Python text.
        arguments: what `run` is called with, by position; it must not write to them, and does so
            without effect here, unless they are tensors in shared memory.
        constraints: expressions that must be true; evaluated before any of `source` is run.
        names: what they are about, axes and inputs by name.
        limits: what it may use.

    Returns:
        What `run` returned, as a list if it was a single value: tensors (on the CPU, strided),
        numbers and None.

    Raises:
        DefinitionError: it misbehaved, or there is no seccomp here; the text says which.
    """
    _seccomp()
    warm_up()
    reader, writer = os.pipe()
    caller, deadline = os.getpid(), time.monotonic() + limits.seconds
    with warnings.catch_warnings():
        # Python 3.12 warns of forks beside threads. The only ones here are the idle ones of
        # libraries, and `_lock_down` keeps the fork from using their pools.
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid == 0:
        try:
            _fork(caller, writer, _Work(source, arguments, constraints, names, limits))
        finally:
            os._exit(1)
    os.close(writer)
    try:
        message = _read(reader, deadline, limits)
        _wait(pid, deadline, limits)
    finally:
        os.kill(pid, signal.SIGKILL)  # without effect if it has ended: it is not reaped yet
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        os.close(reader)
    if status or not message:
        raise DefinitionError(f"reference: {_ending(status)}")
    return _parse(message)


# --- the caller's side ---------------------------------------------------------------------------


def _seccomp() -> Any:
    try:
        import pyseccomp
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        raise DefinitionError(f"{_INSTALL}: {error}") from error
    return pyseccomp


@functools.cache
def warm_up() -> None:
    """Load what references need and libraries load late: behind the filter they cannot."""
    import torch

    _one_blas_thread()
    for name in _PRELOADED:
        with suppress(ImportError):
            importlib.import_module(name)
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        x = torch.ones(32, 32, dtype=dtype)
        y = torch.einsum("ij,jk->ik", x, x).softmax(-1) @ x
        torch.nn.functional.conv1d(y[None], y[:, :, None])
        torch.nn.functional.scaled_dot_product_attention(y[None], y[None], y[None])
        y.sort(-1), y.topk(2), y.float().multinomial(1), torch.bmm(y[None], y[None])
    x.to(torch.float8_e4m3fn).float().numpy().dot(x.float().numpy())
    torch.linalg.inv(torch.eye(4))
    torch.testing.assert_close(x, x)
    _serialised({"0": x}), str(x)


def _one_blas_thread() -> None:
    """Keep NumPy's OpenBLAS, where it is that of its wheels, from using threads.

    It starts its pool again after a fork, where it may not, and then waits for it for ever. Asking
    it in the fork would start the pool too, so it is asked here: NumPy's matrix products are
    single-threaded in this process from now on.
    """
    from numpy.linalg import _umath_linalg

    library = ctypes.CDLL(_umath_linalg.__file__)
    for name in ("scipy_openblas_set_num_threads64_", "openblas_set_num_threads"):
        with suppress(AttributeError):
            library[name](1)


def _serialised(tensors: dict[str, Any]) -> bytes:
    from safetensors.torch import save

    return save(tensors)


def _late(limits: Limits) -> DefinitionError:
    return DefinitionError(f"reference: did not finish in {limits.seconds:g} s")


def _too_much(limits: Limits) -> str:
    return f"returned more than {limits.output_mb} MB"


def _read(pipe: int, deadline: float, limits: Limits) -> bytes:
    """Read all that the fork writes.

    Raises:
        DefinitionError: it takes too long, or is too much.
    """
    most = (limits.output_mb << 20) + 2 * _MAX_HEADER
    poll = select.poll()
    poll.register(pipe, select.POLLIN)
    chunks: list[bytes] = []
    size = 0
    while True:
        left = deadline - time.monotonic()
        if left <= 0 or not poll.poll(left * 1000):
            raise _late(limits)
        chunk = os.read(pipe, 1 << 20)
        if not chunk:
            return b"".join(chunks)
        chunks.append(chunk)
        size += len(chunk)
        if size > most:
            raise DefinitionError(f"reference: {_too_much(limits)}")


def _wait(pid: int, deadline: float, limits: Limits) -> None:
    """Wait until the fork has ended; it stays a zombie, so its number stays its own."""
    while os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        if time.monotonic() > deadline:
            raise _late(limits)
        time.sleep(0.001)


def _ending(status: int) -> str:
    if status >= 0:
        return f"ended with exit status {status} without an answer"
    name = signal.Signals(-status).name
    why = " (is the machine out of memory?)" if name == "SIGKILL" else ""
    return f"killed by {name}{why}"


def _parse(message: bytes) -> list[Any]:
    """Take apart what the fork wrote, which may be anything.

    Raises:
        DefinitionError: it reports a failure, or is no answer.
    """
    try:
        answer, body = _split(message)
        failed = answer.get("failed")
        values = None if failed is not None else _values(answer["values"], body)
    except Exception as error:  # hostile bytes, in two parsers
        raise DefinitionError(f"reference: wrote no answer: {_cleaned(str(error))}") from error
    if values is None:
        raise DefinitionError(_cleaned(str(failed)))
    return values


def _split(message: bytes) -> tuple[dict[str, Any], bytes]:
    (size,) = struct.unpack_from("<I", message)
    if size > _MAX_HEADER:
        raise ValueError(f"a header of {size} bytes")
    answer = json.loads(message[4 : 4 + size])
    if not isinstance(answer, dict):
        raise TypeError(f"a {type(answer).__name__}")
    return answer, message[4 + size :]


def _values(entries: Any, body: bytes) -> list[Any]:
    from safetensors.torch import load

    if not isinstance(entries, list) or len(entries) > _MAX_VALUES:
        raise ValueError("values are not a short list")
    if struct.unpack_from("<Q", body)[0] > _MAX_HEADER:
        raise ValueError("too long a safetensors header")
    tensors = load(body)
    values: list[Any] = []
    for index, entry in enumerate(entries):
        if entry == "tensor":
            values.append(tensors.pop(str(index)))
        elif entry is None or isinstance(entry, bool | int | float):
            values.append(entry)
        else:
            raise TypeError(f"value {index} is a {type(entry).__name__}")
    if tensors:
        raise ValueError("tensors that are no values")
    return values


def _cleaned(text: str) -> str:
    """Make hostile text fit to print: one line, no control or invisible characters."""
    printable = "".join(c if c.isprintable() else " " for c in text[: 4 * _MAX_TEXT])
    line = " ".join(printable.split())
    return line if len(line) <= _MAX_TEXT else f"{line[:_MAX_TEXT]}..."


# --- in the fork ---------------------------------------------------------------------------------


class _AnswerError(Exception):
    """The text tells the caller why there is no result."""


def _fork(caller: int, writer: int, work: _Work) -> NoReturn:
    """Be the fork. What follows `_lock_down` runs beside hostile code and is not relied on."""
    _close_all_but(writer)
    try:
        allowed = _lock_down(caller, work.limits)
    except OSError as error:
        os.write(_PIPE, _message({"failed": f"{_INSTALL}: {error}"}))
        os._exit(0)
    # Made now: there may be no memory for it later.
    too_big = f"wanted more than {allowed / 2**30:.3g} GB of memory"
    out_of_memory = _message({"failed": f"reference: {too_big}"})
    try:
        _check(work.constraints, work.names)
        answer = _message(*_answer(_call(work.source, work.arguments), work.limits))
    except MemoryError:
        answer = out_of_memory
    except _AnswerError as failure:
        answer = _message({"failed": str(failure)})
    except BaseException as error:
        text = _described(error, work.source)
        answer = _message({"failed": f"reference: {text}"}) if text else out_of_memory
    rest = memoryview(answer)
    while rest:
        rest = rest[os.write(_PIPE, rest) :]
    os._exit(0)


def _close_all_but(writer: int) -> None:
    """Make `writer` descriptor 3, after three of /dev/null, and the last."""
    answer = fcntl.fcntl(writer, fcntl.F_DUPFD, _PIPE + 1)
    null = os.open(os.devnull, os.O_RDWR)
    for number in range(_PIPE):
        os.dup2(null, number)
    os.dup2(answer, _PIPE)
    for name in os.listdir("/proc/self/fd"):  # noqa: PTH208  numbers, not paths
        if int(name) > _PIPE:
            with suppress(OSError):  # the listing's own
                os.close(int(name))


def _lock_down(caller: int, limits: Limits) -> int:
    """Give up everything but computing; return how much memory is left to that."""
    import torch

    libc = ctypes.CDLL(None)
    die_with_parent()
    if os.getppid() != caller:  # it died before that
        os._exit(1)
    os.setsid()
    os.environ.clear()
    # The thread pools of the caller are not in the fork, and it can have none of its own.
    torch.set_num_threads(1)
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    size = pages * mmap.PAGESIZE
    allowed = _limit(resource.RLIMIT_AS, size + int(limits.memory_gb * (1 << 30))) - size
    _limit(resource.RLIMIT_CPU, math.ceil(limits.seconds) + 1)
    for nothing in (resource.RLIMIT_CORE, resource.RLIMIT_FSIZE, resource.RLIMIT_NPROC):
        _limit(nothing, 0)
    _limit(resource.RLIMIT_NOFILE, _PIPE + 1)
    libc.prctl(_PR_SET_DUMPABLE, 0)  # no core dump, whoever collects them
    _only_compute()
    return allowed


def _limit(kind: int, value: int) -> int:
    most = resource.getrlimit(kind)[1]
    value = value if most == resource.RLIM_INFINITY else min(value, most)
    resource.setrlimit(kind, (value, value))
    return value


def _only_compute() -> None:
    """Have the kernel refuse every system call that computing does not need.

    Calls of another ABI (x32, 32-bit) kill the process.
    """
    seccomp = _seccomp()
    rules = seccomp.SyscallFilter(seccomp.ERRNO(errno.EPERM))
    rules.set_attr(seccomp.Attr.ACT_BADARCH, seccomp.KILL_PROCESS)
    # All threads: torch may start a pool of its own right after a fork, and hostile code could
    # make a thread without the filter work for it.
    rules.set_attr(seccomp.Attr.CTL_TSYNC, 1)
    for name in _ALLOWED:
        rules.add_rule(seccomp.ALLOW, name)
    # Reading its own limits, not setting them; abort(), not kill().
    own, none = seccomp.Arg(0, seccomp.EQ, 0), seccomp.Arg(2, seccomp.EQ, 0)
    rules.add_rule(seccomp.ALLOW, "prlimit64", own, none)
    rules.add_rule(seccomp.ALLOW, "tgkill", seccomp.Arg(0, seccomp.EQ, os.getpid()))
    rules.load()


def _check(constraints: Sequence[str], names: Mapping[str, Any]) -> None:
    for constraint in constraints:
        try:
            holds = bool(eval(constraint, {}, dict(names)))  # noqa: S307  that is what this is for
        except BaseException as error:
            text = f"constraint {constraint!r}: {type(error).__name__}: {error}"
            raise _AnswerError(text) from error
        if not holds:
            raise _AnswerError(f"constraint {constraint!r} does not hold")


def _call(source: str, arguments: Sequence[Any]) -> Any:
    import torch

    module = ModuleType("reference")
    sys.modules["reference"] = module  # dataclasses look for theirs there
    exec(compile(source, "<reference>", "exec"), module.__dict__)  # noqa: S102  as above
    if not callable(getattr(module, "run", None)):
        raise _AnswerError("reference: defines no function named run")
    before = [_memory(value).clone() for value in arguments if isinstance(value, torch.Tensor)]
    result = module.run(*arguments)
    after = [_memory(value) for value in arguments if isinstance(value, torch.Tensor)]
    if not all(torch.equal(*pair) for pair in zip(before, after, strict=True)):
        # Whoever runs it next to a solution gives both the same inputs.
        raise _AnswerError("reference: writes to its inputs")
    return result


def _memory(tensor: Any) -> Any:
    """Return the bytes a tensor stands on: comparable also if NaN, and rows that overlap once."""
    import torch

    return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())


def _answer(result: Any, limits: Limits) -> tuple[dict[str, Any], bytes]:
    """Write down what a reference returned.

    Raises:
        _AnswerError: it is something else than tensors and numbers, or too much.
    """
    import torch

    results = result if isinstance(result, tuple | list) else (result,)
    if len(results) > _MAX_VALUES:
        raise _AnswerError(f"reference returned {len(results)} values, more than {_MAX_VALUES}")
    entries: list[Any] = []
    tensors: dict[str, Any] = {}
    size = 0
    for index, value in enumerate(results):
        if isinstance(value, torch.Tensor):
            if value.layout != torch.strided or value.device.type != "cpu":
                kind = f"{value.layout} tensor on {value.device}"
                raise _AnswerError(f"reference returned a {kind}, not a plain tensor on the CPU")
            if value.dtype == torch.float4_e2m1fn_x2:  # safetensors writes it but does not read it
                raise _AnswerError(f"reference returned {value.dtype}; return it as torch.uint8")
            size += value.numel() * value.element_size()
            if size > limits.output_mb << 20:
                raise _AnswerError(f"reference: {_too_much(limits)}")
            # Clones: safetensors takes no two tensors of one memory.
            tensors[str(index)] = value.detach().clone(memory_format=torch.contiguous_format)
        elif not (value is None or isinstance(value, bool | int | float)):
            kind = type(value).__name__
            raise _AnswerError(f"reference returned a {kind}, not a tensor or number")
        entries.append("tensor" if isinstance(value, torch.Tensor) else value)
    return {"values": entries}, _serialised(tensors)


def _message(header: dict[str, Any], body: bytes = b"") -> bytes:
    if "failed" in header:
        header = {"failed": header["failed"][: 4 * _MAX_TEXT]}
    text = json.dumps(header).encode()
    return struct.pack("<I", len(text)) + text + body


def _described(error: BaseException, source: str) -> str:
    """Say what went wrong and where; nothing if it was memory."""
    text = str(error)
    if "can't allocate memory" in text or "not enough memory" in text:
        return ""
    hint = ""
    if "Operation not permitted" in text or "can't start new thread" in text:
        hint = f" ({_FORBIDDEN})"
    elif isinstance(error, ModuleNotFoundError):
        hint = f" ({_NOT_LOADED})"
    where = _place(error.__traceback__, source)
    return f"{type(error).__name__}: {text[: _MAX_TEXT // 2]}{hint}{where}"


def _place(trace: TracebackType | None, source: str) -> str:
    """Name the last line of the reference that was being run."""
    line = 0
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == "<reference>":
            line = trace.tb_lineno
        trace = trace.tb_next
    lines = source.splitlines()
    if not 0 < line <= len(lines):
        return ""
    return f" (line {line}: `{lines[line - 1].strip()[:100]}`)"
