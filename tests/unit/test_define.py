"""Definitions: the repair rules one by one, the structural check, and drafting for real."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tasks import ops, sandbox
from tasks.define import draft, repair
from tasks.define.check import check_definition
from tasks.define.draft import draft_definitions, stage_definition
from tasks.errors import DefinitionError, InputError
from tasks.manifest import KernelEntry
from tests.unit.test_collect import definition_of
from tests.unit.test_ops import PUBLISHED, specs

TEMPLATE = {
    "name": "fused",
    "op_type": "rmsnorm",
    "tags": ["fi_api:flashinfer.norm.fused_add_rmsnorm"],
    "axes": {
        "batch_size": {"type": "var"},
        "hidden_size": {"type": "const", "value": 2048},
        "unused": {"type": "var"},
    },
    "inputs": {
        "weight": {"shape": ["hidden_size"], "dtype": "bfloat16", "optional": True},
        "x": {"shape": ["batch_size", "hidden_size"], "dtype": "bfloat16", "param": "input"},
        "return_lse": {"shape": None, "dtype": "int32", "optional": True},
    },
    "outputs": {
        "y": {"shape": ["batch_size", "hidden_size"], "dtype": "bfloat16"},
        "x": {"shape": ["batch_size", "hidden_size"], "dtype": "bfloat16"},
    },
    "reference": (
        "import torch\n\ndef _helper_reference(x):\n    return x\n\n@torch.no_grad()\n"
        "def _norm_reference(x, weight):\n    return _helper_reference(x) * weight\n"
    ),
    "check": "...",
    "init": "...",
}


def test_reference_is_renamed_and_helpers_are_kept() -> None:
    source, parameters = repair.rename_reference(str(TEMPLATE["reference"]))
    assert "def run(x, weight):" in source
    assert "def _helper_reference(x):" in source
    assert "_norm_reference" not in source
    assert parameters == ["x", "weight"]


def test_inputs_are_those_of_the_reference_in_its_order() -> None:
    kept = repair.keep_inputs(TEMPLATE["inputs"], ["x", "weight"])
    assert list(kept) == ["x", "weight"]
    assert kept["x"] == {"shape": ["batch_size", "hidden_size"], "dtype": "bfloat16"}
    with pytest.raises(DefinitionError, match="the reference takes z"):
        repair.keep_inputs(TEMPLATE["inputs"], ["z"])


def test_outputs_written_in_place_are_dropped_but_not_all() -> None:
    assert list(repair.keep_outputs(TEMPLATE["outputs"], {"x": {}})) == ["y"]
    with pytest.raises(DefinitionError, match="all are inputs written in place"):
        repair.keep_outputs(TEMPLATE["outputs"], {"x": {}, "y": {}})


def test_axes_are_those_shapes_use() -> None:
    kept = repair.keep_axes(TEMPLATE["axes"], TEMPLATE["inputs"], TEMPLATE["outputs"])
    assert list(kept) == ["batch_size", "hidden_size"]
    with pytest.raises(DefinitionError, match="shapes use other, not declared"):
        repair.keep_axes({}, {"x": {"shape": ["other"]}}, {})


def test_const_axes_must_be_the_computed_ones() -> None:
    spec = specs("Qwen--Qwen3-30B-A3B")["fused_add_rmsnorm_h2048"]
    repair.check_constants(TEMPLATE["axes"], spec)
    wrong = {"hidden_size": {"type": "const", "value": 128}}
    with pytest.raises(DefinitionError, match="read {'hidden_size': 128}, computed are"):
        repair.check_constants(wrong, spec)


@pytest.mark.parametrize(
    "damage", [{"reference": ""}, {"reference": "def f("}, {"inputs": None}, {"axes": {}}]
)
def test_unusable_template_is_a_typed_error(damage: dict[str, Any]) -> None:
    spec = specs("Qwen--Qwen3-30B-A3B")["fused_add_rmsnorm_h2048"]
    own = ops.op_module("rmsnorm").definition(spec)
    with pytest.raises(DefinitionError):
        repair.repair({**TEMPLATE, **damage}, spec, own)


BIAS_OUT_OF_ORDER = {
    f"trtllm_{kind}_moe_topk1_{experts}_h5120_i8192"
    for kind in ("fp4_block_scale", "fp8_per_tensor_scale")
    for experts in ("e16", "e128")
}
"""Published with routing_bias last among the inputs and second among run's parameters: inputs are
passed by position, so these references cannot be right."""


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_published_definitions_pass_the_check(name: str) -> None:
    if name in BIAS_OUT_OF_ORDER:
        with pytest.raises(DefinitionError, match="reference: run takes"):
            check_definition(PUBLISHED[name])
    else:
        check_definition(PUBLISHED[name])


@pytest.mark.parametrize("config", ["Qwen--Qwen3-30B-A3B", "MiniMaxAI--MiniMax-M1-80k"])
def test_own_definitions_pass_the_check(config: str) -> None:
    for spec in specs(config, tp=8, ep=8).values():
        check_definition(definition_of(spec))


GOOD = PUBLISHED["rmsnorm_h2048"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": ""}, "name: missing"),
        ({"axes": {"hidden_size": {"type": "const"}}}, "axes.hidden_size: const value None"),
        ({"axes": {"hidden_size": {"type": "const", "value": True}}}, "const value True"),
        ({"axes": {"hidden_size": {"type": "what"}}}, "neither const nor var"),
        ({"axes": {"hidden_size": 3}}, "not of the right form"),
        ({"inputs": {"x": {"shape": ["nope"], "dtype": "bfloat16"}}}, "axis 'nope', not declared"),
        ({"inputs": {"x": {"shape": None, "dtype": "uint8"}}}, "dtype 'uint8' is not supported"),
        ({"inputs": {"x y": {"shape": None, "dtype": "int32"}}}, "not an identifier"),
        ({"outputs": {"weight": {"shape": None, "dtype": "int32"}}}, "weight is an input too"),
        ({"constraints": ["a =="]}, "is no expression"),
        ({"reference": "def go(): ..."}, "0 top-level functions named run"),
        ({"reference": "def run(weight, hidden_states): ..."}, "run takes"),
        ({"reference": "def run(*args): ..."}, "run takes"),
        ({"reference": "def run(:"}, "not Python"),
    ],
)
def test_wrong_definition_names_its_field(change: dict[str, Any], message: str) -> None:
    with pytest.raises(DefinitionError) as caught:
        check_definition({**GOOD, **change})
    assert message in str(caught.value)


def entries(config: str) -> list[KernelEntry]:
    return [
        KernelEntry(
            definition_name=spec.name,
            op_type=spec.op_type,
            phase1_status="new",
            fi_trace_template=True,
            spec=spec.model_dump(mode="json"),
        )
        for spec in specs(config).values()
    ]


@pytest.mark.bench_extra
def test_drafts_of_a_whole_model_equal_the_published_definitions(tmp_path: Path) -> None:
    """All kernels of Qwen3-30B-A3B are published; templates are called for real, without a GPU."""
    kernels = entries("Qwen--Qwen3-30B-A3B")
    draft_definitions(kernels, "qwen3-30b-a3b", tmp_path)
    methods = {}
    for entry in kernels:
        made = stage_definition(entry, tmp_path, tmp_path / "dataset")
        definition, theirs = made["definition"], PUBLISHED[entry.definition_name]
        methods[entry.definition_name] = made["method"]
        for part in ("inputs", "outputs"):
            ours = {k: (v["shape"], v["dtype"]) for k, v in definition[part].items()}
            assert ours == {k: (v["shape"], v["dtype"]) for k, v in theirs[part].items()}
            assert list(definition[part]) == list(theirs[part])
        assert {k: v.get("value") for k, v in definition["axes"].items()} == {
            k: v.get("value") for k, v in theirs["axes"].items()
        }
        assert sorted(definition.get("constraints", [])) == sorted(theirs.get("constraints", []))
        assert "model:qwen3-30b-a3b" in definition["tags"]
        # Two published files name the wrapper by FlashInfer's top level; the others by module.
        if "gqa_paged_prefill" not in entry.definition_name:
            api = [tag for tag in theirs["tags"] if tag.startswith("fi_api:")]
            assert [tag for tag in definition["tags"] if tag.startswith("fi_api:")] == api
    templated = {name for name, method in methods.items() if method == "trace_template"}
    assert templated == {
        "fused_add_rmsnorm_h2048",
        "rmsnorm_h2048",
        "rmsnorm_h128",
        "gqa_paged_decode_h32_kv4_d128_ps1",
        "gqa_paged_prefill_causal_h32_kv4_d128_ps1",
        "gqa_ragged_prefill_causal_h32_kv4_d128",
        "top_k_sampling_from_probs_v151936",
        "top_p_sampling_from_probs_v151936",
        "top_k_top_p_sampling_from_probs_v151936",
    }


@pytest.mark.bench_extra
def test_one_bad_kernel_does_not_stop_the_others(tmp_path: Path) -> None:
    good, bad = entries("Qwen--Qwen3-30B-A3B")[:2]
    assert bad.spec is not None
    bad.spec = {**bad.spec, "axes": {"N": -1, "K": 2048}}
    draft_definitions([good, bad], "m", tmp_path)
    stage_definition(good, tmp_path, tmp_path / "dataset")
    with pytest.raises(DefinitionError, match="axes.N: const value -1"):
        stage_definition(bad, tmp_path, tmp_path / "dataset")
    assert len(list((tmp_path / "dataset").rglob("*.json"))) == 1


def test_a_child_that_fails_is_every_kernels_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(draft, "_MEMORY_GB", 0.001)
    kernels = entries("Qwen--Qwen3-30B-A3B")[:2]
    draft_definitions(kernels, "m", tmp_path)
    for entry in kernels:
        with pytest.raises(DefinitionError, match="drafting: the child process"):
            stage_definition(entry, tmp_path, tmp_path / "dataset")


def test_model_with_another_epsilon_does_not_take_the_template() -> None:
    spec = specs("MiniMaxAI--MiniMax-M1-80k")["rmsnorm_h6144"]
    module = ops.op_module("rmsnorm")
    assert module.template_call(spec) is None
    assert "EPS = 1e-05" in module.definition(spec)["reference"]


def test_staging_without_a_draft_or_outside_the_dataset(tmp_path: Path) -> None:
    entry = entries("Qwen--Qwen3-30B-A3B")[0]
    with pytest.raises(DefinitionError, match="has no draft"):
        stage_definition(entry, tmp_path, tmp_path / "dataset")
    hostile = entry.model_copy(update={"definition_name": "../../evil"})
    (tmp_path / "evil.json").write_text(json.dumps({"definition": {}}))
    with pytest.raises(InputError, match="not a valid name"):
        stage_definition(hostile, tmp_path, tmp_path / "dataset")


def test_child_that_hangs_is_killed_with_its_children(tmp_path: Path) -> None:
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'while True: pass'])"
    outcome = sandbox.run_python(["-c", code], timeout=1, memory_gb=4, cwd=tmp_path)
    assert not outcome.ok
    assert "did not finish in 1 s" in outcome.reason


def test_child_sees_no_tokens_and_its_last_lines_are_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "s3cret")
    monkeypatch.setenv("ONBOARD_HF_TOKEN", "s3cret")
    code = "import os; print('s3cret' in str(os.environ)); raise SystemExit(7)"
    outcome = sandbox.run_python(["-c", code], timeout=60, memory_gb=4, cwd=tmp_path)
    assert outcome.reason == "exit status 7: False"


def test_child_that_wants_too_much_memory_fails(tmp_path: Path) -> None:
    code = "x = bytearray(20 << 30)"
    outcome = sandbox.run_python(["-c", code], timeout=60, memory_gb=4, cwd=tmp_path)
    assert "MemoryError" in outcome.reason


def test_models_that_share_a_kernel_add_up_in_its_tags(tmp_path: Path) -> None:
    entry = entries("Qwen--Qwen3-30B-A3B")[0]
    for slug in ("one", "two", "one"):
        tags = ["status:verified", f"model:{slug}"]
        drafted = {"definition": {"name": entry.definition_name, "tags": tags}}
        drafts = tmp_path / slug
        drafts.mkdir(exist_ok=True)
        (drafts / f"{entry.definition_name}.json").write_text(json.dumps(drafted))
        staged = stage_definition(entry, drafts, tmp_path / "dataset")
    assert staged["definition"]["tags"] == ["status:verified", "model:one", "model:two"]
