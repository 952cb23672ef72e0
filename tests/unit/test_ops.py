"""Op modules: names and axes against what is published."""

from __future__ import annotations

import json
from copy import deepcopy
from typing import Any

import pytest

from tasks.model import Serving, read_config
from tasks.ops import registry
from tasks.ops.base import KernelSpec
from tests.conftest import DATA

PUBLISHED = {
    path.stem: json.loads(path.read_text())
    for path in sorted((DATA / "mini-trace" / "definitions").rglob("*.json"))
}
LAST_PAGE_LEN_TOO_LONG = {
    f"gqa_paged_prefill_causal_{heads}_d128_ps64"
    for heads in ("h16_kv1", "h16_kv2", "h20_kv4", "h24_kv4", "h24_kv8", "h32_kv16")
}
"""Published with kv_last_page_len of length len_indptr; their siblings, and FlashInfer, have one
per sequence."""
BIAS_LAST = {
    f"trtllm_{kind}_moe_topk1_{experts}_h5120_i8192"
    for kind in ("fp4_block_scale", "fp8_per_tensor_scale")
    for experts in ("e16", "e128")
}
"""Published with routing_bias last among the inputs, where their own `run` takes it second."""
CONFIGS = sorted((DATA / "configs").glob("*.json"))


def specs(config: str, tp: int = 1, ep: int = 1) -> dict[str, KernelSpec]:
    model = read_config(DATA / "configs" / f"{config}.json")
    serving = Serving(tp=tp, ep=ep, origin="test")
    found = (item for op in registry().values() for item in op.required(model, serving))
    return {item.name: item for item in found if isinstance(item, KernelSpec)}


def test_definitions_equal_the_published_ones_of_the_same_name() -> None:
    made = {
        spec.name: spec
        for config in CONFIGS
        for tp, ep in ((1, 1), (2, 2), (2, 4), (4, 1), (8, 1), (8, 8))
        for spec in specs(config.stem, tp, ep).values()
    }
    compared = sorted(set(made) & set(PUBLISHED))
    for name in compared:
        check_equal(made[name], deepcopy(PUBLISHED[name]))
    # The others are of models whose config is not here (Llama 3.2, Qwen2.5 7B, Nemotron-H 8B, ...).
    assert len(compared) == 140


def check_equal(spec: KernelSpec, theirs: Any) -> None:
    ours = registry()[spec.op_type].definition(spec)
    assert theirs["op_type"] == spec.op_type
    constants = [
        {k: v["value"] for k, v in d["axes"].items() if v["type"] == "const"}
        for d in (ours, theirs)
    ]
    if spec.name == "moe_fp8_block_scale_ds_routing_topk8_ng8_kg4_e32_h7168_i2048":
        del constants[0]["top_k"]  # its later siblings have it among the const axes
    assert constants[0] == constants[1], spec.name
    if spec.name in LAST_PAGE_LEN_TOO_LONG:
        theirs["inputs"]["kv_last_page_len"]["shape"] = ["batch_size"]
    for part in ("inputs", "outputs"):
        shapes = [{k: (v["shape"], v["dtype"]) for k, v in d[part].items()} for d in (ours, theirs)]
        assert shapes[0] == shapes[1], spec.name
        if spec.name not in BIAS_LAST:
            assert list(ours[part]) == list(theirs[part]), spec.name


def test_softmax_scale_comes_from_the_config() -> None:
    spec = specs("Qwen--Qwen3-30B-A3B")["gqa_paged_decode_h32_kv4_d128_ps1"]
    assert spec.scalars["sm_scale"].value == pytest.approx(0.0883883476483184, rel=1e-15)
    assert "head_dim = 128" in spec.scalars["sm_scale"].source
