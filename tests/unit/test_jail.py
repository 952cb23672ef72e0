"""The jail: references compute in it as outside, and whatever else they try fails clearly."""

from __future__ import annotations

import errno
import json
import math
import os
import platform
import re
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from textwrap import dedent, indent
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.define import jail
from tasks.define.jail import Limits
from tasks.errors import DefinitionError
from tasks.sandbox import run_python
from tests.unit import test_ops_gdn as gdn
from tests.unit import test_references as references

if TYPE_CHECKING:
    from tasks.ops.base import KernelSpec

torch = pytest.importorskip("torch")

pytestmark = pytest.mark.bench_extra

PLENTY = Limits(seconds=30.0, memory_gb=2.0)
SHORT = Limits(seconds=2.0, memory_gb=0.25, output_mb=4)
"""For what is meant to reach a limit."""
ROOT = Path(__file__).resolve().parents[2]


def body(text: str) -> str:
    """A reference whose `run()` consists of these lines."""
    return f"import torch\ndef run():\n{indent(dedent(text).strip(), '    ')}\n"


def failure(source: str, limits: Limits = PLENTY) -> str:
    """What the user is told of a reference that fails."""
    with pytest.raises(DefinitionError) as caught:
        jail.run(source, [], limits=limits)
    return str(caught.value)


def relatives() -> set[int]:
    """All processes that are children of this one, or copies of it that have lost their parent."""
    own, found = Path("/proc/self/cmdline").read_bytes(), set()
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal() or int(entry.name) == os.getpid():
            continue
        try:
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            # Tests run side by side in processes that look the same, and have such children.
            copied = (entry / "cmdline").read_bytes() == own != _command(parent)
        except OSError:  # it has just ended
            continue
        if parent == os.getpid() or copied:
            found.add(int(entry.name))
    return found


def open_files() -> Counter[str]:
    """What this process has open; what earlier tests left may be closed at any time."""
    found: Counter[str] = Counter()
    for descriptor in Path("/proc/self/fd").iterdir():
        with suppress(OSError):
            found[str(descriptor.readlink())] += 1
    return found


def _command(process: int) -> bytes:
    return Path(f"/proc/{process}/cmdline").read_bytes()


@pytest.fixture(autouse=True)
def _nothing_is_left(tmp_path: Path) -> Iterator[None]:
    """No process, no open file, nothing in the folder that hostile references write to."""
    jail.run("def run(): return 1", [])  # warm
    before = relatives()
    opened = open_files()
    yield
    assert relatives() <= before
    assert not open_files() - opened
    assert not list(tmp_path.iterdir())


# --- what it is for ------------------------------------------------------------------------------


def test_results_and_their_kinds() -> None:
    source = "def run(x, n, none): return x + n, none, n, 1.5, True, float('nan'), float('-inf')"
    total, *others = jail.run(source, [torch.ones(2, 3), 2, None])
    assert torch.equal(total, torch.full((2, 3), 3.0))
    assert others[:4] == [None, 2, 1.5, True]
    assert type(others[3]) is bool
    assert math.isnan(others[4])
    assert others[5] == -math.inf


@pytest.mark.parametrize("result", ["x", "(x,)", "[x]"])
def test_one_value_is_a_list_of_one(result: str) -> None:
    (got,) = jail.run(f"def run(x): return {result}", [torch.arange(3)])
    assert torch.equal(got, torch.arange(3))


@pytest.mark.parametrize(
    "dtype",
    [
        *("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"),
        *("int64", "int32", "int16", "int8", "uint8", "bool"),
    ],
)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (5,), (2, 3, 4)])
def test_every_dtype_comes_back_bit_by_bit(dtype: str, shape: tuple[int, ...]) -> None:
    kind = getattr(torch, dtype)
    size = torch.empty(0, dtype=kind).element_size() * math.prod(shape)
    most = 2 if dtype == "bool" else 256
    data = torch.randint(0, most, (size,), dtype=torch.uint8, generator=references.seeded(1))
    given = data.view(kind).reshape(shape)
    got, again = jail.run("def run(x): return x, x", [given])
    for value in (got, again):
        assert value.dtype == kind
        assert value.shape == given.shape
        assert torch.equal(value.reshape(-1).view(torch.uint8), data)


def test_views_and_gradients_come_back_as_plain_tensors() -> None:
    source = body("""
        x = torch.arange(6.0, requires_grad=True).reshape(2, 3)
        return x.t(), x[:, 1], x.expand(2, 2, 3)
    """)
    x = torch.arange(6.0).reshape(2, 3)
    for got, expected in zip(
        jail.run(source, []), (x.t(), x[:, 1], x.expand(2, 2, 3)), strict=True
    ):
        assert torch.equal(got, expected)
        assert not got.requires_grad


@pytest.mark.parametrize(
    "body",
    ["x.add_(1); return x.clone()", "x[1:].view(-1).fill_(1); return x + 1", "x.data[0] = 1"],
)
def test_writing_to_an_argument_is_refused_and_has_no_effect_here(body: str) -> None:
    x = torch.zeros(4)
    with pytest.raises(DefinitionError, match="reference: writes to its inputs"):
        jail.run(f"def run(x): {body}", [x])
    assert not x.any()


def test_arguments_of_nan_and_of_overlapping_rows_are_compared_as_bytes() -> None:
    x = torch.full((8,), float("nan"))
    (got,) = jail.run("def run(x): return x[0].isnan().all()", [x.as_strided((3, 4), (2, 1))])
    assert got.item()


def test_constraints() -> None:
    x = torch.tensor([0, 3])
    source, names = "def run(x): return x", {"x": x, "n": 3}
    assert jail.run(source, [x], constraints=["n == x[-1].item()", "n > 2"], names=names)
    for constraint, message in [
        ("n == 4", "constraint 'n == 4' does not hold"),
        ("m == 4", "constraint 'm == 4': NameError: name 'm' is not defined"),
        ("open('/etc/passwd')", "Operation not permitted"),
        ("exit(0)", "constraint 'exit(0)': SystemExit: 0"),
        ("[0] * 10**12", "constraint '[0] * 10**12': MemoryError"),
    ]:
        with pytest.raises(DefinitionError) as caught:
            jail.run(source, [x], constraints=["n == 3", constraint], names=names)
        assert message in str(caught.value)


def test_constraints_come_before_the_reference_can_forge_their_outcome() -> None:
    source = "import os\nos.write(3, b'nonsense')\nos._exit(0)"
    with pytest.raises(DefinitionError, match="constraint '1 == 2' does not hold"):
        jail.run(source, [], constraints=["1 == 2"])


def sampling_inputs() -> dict[str, Any]:
    return {
        "probs": torch.rand(64, references.VOCABULARY, generator=references.seeded(2)).softmax(-1),
        "top_k": torch.full((64,), 5, dtype=torch.int32),
        "top_p": torch.full((64,), 0.9),
    }


def norm_inputs() -> dict[str, Any]:
    generator = references.seeded(3)
    return {
        "hidden_states": references.random((7, 96), generator),
        "weight": references.random((96,), generator),
    }


def decode_inputs() -> dict[str, Any]:
    generator = references.seeded(4)
    keys = [references.random((n, 2, 16), generator) for n in (5, 0, 9)]
    q = references.random((3, 6, 16), generator)
    return {"q": q, **references.paged_cache(keys, keys, 4, generator)}


def moe_inputs() -> dict[str, Any]:
    generator = references.seeded(5)
    logits = references.distinct_logits(8, generator)
    return {"routing_logits": logits, **references.fp8_block_inputs(8, generator)}


REFERENCES = [
    (references.RMSNORM[references.EPSILONS[0]], norm_inputs),
    (references.PAGED_DECODE[4], decode_inputs),
    (references.FP8_BLOCK, moe_inputs),
    (references.SAMPLING["top_k_top_p_sampling_from_probs"], sampling_inputs),
    (gdn.small("prefill"), lambda: gdn.prefill_inputs(gdn.LENGTHS)),
]


@pytest.mark.parametrize(("spec", "make"), REFERENCES, ids=lambda x: getattr(x, "name", ""))
def test_references_compute_as_they_do_outside(spec: KernelSpec, make: Any) -> None:
    definition, inputs = references.full_definition(spec), make()
    ordered = [inputs[name] for name in definition["inputs"]]
    torch.manual_seed(7)  # a fork begins with its parent's generator
    got = jail.run(definition["reference"], ordered)
    expected = references.run_reference(spec, inputs)
    assert len(got) == len(expected)
    for ours, theirs in zip(got, expected, strict=True):
        # Not bit by bit: the fork has one thread, and sums are split by threads.
        torch.testing.assert_close(ours.double(), theirs.double(), rtol=2**-7, atol=1e-4)


def test_caller_with_busy_thread_pools() -> None:
    """A fork has no threads of its parent's pools; waiting for them would take for ever."""
    x = torch.randn(600, 600, generator=references.seeded(6))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        expected = (x @ x).softmax(-1)
        assert (x.numpy() @ x.numpy()).shape == (600, 600)
        source = """
            import torch
            def run(x):
                y = (x @ x).softmax(-1)
                z = torch.from_numpy(x.numpy() @ x.numpy()).softmax(-1)
                torch.linalg.inv(x)
                torch.nn.functional.conv2d(x[None, None], x[None, None, :3, :3])
                return y, z, x.sort()[0], (x.bfloat16() @ x.bfloat16()).float()
        """
        got = jail.run(dedent(source), [x])
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    torch.testing.assert_close(got[0], expected, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(got[1], expected, rtol=1e-3, atol=1e-5)
    assert torch.equal(got[2], x.sort()[0])


def test_usual_imports() -> None:
    source = """
        from __future__ import annotations
        import collections, dataclasses, enum, functools, itertools, math, operator, typing
        import einops
        import numpy as np
        import torch.nn.functional as F
        from typing import NamedTuple, Optional

        @dataclasses.dataclass(frozen=True)
        class Pair:
            a: Optional[int] = None

        class Named(NamedTuple):
            a: int

        def run(x):
            y = einops.rearrange(x, "a b -> b a")
            y = y + float(np.random.default_rng(0).normal()) * 0 + Named(0).a
            return F.relu(y), math.pi, Pair().a
    """
    y, pi, none = jail.run(dedent(source), [-torch.ones(2, 3)])
    assert torch.equal(y, torch.zeros(3, 2))
    assert (pi, none) == (math.pi, None)


# --- mistakes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("def run(:", "reference: SyntaxError: invalid syntax"),
        ("x = 1", "reference: defines no function named run"),
        ("run = 3", "reference: defines no function named run"),
        ("import scipy", "No module named 'scipy' (references may import torch, numpy"),
        (
            body("x = torch.ones(2)\nreturn x @ torch.ones(3)"),
            "(line 4: `return x @ torch.ones(3)`",
        ),
        (body("def f():\n    return 1 / 0\nf()"), "ZeroDivisionError: division by zero (line 4: `"),
        (body("raise KeyError('k')"), "reference: KeyError: 'k' (line 3: `raise KeyError('k')`)"),
        (body("return 'text'"), "reference returned a str, not a tensor or number"),
        (body("return {'a': 1}"), "reference returned a dict, not a tensor or number"),
        (body("return torch.ones(1), [1]"), "reference returned a list, not a tensor or number"),
        (body("return range(3)"), "reference returned a range"),
        (body("return torch.ones(2, device='meta')"), "tensor on meta, not a plain tensor"),
        (
            body("return torch.zeros(2, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)"),
            "reference returned torch.float4_e2m1fn_x2; return it as torch.uint8",
        ),
        (body("return torch.eye(2).to_sparse()"), "torch.sparse_coo tensor on cpu"),
        (body("return [1] * 1000"), "reference returned 1000 values, more than 256"),
        (body("return 10 ** 10000"), "reference: ValueError: Exceeds the limit"),
        (body("return [10 ** 4000] * 200"), "reference: wrote no answer: a header of"),
        (body("import sys; sys.exit(0)"), "reference: SystemExit: 0"),
        (body("import os; os._exit(0)"), "reference: ended with exit status 0 without an answer"),
        (body("import os; os._exit(7)"), "reference: ended with exit status 7 without an answer"),
        (body("import os; os.abort()"), "reference: killed by SIGABRT"),
        (body("import ctypes; ctypes.string_at(0)"), "reference: killed by SIGSEGV"),
        (body("raise KeyboardInterrupt"), "reference: KeyboardInterrupt"),
        (body("def f(): return f()\nreturn f()"), "RecursionError: maximum recursion depth"),
    ],
)
def test_what_went_wrong_is_said(source: str, message: str) -> None:
    assert message in failure(source)


def test_error_text_is_short_and_printable() -> None:
    text = failure(body(r"raise ValueError('\x1b[2J\u202e\n\0' + 'a' * 10**7)"))
    assert text.isprintable()
    assert "a" * 100 in text
    assert len(text) < 600


@pytest.mark.parametrize(
    "lines",
    [
        "class E(Exception):\n    def __str__(self): raise self\nraise E",
        "class E(Exception):\n    def __str__(self): import os; os._exit(0)\nraise E",
        "class M(type):\n    __name__ = 3\nclass E(Exception, metaclass=M): pass\nraise E",
        "class T(torch.Tensor):\n    layout = property(lambda self: 1 / 0)\n"
        "return torch.ones(2).as_subclass(T)",
    ],
)
def test_hostile_objects_among_the_results(lines: str) -> None:
    assert failure(body(lines)).startswith("reference")


# --- time and memory -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "lines",
    [
        "while True: pass",
        "x = torch.ones(500, 500)\nwhile True: x @ x",
        "return sum(iter(int, 1))",
        "while True:\n    try:\n        while True: pass\n    except BaseException: pass",
        "import signal\nfor n in range(1, 65):\n    try: signal.signal(n, signal.SIG_IGN)\n"
        "    except (OSError, ValueError): pass\nwhile True: pass",
        "import time\ntime.sleep(10**6)",
        "import os\nos.close(3)\nwhile True: pass",
        "import threading\nlock = threading.Lock()\nlock.acquire()\nlock.acquire()",
        "class E(Exception):\n    def __str__(self):\n        while True: pass\nraise E",
    ],
)
def test_endless(lines: str) -> None:
    assert failure(body(lines), SHORT) == "reference: did not finish in 2 s"


@pytest.mark.parametrize(
    "lines",
    [
        "return torch.empty(100 << 30, dtype=torch.uint8).fill_(1)",
        "return bytearray(100 << 30)",
        "return torch.ones(1).expand(100 << 30).clone()",
        "kept = []\nwhile True: kept.append(bytearray(10**6))",
        "kept = []\nwhile True: kept.append(torch.ones(10**6))",
        "import mmap\nkept = []\nwhile True: kept.append(b'x' * 1000)",
    ],
)
def test_memory(lines: str) -> None:
    limits = Limits(seconds=30.0, memory_gb=0.25)
    assert failure(body(lines), limits) == "reference: wanted more than 0.25 GB of memory"


def test_memory_that_stays_taken_is_a_failure_too() -> None:
    source = "kept = []\ndef run():\n    while True: kept.append([0])"
    assert failure(source, Limits(seconds=30.0, memory_gb=0.125)).startswith("reference: ")


@pytest.mark.parametrize(
    "lines",
    [
        "return torch.zeros(5 << 20, dtype=torch.uint8)",
        "return [torch.zeros(1 << 20, dtype=torch.uint8)] * 5",
        "return torch.zeros(1).expand(1 << 40)",
        "import os\nwhile True: os.write(3, bytes(10**5))",
    ],
)
def test_output_size(lines: str) -> None:
    assert failure(body(lines), SHORT) == "reference: returned more than 4 MB"


def test_largest_output_is_returned() -> None:
    (got,) = jail.run(body("return torch.ones(4 << 20, dtype=torch.uint8)"), [], limits=SHORT)
    assert got.numel() == 4 << 20


def test_unlimited_recursion() -> None:
    source = body("import sys\nsys.setrecursionlimit(10**9)\nf = lambda x: [*map(f, [x])]\nf(0)")
    assert failure(source, SHORT).startswith("reference: ")


# --- files, processes, network -------------------------------------------------------------------

FORBIDDEN = "references may not open files, start processes or threads, or use the network"


@pytest.mark.parametrize(
    "lines",
    [
        "open(F, 'w')",
        "import os; os.mkdir(F)",
        "import os; os.symlink('/etc/passwd', F)",
        "import os; os.mkfifo(F)",
        "import os; os.rename(ROOT + '/pyproject.toml', F)",
        "import os; os.unlink(ROOT + '/nothing')",
        "import os; os.chmod(ROOT, 0o777)",
        "import os; os.utime(ROOT)",
        "import os; os.truncate(ROOT + '/nothing', 0)",
        "import os; os.setxattr(ROOT, 'user.a', b'')",
        "import os; os.listdir('/')",
        "import os; os.stat('/etc/passwd')",
        "import os; os.readlink('/proc/self/exe')",
        "import os; os.getcwd()",
        "import os; os.chdir('/')",
        "import os; os.memfd_create('x')",
        "import os; os.pipe()",
        "import os; os.fork()",
        "import os; [os.fork() for _ in range(4)]",
        "import os; os.forkpty()",
        "import os; os.execv('/bin/true', ['true'])",
        "import os; os.posix_spawn('/usr/bin/touch', ['touch', F], {})",
        "import os; os.kill(os.getppid(), 9)",
        "import os; os.killpg(os.getpgid(0), 9)",
        "import os; os.setpriority(os.PRIO_PROCESS, 0, -5)",
        "import os; os.pidfd_open(1)",
        "import os; os.sched_setaffinity(0, {0})",
        "import subprocess; subprocess.run(['touch', F])",
        "import threading; threading.Thread(target=print).start()",
        "import socket; socket.socket()",
        "import socket; socket.socket(socket.AF_UNIX)",
        "import socket; socket.create_connection(('127.0.0.1', 80))",
        "open('/etc/passwd')",
        "open('/proc/1/environ')",
        "open('/proc/self/environ')",
        "open('/proc/self/mem', 'r+b')",
        "import pathlib; pathlib.Path(F).touch()",
        "import numpy as np; np.memmap(F, mode='w+', shape=(9,))",
        "import numpy as np; np.save(F, np.ones(3))",
        "torch.from_file(F, shared=True, size=9)",
    ],
)
def test_system_calls_are_refused(lines: str, tmp_path: Path) -> None:
    names = f"F, ROOT = {str(tmp_path / 'made')!r}, {str(ROOT)!r}\n"
    text = failure(names + body(lines))
    assert "Operation not permitted" in text or "can't start new thread" in text
    assert FORBIDDEN in text


@pytest.mark.parametrize(
    "lines",
    [
        "torch.save(torch.ones(2), F)",
        "torch.ones(9).share_memory_()",
        "import os; os.setuid(0)",
        "import sqlite3; sqlite3.connect(F)",
        "import urllib.request; urllib.request.urlopen('http://127.0.0.1:9')",
        "import socket; socket.getaddrinfo('example.org', 80)",
        "import resource; resource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
        "import multiprocessing as m; m.get_context('fork').Process(target=print).start()",
        "import multiprocessing as m; m.get_context('spawn').Process(target=print).start()",
        "import fcntl; fcntl.fcntl(3, fcntl.F_SETPIPE_SZ, 1 << 20)",
        "torch.utils.data.DataLoader([1, 2], num_workers=2).__iter__().__next__()",
    ],
)
def test_libraries_that_need_them_fail(lines: str, tmp_path: Path) -> None:
    text = failure(f"F = {str(tmp_path / 'made')!r}\n{body(lines)}")
    assert text.startswith("reference: ")
    assert "without an answer" not in text


@pytest.mark.parametrize(
    "call",
    [
        "open(F, 0o102, 0o600)",
        "open(b'/etc/passwd', 0)",
        "fork()",
        "execl(b'/usr/bin/touch', b'touch', F, None)",
        "socket(2, 1, 0)",
        "socket(16, 3, 0)",
        "socketpair(1, 1, 0, ctypes.create_string_buffer(8))",
        "kill(PARENT, 9)",
        "kill(-1, 0)",
        "ptrace(16, PARENT, 0, 0)",
        "process_vm_readv(PARENT, None, 0, None, 0, 0)",
        "process_vm_writev(PARENT, None, 0, None, 0, 0)",
        "prctl(1, 0, 0, 0, 0)",
        "unshare(0x10000000)",
        "setns(0, 0)",
        "chroot(b'/')",
        "mount(None, b'/', None, 0, None)",
        "shmget(0, 4096, 0o1600)",
        "memfd_create(b'x', 0)",
        "mknod(F, 0o100600, 0)",
        "dup(3)",
        "ioctl(0, 0x5401, 0)",
        "eventfd(0, 0)",
        "personality(0)",
        "setsid()",
        # By number, the same on every machine: io_uring, pidfd_open, clone3, openat2, landlock.
        *(f"syscall({number}, 0, 0, 0, 0, 0)" for number in (425, 434, 435, 437, 444)),
    ],
)
def test_libc_is_refused_too(call: str, tmp_path: Path) -> None:
    source = f"""
        import ctypes, os, torch
        F = {os.fsencode(tmp_path / "made")!r}
        PARENT = os.getppid()
        def run():
            libc = ctypes.CDLL(None, use_errno=True)
            return libc.{call}, ctypes.get_errno()
    """
    result, error = jail.run(dedent(source), [])
    assert result == -1
    assert error == errno.EPERM


@pytest.mark.skipif(platform.machine() != "x86_64", reason="x86-64 machine code")
@pytest.mark.parametrize(
    "code",
    [
        "b8 14 00 00 00 cd 80 c3",  # getpid by the 32-bit gate
        "b8 27 00 00 40 0f 05 c3",  # getpid of the x32 ABI
    ],
)
def test_other_abis_kill(code: str) -> None:
    source = body(f"""
        import ctypes, mmap
        page = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
        page.write(bytes.fromhex({code!r}))
        at = ctypes.addressof(ctypes.c_char.from_buffer(page))
        return ctypes.CFUNCTYPE(ctypes.c_int)(at)()
    """)
    assert failure(source) == "reference: killed by SIGSYS"


def test_shell_is_not_started(tmp_path: Path) -> None:
    command = b"touch " + os.fsencode(tmp_path / "made")
    source = body(f"import ctypes\nreturn ctypes.CDLL(None).system({command!r})")
    assert jail.run(source, []) != [0]


def test_server_sees_nothing() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        source = body(f"import socket\nsocket.create_connection(('127.0.0.1', {port}))")
        assert FORBIDDEN in failure(source)
        server.setblocking(False)
        with pytest.raises(BlockingIOError):
            server.accept()


def test_open_files_of_the_caller_are_closed(tmp_path: Path) -> None:
    with tempfile.TemporaryFile() as file:
        lines = f"import os\nos.write({file.fileno()}, b'x')"
        assert "Bad file descriptor" in failure(body(lines))
        assert not file.read()


def test_output_goes_nowhere(capfd: pytest.CaptureFixture[str]) -> None:
    source = body("""
        import os, sys
        for _ in range(100):
            print('x' * 10**5, flush=True)
            os.write(2, b'x' * 10**5)
        return os.read(0, 1) == b''
    """)
    with capfd.disabled():
        assert jail.run(source, []) == [True]
    assert capfd.readouterr() == ("", "")


# --- the caller ----------------------------------------------------------------------------------


def test_environment_is_not_in_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLANTED", "planted-secret")
    text = failure(body("import os\nraise Exception(str(os.environ) + str(os.getenv('PLANTED')))"))
    assert "environ({})None" in text
    assert "planted" not in text


def test_poisoned_modules_stay_in_the_fork() -> None:
    source = body("""
        import builtins, json, math, sys
        torch.matmul = builtins.open = json.loads = None
        math.pi = 3
        sys.modules['tasks'] = sys.modules['os'] = None
        return math.pi
    """)
    assert jail.run(source, []) == [3]
    assert math.pi != 3
    assert None not in (torch.matmul, open, json.loads, sys.modules["tasks"])


def test_nothing_of_the_caller_is_run_at_the_end(
    tmp_path_factory: pytest.TempPathFactory, capfd: pytest.CaptureFixture[str]
) -> None:
    made = tmp_path_factory.mktemp("own") / "made"
    with tempfile.TemporaryDirectory() as folder:
        source = f"""
            import atexit, gc, sys, weakref
            class Last:
                def __del__(self): open({str(made)!r}, 'w')
            atexit.register(open, {str(made)!r}, 'w')
            kept = Last()
            def run():
                weakref.finalize._exitfunc()
                gc.collect()
                return 1
        """
        assert jail.run(dedent(source), []) == [1]
        assert Path(folder).is_dir()
    assert not made.exists()
    assert capfd.readouterr() == ("", "")


def test_interrupted_caller_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(jail, "_read", interrupted)
    with pytest.raises(KeyboardInterrupt):
        jail.run(body("while True: pass"), [])


def running(marker: str) -> set[str]:
    found = set()
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdecimal() and marker.encode() in (entry / "cmdline").read_bytes():
                found.add(entry.name)
        except OSError:
            continue
    return found


def test_killed_caller_leaves_nothing(tmp_path_factory: pytest.TempPathFactory) -> None:
    marker = str(tmp_path_factory.mktemp("killed"))
    code = "from tasks.define import jail; jail.run('def run():\\n while True: pass', [])"
    with subprocess.Popen([sys.executable, "-c", code, marker], cwd=ROOT) as driver:
        while len(running(marker)) < 2:
            assert driver.poll() is None
            time.sleep(0.05)
        driver.send_signal(signal.SIGKILL)
    while running(marker):
        time.sleep(0.05)


# --- what it answers -----------------------------------------------------------------------------


def message(header: Any, tensors: bytes = b"") -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<I", len(text)) + text + tensors


def stored(header: Mapping[str, Any], data: bytes = b"") -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(shape: list[int], end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [0, end]}


FORGED = [
    b"x",
    b"\xff" * 100,
    struct.pack("<I", 2) + b"{",
    message([]),
    message({}),
    message({"values": 3}, stored({})),
    message({"values": ["tensor"]}),
    message({"values": ["tensor"]}, stored({})),
    message({"values": [{}]}, stored({})),
    message({"values": ["text"]}, stored({})),
    message({"values": [0] * 1000}, stored({})),
    message({"values": []}, stored({"0": entry([1], 4)}, bytes(4))),
    message({"values": ["tensor"]}, stored({"0": entry([2], 4)}, bytes(4))),
    message({"values": ["tensor"]}, stored({"0": entry([1 << 60], 4)}, bytes(4))),
    message({"values": ["tensor"]}, stored({"0": entry([1], 8)}, bytes(4))),
    message({"values": ["tensor"]}, stored({"0": entry([-1], 4)}, bytes(4))),
    message({"values": ["tensor"]}, stored({"0": entry([1], 4, "Q7")}, bytes(4))),
    message({"values": ["tensor"]}, struct.pack("<Q", 1 << 40)),
    struct.pack("<I", 20000) + b"[" * 20000,
    struct.pack("<I", 5000) + b"1" * 5000,
]


@pytest.mark.parametrize("forged", FORGED)
def test_forged_answer(forged: bytes) -> None:
    text = failure(body(f"import os\nos.write(3, {forged!r})\nos._exit(0)"))
    assert text.startswith("reference: wrote no answer: ")


def test_forged_failure_is_only_text() -> None:
    forged = message({"failed": "\x1b[2J all \u202e is\nwell" + "!" * 1000})
    text = failure(body(f"import os\nos.write(3, {forged!r})\nos._exit(0)"))
    assert text.startswith("[2J all is well!!!")
    assert text.isprintable()
    assert len(text) < 520


def test_garbage_before_an_answer() -> None:
    assert "wrote no answer" in failure(body("import os\nos.write(3, b'noise')\nreturn 1"))


def test_answer_of_a_fork_that_then_crashes_is_none() -> None:
    forged = message({"values": [1]}, stored({}))
    text = failure(body(f"import os\nos.write(3, {forged!r})\nos.abort()"))
    assert text == "reference: killed by SIGABRT"


@given(st.binary(max_size=60), st.booleans())
def test_any_bytes_are_parsed_or_refused(data: bytes, framed: bool) -> None:
    if framed:
        data = struct.pack("<I", len(data) // 2) + data
    try:
        values = jail._parse(data)
    except DefinitionError as error:
        assert str(error).isprintable()
    else:
        assert isinstance(values, list)


# --- seccomp itself ------------------------------------------------------------------------------


def test_without_seccomp_nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyseccomp", None)
    for call in (jail.deny_network, lambda: jail.run("def run(): return 1", [])):
        with pytest.raises(DefinitionError, match="pip install pyseccomp"):
            call()


def test_all_threads_are_behind_the_filter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch starts a pool in a fork if the caller had set a number of threads."""
    before, modes = relatives(), set()

    def inspect(pipe: int, *_: Any) -> None:
        assert os.read(pipe, 1) == b"x"
        (fork,) = relatives() - before
        for status in Path(f"/proc/{fork}/task").glob("*/status"):
            modes.update(
                re.findall(r"^(?:Seccomp|NoNewPrivs):.*", status.read_text(), re.MULTILINE)
            )
        raise KeyboardInterrupt

    monkeypatch.setattr(jail, "_read", inspect)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        with pytest.raises(KeyboardInterrupt):
            jail.run(body("import os\nos.write(3, b'x')\nwhile True: pass"), [])
    finally:
        torch.set_num_threads(threads)
    assert modes == {"Seccomp:\t2", "NoNewPrivs:\t1"}


def test_filter_that_cannot_be_loaded_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused() -> None:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(jail, "_only_compute", refused)
    assert "seccomp filter, which needs Linux" in failure("def run(): return 1")


def test_deny_network() -> None:
    code = """
        import socket, subprocess, sys
        from tasks.define import jail
        jail.deny_network()
        refused = 'import socket, sys\\ntry: socket.socket()\\nexcept PermissionError: sys.exit(9)'
        for family in (socket.AF_INET, socket.AF_INET6, socket.AF_NETLINK, socket.AF_PACKET):
            try:
                socket.socket(family, socket.SOCK_RAW)
            except PermissionError:
                continue
            sys.exit(f'{family} is open')
        socket.socketpair()[0].close()
        assert subprocess.run([sys.executable, '-c', refused]).returncode == 9
        assert jail.run('def run(x): return x', [1]) == [1]
    """
    outcome = run_python(["-c", dedent(code)], timeout=120, memory_gb=16, cwd=ROOT)
    assert outcome.ok, outcome.reason


def test_as_a_plain_user() -> None:
    """Without root's capabilities, and the same things refused."""
    code = """
        import ctypes, os
        from tasks.define import jail
        jail.run('def run(): return 1', [])  # a plain user may not be able to read this Python
        if os.getuid() == 0:
            os.setgroups([]); os.setgid(65534); os.setuid(65534)
            ctypes.CDLL(None).prctl(4, 1)  # as if it had been started by that user
        assert jail.run('def run(x): return x + 1', [1]) == [2]
        try:
            jail.run('import os\\ndef run(): os.fork()', [])
        except jail.DefinitionError as error:
            assert 'Operation not permitted' in str(error)
        else:
            raise SystemExit('forked')
    """
    outcome = run_python(["-c", dedent(code)], timeout=120, memory_gb=16, cwd=ROOT)
    assert outcome.ok, outcome.reason
