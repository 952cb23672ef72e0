"""Sessions that ran what they were to run, and those that only seem to have."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.collect.gate import GateReport, check_session
from tasks.collect.session import Session, Traffic
from tasks.ops import registry
from tasks.ops.base import Hint

DECODE = "BatchDecodeWithPagedKVCacheWrapper.plan"
RAGGED = "BatchPrefillWithRaggedKVCacheWrapper.plan"
PAGED = "BatchPrefillWithPagedKVCacheWrapper.plan"
SAMPLING = "top_k_top_p_sampling_from_probs"
VERSIONS = {"flashinfer": ["0.6.15.post1"], "torch": ["2.11.0+cu130"], "python": ["3.12.3"]}


@dataclass
class PhaseConfig:
    backend: str = "disabled"
    bs: list[int] | None = None


@dataclass
class ServerArgs:
    """Prints itself as SGLang's does."""

    model_path: str = "models/it's \"tiny\", attention_backend='triton')"
    json_model_override_args: str = "{}"
    mem_fraction_static: float | None = 0.2
    attention_backend: str | None = "flashinfer"
    decode_attention_backend: str | None = None
    prefill_attention_backend: str | None = None
    sampling_backend: str = "flashinfer"
    cuda_graph_config: dict[str, PhaseConfig] = field(
        default_factory=lambda: {"page_size": PhaseConfig(bs=[1, 2])}
    )
    enable_deterministic_inference: bool = False
    page_size: int | None = 1


def session(**changes: Any) -> Session:
    given_ = {
        "id": "s",
        "model": "m",
        "tp": 1,
        "ep": 1,
        "page_size": 1,
        "mode": "decode",
        "flags": ("--attention-backend", "flashinfer", "--disable-cuda-graph", "--tp-size", "1"),
        "env": {},
        "record": (DECODE, RAGGED, "rmsnorm", SAMPLING),
        "expects": {"decode": (DECODE,), "ragged": (RAGGED,), "norm": ("rmsnorm",)},
        "traffic": Traffic(),
        "tp_choices": (1,),
    }
    return Session.model_validate(given_ | changes)


FIRED = {DECODE: 88, RAGGED: 17, "rmsnorm": 4}


def gate(tmp_path: Path, *lines: str, args: ServerArgs | None = None, **changes: Any) -> GateReport:
    fired = changes.pop("fired", FIRED)
    captured = changes.pop("captured", {})
    versions = changes.pop("versions", VERSIONS)
    server_args = args or ServerArgs()
    log = tmp_path / "server.log"
    shown = f"[2026-11-20 17:49:01] {server_args=}"
    log.write_text("\n".join(["[2026-11-20 17:48:59] hello", shown, *lines]) + "\n")
    return check_session(session(**changes), fired, captured, log, versions)


def reason(report: GateReport) -> str:
    assert report.failure is not None
    assert not report.failure.retryable
    return f"{report.failure.reason} | {report.failure.advice}"


def test_a_session_that_ran_as_asked_passes(tmp_path: Path) -> None:
    report = gate(tmp_path, "[x] Decode batch, #running-req: 4, cuda graph: False, #queue-req: 0")
    assert (report.failure, report.missing) == (None, {})
    assert report.notes == [
        "attention backend flashinfer for prefill, attention backend flashinfer for decode, "
        "page size 1, flashinfer 0.6.15.post1, torch 2.11.0+cu130"
    ]


@pytest.mark.parametrize(
    ("args", "flags", "said"),
    [
        (ServerArgs(attention_backend="fa3"), (), "backend for prefill: fa3, asked for flashinfer"),
        (
            ServerArgs(decode_attention_backend="trtllm_mha"),
            (),
            "backend for decode: trtllm_mha, asked for flashinfer",
        ),
        (
            ServerArgs(),
            ("--decode-attention-backend=trtllm_mha",),
            "backend for decode: flashinfer, asked for trtllm_mha",
        ),
        (ServerArgs(attention_backend=None), (), "backend for prefill: None"),
    ],
)
def test_another_attention_backend_fails_the_session(
    tmp_path: Path, args: ServerArgs, flags: tuple[str, ...], said: str
) -> None:
    asked = ("--attention-backend", "flashinfer", *flags)
    warning = "[x] Attention backend not specified. Use fa3 backend by default."
    text = reason(gate(tmp_path, warning, args=args, flags=asked))
    assert said in text
    assert "Use fa3 backend by default" in text


def test_a_backend_is_not_asked_about_where_the_flags_do_not_ask(tmp_path: Path) -> None:
    report = gate(
        tmp_path,
        args=ServerArgs(attention_backend="fa3"),
        flags=("--disable-cuda-graph",),
        expects={"norm": ("rmsnorm",)},
    )
    assert report.failure is None


def test_another_page_size_fails_the_session(tmp_path: Path) -> None:
    line = "[x] FlashMLA only supports a page_size of 64, change page_size to 64."
    text = reason(gate(tmp_path, line, args=ServerArgs(page_size=64)))
    assert "page size: 64, asked for 1 (SGLang: [x] FlashMLA only supports" in text


@pytest.mark.parametrize(
    "line",
    [
        "Capture target decode CUDA graph begin. backend=full, num_tokens_per_req=1, bs=[1, 2]",
        "Capture cuda graph begin. This can take up to several minutes. avail mem=30.43 GB",
        "Decode batch, #running-req: 4, #token: 9, cuda graph: True, gen throughput (token/s): 1",
    ],
)
def test_cuda_graphs_fail_the_session(tmp_path: Path, line: str) -> None:
    text = reason(gate(tmp_path, line))
    assert line in text
    assert "--disable-cuda-graph" in text
    recorded = reason(gate(tmp_path, captured={"rmsnorm": 3, DECODE: 0}))
    assert "calls recorded in graphs: rmsnorm (3)" in recorded


def test_versions_are_recorded_and_not_mixed(tmp_path: Path) -> None:
    mixed = {**VERSIONS, "torch": ["2.11.0", "2.13.0"]}
    assert "torch: versions 2.11.0, 2.13.0 were mixed" in reason(gate(tmp_path, versions=mixed))
    assert "flashinfer: its version is unknown" in reason(gate(tmp_path, versions={}))


def test_a_definition_without_calls_fails_alone(tmp_path: Path) -> None:
    report = gate(tmp_path, fired={DECODE: 3, "rmsnorm": 1, RAGGED: 0})
    assert report.failure is None
    assert list(report.missing) == ["ragged"]
    assert report.missing["ragged"].startswith(
        f"{RAGGED} was never called; these were: {DECODE} (3), rmsnorm (1); "
    )


def test_a_session_without_any_expected_call_fails_with_what_ran(tmp_path: Path) -> None:
    report = gate(tmp_path, fired={"merge_state": 2})
    text = reason(report)
    assert "none of the expected calls was made; these were: merge_state (2)" in text
    assert set(report.missing) == {"decode", "ragged", "norm"}
    assert "these were: none at all" in reason(gate(tmp_path, fired={}, versions={}))


@pytest.mark.parametrize(
    ("name", "args", "changes", "said"),
    [
        (
            "rmsnorm",
            ServerArgs(),
            {"record": ("flashinfer.norm.rmsnorm",)},
            r"record rmsnorm \(instead of flashinfer.norm.rmsnorm\?\)",
        ),
        (SAMPLING, ServerArgs(), {}, "temperature 0"),
        (SAMPLING, ServerArgs(sampling_backend="pytorch"), {}, "--sampling-backend flashinfer"),
        (
            SAMPLING,
            ServerArgs(enable_deterministic_inference=True),
            {},
            "torch: leave it out",
        ),
        (
            "fused_add_rmsnorm",
            ServerArgs(enable_deterministic_inference=True),
            {"record": ("*rmsnorm",)},
            "takes other norms",
        ),
        (DECODE, ServerArgs(attention_backend="triton"), {"flags": ()}, "--attention-backend fl"),
        (RAGGED, ServerArgs(), {"env": {"SGLANG_FLASHINFER_USE_PAGED": "1"}}, "leave it out"),
        (RAGGED, ServerArgs(), {}, "multimodal"),
        (PAGED, ServerArgs(), {"record": (PAGED,)}, "set SGLANG_FLASHINFER_USE_PAGED=1"),
        ("gelu", ServerArgs(), {"record": ("gelu",)}, "see SGLang's log"),
    ],
)
def test_a_missing_call_comes_with_the_likely_fix(
    tmp_path: Path, name: str, args: ServerArgs, changes: dict[str, Any], said: str
) -> None:
    hints = {api.recorded[0]: api.hint for module in registry().values() for api in module.apis}
    asked = changes | {
        "expects": {"it": (name,), "norm": ("layernorm",)},
        "hints": {"it": hints.get(name, Hint())},
    }
    report = gate(tmp_path, args=args, fired={"layernorm": 1}, **asked)
    assert report.failure is None
    assert list(report.missing) == ["it"]
    with pytest.raises(AssertionError, match=said):
        raise AssertionError(report.missing["it"])


def test_a_log_that_says_nothing_proves_nothing(tmp_path: Path) -> None:
    log = tmp_path / "server.log"
    assert "does not say" in reason(check_session(session(), FIRED, {}, log, VERSIONS))
    log.write_bytes(b"\xff\xfe\x00 server_args: none\n")
    assert "does not say" in reason(check_session(session(), FIRED, {}, log, VERSIONS))
    log.write_text("server_args=ServerArgs(page_size=")
    assert "page size: None" in reason(check_session(session(flags=()), FIRED, {}, log, VERSIONS))
    log.write_text("server_args=ServerArgs(page_size=" + "(" * 10_000 + ")")
    assert "page size: None" in reason(check_session(session(flags=()), FIRED, {}, log, VERSIONS))


@given(
    texts=st.tuples(st.text(), st.text()),
    size=st.integers(1, 1024),
    backend=st.text().filter(lambda text: text.strip()),
)
def test_settings_are_read_whatever_stands_beside_them(
    tmp_path_factory: pytest.TempPathFactory, texts: tuple[str, str], size: int, backend: str
) -> None:
    args = ServerArgs(
        model_path=texts[0],
        json_model_override_args=texts[1],
        attention_backend=backend,
        page_size=size,
    )
    folder = tmp_path_factory.getbasetemp()
    report = gate(folder, args=args, page_size=size, flags=(f"--attention-backend={backend}",))
    assert report.failure is None
