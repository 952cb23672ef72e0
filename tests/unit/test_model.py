"""Model configs: real ones with known answers, and wrong ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.errors import ConfigError
from tasks.model import ModelConfig, parse_config, read_config
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
    assert model.weight_bytes() / 2e9 == pytest.approx(billions, rel=0.03)


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
