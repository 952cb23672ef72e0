"""Our definitions against those FlashInfer dumped by itself in SGLang runs on an H200."""

from __future__ import annotations

import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tasks import manifest
from tasks.collect.dumps import read_calls
from tasks.define.crosscheck import Crosscheck, Verdict, crosscheck, record
from tasks.errors import InputError
from tests.conftest import DATA

Json = dict[str, Any]
TRACES = DATA / "traces_h200"


@pytest.fixture(scope="module")
def calls(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some calls of each API, by run."""
    folder = tmp_path_factory.mktemp("calls")
    for archive in (DATA / "dumps_h200").glob("*_calls.tar.xz"):
        with tarfile.open(archive) as packed:
            packed.extractall(folder, filter="data")
    return folder


def compared(found: Crosscheck) -> dict[str, tuple[str, str | None]]:
    return {item.dumped: (item.verdict, item.definition) for item in found.verdicts}


@pytest.mark.parametrize("run", ["llama", "moe"])
def test_what_a_serving_run_dumped_agrees_once_corrected(run: str, calls: Path) -> None:
    found = crosscheck(TRACES / run, read_calls(calls / run).calls)
    assert compared(found) == {
        "fused_add_rmsnorm_h512.json": ("agrees", "fused_add_rmsnorm_h512"),
        "gqa_paged_decode_h8_kv128_d128_ps2.json": (
            "agrees",
            "gqa_paged_decode_h8_kv2_d128_ps1",
        ),
        "gqa_paged_prefill_h8_kv128_d128_ps2.json": (
            "agrees",
            "gqa_paged_prefill_causal_h8_kv2_d128_ps1",
        ),
        "gqa_ragged_h8_kv2_d128.json": ("agrees", "gqa_ragged_prefill_causal_h8_kv2_d128"),
        "merge_state_h8_d128.json": ("not compared", None),
        "rmsnorm_h512.json": ("agrees", "rmsnorm_h512"),
        "top_k_top_p_sampling_v4096.json": (
            "agrees",
            "top_k_top_p_sampling_from_probs_v4096",
        ),
    }
    told = {item.dumped: item.corrected for item in found.verdicts}
    assert told["gqa_paged_decode_h8_kv128_d128_ps2.json"] == [
        "page_size 2, planned 1",
        "num_kv_heads 128, planned 2",
    ]
    # The tiny Llama has rms_norm_eps 1e-5, the tiny Qwen3-MoE the template's own.
    epsilon = "epsilon 1e-06 of the template, called with 1e-05"
    assert told["rmsnorm_h512.json"] == ([epsilon] if run == "llama" else [])
    assert told["gqa_ragged_h8_kv2_d128.json"] == []


def test_latent_attention_agrees_once_corrected(calls: Path) -> None:
    found = crosscheck(TRACES / "mla", read_calls(calls / "mla").calls)
    assert compared(found) == {
        "fused_add_rmsnorm_h512.json": ("agrees", "fused_add_rmsnorm_h512"),
        "gqa_ragged_h16_kv16_d192.json": (
            "agrees",
            "mla_ragged_prefill_causal_h16_qk192_vo128",
        ),
        "mla_paged_decode_h16_ckv512_kpe64_ps1.json": (
            "agrees",
            "mla_paged_decode_h16_ckv512_kpe64_ps1",
        ),
        "rmsnorm_h512.json": ("agrees", "rmsnorm_h512"),
        "top_k_top_p_sampling_v4096.json": (
            "agrees",
            "top_k_top_p_sampling_from_probs_v4096",
        ),
    }
    told = {item.dumped: item.corrected for item in found.verdicts}
    assert told["gqa_ragged_h16_kv16_d192.json"] == ["values of 192 elements, planned 128"]


def alone(name: str, change: Callable[[Json], Any], folder: Path, calls: Path) -> Verdict:
    """What comes of one dumped definition of the Llama run that is changed."""
    definition = json.loads((TRACES / "llama" / name).read_text())
    change(definition)
    (folder / name).write_text(json.dumps(definition))
    (verdict,) = crosscheck(folder, read_calls(calls / "llama").calls).verdicts
    return verdict


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "gqa_paged_decode_h8_kv128_d128_ps2.json",
            lambda d: d["axes"]["num_qo_heads"].update(value=16),
            "axes: dumped {'num_qo_heads': 16",
        ),
        (
            "gqa_paged_decode_h8_kv128_d128_ps2.json",
            lambda d: d["axes"]["page_size"].update(value=4),
            "axes: dumped",
        ),
        (
            "gqa_ragged_h8_kv2_d128.json",
            lambda d: d["inputs"]["k"].update(dtype="float16"),
            "inputs.k.dtype: ours bfloat16, dumped float16",
        ),
        (
            "gqa_ragged_h8_kv2_d128.json",
            lambda d: d["constraints"].append("total_q == total_kv"),
            "constraints: ours ['total_q == qo_indptr",
        ),
        (
            "rmsnorm_h512.json",
            lambda d: d["axes"]["hidden_size"].update(value=1024),
            "axes: dumped {'hidden_size': 1024}, called with {'hidden_size': 512}",
        ),
        (
            "top_k_top_p_sampling_v4096.json",
            lambda d: d["inputs"].pop("top_p"),
            "top_p",
        ),
    ],
)
def test_a_true_disagreement_is_named(
    name: str, change: Callable[[Json], Any], message: str, tmp_path: Path, calls: Path
) -> None:
    verdict = alone(name, change, tmp_path, calls)
    assert verdict.verdict == "disagrees"
    assert message in " ".join(verdict.reasons)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(tags=[]), "0 fi_api: tags"),
        (lambda d: d.update(tags=["fi_api:flashinfer.page.append"]), "no op module has the API"),
        (
            lambda d: d.update(tags=["fi_api:flashinfer.mla.BatchMLAPagedAttentionWrapper.run"]),
            "no call of flashinfer.mla.BatchMLAPagedAttentionWrapper is among the dumps",
        ),
    ],
)
def test_what_cannot_be_compared_says_why(
    change: Callable[[Json], Any], message: str, tmp_path: Path, calls: Path
) -> None:
    verdict = alone("rmsnorm_h512.json", change, tmp_path, calls)
    assert verdict.verdict == "not compared"
    assert message in " ".join(verdict.reasons)


def test_a_damaged_file_stops_no_other(tmp_path: Path, calls: Path) -> None:
    (tmp_path / "broken.json").write_text("{")
    shutil.copy(TRACES / "llama" / "rmsnorm_h512.json", tmp_path)
    found = crosscheck(tmp_path, read_calls(calls / "llama").calls)
    assert (found.agree, found.disagree, found.not_compared) == (1, 0, 1)


def test_a_folder_without_definitions_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no dumped definitions"):
        crosscheck(tmp_path, [])


def test_a_disagreement_is_its_kernels_failure(tmp_path: Path, calls: Path) -> None:
    dumped = json.loads((TRACES / "llama" / "rmsnorm_h512.json").read_text())
    dumped["inputs"]["weight"]["dtype"] = "float16"
    (traces := tmp_path / "traces").mkdir()
    (traces / "rmsnorm_h512.json").write_text(json.dumps(dumped))
    run = tmp_path / "onboard_m_20260101.json"
    kernels = [
        {"definition_name": name, "op_type": "rmsnorm", "phase1_status": "new"}
        for name in ("rmsnorm_h512", "rmsnorm_h1024")
    ]
    run.write_text(
        json.dumps(
            {"model_slug": "m", "hf_repo_id": None, "date": "2026-01-01", "kernels": kernels}
        )
    )
    record(crosscheck(traces, read_calls(calls / "llama").calls), run)
    failed, other = manifest.load(run).kernels
    assert "inputs.weight.dtype: ours bfloat16, dumped float16" in str(failed.error)
    assert other.error is None
