"""What real sessions on an H200 left: rows that hold, and a record that agrees with them."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from flows.command import app
from tests.conftest import DATA

RECORD = json.loads((DATA / "h200" / "record.json").read_text())
MODELS = ("llama", "llama-sampling", "llama-tp2", "mla", "qwen3-30b-a3b", "qwen3moe")


@pytest.fixture(scope="module", params=MODELS)
def dataset(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("h200") / str(request.param)
    with tarfile.open(DATA / "h200" / f"{request.param}.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder


def workloads(dataset: Path) -> dict[str, list[dict[str, Any]]]:
    return {
        path.stem: [json.loads(line)["workload"] for line in path.read_text().splitlines()]
        for path in dataset.rglob("*.jsonl")
    }


def test_rows_hold(dataset: Path) -> None:
    import flows.cli  # noqa: F401  registers the commands

    result = CliRunner().invoke(app, ["validate", "--dataset", str(dataset), "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["errors"] == []


def test_every_definition_was_served_and_evaluations_passed(dataset: Path) -> None:
    rows = workloads(dataset)
    served = {
        name
        for session in RECORD["sessions"]
        if session["model"] == dataset.name
        for name in session["definitions"]
    }
    # SGLang ran its own fused kernel for the norms of q and k.
    assert served - rows.keys() == ({"rmsnorm_h128"} if dataset.name.startswith("qwen3") else set())
    assert rows.keys() <= served
    for evaluation in RECORD["evaluations"]:
        if evaluation["model"] == dataset.name:
            count = evaluation["workloads"]
            assert evaluation["statuses"] == {"PASSED": count}
            assert 0 < count <= len(rows[evaluation["definition"]])


def test_every_family_that_fires_passed_on_one_gpu_and_attention_on_two() -> None:
    passed = {(item["model"], item["definition"]) for item in RECORD["evaluations"]}
    stages = ("paged_decode", "paged_prefill_causal", "ragged_prefill_causal")
    for model in ("llama-tp2", "qwen3-30b-a3b", "mla"):
        for stage in stages:
            names = [name for of, name in passed if of == model and stage in name]
            pages = {name.rpartition("_ps")[2] for name in names}
            assert pages == {"1", "64"} if "paged" in stage else len(names) == 1
    assert any("rmsnorm" in name for _, name in passed)
    assert ("llama-sampling", "top_k_top_p_sampling_from_probs_v4096") in passed
    on_two = {item["session"] for item in RECORD["sessions"] if item["tp"] == 2}
    assert len(on_two) == 3


def test_traffic_was_served_whole_at_batch_sizes_of_every_order() -> None:
    for session in RECORD["sessions"]:
        assert session["failed"] == 0
        assert session["requests"] == session["traffic"]["rounds"] * sum(
            session["traffic"]["batch_sizes"]
        ) * len(session["traffic"]["lengths"])
    with tarfile.open(DATA / "h200" / "qwen3-30b-a3b.tar.xz") as archive:
        path = "./workloads/gqa_paged/gqa_paged_decode_h32_kv4_d128_ps64.jsonl"
        lines = archive.extractfile(path).read().splitlines()  # type: ignore[union-attr]
    rows = [json.loads(line)["workload"]["axes"] for line in lines]
    sizes = {row["batch_size"] for row in rows}
    assert len(rows) == 20
    assert {1, 32, 64} <= sizes
    assert max(sizes) > 100
