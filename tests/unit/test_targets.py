"""What is collected for: kernels of a checkpoint's weights, definitions that calls can fit."""

from __future__ import annotations

import copy
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest

from tasks.collect.targets import NoTarget, Target, targets
from tasks.model import Fields, Serving, parse_config
from tasks.ops import op_module, registry
from tasks.ops.base import KernelSpec, NotProduced
from tests.conftest import DATA
from tests.unit.test_ops import PUBLISHED

SEEN = {name for module in registry().values() for api in module.apis for name in api.dumps}


def found(folder: Path, *definitions: dict[str, Any]) -> list[Target | NoTarget]:
    """What of the definitions, put into a dataset, may be collected for."""
    for definition in definitions:
        path = folder / "definitions" / definition["op_type"] / f"{definition['name']}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(definition))
    return list(targets(folder, [], SEEN, None))


def test_rows_know_all_inputs_of_the_published_definitions(tmp_path: Path) -> None:
    refused = [one for one in found(tmp_path, *PUBLISHED.values()) if isinstance(one, NoTarget)]
    # DeepGEMM's, which is no call of FlashInfer.
    assert {one.op_type for one in refused} <= {"dsa_paged"}
    assert all("no FlashInfer call" in one.error for one in refused)


OURS = "rmsnorm_h4096"


@pytest.mark.parametrize(
    ("name", "inputs", "reason"),
    [
        # As FlashInfer's own template has it: optional, and absent in most calls.
        (
            "moe_fp8_block_scale_ds_routing_topk8_ng8_kg4_e32_h7168_i2048",
            {"gemm1_clamp_limit": {"shape": ["num_local_experts"], "dtype": "float32"}},
            "input gemm1_clamp_limit is float32 ['num_local_experts'], calls are checked for none",
        ),
        (
            OURS,
            {"hidden_states": {"shape": ["batch_size", "hidden_size"], "dtype": "float16"}},
            "input hidden_states is float16 ['batch_size', 'hidden_size'], calls are checked for "
            "bfloat16 ['batch_size', 'hidden_size']",
        ),
        (
            OURS,
            {"weight": {"shape": ["hidden_size", "hidden_size"], "dtype": "bfloat16"}},
            "input weight is bfloat16 ['hidden_size', 'hidden_size'], calls are checked for",
        ),
    ],
)
def test_an_input_that_nobody_looks_for_in_calls_is_not_made_up(
    tmp_path: Path, name: str, inputs: dict[str, Any], reason: str
) -> None:
    (fine,) = found(tmp_path, PUBLISHED[name])
    assert isinstance(fine, Target)
    other = copy.deepcopy(PUBLISHED[name])
    other["inputs"] |= inputs
    (refused,) = found(tmp_path, other)
    assert isinstance(refused, NoTarget)
    assert reason in refused.error


# --- FP8 checkpoints -----------------------------------------------------------------------------

BLOCK, TENSOR = "moe_fp8_block_scale_renorm", "trtllm_fp8_per_tensor_scale_moe"
QWEN3 = json.loads((DATA / "configs" / "Qwen--Qwen3-30B-A3B.json").read_text())


def strategy(name: str) -> dict[str, Any]:
    weights = {"num_bits": 8, "type": "float", "strategy": name}
    return {
        "quant_method": "compressed-tensors",
        "config_groups": {"group_0": {"weights": weights}},
    }


def experts(raw: dict[str, Any], beside: Fields | None = None) -> tuple[set[str], dict[str, str]]:
    """The FP8 kernels of a model's experts, and why others are none."""
    model = parse_config(raw, "config.json", beside)
    asked = list(op_module("moe").required(model, Serving(1, 1, "a test", (1,))))
    names = {item.name for item in asked if isinstance(item, KernelSpec) and "fp8" in item.name}
    return names, {item.what: item.reason for item in asked if isinstance(item, NotProduced)}


def kinds(names: Collection[str]) -> set[str]:
    return {kind for kind in (BLOCK, TENSOR) for name in names if name.startswith(kind)}


@pytest.mark.parametrize(
    ("config", "kernels", "scaled"),
    [
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, {BLOCK}, "block"),
        ({"quant_method": "fp8"}, {TENSOR}, "tensor"),
        ({"quant_method": "fp8", "weight_block_size": None}, {TENSOR}, "tensor"),
        ({"quant_method": "modelopt", "quant_algo": "FP8"}, {TENSOR}, "tensor"),
        (strategy("block"), {BLOCK}, "block"),
        (strategy("tensor"), {TENSOR}, "tensor"),
        (strategy("channel"), set(), "channel"),
        ({"quant_method": "fbgemm_fp8"}, set(), "channel"),
    ],
)
def test_fp8_experts_run_the_kernel_of_their_scales(
    config: dict[str, Any], kernels: set[str], scaled: str
) -> None:
    names, reasons = experts({**QWEN3, "quantization_config": config})
    assert kinds(names) == kernels
    apis = {BLOCK: "trtllm_fp8_block_scale_moe", TENSOR: "trtllm_fp8_per_tensor_scale_moe"}
    assert reasons.keys() == {apis[kind] for kind in apis.keys() - kernels}
    assert all(f"the checkpoint has one for each {scaled}" in text for text in reasons.values())


def test_weights_of_16_bits_may_be_quantised_either_way() -> None:
    assert experts(QWEN3) == (experts(QWEN3)[0], {})
    assert kinds(experts(QWEN3)[0]) == {BLOCK, TENSOR}


def test_the_config_beside_says_that_experts_have_one_scale_for_each_matrix() -> None:
    beside = Fields("hf_quant_config.json", {"quantization": {"quant_algo": "FP8"}})
    assert kinds(experts(QWEN3, beside)[0]) == {TENSOR}


def test_a_published_checkpoint_in_blocks_asks_for_no_other_kernel() -> None:
    raw = json.loads((DATA / "configs" / "Qwen--Qwen3-30B-A3B-FP8.json").read_text())
    assert kinds(experts(raw)[0]) == {BLOCK}
