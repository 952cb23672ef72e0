"""What a user types, and what comes back: wrong input, dry runs, status."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import DATA, write_workspace
from tests.e2e.commands import QWEN, onboard
from tests.e2e.conftest import CONFIG

pytestmark = pytest.mark.e2e


def tree(root: Path) -> dict[str, float]:
    return {str(p.relative_to(root)): p.stat().st_mtime_ns for p in root.rglob("*") if p.is_file()}


def test_help_lists_the_commands_and_imports_no_prefect() -> None:
    code = (
        "import sys\nfrom flows.cli import app\n"
        "try: app(['--help'])\nexcept SystemExit: pass\n"
        "heavy = {'prefect', 'torch', 'pydantic', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    looking = ("repos", "discover", "inventory", "sources", "coverage")
    for command in ("run", "status", "sample", "server", *looking):
        assert command in done.stdout


def _config(**changes: Any) -> str:
    return json.dumps(json.loads(CONFIG.read_text()) | changes)


WRONG = {
    "missing field": (_config(hidden_size=None), [], "field hidden_size: missing"),
    "wrong type": (_config(vocab_size="many"), [], "field vocab_size: 'many' is not an integer"),
    "not JSON": ("{nope", [], "is not JSON"),
    "phases": (_config(), ["--phases", "0,7"], "--phases: [0, 7]: phases are 0 to 4"),
    "phase text": (_config(), ["--phases", "all"], "--phases: 'all' is not a list"),
    "model name": (_config(), ["--model-name", "../x"], "--model-name: '../x' is not a valid name"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_input_is_one_line_before_anything_is_written(tmp_path: Path, kind: str) -> None:
    text, extra, message = WRONG[kind]
    config = tmp_path / "config.json"
    config.write_text(text)
    workspace = tmp_path / "workspace"
    done = onboard("run", *QWEN, "--config", config, "--workspace", workspace, *extra)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert message in line
    assert done.stdout == ""
    assert not workspace.exists()


def test_no_such_config(tmp_path: Path) -> None:
    done = onboard("run", *QWEN, "--config", tmp_path / "no.json", "--workspace", tmp_path / "w")
    assert done.returncode == 2
    assert "no.json: cannot be read (No such file or directory)" in done.stderr


def test_manifest_of_another_model_and_damaged_manifest(tmp_path: Path) -> None:
    path = tmp_path / "onboard_qwen3-30b-a3b_20260101.json"
    arguments = ("run", *QWEN, "--config", CONFIG, "--workspace", tmp_path)
    for text, message in (
        ('{"model_slug": "other", "hf_repo_id": null, "date": "2026-01-01"}', "field model_slug"),
        (
            '{"model_slug": "qwen3-30b-a3b", "hf_repo_id": "x/y", "date": "2026-01-01"}',
            "hf_repo_id",
        ),
        ('{"model_slug": "qwen3-30b-a3b"', "is not JSON"),
    ):
        path.write_text(text)
        done = onboard(*arguments)
        assert done.returncode == 2
        (line,) = done.stderr.splitlines()
        assert message in line
        assert str(path) in line
        assert path.read_text() == text
        assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_of_an_unknown_architecture_the_known_parts_are_listed(
    workspace: Path, tmp_path: Path
) -> None:
    config = tmp_path / "config.json"
    config.write_text(_config(architectures=["NobodyKnowsForCausalLM"]))
    done = onboard("run", *QWEN, "--config", config, "--workspace", workspace, "--phases", "1")
    assert done.returncode == 0, done.stderr
    reason = "nobody has mapped the layers of NobodyKnowsForCausalLM yet"
    assert f"not produced: full_attention (48 of 48 layers): {reason}" in done.stdout
    (path,) = workspace.glob("onboard_*.json")
    found = json.loads(path.read_text())
    assert {kernel["op_type"] for kernel in found["kernels"]} == {"gemm", "rmsnorm", "sampling"}
    assert [item["what"] for item in found["unmapped"]] == [
        "full_attention (48 of 48 layers)",
        "mixture of experts (48 of 48 layers)",
    ]


def test_later_phases_need_an_earlier_run(workspace: Path) -> None:
    done = onboard("run", *QWEN, "--workspace", workspace, "--phases", "2,3")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "there is no manifest yet; run phase 1 first" in line


def test_remote_that_does_not_exist(sample: Path, prefect_home: Path, tmp_path: Path) -> None:
    workspace = write_workspace(tmp_path / "w", sample, sglang=str(tmp_path / "none.git"))
    done = onboard("run", *QWEN, "--config", CONFIG, "--workspace", workspace)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "remote sglang: " in line
    assert "cannot be cloned" in line
    assert not (workspace / "sglang").exists()
    assert not list(workspace.glob("onboard_*.json"))
    assert not [p for p in workspace.iterdir() if ".cloning" in p.name]


def test_read_only_workspace(tmp_path: Path) -> None:
    """A file in the way behaves as a folder without write permission, for root too."""
    blocked = tmp_path / "file"
    blocked.write_text("x")
    done = onboard("run", *QWEN, "--config", CONFIG, "--workspace", blocked / "w")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "cannot be written" in line


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_folder_without_write_permission(tmp_path: Path) -> None:
    (tmp_path / "w").mkdir(mode=0o555)
    done = onboard("run", *QWEN, "--config", CONFIG, "--workspace", tmp_path / "w")
    assert done.returncode == 2
    assert "cannot be written" in done.stderr


def test_hub_that_cannot_be_reached(workspace: Path) -> None:
    arguments = ("run", "--model-name", "m", "--hf-repo-id", "nobody/nothing")
    toml = workspace / "onboard.toml"
    text = toml.read_text()
    toml.unlink()  # a hard link: not to be written through
    toml.write_text('hf_endpoint = "http://127.0.0.1:1"\n' + text)
    done = onboard(*arguments, "--workspace", workspace, "--phases", "1")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "nobody/nothing: " in line
    assert "--config FILE" in line


def test_dry_run_writes_nothing_and_says_what_it_would_do(workspace: Path) -> None:
    before = tree(workspace)
    done = onboard("run", *QWEN, "--config", CONFIG, "--workspace", workspace, "--dry-run")
    assert done.returncode == 0, done.stderr
    assert tree(workspace) == before
    lines = done.stdout.splitlines()
    start = lines.index("Would do:")
    assert lines[start + 1 :] == [
        "  gqa_paged_decode_h32_kv4_d128_ps1: define, collect, publish dataset, publish coverage",
        "  gqa_ragged_prefill_causal_h32_kv4_d128: define, collect, publish dataset, publish "
        "coverage",
        "  fused_add_rmsnorm_h2048: define, collect, publish dataset, publish coverage",
        "  top_k_sampling_from_probs_v151936: define, prepare SGLang pull request",
    ]


def test_dry_run_without_clones_makes_them_elsewhere(sample: Path, tmp_path: Path) -> None:
    workspace = write_workspace(tmp_path / "w", sample)
    done = onboard("run", *QWEN, "--config", CONFIG, "--workspace", workspace, "--dry-run")
    assert done.returncode == 0, done.stderr
    assert [p.name for p in workspace.iterdir()] == ["onboard.toml"]
    assert "cloning sglang into a temporary folder" in done.stdout


def test_status_of_a_manifest(tmp_path: Path) -> None:
    kernel = {"definition_name": "k", "op_type": "gemm", "phase1_status": "new"}
    waiting = kernel | {
        "fi_status": "fi_supported",
        "sgl_status": "sgl_missing",
        "phase2_status": "done",
        "sglang_pr_url": "https://example.org/1",
    }
    path = tmp_path / "onboard_m_20260101.json"
    head = {"model_slug": "m", "hf_repo_id": None, "date": "2026-01-01"}
    for entry, code in ((kernel, 0), (waiting, 3), (waiting | {"error": "broke"}, 1)):
        path.write_text(json.dumps(head | {"kernels": [entry]}))
        assert onboard("status", path).returncode == code
        done = onboard("status", "--workspace", tmp_path, "--json")
        assert done.returncode == code
        (shown,) = json.loads(done.stdout)
        assert shown["kernels"][0]["definition"] == "k"
    assert onboard("status", "--workspace", tmp_path / "none").returncode == 2
    assert onboard("status", DATA / "configs").returncode == 2


def test_sample_refuses_a_folder_that_is_something_else(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("x")
    done = onboard("sample", "--workspace", tmp_path)
    assert done.returncode == 2
    assert "is not a sample workspace" in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]
