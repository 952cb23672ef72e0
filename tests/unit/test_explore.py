"""The commands that only look, as they are typed: what they print and how they end."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from flows.cli import app
from tasks import manifest
from tasks.manifest import RunManifest
from tests.conftest import DATA

QWEN = DATA / "configs" / "Qwen--Qwen3-30B-A3B.json"
KERNEL_KEYS = {
    "definition_name",
    "op_type",
    "axes",
    "tp",
    "ep",
    "tags",
    "phase1_status",
    "fi_status",
    "fi_trace_template",
    "sgl_status",
    "server_flags",
    "evidence",
    "spec",
}


def onboard(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def answer(*arguments: str | Path) -> Any:
    done = onboard(*arguments, "--json")
    assert done.exit_code == 0, done.stderr
    return json.loads(done.stdout)


def kernels(found: Any) -> dict[str, Any]:
    return {kernel["definition_name"]: kernel for kernel in found["kernels"]}


def test_inventory_without_sources_has_names_and_axes(tmp_path: Path) -> None:
    found = answer("inventory", "--config", QWEN, "--tp-list", "2,1", "--workspace", tmp_path)
    assert (found["model_slug"], found["hf_repo_id"]) == ("qwen3-30b-a3b", None)
    assert found["architecture"] == "Qwen3MoeForCausalLM"
    assert [serving["tp"] for serving in found["serving"]] == [2, 1]
    assert (found["unmapped"], found["rejected"]) == ([], [])
    for kernel in found["kernels"]:
        assert set(kernel) == KERNEL_KEYS
        assert kernel["phase1_status"] is kernel["fi_status"] is kernel["sgl_status"] is None
    decode = kernels(found)["gqa_paged_decode_h16_kv2_d128_ps64"]
    assert decode["tp"] == [2]
    assert decode["axes"] == {
        "num_qo_heads": 16,
        "num_kv_heads": 2,
        "head_dim": 128,
        "page_size": 64,
    }
    assert {"tp:2", "model:qwen3-30b-a3b", "stage:decode"} <= set(decode["tags"])


def test_inventory_against_sources_and_dataset(cloned: Path, tmp_path: Path) -> None:
    found = kernels(
        answer(
            "inventory",
            *("--config", QWEN, "--tp-list", "1", "--workspace", tmp_path),
            *("--sources", cloned, "--dataset", cloned / "flashinfer-trace"),
        )
    )
    # Reasons found by reading SGLang 0.5.17 and FlashInfer 0.6.15.post1.
    expected = {
        "gqa_paged_decode_h32_kv4_d128_ps64": (
            ("existing", "fi_supported", True, "sgl_integrated"),
            ["--attention-backend flashinfer", "--page-size 64"],
            "layers/attention/flashinfer_backend.py:500",
        ),
        "fused_add_rmsnorm_h2048": (
            ("new", "fi_supported", True, "sgl_integrated"),
            [],
            "srt/layers/layernorm.py",
        ),
        "top_k_sampling_from_probs_v151936": (
            ("new", "fi_supported", True, "sgl_missing"),
            ["--sampling-backend flashinfer"],
            "no call of flashinfer.sampling.top_k_sampling_from_probs",
        ),
        "gemm_n128_k2048": (("existing", "fi_supported", False, "n/a"), [], "torch"),
    }
    for name, (statuses, flags, reason) in expected.items():
        kernel = found[name]
        keys = ("phase1_status", "fi_status", "fi_trace_template", "sgl_status")
        assert tuple(kernel[key] for key in keys) == statuses, name
        assert kernel["server_flags"] == flags, name
        assert any(reason in line for line in kernel["evidence"]), kernel["evidence"]


def test_serving_comes_from_the_cookbook_or_from_the_memory(cloned: Path, tmp_path: Path) -> None:
    config = DATA / "configs" / "nvidia--Qwen3-235B-A22B-NVFP4.json"
    known = answer(
        "inventory",
        *("--config", config, "--hf-repo-id", "Qwen/Qwen3-235B-A22B-FP8", "--workspace", cloned),
    )
    assert [(s["tp"], s["ep"]) for s in known["serving"]] == [(8, 2)]
    # 235 billion parameters of 16 bits: 470 GB on GPUs of 141, then of 80.
    for memory, tp in ((None, 4), ("80", 8)):
        extra = ("--gpu-memory", memory) if memory else ()
        assumed = answer("inventory", "--config", config, "--workspace", tmp_path, *extra)
        assert [s["tp"] for s in assumed["serving"]] == [tp]
        assert assumed["serving"][0]["origin"].startswith("assumed: no sgl-cookbook entry")


def test_what_sglang_refuses_is_not_integrated(cloned: Path, tmp_path: Path) -> None:
    config = DATA / "configs" / "openai--gpt-oss-20b.json"
    where = ("--sources", cloned, "--tp-list", "1", "--workspace", tmp_path)
    found = kernels(answer("inventory", "--config", config, *where))
    decode = found["gqa_paged_decode_h64_kv8_d64_ps1"]
    assert (decode["fi_status"], decode["sgl_status"]) == ("fi_supported", "sgl_missing")
    assert "other attention backends only" in decode["evidence"][-1]
    assert "heads have sinks" in decode["evidence"][0]
    assert found["rmsnorm_h2880"]["sgl_status"] == "sgl_integrated"


def test_several_trees_of_one_kind_are_ambiguous(tmp_path: Path) -> None:
    for name in ("flashinfer-1", "flashinfer-2"):
        (tmp_path / name / "flashinfer").mkdir(parents=True)
        (tmp_path / name / "flashinfer" / "__init__.py").touch()
    done = onboard("sources", "--api", "x", "--sources", tmp_path, "--workspace", tmp_path / "w")
    assert done.exit_code == 2
    assert "has several flashinfer trees (flashinfer-1, flashinfer-2); give one" in done.stderr


def test_help_keeps_its_defaults() -> None:
    text = " ".join(onboard("inventory", "--help").stdout.split())
    assert "[default: the cookbook's]" in text


def test_page_sizes(tmp_path: Path) -> None:
    found = answer(
        "inventory",
        *("--config", QWEN, "--tp-list", "1", "--page-sizes", "16", "--workspace", tmp_path),
    )
    paged = [name for name in kernels(found) if "paged" in name]
    assert paged == [
        "gqa_paged_decode_h32_kv4_d128_ps16",
        "gqa_paged_prefill_causal_h32_kv4_d128_ps16",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give --model-name, --hf-repo-id or --config"),
        (("--model-name", "nobody-knows"), "neither in a manifest of"),
        (("--config", QWEN, "--tp-list", "1,x"), "--tp-list: '1,x' is not a list"),
        (("--config", QWEN, "--ep-list", "0"), "--ep-list: '0' is not a list"),
        (("--config", QWEN, "--page-sizes", "-1"), "--page-sizes: '-1' is not a list"),
        (("--config", QWEN, "--hf-repo-id", "../../etc"), "'../../etc' is not a Hugging Face"),
        (("--config", QWEN, "--model-name", "../x"), "--model-name: '../x' is not a valid name"),
        (("--config", "no.json"), "no.json: cannot be read"),
        (("--config", QWEN, "--sources", "nowhere"), "--sources: nowhere is no folder"),
        (("--config", QWEN, "--sources", DATA), "has no flashinfer tree"),
        (("--config", QWEN, "--dataset", "nowhere"), "nowhere: is no folder"),
        (("--config", QWEN, "--dataset", DATA), "has no definitions/ folder"),
        (("--config", QWEN, "--gpu-memory", "nan"), "--gpu-memory"),
        (("--config", QWEN, "--tp-list", ""), "--tp-list: '' is not a list"),
        (("--config", QWEN, "--model-name", ""), "--model-name: '' is not a valid name"),
        (("--hf-repo-id", "a/.."), "--hf-repo-id: 'a/..' is not a Hugging Face"),
    ],
)
def test_wrong_input_of_inventory_is_one_line(
    tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    done = onboard("inventory", *arguments, "--workspace", tmp_path)
    assert done.exit_code == 2
    (line,) = done.stderr.splitlines()
    assert message in line
    assert done.stdout == ""


def test_a_linked_config_is_read_and_its_name_cannot_escape(tmp_path: Path) -> None:
    link = tmp_path / "..--..--x.json"
    link.symlink_to(QWEN)
    done = onboard("inventory", "--config", link, "--tp-list", "1", "--workspace", tmp_path / "w")
    assert done.exit_code == 0, done.stderr
    assert not (tmp_path / "w").exists()


def test_repos_says_the_commits(workspace: Path) -> None:
    found = {item["name"]: item for item in answer("repos", "--workspace", workspace)}
    assert set(found) == {
        "sglang",
        "flashinfer",
        "sgl_cookbook",
        "flashinfer_trace",
        "flashinfer_bench",
    }
    assert not any(item["moved"] for item in found.values())
    assert "Repositories in" in onboard("repos", "--workspace", workspace).stdout


def test_one_bad_remote_does_not_stop_the_others(workspace: Path) -> None:
    shutil.rmtree(workspace / "sglang")
    settings = workspace / "onboard.toml"
    text = settings.read_text()
    settings.unlink()
    settings.write_text(text.replace("sglang.git", "gone.git"))
    done = onboard("repos", "--workspace", workspace)
    assert done.exit_code == 2
    assert "1 of 5 repositories failed: remote sglang" in done.stderr
    assert "flashinfer_trace" in done.stdout


def test_sources_answers_in_text_and_json(cloned: Path) -> None:
    where = ("--sources", cloned, "--workspace", cloned)
    done = onboard("sources", "--api", "rmsnorm", *where)
    assert done.exit_code == 0, done.stderr
    assert "flashinfer/norm/__init__.py:114" in done.stdout
    assert "sgl-kernel/python/sgl_kernel/elementwise.py:120" in done.stdout
    found = answer("sources", "--op-type", "gdn", *where)
    assert "flashinfer.gdn_decode.gated_delta_rule_mtp" in {api["public"] for api in found["apis"]}
    (model,) = answer("sources", "--model", "Qwen3MoeForCausalLM", *where)["models"]
    assert model["file"] == "python/sglang/srt/models/qwen3_moe.py"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give one of --api, --op-type and --model"),
        (("--api", "a", "--model", "b"), "give one of --api, --op-type and --model"),
        (("--api", "rmsnrm"), "did you mean"),
    ],
)
def test_wrong_questions(cloned: Path, arguments: tuple[str, ...], message: str) -> None:
    done = onboard("sources", *arguments, "--workspace", cloned)
    assert done.exit_code == 2
    assert message in done.stderr


def test_discover_lists_a_line_each(cloned: Path) -> None:
    done = onboard("discover", "--offline", "--since", "2026-11-01", "--workspace", cloned)
    assert done.exit_code == 0, done.stderr
    *lines, last = done.stdout.splitlines()
    assert all(line.startswith(("candidate ", "needs_repo_id ")) for line in lines)
    assert last.startswith(f"{len(lines)} listed since 2026-11-01")
    found = answer("discover", "--offline", "--since", "2026-11-01", "--workspace", cloned)
    assert {c["status"] for c in found["candidates"]} >= {"candidate", "needs_repo_id", "tracked"}


def document(workspace: Path) -> Path:
    return workspace / "flashinfer-bench" / "docs" / "model_coverage.mdx"


def test_coverage_check_changes_nothing(workspace: Path) -> None:
    before = document(workspace).read_bytes()
    done = onboard("coverage", "--model-name", "qwen3-30b-a3b", "--check", "--workspace", workspace)
    assert done.exit_code == 1
    assert "-| `gqa_paged_prefill_causal_h32_kv4_d128_ps1` | gqa_paged | ✅ |" in done.stdout
    assert document(workspace).read_bytes() == before


def test_coverage_refresh_touches_its_model_only_and_once(workspace: Path) -> None:
    before = document(workspace).read_text()
    refresh = ("coverage", "--model-name", "Qwen/Qwen3-30B-A3B", "--workspace", workspace)
    first = answer(*refresh)
    after = document(workspace).read_text()
    assert first["changed"]
    assert first["model"] == "Qwen3 30B A3B"
    changed = [
        (old, new)
        for old, new in zip(before.splitlines(), after.splitlines(), strict=True)
        if old != new
    ]
    section = after[after.index("\n## Qwen3 30B A3B") :]
    section = section[: section.index("\n## ", 1)]
    assert all(new in section or new.startswith("| Qwen3 30B A3B |") for _, new in changed)
    assert answer(*refresh)["changed"] is False
    assert document(workspace).read_text() == after


def test_coverage_adds_a_model_that_has_a_manifest(workspace: Path) -> None:
    run = RunManifest.model_validate(
        {
            "model_slug": "novel-9b",
            "hf_repo_id": "acme/Novel-9B",
            "date": "2026-11-20",
            "architecture": "NovelForCausalLM",
            "kernels": [
                {"definition_name": name, "op_type": op, "phase1_status": status}
                for name, op, status in (
                    ("gemm_n128_k2048", "gemm", "existing"),
                    ("gqa_paged_decode_h9_kv3_d128_ps1", "gqa_paged", "new"),
                )
            ],
        }
    )
    manifest.create(workspace / "onboard_novel-9b_20261120.json", run)
    found = answer("coverage", "--model-name", "novel-9b", "--workspace", workspace)
    added = [line for line in found["diff"].splitlines() if line.startswith("+") and "|" in line]
    assert added == [
        "+| Novel-9B | NovelForCausalLM | 🟡 Partial |",
        "+| Definition | Op Type | Status |",
        "+|-----------|---------|:------:|",
        "+| `gemm_n128_k2048` | gemm | ✅ |",
        "+| `gqa_paged_decode_h9_kv3_d128_ps1` | gqa_paged | ❌ |",
    ]
    assert not [
        line
        for line in found["diff"].splitlines()
        if line.startswith("-") and not line.startswith("---")
    ]


def test_coverage_of_all_models_is_only_checked(workspace: Path) -> None:
    before = document(workspace).read_bytes()
    assert onboard("coverage", "--workspace", workspace).exit_code == 2
    done = onboard("coverage", "--check", "--workspace", workspace)
    assert done.exit_code == 1
    assert "Qwen3 235B A22B: says 8 / 14, its table has 10 / 16" in done.stdout
    assert document(workspace).read_bytes() == before


def test_coverage_of_an_unknown_model_names_close_ones(workspace: Path) -> None:
    done = onboard("coverage", "--model-name", "qwen3-30b", "--workspace", workspace)
    assert done.exit_code == 2
    assert "has no section 'qwen3-30b'; close: " in done.stderr
