"""Rows from the dumps that a true Qwen3-30B-A3B run left on an H200."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from tasks import ops
from tasks.collect.dumps import CallLog, DumpedCall, read_calls
from tasks.collect.sanitize import sanitize
from tasks.collect.write import write_workloads
from tasks.dataset import DefinitionFiles
from tasks.errors import CollectError
from tasks.ops.base import KernelSpec, Rejected, Row
from tests.unit.test_ops import specs

DECODE = "gqa_paged_decode_h32_kv4_d128_ps1"
RAGGED = "gqa_ragged_prefill_causal_h32_kv4_d128"
NORM = "fused_add_rmsnorm_h2048"


def definition_of(spec: KernelSpec) -> dict[str, Any]:
    body = ops.op_module(spec.op_type).definition(spec)
    return {"name": spec.name, "op_type": spec.op_type, **body}


def qwen(name: str) -> KernelSpec:
    return specs("Qwen--Qwen3-30B-A3B")[name]


@pytest.fixture(scope="session")
def log(dumps: Path) -> CallLog:
    return read_calls(dumps)


def test_every_recorded_call_is_read(log: CallLog) -> None:
    # 88 decode, 17 paged and 17 ragged plans, 89 + 1 norms: one folder each in the archives.
    assert len(log.calls) == 212
    assert not log.unreadable


@pytest.mark.parametrize(
    ("name", "calls", "distinct"),
    # Counted from the raw files: offsets and indices compared byte by byte.
    [(DECODE, 88, 88), (RAGGED, 17, 12), (NORM, 89, 1), ("rmsnorm_h2048", 1, 1)],
)
def test_calls_become_distinct_rows(log: CallLog, name: str, calls: int, distinct: int) -> None:
    chosen, collected = sanitize(qwen(name), definition_of(qwen(name)), log, 1000)
    assert (collected.calls, collected.distinct, len(chosen)) == (calls, distinct, distinct)


def test_plans_without_a_run_are_no_rows(log: CallLog) -> None:
    name = "gqa_paged_prefill_causal_h32_kv4_d128_ps1"
    with pytest.raises(CollectError, match="17 x .*no evidence of a causal run"):
        sanitize(qwen(name), definition_of(qwen(name)), log, 20)


def test_page_size_64_rows_need_whole_pages(log: CallLog) -> None:
    name = "gqa_paged_decode_h32_kv4_d128_ps64"
    with pytest.raises(CollectError, match="88 x .*not whole pages of 64"):
        sanitize(qwen(name), definition_of(qwen(name)), log, 20)


def test_a_definition_of_other_heads_takes_none_of_the_calls(log: CallLog) -> None:
    spec = specs("meta-llama--Meta-Llama-3.1-8B")["gqa_paged_decode_h32_kv8_d128_ps1"]
    with pytest.raises(CollectError, match="num_kv_heads is 4, the definition has 8"):
        sanitize(spec, definition_of(spec), log, 20)


def test_a_norm_with_another_epsilon_takes_none_of_the_calls(log: CallLog) -> None:
    spec = qwen(NORM).model_copy(update={"constants": {"eps": 1e-5}})
    with pytest.raises(CollectError, match="eps is 1e-06, the definition has 1e-05"):
        sanitize(spec, definition_of(spec), log, 20)


def test_rows_hold_the_raw_index_tensors(log: CallLog, dumps: Path, tmp_path: Path) -> None:
    """Compared with the dump files themselves, read without this project's reader."""
    chosen, _ = sanitize(qwen(DECODE), definition_of(qwen(DECODE)), log, 20)
    write_workloads(tmp_path, definition_of(qwen(DECODE)), chosen)
    place = DefinitionFiles("gqa_paged", DECODE)
    lines = (tmp_path / place.workloads).read_text().splitlines()
    assert len(lines) == 20
    for line, candidate in zip(lines, chosen, strict=True):
        row = json.loads(line)
        assert (row["definition"], row["solution"], row["evaluation"]) == (DECODE, None, None)
        workload = row["workload"]
        with safe_open(dumps / candidate.calls[0] / "inputs.safetensors", "numpy") as raw:
            indptr, indices = raw.get_tensor("arg_1"), raw.get_tensor("arg_2")
        total = int(indptr[-1])
        assert workload["axes"] == {
            "num_pages": int(indices[:total].max()) + 1,
            "len_indptr": len(indptr),
            "num_kv_indices": total,
            "batch_size": len(indptr) - 1,
        }
        assert {k: v["type"] for k, v in workload["inputs"].items()} == {
            "q": "random",
            "k_cache": "random",
            "v_cache": "random",
            "kv_indptr": "safetensors",
            "kv_indices": "safetensors",
            "sm_scale": "scalar",
        }
        with safe_open(tmp_path / workload["inputs"]["kv_indices"]["path"], "numpy") as blob:
            assert np.array_equal(blob.get_tensor("kv_indptr"), indptr)
            assert np.array_equal(blob.get_tensor("kv_indices"), indices[:total])
    blobs = {p.name for p in (tmp_path / place.blobs).iterdir()}
    assert len(blobs) == 20


def _tree(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def test_same_dumps_give_same_bytes_and_orphans_go(dumps: Path, tmp_path: Path) -> None:
    definition = definition_of(qwen(RAGGED))
    for folder in ("a", "b", "b"):
        chosen, _ = sanitize(qwen(RAGGED), definition, read_calls(dumps), 5)
        write_workloads(tmp_path / folder, definition, chosen)
        stray = tmp_path / folder / DefinitionFiles("gqa_ragged", RAGGED).blobs / "stray"
        if folder == "a":
            stray.write_bytes(b"x")
            write_workloads(tmp_path / folder, definition, chosen)
    assert _tree(tmp_path / "a") == _tree(tmp_path / "b")


@pytest.mark.parametrize("size", [0, 4, 60])
def test_truncated_tensor_file_rejects_the_call(dumps: Path, tmp_path: Path, size: int) -> None:
    source = min(dumps.rglob("*BatchDecode*plan_call*"))
    shutil.copytree(source, tmp_path / "d" / source.name)
    os.truncate(tmp_path / "d" / source.name / "inputs.safetensors", size)
    results = list(ops.op_module("gqa_paged").rows(qwen(DECODE), read_calls(tmp_path / "d").calls))
    assert [type(result) for result in results] == [Rejected]
    assert "cannot be read" in results[0].reason


class _Indices:
    """A tensor argument in memory."""

    def __init__(self, values: list[int]) -> None:
        self._values = np.array(values, dtype=np.int32)
        self.shape = self._values.shape

    def load(self) -> np.ndarray:
        return self._values


def _plan(indptr: list[int], indices: list[int]) -> DumpedCall:
    return DumpedCall(
        id="x",
        name="BatchDecodeWithPagedKVCacheWrapper.plan",
        process="p",
        tensors={"indptr": _Indices(indptr), "indices": _Indices(indices)},
        values={"num_qo_heads": 32, "num_kv_heads": 4, "head_dim": 128, "page_size": 1},
        versions={},
    )


@given(
    st.lists(st.integers(1, 300), min_size=1, max_size=6),
    st.randoms(use_true_random=False),
)
def test_page_rows_are_the_inverse_of_token_indices(lengths: list[int], random: Any) -> None:
    """Lay requests out on random pages of 64 as SGLang does; the rows must name those pages."""
    free = list(range(200))
    random.shuffle(free)
    indptr, tokens, pages, last = [0], [], [], []
    for length in lengths:
        own = [free.pop() for _ in range(-(-length // 64))]
        tokens += [page * 64 + i for page in own for i in range(64)][:length]
        indptr.append(len(tokens))
        pages.append(own)
        last.append(length - 64 * (len(own) - 1))
    spec = qwen("gqa_paged_decode_h32_kv4_d128_ps64")
    results = list(ops.op_module("gqa_paged").rows(spec, [_plan(indptr, tokens)]))
    row = results[0]
    assert isinstance(row, Row)
    assert row.tensors["kv_indices"].tolist() == [page for own in pages for page in own]
    assert np.diff(row.tensors["kv_indptr"]).tolist() == [len(own) for own in pages]
    assert row.tensors["kv_last_page_len"].tolist() == last


@pytest.mark.parametrize(
    ("indptr", "indices", "reason"),
    [
        ([0, 0], [0], "the KV is empty"),
        ([0, 3], [0, 1], "2 indices for 3 KV tokens"),
        ([0, 2, 1], [0, 1], "not a sequence of offsets"),
        ([1, 2], [0, 1], "not a sequence of offsets"),
        ([0, 2], [0, -1], "negative page index"),
    ],
)
def test_impossible_plan_is_rejected(indptr: list[int], indices: list[int], reason: str) -> None:
    results = list(ops.op_module("gqa_paged").rows(qwen(DECODE), [_plan(indptr, indices)]))
    assert isinstance(results[0], Rejected)
    assert reason in results[0].reason


def test_missing_input_is_an_error_and_never_random(log: CallLog) -> None:
    definition = definition_of(qwen(DECODE))
    definition["inputs"]["extra"] = {"shape": ["len_indptr"], "dtype": "int32"}
    with pytest.raises(CollectError, match=r"input extra \(int32\) has no recorded value"):
        sanitize(qwen(DECODE), definition, log, 20)


def test_rows_of_another_model_stay(log: CallLog, tmp_path: Path) -> None:
    definition = definition_of(qwen(RAGGED))
    chosen, _ = sanitize(qwen(RAGGED), definition, log, 12)
    write_workloads(tmp_path, definition, chosen[:5])
    write_workloads(tmp_path, definition, chosen[3:])
    place = DefinitionFiles("gqa_ragged", RAGGED)
    lines = (tmp_path / place.workloads).read_text().splitlines()
    assert [json.loads(line)["workload"]["uuid"] for line in lines] == [c.uuid for c in chosen]
    assert len(list((tmp_path / place.blobs).iterdir())) == 12
