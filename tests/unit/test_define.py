"""Definitions: the structural check, and drafting for real."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tasks import ops, sandbox
from tasks.define import child, draft, phase
from tasks.define.check import check_definition
from tasks.define.compare import differences
from tasks.define.draft import (
    Draft,
    Order,
    draft_definitions,
    order_of,
    read_draft,
    stage_definition,
)
from tasks.define.reference_test import render
from tasks.errors import DefinitionError, InputError
from tasks.manifest import KernelEntry
from tests.conftest import DATA
from tests.unit.test_collect import definition_of
from tests.unit.test_ops import PUBLISHED, specs

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
        ({"constraints": "a"}, "constraints: 'a' is no list of texts"),
        ({"constraints": ["other > 1"]}, "other is no axis and no input"),
        ({"constraints": ["weight.tofile('x')"]}, "does more than compare"),
        ({"constraints": ["[hidden_size for _ in ()]"]}, "does more than compare"),
        ({"constraints": ["__import__('os').system('x')"]}, "does more than compare"),
        ({"tags": [5]}, "tags: [5] is no list of texts"),
        ({"description": "\ud800"}, "not Unicode text"),
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


def orders(config: str) -> list[Order]:
    return [Order(spec=spec) for spec in specs(config).values()]


def stage(order: Order, drafts: Path, dataset: Path) -> Draft:
    return stage_definition(order.spec.name, order.spec.op_type, drafts, dataset)


@pytest.mark.bench_extra
def test_drafts_of_a_whole_model_equal_the_published_definitions(tmp_path: Path) -> None:
    """All kernels of Qwen3-30B-A3B are published; templates are called for real, without a GPU."""
    kernels = orders("Qwen--Qwen3-30B-A3B")
    draft_definitions(kernels, "qwen3-30b-a3b", tmp_path)
    methods = {}
    for order in kernels:
        name = order.spec.name
        made = stage(order, tmp_path, tmp_path / "dataset")
        methods[name] = made.method
        assert made.proof, name
        # One published file names the wrapper by FlashInfer's top level.
        differ = [d.field for d in differences(made.definition, PUBLISHED[name])]
        assert differ in ([], ["tags.fi_api"]), name
        assert "model:qwen3-30b-a3b" in made.definition["tags"]
    templated = {name for name, method in methods.items() if method == "trace_template"}
    assert templated == {
        "fused_add_rmsnorm_h2048",
        "rmsnorm_h2048",
        "rmsnorm_h128",
        "gqa_paged_decode_h32_kv4_d128_ps1",
        "gqa_paged_decode_h32_kv4_d128_ps64",
        "gqa_paged_prefill_causal_h32_kv4_d128_ps1",
        "gqa_paged_prefill_causal_h32_kv4_d128_ps64",
        "gqa_ragged_prefill_causal_h32_kv4_d128",
        "top_k_sampling_from_probs_v151936",
        "top_p_sampling_from_probs_v151936",
        "top_k_top_p_sampling_from_probs_v151936",
    }
    tests = sorted((tmp_path / "dataset" / "tests" / "references").iterdir())
    assert [path.name for path in tests] == sorted(f"test_{o.spec.name}.py" for o in kernels)


@pytest.mark.bench_extra
def test_one_bad_kernel_does_not_stop_the_others(tmp_path: Path) -> None:
    good, other = orders("Qwen--Qwen3-30B-A3B")[:2]
    bad = Order(spec=other.spec.model_copy(update={"axes": {"N": -1, "K": 2048}}))
    draft_definitions([good, bad], "m", tmp_path)
    stage(good, tmp_path, tmp_path / "dataset")
    with pytest.raises(DefinitionError, match="axes.N: const value -1"):
        stage(bad, tmp_path, tmp_path / "dataset")
    assert len(list((tmp_path / "dataset").rglob("*.json"))) == 1


def test_a_child_that_fails_is_every_kernels_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(draft, "_MEMORY_GB", 0.001)
    kernels = orders("Qwen--Qwen3-30B-A3B")[:2]
    draft_definitions(kernels, "m", tmp_path)
    for order in kernels:
        with pytest.raises(DefinitionError, match="drafting: the child process"):
            stage(order, tmp_path, tmp_path / "dataset")


def test_a_draft_of_an_earlier_run_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (order,) = orders("Qwen--Qwen3-30B-A3B")[:1]
    (tmp_path / f"{order.spec.name}.json").write_text("{}")
    monkeypatch.setattr(draft, "_MEMORY_GB", 0.001)
    draft_definitions([order], "m", tmp_path)
    with pytest.raises(DefinitionError, match="drafting: the child process"):
        read_draft(tmp_path, order.spec.name)


@pytest.mark.bench_extra
def test_a_wrong_reference_does_not_pass_its_proof(tmp_path: Path) -> None:
    (spec,) = (s for s in specs("Qwen--Qwen3-30B-A3B").values() if s.name == "rmsnorm_h2048")
    definition = {**PUBLISHED["rmsnorm_h2048"]}
    definition["reference"] = definition["reference"].replace("+ EPS", "")
    test = render(spec)
    code = (
        "import json, sys\n"
        "from tasks.define import proof\n"
        "from tasks.errors import DefinitionError\n"
        "definition, test = json.load(open(sys.argv[1]))\n"
        "try:\n    print(proof.prove(definition, test, proof.jail.Limits()))\n"
        "except DefinitionError as error:\n    print(error); raise SystemExit(1)\n"
    )
    asked = tmp_path / "asked.json"
    asked.write_text(json.dumps([definition, test]))
    outcome = sandbox.run_python(["-c", code, str(asked)], timeout=120, memory_gb=64, cwd=tmp_path)
    assert "proof: one row" in outcome.reason
    assert "not close" in outcome.reason


def test_model_with_another_epsilon_does_not_take_the_template() -> None:
    spec = specs("MiniMaxAI--MiniMax-M1-80k")["rmsnorm_h6144"]
    module = ops.op_module("rmsnorm")
    assert module.template_call(spec) is None
    assert "EPS = 1e-05" in module.definition(spec)["reference"]


def test_staging_without_a_draft_or_outside_the_dataset(tmp_path: Path) -> None:
    with pytest.raises(DefinitionError, match="has no draft"):
        stage_definition("rmsnorm_h1", "rmsnorm", tmp_path, tmp_path / "dataset")
    (tmp_path / "evil.json").write_text(json.dumps({"definition": {}}))
    with pytest.raises(InputError, match="not a valid name"):
        stage_definition("../../evil", "rmsnorm", tmp_path, tmp_path / "dataset")


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
    name = "rmsnorm_h2048"
    for slug in ("one", "two", "one"):
        tags = ["status:verified", f"model:{slug}"]
        drafted = {
            "definition": {"name": name, "tags": tags},
            "method": "op_module",
            "notes": [],
            "test": "",
            "proof": [],
            "versions": {},
        }
        drafts = tmp_path / slug
        drafts.mkdir(exist_ok=True)
        (drafts / f"{name}.json").write_text(json.dumps(drafted))
        staged = stage_definition(name, "rmsnorm", drafts, tmp_path / "dataset")
    assert staged.definition["tags"] == ["status:verified", "model:one", "model:two"]


def test_only_the_models_of_what_is_staged_are_kept(tmp_path: Path) -> None:
    (drafts := tmp_path / "drafts").mkdir()
    drafted = {
        "definition": {"name": "x", "tags": ["fi_api:new", "status:verified", "model:two"]},
        "method": "op_module",
        "notes": [],
        "test": "",
        "proof": [],
        "versions": {},
    }
    (drafts / "x.json").write_text(json.dumps(drafted))
    staged = tmp_path / "dataset" / "definitions" / "gemm" / "x.json"
    staged.parent.mkdir(parents=True)
    old = ["fi_api:old", "status:unverified", "model:one", "tp:2"]
    staged.write_text(json.dumps({"tags": old}))
    made = stage_definition("x", "gemm", drafts, tmp_path / "dataset")
    assert made.definition["tags"] == [
        *("fi_api:new", "status:verified", "model:two"),
        *("model:one", "tp:2"),
    ]
    staged.write_text(json.dumps({"tags": "none"}))
    with pytest.raises(DefinitionError, match="x.json: field tags"):
        stage_definition("x", "gemm", drafts, tmp_path / "dataset")


def inventory_json(**changes: Any) -> dict[str, Any]:
    kernel = {
        "definition_name": "rmsnorm_h2048",
        "op_type": "rmsnorm",
        "phase1_status": None,
        "spec": specs("Qwen--Qwen3-30B-A3B")["rmsnorm_h2048"].model_dump(mode="json"),
    }
    return {"model_slug": "m", "kernels": [kernel], **changes}


def test_kernels_of_an_inventory() -> None:
    slug, (entry,) = phase.kernels_of_inventory(inventory_json(), "i.json", DATA)
    assert slug == "m"
    assert entry.phase1_status == "new"
    # A dataset that has it already is not written over.
    found = phase.kernels_of_inventory(inventory_json(), "i.json", DATA / "mini-trace")
    assert found == ("m", [])
    existing = {**inventory_json()["kernels"][0], "phase1_status": "existing"}
    assert phase.kernels_of_inventory(inventory_json(kernels=[existing]), "i.json", DATA) == (
        "m",
        [],
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_slug": None}, "i.json: field model_slug"),
        ({"kernels": {}}, "i.json: field kernels"),
        ({"kernels": [{}]}, "i.json: field kernels.0.spec"),
        (
            {"kernels": [{"definition_name": "../x", "op_type": "gemm", "spec": {}}]},
            "i.json: field kernels.0",
        ),
    ],
)
def test_what_is_no_inventory_names_its_field(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        phase.kernels_of_inventory(inventory_json(**changes), "i.json", DATA)
    assert str(caught.value).startswith(message)


def test_only_names_that_are_there_can_be_chosen() -> None:
    entries = [
        KernelEntry(definition_name=name, op_type="gemm", phase1_status="new") for name in "abc"
    ]
    assert phase.chosen(entries, ["b"], "x") == entries[1:2]
    assert phase.chosen(entries, [], "x") == entries
    with pytest.raises(InputError, match="--only: d is not among the 3 kernels"):
        phase.chosen(entries, ["a", "d"], "x")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "rmsnorm_h1024"}, "field spec.name: 'rmsnorm_h1024', expected 'rmsnorm_h2048'"),
        ({"op_type": "gemm"}, "field spec.op_type: 'gemm', expected 'rmsnorm'"),
        ({"axes": {"hidden_size": 7}}, "not the name of a kernel of op type 'rmsnorm' with"),
        ({"axes": {}}, "not the name of a kernel of op type 'rmsnorm' with"),
        ({"axes": {"hidden_size": "wide"}}, "field spec.axes.hidden_size: Input should be"),
        ({"more": 1}, "field spec.more: Extra inputs are not permitted"),
    ],
)
def test_a_spec_that_is_another_kernels_names_its_field(
    changes: dict[str, Any], message: str
) -> None:
    spec = {**specs("Qwen--Qwen3-30B-A3B")["rmsnorm_h2048"].model_dump(mode="json"), **changes}
    entry = KernelEntry(
        definition_name="rmsnorm_h2048", op_type="rmsnorm", phase1_status="new", spec=spec
    )
    with pytest.raises(DefinitionError) as caught:
        order_of(entry)
    assert message in str(caught.value)


@pytest.mark.parametrize("config", ["Qwen--Qwen3-30B-A3B", "deepseek-ai--DeepSeek-V3.2"])
def test_every_kernel_of_a_model_has_the_name_of_its_axes(config: str) -> None:
    for spec in specs(config, tp=8, ep=8).values():
        ops.op_module(spec.op_type).check_name(spec)


def test_nothing_is_staged_through_a_link_out_of_the_dataset(tmp_path: Path) -> None:
    drafted = {
        "definition": {"name": "x", "tags": []},
        "method": "op_module",
        "notes": [],
        "test": "",
        "proof": [],
        "versions": {},
    }
    (tmp_path / "x.json").write_text(json.dumps(drafted))
    for folder in ("dataset", "outside"):
        (tmp_path / folder).mkdir()
    (tmp_path / "dataset" / "definitions").symlink_to(tmp_path / "outside")
    with pytest.raises(InputError, match="leads out of"):
        stage_definition("x", "gemm", tmp_path, tmp_path / "dataset")
    assert not list((tmp_path / "outside").iterdir())


def test_a_kernel_of_a_known_op_type_without_its_spec_is_an_error(tmp_path: Path) -> None:
    entry = KernelEntry(definition_name="gemm_n1_k1", op_type="gemm", phase1_status="new")
    (result,) = phase.draft_all([entry], "m", tmp_path)
    assert result.state == "failed"
    assert "the manifest has no `spec`; run phase 1 again" in result.error


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def wait_for_ever() -> None:
    signal.pause()


@pytest.mark.parametrize(
    ("target", "deadline", "message"),
    [
        (die, float("inf"), "its process ended (killed by SIGKILL"),
        (wait_for_ever, 0.0, "took too long"),
    ],
)
def test_a_fork_that_dies_or_hangs_is_its_kernels_error(
    target: Callable[[], None], deadline: float, message: str, tmp_path: Path
) -> None:
    process = multiprocessing.get_context("fork").Process(target=target)
    process.start()
    fork = child.Fork(process, tmp_path / "x.json", deadline)
    while not fork.ended():
        process.join(1)
    assert message in json.loads((tmp_path / "x.json").read_text())["error"]
    assert not process.is_alive()
