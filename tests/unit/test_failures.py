"""Why servers failed, in the words of the programs that fail, and what is tried next."""

from __future__ import annotations

import argparse

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.collect.failures import (
    LEAST_CONCURRENCY,
    LEAST_TOKENS,
    Adjustment,
    Failure,
    Kind,
    classify,
    failure_of,
    next_adjustment,
)

# What SGLang 0.5.17 writes around an exception of a scheduler.
SCHEDULER = """\
[2026-11-20 10:00:00] server_args=ServerArgs(model_path='m', mem_fraction_static=0.88)
[2026-11-20 10:00:05 TP0] Load weight begin. avail mem=138.77 GB
[2026-11-20 10:00:09 TP0] max_total_num_tokens=65536, chunked_prefill_size=8192
[2026-11-20 10:00:10 TP0] Scheduler hit an exception: Traceback (most recent call last):
  File "/site/sglang/srt/managers/scheduler.py", line 4920, in run_scheduler_process
    scheduler = Scheduler(
                ^^^^^^^^^^
{}

[2026-11-20 10:00:11] Received sigquit from a child process. It usually means the child failed.
RuntimeError: Rank 0 scheduler died during initialization (exit code: -9). If exit code is -9 \
(SIGKILL), a common cause is the OS OOM killer. Run `dmesg -T | grep -i oom` to check.
"""
FLAGS = """\
Traceback (most recent call last):
  File "/site/sglang/launch_server.py", line 60, in <module>
    server_args = prepare_server_args(sys.argv[1:])
  File "/site/sglang/srt/server_args.py", line 8762, in check_server_args
    assert self.chunked_prefill_size % self.page_size == 0
AssertionError: chunked_prefill_size must be a multiple
"""


@pytest.mark.parametrize(
    ("kind", "line"),
    [
        (
            Kind.OUT_OF_MEMORY,
            "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a "
            "total capacity of 139.80 GiB of which 1.20 GiB is free.",
        ),
        (Kind.OUT_OF_MEMORY, "[rank1]: torch.OutOfMemoryError: CUDA out of memory."),
        (Kind.OUT_OF_MEMORY, "Exception: Capture cuda graph failed: CUDA out of memory. Tried"),
        (Kind.OUT_OF_MEMORY, "torch.AcceleratorError: CUDA error: out of memory"),
        (Kind.OUT_OF_MEMORY, "RuntimeError: CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"),
        (
            Kind.NO_ROOM_FOR_KV,
            "RuntimeError: Not enough memory. Please try to increase --mem-fraction-static. "
            "Current value: mem_fraction_static=0.88",
        ),
        (
            Kind.NO_ROOM_FOR_KV,
            "ValueError: Loaded weights leave no GPU memory for the KV cache under "
            "--mem-fraction-static=0.08. Raise --mem-fraction-static above 0.113 (minimum viable = "
            "1 - available/pre = 0.1126).",
        ),
        (Kind.POOL_TOO_SMALL, "RuntimeError: Decode out of memory. Try to lower your batch size."),
        (Kind.POOL_TOO_SMALL, "RuntimeError: alloc_req_slots runs out of memory. Please set a"),
        (
            Kind.POOL_TOO_SMALL,
            "RuntimeError: Not enough GPU memory for hybrid (mamba/linear-attention) state cache. "
            "Computed max_mamba_cache_size=0",
        ),
        (
            Kind.BAD_FLAG,
            "TypeError: ServerArgs.__init__() got an unexpected keyword argument "
            "'disable_piecewise_cuda_graph'",
        ),
        (
            Kind.MODEL_NOT_FOUND,
            "OSError: no/model is not a local folder and is not a valid model identifier listed on "
            "'https://huggingface.co/models'",
        ),
        (
            Kind.MODEL_NOT_FOUND,
            "huggingface_hub.errors.RepositoryNotFoundError: 401 Client Error. (Request ID: x)",
        ),
        (Kind.MODEL_NOT_FOUND, "huggingface_hub.errors.GatedRepoError: 403 Client Error."),
        (Kind.MODEL_NOT_FOUND, "OSError: You are trying to access a gated repo."),
        (Kind.MODEL_NOT_FOUND, "huggingface_hub.errors.OfflineModeIsEnabled: Cannot reach https"),
        (Kind.NETWORK, "OSError: We couldn't connect to 'https://huggingface.co' to load the"),
        (Kind.NETWORK, "httpx.ConnectTimeout: timed out"),
        (Kind.NETWORK, "huggingface_hub.errors.HfHubHTTPError: 503 Server Error: Unavailable"),
        (
            Kind.UNSUPPORTED,
            "ValueError: Model architectures ['NewForCausalLM'] are not supported for now. "
            "Supported architectures: dict_keys([])",
        ),
        (Kind.UNSUPPORTED, "ValueError: trtllm_mla backend can only be used with MLA models."),
        (Kind.UNSUPPORTED, "AssertionError: FlashAttention v3 Backend requires SM>=80 and SM<=90."),
        (Kind.UNSUPPORTED, "AssertionError: 6 is not divisible by 4"),
        (
            Kind.UNSUPPORTED,
            "ValueError: The checkpoint you are trying to load has model type `new` but "
            "Transformers does not recognize this architecture.",
        ),
        (
            Kind.UNSUPPORTED,
            "torch.AcceleratorError: CUDA error: no kernel image is available for execution on the "
            "device",
        ),
        (
            Kind.PORT_IN_USE,
            "ERROR:    [Errno 98] error while attempting to bind on address ('127.0.0.1', 30000): "
            "address already in use",
        ),
        (Kind.PORT_IN_USE, "zmq.error.ZMQError: Address already in use (addr='tcp://127.0.0.1:1')"),
        (Kind.PORT_IN_USE, "ValueError: nccl_port at 30000 is not available in 30 seconds."),
        (
            Kind.PORT_IN_USE,
            "torch.distributed.DistNetworkError: The server socket has failed to listen on any "
            "local network address. port: 29500, useIpv6: false, code: -98, name: EADDRINUSE",
        ),
        (Kind.NO_DEVICE, "torch.AcceleratorError: CUDA error: invalid device ordinal"),
        (Kind.NO_DEVICE, "RuntimeError: No CUDA GPUs are available"),
        (
            Kind.NO_DEVICE,
            "torch.distributed.DistBackendError: NCCL error in: ProcessGroupNCCL.cpp: Duplicate "
            "GPU detected : rank 1 and rank 0 both on CUDA device 9000",
        ),
        (Kind.DEVICE, "RuntimeError: NCCL error: unhandled system error"),
        (
            Kind.DEVICE,
            "torch.AcceleratorError: CUDA error: an illegal memory access was encountered",
        ),
        (
            Kind.DEVICE,
            "RuntimeError: The memory capacity is unbalanced. Some GPUs may be occupied by other "
            "processes. pre_model_load_memory=1",
        ),
        (
            Kind.JIT,
            "RuntimeError: Could not find nvcc and default cuda_home='/usr/local/cuda' doesn't "
            "exist",
        ),
        (
            Kind.JIT,
            "RuntimeError: Ninja build failed. Ninja output:\nnorm.cu(10): error: this is not code",
        ),
        (Kind.JIT, "norm.cpp:12:5: error: x\nRuntimeError: Ninja build failed. Ninja output:"),
        (Kind.JIT, "FileNotFoundError: [Errno 2] No such file or directory: 'ninja'"),
        (Kind.IMPORT_ERROR, "ModuleNotFoundError: No module named 'sgl_kernel'"),
        (Kind.IMPORT_ERROR, "ImportError: libcudart.so.13: cannot open shared object file"),
        (Kind.DISK_FULL, "OSError: [Errno 28] No space left on device"),
        (
            Kind.TIMEOUT,
            "[2026-11-20 10:00:10] Scheduler watchdog timeout (self.watchdog_timeout=300, "
            "self.soft=False)",
        ),
        (Kind.UNKNOWN, "KeyError: 'rope_theta'"),
    ],
)
def test_exceptions_are_understood(kind: Kind, line: str) -> None:
    failure = classify(SCHEDULER.format(line), -9)
    assert failure.kind is kind
    reasons = [" ".join(part.split())[:300] for part in line.removeprefix("[rank1]: ").split("\n")]
    assert failure.reason in reasons
    assert failure.pool_tokens == 65536
    assert failure.advice in str(failure)


NOT_RETRYABLE = {
    Kind.BAD_FLAG,
    Kind.MODEL_NOT_FOUND,
    Kind.UNSUPPORTED,
    Kind.NO_DEVICE,
    Kind.JIT,
    Kind.IMPORT_ERROR,
    Kind.DISK_FULL,
}


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--disable-piecewise-cuda-graph"], "--disable-piecewise-cuda-graph"),
        (["--backend", "x"], "--backend"),
        (["--tp-size", "x"], "--tp-size"),
        (["--back"], "--back"),
        (["--tp-size"], "--tp-size"),
    ],
)
def test_a_flag_that_argparse_refuses_is_named(
    capsys: pytest.CaptureFixture[str], arguments: list[str], named: str
) -> None:
    parser = argparse.ArgumentParser(prog="launch_server.py")
    parser.add_argument("--backend", choices=["flashinfer"])
    parser.add_argument("--backend-other")
    parser.add_argument("--tp-size", type=int)
    with pytest.raises(SystemExit):
        parser.parse_args(arguments)
    failure = classify(capsys.readouterr().err, 2)
    assert (failure.kind, failure.retryable) == (Kind.BAD_FLAG, False)
    assert failure.reason.startswith("launch_server.py: error: ")
    assert named in failure.reason


def test_flags_that_sglang_refuses() -> None:
    failure = classify(FLAGS, 1)
    assert failure.kind is Kind.BAD_FLAG
    assert failure.reason == "AssertionError: chunked_prefill_size must be a multiple"


@pytest.mark.parametrize(
    "line",
    [
        "[2026-11-20 10:00:00] Currently X is not supported, falling back to Y",
        "[2026-11-20 10:00:00] Ignore import error when loading sglang.srt.models.x: "
        "No module named 'y'",
        "[2026-11-20 10:00:00] 404 Client Error. Entry Not Found for url: hf_quant_config.json",
        "[2026-11-20 10:00:00] The memory capacity is unbalanced. Some GPUs may be occupied by",
    ],
)
def test_warnings_are_no_causes(line: str) -> None:
    failure = classify(f"{line}\nKeyError: 'x'\n", 1)
    assert (failure.kind, failure.reason) == (Kind.UNKNOWN, "KeyError: 'x'")


def test_the_servers_call_to_itself_is_no_network() -> None:
    line = (
        "requests.exceptions.ConnectionError: HTTPConnectionPool(host='127.0.0.1', port=30000): "
        "Max retries exceeded with url: /model_info"
    )
    assert classify(line, 1).kind is Kind.UNKNOWN


@pytest.mark.parametrize(
    ("log", "status", "kind", "reason"),
    [
        ("last\n\n", -9, Kind.KILLED, "ended by SIGKILL; last"),
        ("", -11, Kind.KILLED, "ended by SIGSEGV; its log is empty"),
        ("", -99, Kind.KILLED, "ended by signal 99; its log is empty"),
        ("last", 7, Kind.UNKNOWN, "ended with status 7; last"),
        ("", 0, Kind.UNKNOWN, "ended with status 0; its log is empty"),
        ("last", None, Kind.TIMEOUT, "not done in time; last"),
        ("KeyError: 'x'\nlast", None, Kind.TIMEOUT, "not done in time; KeyError: 'x'"),
        ("KeyError: 'x'\nlast", -9, Kind.UNKNOWN, "KeyError: 'x'"),
        (
            "Subprocess scheduler_0 (pid=5) crashed with exit code -9. Triggering SIGQUIT",
            1,
            Kind.KILLED,
            "Subprocess scheduler_0 (pid=5) crashed with exit code -9. Triggering SIGQUIT",
        ),
        (
            "RuntimeError: Rank 0 scheduler died during initialization (exit code: -9).",
            -9,
            Kind.KILLED,
            "RuntimeError: Rank 0 scheduler died during initialization (exit code: -9).",
        ),
        ("RuntimeError: CUDA out of memory", None, Kind.OUT_OF_MEMORY, None),
    ],
)
def test_the_exit_tells_where_the_log_does_not(
    log: str, status: int | None, kind: Kind, reason: str | None
) -> None:
    failure = classify(log, status)
    assert failure.kind is kind
    assert failure.reason == reason or reason is None
    assert failure.pool_tokens is None


@given(st.text(), st.none() | st.integers(-(2**31), 2**31))
def test_any_log_gives_one_line(log: str, status: int | None) -> None:
    failure = classify(log, status)
    assert failure.reason
    assert len(failure.reason.splitlines()) == 1
    assert len(failure.reason) <= 300
    assert failure.retryable == (failure.kind not in NOT_RETRYABLE)


def failure(kind: Kind, pool_tokens: int | None = None) -> Failure:
    return Failure(kind, "reason", kind not in NOT_RETRYABLE, "advice", pool_tokens)


def attempts(
    first: Adjustment, kinds: list[Kind], tp_choices: tuple[int, ...] = (1,), gpus: int = 8
) -> list[Adjustment | None]:
    """What is tried after each failure of a kind, one after the other."""
    history, tried = [], []
    used: Adjustment | None = first
    for kind in kinds:
        assert used is not None
        history.append((used, failure(kind)))
        used = next_adjustment(history, tp_choices, gpus)
        tried.append(used)
    return tried


def test_out_of_memory_shrinks_the_pool_then_grows_tp_then_sends_less() -> None:
    first = Adjustment(50_000, 1, 1.0)
    tried = attempts(first, [Kind.OUT_OF_MEMORY] * 9, tp_choices=(4, 1, 2, 8), gpus=4)
    assert tried == [
        Adjustment(25_000, 1, 1.0),
        Adjustment(LEAST_TOKENS, 1, 1.0),
        Adjustment(LEAST_TOKENS, 2, 1.0),
        Adjustment(LEAST_TOKENS, 4, 1.0),
        Adjustment(LEAST_TOKENS, 4, 1 / 2),
        Adjustment(LEAST_TOKENS, 4, 1 / 4),
        Adjustment(LEAST_TOKENS, 4, 1 / 8),
        Adjustment(LEAST_TOKENS, 4, 1 / 16),
        None,
    ]


def test_a_pool_that_sglang_chose_is_halved_from_what_it_said() -> None:
    first = Adjustment(None, 1, 1.0)
    known = [(first, failure(Kind.OUT_OF_MEMORY, 2_000_000))]
    assert next_adjustment(known, (1,), 1) == Adjustment(1_000_000, 1, 1.0)
    unknown = [(first, failure(Kind.OUT_OF_MEMORY))]
    assert next_adjustment(unknown, (1,), 1) == Adjustment(131_072, 1, 1.0)
    small = [(first, failure(Kind.OUT_OF_MEMORY, 10_000))]
    assert next_adjustment(small, (1, 2), 2) == Adjustment(None, 2, 1.0)


def test_no_room_for_kv_needs_more_gpus() -> None:
    first = Adjustment(None, 1, 1.0)
    assert attempts(first, [Kind.NO_ROOM_FOR_KV] * 2, (1, 2), 2) == [Adjustment(None, 2, 1.0), None]


def test_a_full_pool_needs_fewer_requests() -> None:
    first = Adjustment(20_000, 1, 2 * LEAST_CONCURRENCY)
    assert attempts(first, [Kind.POOL_TOO_SMALL] * 3, (1, 2), 2) == [
        Adjustment(20_000, 1, LEAST_CONCURRENCY),
        Adjustment(20_000, 2, LEAST_CONCURRENCY),
        None,
    ]


@pytest.mark.parametrize(
    ("kinds", "goes_on"),
    [
        ([Kind.DEVICE] * 3, [True, True, False]),
        ([Kind.PORT_IN_USE, Kind.KILLED, Kind.NETWORK], [True, True, False]),
        ([Kind.TIMEOUT] * 2, [True, False]),
        ([Kind.UNKNOWN] * 2, [True, False]),
        ([Kind.DEVICE, Kind.TIMEOUT], [True, False]),
        *[([kind], [False]) for kind in sorted(NOT_RETRYABLE)],
    ],
)
def test_others_get_the_same_settings_again_or_none(kinds: list[Kind], goes_on: list[bool]) -> None:
    first = Adjustment(None, 2, 1.0)
    assert attempts(first, kinds) == [first if again else None for again in goes_on]


@given(
    tokens=st.none() | st.integers(1, 10**9),
    tp=st.sampled_from([1, 2, 4, 8]),
    concurrency=st.floats(0, 1),
    tp_choices=st.lists(st.integers(1, 16), max_size=5),
    gpus=st.integers(0, 16),
    failures=st.lists(
        st.builds(failure, st.sampled_from(Kind), st.none() | st.integers(0, 10**9)),
        min_size=60,
        max_size=60,
    )
    | st.sampled_from(Kind).map(lambda kind: [failure(kind)] * 60),
)
def test_it_always_ends_and_never_asks_for_more(
    tokens: int | None,
    tp: int,
    concurrency: float,
    tp_choices: list[int],
    gpus: int,
    failures: list[Failure],
) -> None:
    used = Adjustment(tokens, tp, concurrency)
    history: list[tuple[Adjustment, Failure]] = []
    for failed in failures:
        history.append((used, failed))
        adjusted = next_adjustment(history, tp_choices, gpus)
        if adjusted is None:
            break
        assert failed.retryable
        if used.max_total_tokens is not None:
            assert adjusted.max_total_tokens is not None
            assert adjusted.max_total_tokens <= used.max_total_tokens
        assert adjusted.concurrency <= used.concurrency
        assert adjusted.tp == used.tp or used.tp < adjusted.tp <= gpus
        assert adjusted.tp == used.tp or adjusted.tp in tp_choices
        used = adjusted
    else:
        raise AssertionError("it goes on forever")


def test_failures_that_nothing_was_tried_again_for_use_up_no_attempt() -> None:
    used = Adjustment(None, 1, 1.0)
    not_free, killed = failure_of(Kind.NOT_FREE, "held"), failure_of(Kind.KILLED, "kill -9")
    assert next_adjustment([(used, not_free)], (1,), 1) is None
    assert next_adjustment([(used, not_free)] * 5 + [(used, killed)] * 2, (1,), 1) == used
    assert next_adjustment([(used, killed)] * 3, (1,), 1) is None


@given(st.text())
def test_a_reason_is_one_line_of_bounded_length(text: str) -> None:
    for kind in Kind:
        known = failure_of(kind, text)
        assert len(known.reason.splitlines()) <= 1
        assert len(known.reason) <= 300
        assert known.advice
