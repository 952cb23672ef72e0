"""Names and axes against everything that is published about models whose config is at hand."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from itertools import product
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.coverage_doc import CoverageDocument
from tasks.discover.inventory import requirements
from tasks.discover.phase import Inventory, take
from tasks.errors import ConfigError
from tasks.model import Serving, parse_config, read_config
from tests.conftest import DATA

CONFIG_OF_TAG = {
    "deepseek-v3": "deepseek-ai--DeepSeek-V3",
    "deepseek-r1": "deepseek-ai--DeepSeek-V3",
    "deepseek-v3.2": "deepseek-ai--DeepSeek-V3.2",
    "gemma-3-27b": "google--gemma-3-27b-it",
    "kimi-k2": "moonshotai--Kimi-K2.5",
    "llama-3.1-8b": "meta-llama--Meta-Llama-3.1-8B",
    "llama-3.1-70b": "meta-llama--Meta-Llama-3.1-70B",
    "llama-3.3-70b": "meta-llama--Meta-Llama-3.1-70B",
    "llama-3.1-405b": "meta-llama--Meta-Llama-3.1-405B",
    "llama-4-maverick": "meta-llama--Llama-4-Maverick-17B-128E-Instruct",
    "llama-4-scout": "meta-llama--Llama-4-Scout-17B-16E-Instruct",
    "llama-4-scout-17b-16e": "meta-llama--Llama-4-Scout-17B-16E-Instruct",
    "minimax-m2": "MiniMaxAI--MiniMax-M2.5",
    "mixtral-8x22b": "mistralai--Mixtral-8x22B-v0.1",
    "qwen3-8b": "Qwen--Qwen3-8B",
    "qwen3-14b": "Qwen--Qwen3-14B",
    "qwen3-30b-a3b": "Qwen--Qwen3-30B-A3B",
    "qwen3-32b": "Qwen--Qwen3-32B",
    "qwen3-235b": "nvidia--Qwen3-235B-A22B-NVFP4",
    "qwen3-235b-a22b": "nvidia--Qwen3-235B-A22B-NVFP4",
    "qwen3-next": "Qwen--Qwen3-Next-80B-A3B-Instruct",
    "qwen3-next-80b-a3b": "Qwen--Qwen3-Next-80B-A3B-Instruct",
}
"""Where model tags of published definitions have their dimensions; siblings of the same shape."""

CONFIG_OF_HEADING = {
    "DeepSeek V3 / R1": "deepseek-ai--DeepSeek-V3",
    "DeepSeek V3.2": "deepseek-ai--DeepSeek-V3.2",
    "Gemma 3 27B": "google--gemma-3-27b-it",
    "Kimi K2": "moonshotai--Kimi-K2.5",
    "Llama 3.1 8B": "meta-llama--Meta-Llama-3.1-8B",
    "Llama 3.1 / 3.3 70B": "meta-llama--Meta-Llama-3.1-70B",
    "Llama 3.1 405B": "meta-llama--Meta-Llama-3.1-405B",
    "Llama 4 Maverick 17B-128E": "meta-llama--Llama-4-Maverick-17B-128E-Instruct",
    "Llama 4 Scout 17B-16E": "meta-llama--Llama-4-Scout-17B-16E-Instruct",
    "MiniMax M2": "MiniMaxAI--MiniMax-M2.5",
    "MiniMax-Text-01": "MiniMaxAI--MiniMax-M1-80k",
    "Mistral 7B v0.3": "mistralai--Mistral-7B-Instruct-v0.3",
    "Mistral Nemo 12B": "mistralai--Mistral-Nemo-Instruct-2407",
    "Mixtral 8x7B": "mistralai--Mixtral-8x7B-v0.1",
    "Mixtral 8x22B": "mistralai--Mixtral-8x22B-v0.1",
    "Qwen3 8B": "Qwen--Qwen3-8B",
    "Qwen3 14B": "Qwen--Qwen3-14B",
    "Qwen3 30B A3B": "Qwen--Qwen3-30B-A3B",
    "Qwen3 32B": "Qwen--Qwen3-32B",
    "Qwen3 235B A22B": "nvidia--Qwen3-235B-A22B-NVFP4",
    "Qwen3 Next 80B A3B": "Qwen--Qwen3-Next-80B-A3B-Instruct",
}

_FILTERS = ("top_k", "top_k_top_p", "top_p")
WRONG_ROWS = {
    *(("Kimi K2", f"{kind}_sampling_from_probs_v160000") for kind in _FILTERS),
    *(("Mistral 7B v0.3", f"{kind}_sampling_from_probs_v32000") for kind in _FILTERS),
    *(("Mixtral 8x22B", f"{kind}_sampling_from_probs_v32768") for kind in _FILTERS),
    ("Mistral Nemo 12B", "gemm_n28872_k5120"),
    ("Mistral Nemo 12B", "gemm_n5120_k14436"),
    ("Qwen3 8B", "gemm_n44032_k4096"),
    ("Qwen3 8B", "gemm_n4096_k22016"),
}
"""Rows that contradict the model's own config: the vocabularies are 163840 (Kimi K2), 32768
(Mistral 7B v0.3) and 32000 (Mixtral 8x22B), Nemo's width is 14336, Qwen3 8B's 12288."""

PUBLISHED = {
    path.stem: json.loads(path.read_text())
    for path in sorted((DATA / "mini-trace" / "definitions").rglob("*.json"))
}
COVERAGE = CoverageDocument.parse(
    (DATA / "flashinfer-bench" / "docs" / "model_coverage.mdx").read_text()
)
DEGREES = (1, 2, 4, 8)


@cache
def inventory(
    config: str, tps: tuple[int, ...] = DEGREES, eps: tuple[int, ...] = DEGREES
) -> Inventory:
    model = read_config(DATA / "configs" / f"{config}.json")
    return take(model, [Serving(tp=tp, ep=ep, origin="test") for tp, ep in product(tps, eps)])


@cache
def axes_by_name(config: str) -> dict[str, dict[str, int]]:
    found = inventory(config).as_json("test", None)["kernels"]
    return {kernel["definition_name"]: kernel["axes"] for kernel in found}


def pairs() -> Iterator[tuple[str, str]]:
    for name, definition in PUBLISHED.items():
        for tag in definition["tags"]:
            model = tag.removeprefix("model:")
            if tag.startswith("model:") and model in CONFIG_OF_TAG:
                yield model, name


def test_every_published_pair_is_produced_with_its_const_axes() -> None:
    checked, missing = 0, []
    for model, name in pairs():
        checked += 1
        axes = PUBLISHED[name]["axes"].items()
        constants = {key: axis["value"] for key, axis in axes if axis["type"] == "const"}
        made = axes_by_name(CONFIG_OF_TAG[model]).get(name, {})
        if {key: made.get(key) for key in constants} != constants:
            missing.append((model, name, made, constants))
    print(f"pairs covered: {checked - len(missing)} / {checked}")
    assert not missing
    # 199 pairs in all; the others are of models whose config is not here.
    assert checked == 176


def test_every_documented_row_is_produced() -> None:
    missing, checked = [], 0
    for heading, config in CONFIG_OF_HEADING.items():
        for name in COVERAGE.statuses(heading):
            if " " in name or "?" in name or "{" in name or (heading, name) in WRONG_ROWS:
                continue
            checked += 1
            if name not in axes_by_name(config):
                missing.append((heading, name))
    print(f"rows covered: {checked - len(missing)} / {checked}")
    assert not missing
    assert checked == 269


@pytest.mark.parametrize(
    ("config", "heading"),
    [
        ("meta-llama--Meta-Llama-3.1-8B", "Llama 3.1 8B"),
        ("Qwen--Qwen3-30B-A3B", "Qwen3 30B A3B"),
    ],
)
def test_at_tp_1_nothing_but_the_documented_rows_is_produced(config: str, heading: str) -> None:
    found = inventory(config, (1,), (1,))
    documented = {name for name in COVERAGE.statuses(heading) if " " not in name}
    assert {kernel.spec.name for kernel in found.kernels} == documented
    assert (found.rejected, found.unmapped) == ([], [])


def names(config: str, tp: int = 1, ep: int = 1) -> set[str]:
    return {kernel.spec.name for kernel in inventory(config, (tp,), (ep,)).kernels}


@pytest.mark.parametrize(
    ("config", "tp", "ep", "reason"),
    [
        ("Qwen--Qwen3-30B-A3B", 7, 5, "tp=7 does not divide 32 query and 4 KV heads"),
        ("Qwen--Qwen3-30B-A3B", 7, 5, "ep=5 does not divide 128 experts"),
        ("Qwen--Qwen3-14B", 16, 1, "tp=16 does not divide 40 query and 8 KV heads"),
        ("deepseek-ai--DeepSeek-V3", 3, 1, "tp=3"),
        ("nvidia--NVIDIA-Nemotron-3-Nano-30B-A3B-BF16", 3, 1, "tp=3"),
        ("Qwen--Qwen3-Next-80B-A3B-Instruct", 3, 1, "tp=3"),
        ("Qwen--Qwen3-Next-80B-A3B-Instruct", 1, 64, "8 experts of a rank are fewer than top_k=10"),
    ],
)
def test_impossible_combinations_are_listed_with_their_reason(
    config: str, tp: int, ep: int, reason: str
) -> None:
    rejected = inventory(config, (tp,), (ep,)).rejected
    assert any(reason in item.reason for item in rejected), rejected


def test_kv_heads_are_replicated_below_one() -> None:
    assert "gqa_paged_decode_h4_kv1_d128_ps1" in names("Qwen--Qwen3-30B-A3B", tp=8)
    assert "gqa_paged_decode_h8_kv1_d128_ps64" in names("nvidia--Qwen3-235B-A22B-NVFP4", tp=8)


def test_linear_layers_are_listed_whole_and_as_one_rank_has_them() -> None:
    found = names("nvidia--Qwen3-235B-A22B-NVFP4", tp=2)
    # (64 + 2 * 4) heads of 128, o_proj 64 * 128; the published rows have tp 2's halves.
    assert {"gemm_n9216_k4096", "gemm_n4608_k4096"} <= found
    assert {"gemm_n4096_k8192", "gemm_n4096_k4096"} <= found


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        # 128 local experts under tp/ep as published, 512 in all.
        ("Qwen--Qwen3-Next-80B-A3B-Instruct", "moe_fp8_block_scale_renorm_topk10_e512_h2048_i512"),
        ("Qwen--Qwen3-Next-80B-A3B-Instruct", "gdn_prefill_qk16_v32_d128_k_last"),
        ("Qwen--Qwen3.5-35B-A3B", "gdn_decode_qk16_v32_d128_k_last"),
        (
            "MiniMaxAI--MiniMax-M2.5",
            "moe_fp8_block_scale_ds_routing_topk8_ng1_kg1_e256_h3072_i1536",
        ),
        ("deepseek-ai--DeepSeek-V2-Lite-Chat", "moe_fp8_block_scale_default_topk6_e64_h2048_i1408"),
        ("deepseek-ai--DeepSeek-V2-Lite-Chat", "mla_paged_decode_h16_ckv512_kpe64_ps1"),
        ("zai-org--GLM-5-FP8", "dsa_topk_indexer_fp8_h32_d128_topk2048_ps64"),
        ("zai-org--GLM-5-FP8", "dsa_sparse_attention_h64_ckv512_kpe64_topk2048_ps1"),
        ("nvidia--GLM-5.2-NVFP4", "dsa_sparse_attention_h64_ckv512_kpe64_topk2048_ps64"),
        ("nvidia--Nemotron-H-56B-Base-8K", "mamba_ssu_decode_h256_d64_s256_ng8"),
        ("nvidia--NVIDIA-Nemotron-3-Nano-30B-A3B-BF16", "mamba_ssu_decode_h64_d64_s128_ng8"),
        ("nvidia--NVIDIA-Nemotron-3-Ultra-550B-A55B-NVFP4", "mamba_ssu_decode_h256_d64_s128_ng8"),
        ("nvidia--Nemotron-H-56B-Base-8K", "rmsnorm_h8192"),
        ("nvidia--Llama-3_3-Nemotron-Super-49B-v1", "gqa_paged_decode_h64_kv8_d128_ps1"),
        # ffn_mult 1.3125 and 5.25 of 8192: widths 7168 and 28672, gate and up together.
        ("nvidia--Llama-3_3-Nemotron-Super-49B-v1", "gemm_n14336_k8192"),
        ("nvidia--Llama-3_3-Nemotron-Super-49B-v1", "gemm_n57344_k8192"),
        ("google--gemma-4-26B-A4B", "gqa_paged_decode_h16_kv8_d256_ps1"),
        ("google--gemma-4-26B-A4B", "gqa_paged_decode_h16_kv2_d512_ps1"),
        ("openai--gpt-oss-20b", "gqa_paged_decode_h64_kv8_d64_ps1"),
        ("meta-llama--Llama-4-Scout-17B-16E-Instruct", "rmsnorm_h128"),
        ("google--gemma-3-27b-it", "top_k_sampling_from_probs_v262208"),
    ],
)
def test_odd_configs_give_the_right_names(config: str, expected: str) -> None:
    assert expected in names(config)


@pytest.mark.parametrize(
    ("config", "what", "reason"),
    [
        ("moonshotai--Kimi-K3", "kda (69 of 93 layers)", "nobody has mapped"),
        (
            "nvidia--DeepSeek-V4-Flash-NVFP4",
            "full_attention (43 of 43 layers)",
            "nobody has mapped",
        ),
        ("nvidia--DeepSeek-V4-Flash-NVFP4", "mixture of experts (43 of 43", "nobody has mapped"),
        ("XiaomiMiMo--MiMo-V2-Flash", "attention of 39 layers", "keys are 192 and values 128"),
        ("google--gemma-4-26B-A4B", "mixture of experts", "gelu_pytorch_tanh"),
        ("openai--gpt-oss-20b", "mixture of experts", "clamped SwiGLU"),
        ("nvidia--NVIDIA-Nemotron-3-Nano-30B-A3B-BF16", "mixture of experts", "relu2"),
    ],
)
def test_parts_without_a_kernel_are_listed(config: str, what: str, reason: str) -> None:
    unmapped = inventory(config, (1,), (1,)).unmapped
    assert any(item.what.startswith(what) and reason in item.reason for item in unmapped), unmapped


def test_of_an_unknown_class_the_known_parts_are_produced() -> None:
    raw: dict[str, Any] = json.loads((DATA / "configs" / "Qwen--Qwen3-30B-A3B.json").read_text())
    raw |= {"architectures": ["BrandNewForCausalLM"], "model_type": "brand_new"}
    found = requirements(
        parse_config(raw, "config.json"), [Serving(tp=1, ep=1, origin="test")], "models/new.py"
    )
    assert {spec.name for spec in found.kernels} == {
        "rmsnorm_h2048",
        "fused_add_rmsnorm_h2048",
        "gemm_n128_k2048",
        "top_k_sampling_from_probs_v151936",
        "top_p_sampling_from_probs_v151936",
        "top_k_top_p_sampling_from_probs_v151936",
    }
    assert [(item.what, item.sglang_file) for item in found.unmapped] == [
        ("full_attention (48 of 48 layers)", "models/new.py"),
        ("mixture of experts (48 of 48 layers)", "models/new.py"),
    ]


@pytest.mark.parametrize("config", sorted((DATA / "configs").glob("*.json")), ids=lambda p: p.stem)
def test_every_config_gives_norms_gemms_and_sampling(config: Any) -> None:
    found = inventory(config.stem)
    assert {"rmsnorm", "gemm", "sampling"} <= {kernel.spec.op_type for kernel in found.kernels}
    assert len({kernel.spec.name for kernel in found.kernels}) == len(found.kernels)


MOE = {
    "hidden_size": 2048,
    "vocab_size": 1000,
    "num_hidden_layers": 2,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "intermediate_size": 4096,
    "moe_intermediate_size": 1024,
    "num_experts": 64,
    "num_experts_per_tok": 4,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
}


@pytest.mark.parametrize(
    ("architecture", "fields", "experts", "norms"),
    # By SGLang's afmoe.py, exaone_moe.py, grok.py, ernie45_vl.py, olmoe.py and olmo2.py.
    [
        (
            "AfmoeForCausalLM",
            {"model_type": "afmoe", "score_func": "sigmoid", "route_norm": True},
            {"moe_fp8_block_scale_ds_routing_topk4_ng1_kg1_e64_h2048_i1024"},
            {"rmsnorm_h2048", "fused_add_rmsnorm_h2048", "rmsnorm_h128"},
        ),
        (
            "ExaoneMoEForCausalLM",
            {"model_type": "exaone_moe", "norm_topk_prob": True},
            {"moe_fp8_block_scale_ds_routing_topk4_ng1_kg1_e64_h2048_i1024"},
            {"rmsnorm_h2048", "fused_add_rmsnorm_h2048", "rmsnorm_h128"},
        ),
        ("Grok1ForCausalLM", {}, set(), {"rmsnorm_h2048", "fused_add_rmsnorm_h2048"}),
        (
            "Ernie4_5_VLMoeForConditionalGeneration",
            {
                "model_type": "ernie4_5_moe_vl",
                "vision_config": {},
                "moe_num_experts": [64, 64],
                "num_experts": None,
                "moe_intermediate_size": [1024, 512],
                "moe_layer_start_index": [1, 1],
                "moe_layer_end_index": [1, 0],
            },
            set(),
            {"rmsnorm_h2048", "fused_add_rmsnorm_h2048"},
        ),
        (
            "OlmoeForCausalLM",
            {"model_type": "olmoe", "norm_topk_prob": False},
            {
                "moe_fp8_block_scale_default_topk4_e64_h2048_i1024",
                "trtllm_fp4_block_scale_routed_moe_topk4_e64_h2048_i1024",
            },
            {"rmsnorm_h2048", "fused_add_rmsnorm_h2048", "rmsnorm_h512"},
        ),
        (
            "Olmo2ForCausalLM",
            {"model_type": "olmo2", "num_experts": None},
            set(),
            {"rmsnorm_h2048", "rmsnorm_h512"},
        ),
    ],
)
def test_routers_and_norms_that_no_field_says(
    architecture: str, fields: dict[str, Any], experts: set[str], norms: set[str]
) -> None:
    model = parse_config({"architectures": [architecture], **MOE, **fields}, "config.json")
    found = take(model, [Serving(tp=1, ep=1, origin="test")]).kernels
    by_op_type = {op: {k.spec.name for k in found if k.spec.op_type == op} for op in OPS}
    assert by_op_type["moe"] == experts
    assert by_op_type["rmsnorm"] == norms
    assert "gqa_paged_decode_h16_kv4_d128_ps1" in by_op_type["gqa_paged"]


OPS = ("moe", "rmsnorm", "gqa_paged")


def test_kernels_that_see_one_rank_need_enough_experts_there() -> None:
    found = inventory("nvidia--GLM-5.2-NVFP4", (1,), (64,))
    experts = {k.spec.name for k in found.kernels if k.spec.op_type == "moe"}
    assert experts == {"moe_fp8_block_scale_ds_routing_topk8_ng1_kg1_e4_h6144_i2048"}
    assert any("4 experts of a rank are fewer than top_k=8" in r.reason for r in found.rejected)


WILD = [json.loads(path.read_text()) for path in sorted((DATA / "configs").glob("*.json"))]
LANGUAGE_PARTS = [config.get("text_config", config) for config in WILD]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 10**6) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)


@given(st.data())
def test_a_damaged_config_gives_an_inventory_or_a_typed_error(data: st.DataObject) -> None:
    part = data.draw(st.sampled_from(LANGUAGE_PARTS))
    architecture = part.get("architectures") or ["Qwen3NextForCausalLM"]
    damage = data.draw(st.dictionaries(st.sampled_from(sorted(part)), JSON, min_size=1, max_size=3))
    lost = data.draw(st.sets(st.sampled_from(sorted(part)), max_size=2))
    raw = {
        k: v for k, v in {"architectures": architecture, **part, **damage}.items() if k not in lost
    }
    servings = [Serving(tp=tp, ep=ep, origin="test") for tp, ep in ((1, 1), (8, 4))]
    try:
        take(parse_config(raw, "config.json"), servings).as_json("test", None)
    except ConfigError as error:
        assert str(error).startswith("config.json: field ")
