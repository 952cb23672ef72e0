"""Model configs: real ones with known answers, and wrong ones."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.errors import ConfigError
from tasks.model import Fields, ModelConfig, parse_config, read_config, weight_bytes
from tests.conftest import DATA

QWEN = json.loads((DATA / "configs" / "Qwen--Qwen3-30B-A3B.json").read_text())


@pytest.mark.parametrize(
    ("name", "billions"),
    # Parameters as their publishers state them, in billions.
    [
        ("Qwen--Qwen3-30B-A3B", 30.5),
        ("MiniMaxAI--MiniMax-M1-80k", 456),
        ("meta-llama--Meta-Llama-3.1-8B", 8.03),
        ("mistralai--Mixtral-8x7B-v0.1", 46.7),
        ("Qwen--Qwen3-32B", 32.8),
    ],
)
def test_weights_are_estimated_within_three_per_cent(name: str, billions: float) -> None:
    model = read_config(DATA / "configs" / f"{name}.json")
    assert weight_bytes(model) / 2e9 == pytest.approx(billions, rel=0.03)


NEMOTRON = "nvidia--NVIDIA-Nemotron-3-Super-120B-A12B-FP8"


@pytest.mark.parametrize(
    ("name", "method", "width", "attention", "gigabytes"),
    # Parameters as published, in billions, times the bytes of one with its share of the scales.
    [
        ("deepseek-ai--DeepSeek-V3", "fp8", "fp8", True, 671),
        ("Qwen--Qwen3-30B-A3B-FP8", "fp8", "fp8", True, 31),
        # A trillion experts' weights of 4 bits and a 16-bit scale for 32 of them; the rest bf16.
        ("moonshotai--Kimi-K2.5", "compressed-tensors", "int4", False, 594),
        # The published checkpoint has 13.8 GB.
        ("openai--gpt-oss-20b", "mxfp4", "fp4", False, 13.8),
        (NEMOTRON, "modelopt", "fp8", True, 120),
    ],
)
def test_quantisation_counts(
    name: str, method: str, width: str, attention: bool, gigabytes: float
) -> None:
    raw = json.loads((DATA / "configs" / f"{name}.json").read_text())
    beside = DATA / "hf_quant" / f"{name}.hf_quant_config.json"
    quantisation = Fields("x", json.loads(beside.read_text())) if beside.exists() else None
    found = parse_config(raw, name, quantisation)
    assert found.quantization is not None
    assert found.quantization.method == method
    assert (found.quantization.width, found.quantization.attention) == (width, attention)
    assert weight_bytes(found) / 1e9 == pytest.approx(gigabytes, rel=0.06)


@pytest.mark.parametrize(
    ("config", "width"),
    [
        ({"quant_method": "awq", "bits": 4}, "int4"),
        ({"quant_method": "gptq", "bits": 8}, "int8"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "int4"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "int8"),
        ({"quant_method": "fbgemm_fp8"}, "fp8"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "fp4"),
        ({"quant_algo": "FP8", "kv_cache_scheme": "fp8"}, "fp8"),
        ({"quant_method": "modelopt", "quant_algo": "W4A16_AWQ"}, "int4"),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {"group_0": {"weights": {"num_bits": 8, "type": "float"}}},
            },
            "fp8",
        ),
        (
            {
                "quant_method": "compressed-tensors",
                "format": "nvfp4-pack-quantized",
                "config_groups": {"group_0": {"weights": {"num_bits": 4, "type": "float"}}},
            },
            "fp4",
        ),
        ({}, None),
        ({"quant_method": "bitsandbytes", "load_in_4bit": False, "load_in_8bit": False}, None),
    ],
)
def test_widths_of_quantisation_methods(config: dict[str, Any], width: str | None) -> None:
    found = parse_config(QWEN | {"quantization_config": config}, "config.json").quantization
    assert (found.width if found else None) == width


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("fp8", "field quantization_config: not an object"),
        ({"quant_method": 8}, "field quantization_config.quant_method: 8 is not a string"),
        (
            {"quant_method": "awq", "bits": "4"},
            "field quantization_config.bits: '4' is not an integer",
        ),
    ],
)
def test_quantisation_is_not_guessed(config: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(QWEN | {"quantization_config": config}, "config.json")
    assert message in str(caught.value)


@pytest.mark.parametrize("kind", ["directory", "pipe", "device"])
def test_only_regular_files_are_read(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "config.json"
    if kind == "directory":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")
    with pytest.raises(ConfigError, match="is not a regular file"):
        read_config(path)


def test_quantisation_beside_a_config_json_counts(tmp_path: Path) -> None:
    (tmp_path / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "NVFP4"}}')
    for name, width in (("config.json", "fp4"), ("another.json", None)):
        (tmp_path / name).write_text(json.dumps(QWEN))
        found = read_config(tmp_path / name).quantization
        assert (found.width if found else None) == width


def test_width_that_is_not_known_is_an_error_only_where_it_is_needed() -> None:
    model = parse_config(QWEN | {"quantization_config": {"quant_method": "novel"}}, "config.json")
    assert model.quantization is not None
    assert model.quantization.width is None
    with pytest.raises(ConfigError, match="'novel' does not say how wide.*--tp-list"):
        weight_bytes(model)


@pytest.mark.parametrize(
    "config",
    [
        {"quant_method": "modelopt", "quant_algo": None, "kv_cache_quant_algo": "FP8"},
        {"quant_method": "compressed-tensors", "config_groups": {}, "kv_cache_scheme": {}},
    ],
)
def test_a_quantised_cache_alone_leaves_the_weights(config: dict[str, Any]) -> None:
    assert parse_config(QWEN | {"quantization_config": config}, "config.json").quantization is None


LAYERS = {"num_hidden_layers": 4, "architectures": ["Qwen3NextForCausalLM"]}


@pytest.mark.parametrize(
    ("fields", "mixers"),
    [
        (
            {"layer_types": ["full_attention", "sliding_attention"] * 2},
            {"full_attention": 2, "sliding_attention": 2},
        ),
        ({"sliding_window_pattern": 2}, {"sliding_attention": 2, "full_attention": 2}),
        ({"sliding_window_pattern": "LLG"}, {"sliding_attention": 3, "full_attention": 1}),
        ({"hybrid_layer_pattern": [0, 1, 1, 0]}, {"full_attention": 2, "sliding_attention": 2}),
        ({"full_attention_interval": 4}, {"linear_attention": 3, "full_attention": 1}),
        ({"hybrid_override_pattern": "M-*E"}, {"mamba": 1, "full_attention": 1}),
        ({"attn_layer_period": 4, "attn_layer_offset": 1}, {"mamba": 3, "full_attention": 1}),
        ({"linear_attn_config": {"kda_layers": [1, 2, 3]}}, {"kda": 3, "full_attention": 1}),
        ({"full_attn_idxs": [2]}, {"conv": 3, "full_attention": 1}),
        ({"layer_group_size": 3}, {"linear_attention": 2, "full_attention": 2}),
        ({"model_type": "falcon_h1"}, {"mamba": 4, "full_attention": 4}),
        ({"model_type": "mamba2"}, {"mamba": 4}),
        (
            {"layer_types": ["novel", "novel", "full_attention", "novel"]},
            {"novel": 3, "full_attention": 1},
        ),
        ({"layer_types": ["full_attention"] * 6}, {"full_attention": 4}),
    ],
)
def test_layer_patterns(fields: dict[str, Any], mixers: dict[str, int]) -> None:
    assert parse_config(QWEN | LAYERS | fields, "config.json").mixers == mixers


@pytest.mark.parametrize(
    ("fields", "layers"),
    [
        ({"moe_layer_freq": [0, 1, 1, 1]}, 3),
        ({"moe_layer_freq": 2}, 2),
        ({"mlp_layer_types": ["dense", "sparse", "sparse", "sparse"]}, 3),
        ({"first_k_dense_replace": 1}, 3),
        ({"decoder_sparse_step": 2, "mlp_only_layers": [3]}, 1),
        ({"interleave_moe_layer_step": 2, "decoder_sparse_step": None}, 2),
        ({"moe_layers_enum": "1,2"}, 2),
        ({"expert_layer_period": 2, "expert_layer_offset": 1}, 2),
        ({"moe_layer_start_index": 1, "moe_layer_end_index": 2}, 2),
        ({"num_experts": 0}, 0),
        ({"num_experts": None}, 0),
        ({"hybrid_override_pattern": "M-*E"}, 1),
    ],
)
def test_layers_with_experts(fields: dict[str, Any], layers: int) -> None:
    assert parse_config(QWEN | LAYERS | fields, "config.json").moe_layers == layers


def test_deepseek_v3_is_fp8_mla_with_grouped_routing() -> None:
    model = read_config(DATA / "configs" / "deepseek-ai--DeepSeek-V3.json")
    assert (model.is_mla, model.moe_layers) == (True, 58)
    assert model.quantization is not None
    assert (model.quantization.method, model.quantization.width) == ("fp8", "fp8")
    assert model.moe is not None
    assert (model.moe.num_groups, model.moe.topk_group) == (8, 4)


def test_minimax_m1_has_70_linear_layers() -> None:
    model = read_config(DATA / "configs" / "MiniMaxAI--MiniMax-M1-80k.json")
    assert model.mixers == {"linear_attention": 70, "full_attention": 10}


def test_text_config_is_used_where_nested() -> None:
    nested = {"architectures": ["X"], "text_config": QWEN}
    assert parse_config(nested, "x").hidden_size == 2048


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": None}, "config.json: field hidden_size: missing"),
        ({"hidden_size": "2048"}, "field hidden_size: '2048' is not an integer"),
        ({"hidden_size": 0}, "field hidden_size: 0 is not between 1 and"),
        ({"num_attention_heads": -32}, "field num_attention_heads: -32 is not"),
        ({"vocab_size": 1.5}, "field vocab_size: 1.5 is not an integer"),
        ({"vocab_size": True}, "field vocab_size: True is not an integer"),
        ({"vocab_size": 10**12}, "field vocab_size: 1000000000000 is not between"),
        ({"num_key_value_heads": 5}, "field num_key_value_heads: 5 does not divide"),
        ({"head_dim": None, "hidden_size": 2047}, "field head_dim: missing, and hidden_size 2047"),
        ({"rms_norm_eps": float("inf")}, "field rms_norm_eps: inf is not a positive"),
        ({"num_experts_per_tok": 999}, "field num_experts_per_tok: 999 exceeds the 128 experts"),
        ({"n_group": 7, "topk_group": 4}, "field n_group: 7 does not divide 128 experts"),
        ({"n_group": 8}, "field topk_group: missing although n_group is 8"),
        ({"n_group": 8, "topk_group": 9}, "field topk_group: 9 exceeds n_group 8"),
        ({"n_group": 64, "topk_group": 2}, "field num_experts_per_tok: 8 exceeds the experts of 2"),
        ({"architectures": ["A\nB"]}, "field architectures: 'A\\nB' is no class name"),
        ({"architectures": []}, "field architectures: not a non-empty list"),
        ({"architectures": None, "model_type": None}, "field architectures: missing"),
        ({"architectures": [1]}, "field architectures: 1 is not a string"),
        ({"text_config": [1]}, "field text_config: not an object"),
        ({"attn_type_list": [0, 1]}, "field attn_type_list: not a list of 48"),
    ],
)
def test_wrong_field_is_named_with_its_value(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(QWEN | change, "config.json")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "is not JSON"),
        (b"[]", "a JSON list, expected an object"),
        (b"\xff", "not UTF-8"),
        (b" " * (5 << 20), "too large"),
    ],
)
def test_file_that_is_no_config(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        read_config(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)


@given(st.dictionaries(st.sampled_from(sorted(QWEN)), JSON, max_size=4))
def test_any_json_gives_a_model_or_a_typed_error(change: dict[str, Any]) -> None:
    try:
        assert isinstance(parse_config(QWEN | change, "config.json"), ModelConfig)
    except ConfigError as error:
        assert "config.json: field " in str(error)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_key_value_heads": None}, "field num_key_value_heads: null"),
        ({"mlp_only_layers": 5}, "field mlp_only_layers: 5 is not a list"),
        ({"decoder_sparse_step": "x"}, "field decoder_sparse_step: 'x' is not an integer"),
        ({"first_k_dense_replace": "3"}, "field first_k_dense_replace: '3' is not"),
    ],
)
def test_layer_patterns_are_not_guessed(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(QWEN | change, "config.json")
    assert message in str(caught.value)
