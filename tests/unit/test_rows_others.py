"""Rows of experts, linear attention, state-space layers, sparse attention and rotary embedding.

The calls have the parameter names and the values that FlashInfer's own dumps have of calls as
SGLang makes them. A tensor whose data no row may need cannot be loaded here.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import math
import sys
import types
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.collect.rows import form_of
from tasks.ops import op_module, registry
from tasks.ops.base import DumpError, FlashInferApi, KernelSpec, OpModule, Rejected, Row, Scalar
from tests.unit.test_ops import PUBLISHED

with suppress(ImportError):  # the bench extra: tests marked so are skipped without it
    import torch

BF16, FP8, F32, I32, I64 = "bfloat16", "float8_e4m3fn", "float32", "int32", "int64"


@dataclass
class Tensor:
    """A dumped tensor; without data, one that no row may read."""

    shape: tuple[int, ...]
    dtype: str
    values: np.ndarray | None = None
    loads: int = 0

    def load(self) -> np.ndarray:
        assert self.values is not None, "a row read what it does not need"
        self.loads += 1
        return self.values


@dataclass
class Call:
    name: str
    tensors: dict[str, Tensor]
    values: dict[str, Any]
    id: str = "a call"
    process: str = "a process"
    self_id: int | None = None
    captured: bool = False
    prefill: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)


def shaped(dtype: str, *shape: int) -> Tensor:
    return Tensor(shape, dtype)


def data(values: Any, dtype: Any) -> Tensor:
    array = np.asarray(values).astype(dtype)
    return Tensor(array.shape, array.dtype.name, array)


def changed(call: Call, **arguments: Any) -> Call:
    """The call with other arguments; `...` leaves one out."""
    tensors, values = dict(call.tensors), dict(call.values)
    for name, value in arguments.items():
        tensors.pop(name, None)
        values.pop(name, None)
        if isinstance(value, Tensor):
            tensors[name] = value
        elif value is not ...:
            values[name] = value
    return replace(call, tensors=tensors, values=values)


def spec_of(name: str) -> KernelSpec:
    return op_module(PUBLISHED[name]["op_type"]).spec_of(PUBLISHED[name])


def row_of(spec: KernelSpec, call: Call) -> Row:
    """The only row of the call, which the definition's own rules accept."""
    module = op_module(spec.op_type)
    (row,) = module.rows(spec, [call, replace(call, name="another_api")])
    assert isinstance(row, Row), row
    definition = {"name": spec.name, "op_type": spec.op_type, **module.definition(spec)}
    checked = form_of(definition, spec.name).check(row)
    assert checked.calls == ("a call",)
    (api,) = (api for api in module.apis if call.name in api.dumps)
    assert {name for name, tensor in call.tensors.items() if tensor.loads} <= set(api.reads)
    return row


def reason_of(spec: KernelSpec, call: Call) -> str:
    (rejected,) = op_module(spec.op_type).rows(spec, [call])
    assert isinstance(rejected, Rejected), rejected
    assert rejected.call == "a call"
    assert rejected.reason.startswith(f"{call.name}: ")
    return rejected.reason.removeprefix(f"{call.name}: ")


def implied(call: Call) -> KernelSpec | None:
    """The kernel that the call implies, by the one family that knows it."""
    found = [spec for module in registry().values() if (spec := module.implied(call)) is not None]
    assert len(found) < 2
    return found[0] if found else None


def check_implied(name: str, call: Call) -> None:
    """The call implies the published kernel, and the rows of what it implies are the same."""
    spec, known = implied(call), spec_of(name)
    assert spec is not None
    assert spec.name == name
    module = op_module(spec.op_type)
    own = {"name": spec.name, "op_type": spec.op_type, **module.definition(spec)}
    assert module.spec_of(own).axes == spec.axes
    assert module.definition(known)["inputs"] == module.definition(spec)["inputs"]
    assert row_of(spec, call).axes == row_of(known, call).axes


# --- mixture of experts --------------------------------------------------------------------------

DEEPSEEK = "moe_fp8_block_scale_ds_routing_topk8_ng8_kg4_e32_h7168_i2048"
KIMI = "moe_fp8_block_scale_ds_routing_topk8_ng1_kg1_e48_h7168_i2048"
RENORM = "moe_fp8_block_scale_renorm_topk8_e128_h2048_i768"
FP4 = "trtllm_fp4_block_scale_moe_topk8_e128_h2048_i768"
FP4_LLAMA4 = "trtllm_fp4_block_scale_moe_topk1_e16_h5120_i8192"
FP4_ROUTED = "trtllm_fp4_block_scale_routed_moe_topk8_e128_h2048_i768"
PER_TENSOR = "trtllm_fp8_per_tensor_scale_moe_topk8_e128_h2048_i768"
PER_TENSOR_LLAMA4 = "trtllm_fp8_per_tensor_scale_moe_topk1_e16_h5120_i8192"

RANDOM = np.random.default_rng(3)
LOGITS = RANDOM.standard_normal((3, 512), dtype=np.float32)
BIAS = RANDOM.standard_normal(512).astype(ml_dtypes.bfloat16)


def experts(api: str, sizes: tuple[int, ...], method: int, **arguments: Any) -> Call:
    """A call for three tokens.

    Args:
        api: the function.
        sizes: experts of all ranks and of one, tokens' width, experts' width, experts per token.
        method: FlashInfer's number of the routing.
        arguments: what else is passed.
    """
    total, local, hidden, width, top_k = sizes
    fp4 = "fp4" in api
    weights, packing = ("uint8", 2) if fp4 else (FP8, 1)
    tensors = {
        "hidden_states": shaped(weights, 3, hidden // packing),
        "gemm1_weights": shaped(weights, local, 2 * width, hidden // packing),
        "gemm2_weights": shaped(weights, local, hidden, width // packing),
    }
    if "fp8_block" in api:
        scales = {
            "hidden_states_scale": (hidden // 128, 3),
            "gemm1_weights_scale": (local, 2 * width // 128, hidden // 128),
            "gemm2_weights_scale": (local, hidden // 128, width // 128),
        }
        tensors |= {name: shaped(F32, *shape) for name, shape in scales.items()}
    if "per_tensor" in api:
        names = ("output1_scales_scalar", "output1_scales_gate_scalar", "output2_scales_scalar")
        tensors |= {name: shaped(F32, local) for name in names}
    values = {
        "num_experts": total,
        "top_k": top_k,
        "n_group": None,
        "topk_group": None,
        "intermediate_size": width,
        "local_expert_offset": 0,
        "local_num_experts": local,
        "routed_scaling_factor": 1.0,
        "routing_method_type": method,
        "routing_bias": None,
        "tune_max_num_tokens": 4,
        "activation_type": {"type": "enum", "name": "ActivationType.Swiglu", "value": 3},
    }
    if fp4:
        values |= {"gemm1_bias": None, "gemm1_alpha": None, "gemm2_bias": None}
    return changed(Call(api, tensors, values), **arguments)


def deepseek(**arguments: Any) -> Call:
    call = experts(
        "trtllm_fp8_block_scale_moe",
        (256, 32, 7168, 2048, 8),
        method=2,
        routing_logits=data(LOGITS[:, :256], np.float32),
        routing_bias=data(BIAS[:256], ml_dtypes.bfloat16),
        n_group=8,
        topk_group=4,
        local_expert_offset=96,
        routed_scaling_factor=2.5,
    )
    return changed(call, **arguments)


def qwen3(api: str = "trtllm_fp8_block_scale_moe", **arguments: Any) -> Call:
    call = experts(api, (128, 128, 2048, 768, 8), method=1)
    if api == "trtllm_fp4_block_scale_routed_moe":
        # Experts 0, 9, 18, ..., 63 and 127, each with the weight -0.125.
        ids = np.array([[0, 9, 18, 27, 36, 45, 63, 127]] * 3, dtype=np.int32) << 16 | 0xBE00
        call = changed(call, topk_ids=data(ids, np.int32), routed_scaling_factor=None)
    else:
        logits = data(LOGITS[:, :128], ml_dtypes.bfloat16)
        call = changed(call, routing_logits=logits)
    if "per_tensor" in api:
        call = changed(call, use_routing_scales_on_input=False)
    return changed(call, **arguments)


def llama4(api: str, **arguments: Any) -> Call:
    call = experts(
        api,
        (16, 16, 5120, 8192, 1),
        method=3,
        routing_logits=data(LOGITS[:, :16], ml_dtypes.bfloat16),
        routing_bias=data(BIAS[:16], ml_dtypes.bfloat16),
    )
    if "per_tensor" in api:
        call = changed(call, use_routing_scales_on_input=True)
    return changed(call, **arguments)


def test_deepseek_routing_is_stored_with_its_scalars() -> None:
    row = row_of(spec_of(DEEPSEEK), deepseek())
    assert row.axes == {"seq_len": 3}
    assert set(row.tensors) == {"routing_logits", "routing_bias"}
    assert np.array_equal(row.tensors["routing_logits"], LOGITS[:, :256])
    assert np.array_equal(row.tensors["routing_bias"], BIAS[:256])
    assert {name: scalar.value for name, scalar in row.scalars.items()} == {
        "local_expert_offset": 96,
        "routed_scaling_factor": 2.5,
    }
    assert type(row.scalars["local_expert_offset"].value) is int
    assert row.remake is not None
    assert row.remake().axes == row.axes


@pytest.mark.parametrize(
    ("name", "call"),
    [
        (DEEPSEEK, deepseek()),
        (RENORM, qwen3()),
        (FP4, qwen3("trtllm_fp4_block_scale_moe")),
        # Tokens in bfloat16 are not packed.
        (FP4, qwen3("trtllm_fp4_block_scale_moe", hidden_states=shaped(BF16, 3, 2048))),
        (FP4_ROUTED, qwen3("trtllm_fp4_block_scale_routed_moe")),
        (PER_TENSOR, qwen3("trtllm_fp8_per_tensor_scale_moe")),
        (FP4_LLAMA4, llama4("trtllm_fp4_block_scale_moe")),
        (PER_TENSOR_LLAMA4, llama4("trtllm_fp8_per_tensor_scale_moe")),
        # Softmax, top k and renormalisation are the softmax of the top k.
        (RENORM, qwen3(routing_method_type=4)),
    ],
)
def test_every_precision_and_routing_has_rows(name: str, call: Call) -> None:
    row = row_of(spec_of(name), call)
    assert row.axes == {"seq_len": 3}
    stored = {"topk_ids", "routing_logits", "routing_bias"} & call.tensors.keys()
    assert set(row.tensors) == stored
    for key in stored:
        assert np.array_equal(row.tensors[key], call.tensors[key].load())
    check_implied(name, call)


@pytest.mark.parametrize("groups", [None, 0, 1])
def test_no_group_is_one_group_of_all_experts(groups: int | None) -> None:
    call = experts(
        "trtllm_fp8_block_scale_moe",
        (384, 48, 7168, 2048, 8),
        method=2,
        routing_logits=data(LOGITS[:, :384], np.float32),
        routing_bias=data(BIAS[:384], np.float32),
        n_group=groups,
        topk_group=groups,
    )
    check_implied(KIMI, call)


def test_logits_are_converted_where_no_value_changes() -> None:
    rounded = LOGITS[:, :256].astype(ml_dtypes.bfloat16)
    row = row_of(spec_of(DEEPSEEK), deepseek(routing_logits=data(rounded, rounded.dtype)))
    assert row.tensors["routing_logits"].dtype == np.float32
    assert np.array_equal(row.tensors["routing_logits"], rounded.astype(np.float32))
    # A bias that is float32 in the call and exactly a bfloat16, as SGLang has some.
    row = row_of(spec_of(DEEPSEEK), deepseek(routing_bias=data(BIAS[:256], np.float32)))
    assert row.tensors["routing_bias"].dtype == ml_dtypes.bfloat16
    assert np.array_equal(row.tensors["routing_bias"], BIAS[:256])


def test_a_factor_that_no_dump_has_is_the_models() -> None:
    factor = Scalar(value=2.446, source="config.json")
    spec = spec_of(DEEPSEEK)
    call = deepseek(routed_scaling_factor=...)
    assert "no routed_scaling_factor" in reason_of(spec, call)
    known = spec.model_copy(update={"scalars": {"routed_scaling_factor": factor}})
    assert row_of(known, call).scalars["routed_scaling_factor"] == factor
    assert row_of(known, deepseek()).scalars["routed_scaling_factor"].value == 2.5


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"num_experts": 384}, "num_experts is 384, the definition has 256"),
        ({"local_num_experts": 64}, "num_local_experts is 64, the definition has 32"),
        ({"top_k": 6}, "top_k is 6, the definition has 8"),
        ({"n_group": 4}, "n_group is 4, the definition has 8"),
        ({"topk_group": None}, "topk_group is 1, the definition has 4"),
        ({"n_group": ...}, "the dump has no n_group"),
        ({"intermediate_size": 1024}, "intermediate_size is 1024, the definition has 2048"),
        ({"routing_method_type": 1}, "the routing is renorm, the definition has ds_routing"),
        ({"routing_method_type": 7}, "routing_method_type is 7, which no definition has"),
        ({"routing_method_type": ...}, "the routing is default, the definition has ds_routing"),
        ({"top_k": True}, "top_k is True, not an integer"),
        ({"top_k": ...}, "the dump has no top_k"),
        ({"routing_bias": None}, "routing_bias is None, and a row cannot leave an input out"),
        ({"routing_bias": ...}, "the dump has no tensor 'routing_bias'"),
        ({"routing_logits": ...}, "the dump has no tensor 'routing_logits'"),
        (
            {"routing_logits": data(LOGITS[:, :128], np.float32)},
            "num_experts is 128, the definition has 256 (routing_logits)",
        ),
        (
            {"routing_logits": data(LOGITS[:2, :256], np.float32)},
            "seq_len is 3 by hidden_states, 2 by other inputs",
        ),
        (
            {"routing_bias": data(RANDOM.standard_normal(256), np.float32)},
            "routing_bias is float32, the definition has bfloat16, which does not have",
        ),
        (
            {"routing_logits": data(LOGITS[:, :256] * np.nan, np.float32)},
            "routing_logits has numbers that are not finite",
        ),
        (
            {"routing_logits": data(np.ones((3, 256)), np.int32)},
            "routing_logits is int32, the definition has float32",
        ),
        ({"hidden_states": shaped(BF16, 3, 7168)}, "hidden_states is bfloat16, the definition has"),
        ({"hidden_states": shaped(FP8, 3, 4096)}, "hidden_size is 4096, the definition has 7168"),
        ({"hidden_states": shaped(FP8, 7168)}, "hidden_states has 1 dimensions, expected 2"),
        ({"hidden_states": shaped(FP8, 0, 7168)}, "is empty (seq_len is 0)"),
        # MXFP8: 32-wide scales in another dtype.
        (
            {"hidden_states_scale": shaped("uint8", 224, 3)},
            "hidden_states_scale is uint8, the definition has float32",
        ),
        ({"gemm1_weights": shaped(FP8, 32, 56, 4096, 128)}, "has 4 dimensions, expected 3"),
        ({"local_expert_offset": 225}, "local_expert_offset is 225, expected 0 to 224"),
        ({"local_expert_offset": 3.0}, "local_expert_offset is 3.0, expected 0 to 224"),
        ({"local_expert_offset": ...}, "the dump has no local_expert_offset"),
        ({"routed_scaling_factor": None}, "routed_scaling_factor is None, not a number"),
        ({"routed_scaling_factor": float("nan")}, "routed_scaling_factor is nan, no float32"),
        ({"routed_scaling_factor": 10**60}, "no float32"),
        ({"activation_type": 4}, "activation_type is 4, the definition has 3"),
        ({"do_finalize": False}, "do_finalize is False, the definition has True"),
        ({"num_fused_shared_experts": 1}, "num_fused_shared_experts is 1"),
        ({"gemm1_clamp_limit": shaped(F32, 32)}, "called with gemm1_clamp_limit"),
    ],
)
def test_a_call_of_other_experts_is_no_row(arguments: dict[str, Any], reason: str) -> None:
    assert reason in reason_of(spec_of(DEEPSEEK), deepseek(**arguments))


@pytest.mark.parametrize(
    ("name", "call", "reason"),
    [
        (RENORM, deepseek(), "the routing is ds_routing, the definition has renorm"),
        # One rank of four: the logits are of all ranks' experts.
        (
            RENORM,
            experts(
                "trtllm_fp8_block_scale_moe",
                (512, 128, 2048, 768, 8),
                method=1,
                routing_logits=data(LOGITS, ml_dtypes.bfloat16),
            ),
            "num_experts is 512, the definition has 128",
        ),
        (
            RENORM,
            qwen3(routing_logits=data(LOGITS[:, :128], np.float32)),
            "routing_logits is float32, the definition has bfloat16, which does not have",
        ),
        (RENORM, qwen3(routing_bias=data(BIAS[:128], np.float32)), "called with routing_bias"),
        (RENORM, qwen3(routed_scaling_factor=2.5), "routed_scaling_factor is 2.5"),
        (
            FP4,
            qwen3("trtllm_fp4_block_scale_moe", gemm1_weights=shaped("uint8", 128, 3072, 1024)),
            "gemm1_out_size is 3072, the definition has 1536",
        ),
        (
            FP4,
            qwen3("trtllm_fp4_block_scale_moe", hidden_states=shaped("uint8", 4, 1024)),
            "4 tokens, routing for 3",
        ),
        (
            FP4_LLAMA4,
            llama4("trtllm_fp4_block_scale_moe", routing_bias=None),
            "routing_bias is None, and a row cannot leave an input out",
        ),
        (
            PER_TENSOR_LLAMA4,
            llama4("trtllm_fp8_per_tensor_scale_moe", use_routing_scales_on_input=False),
            "use_routing_scales_on_input is False, the definition has True",
        ),
        (
            FP4_ROUTED,
            qwen3(
                "trtllm_fp4_block_scale_routed_moe",
                topk_ids=data(np.full((3, 8), 128 << 16), np.int32),
            ),
            "topk_ids >> 16 has values from 128 to 128, expected from 0 to 127",
        ),
        (
            FP4_ROUTED,
            qwen3(
                "trtllm_fp4_block_scale_routed_moe", topk_ids=data(np.full((3, 8), 0x7FC0), "i4")
            ),
            "topk_ids has weights that are not finite",
        ),
        (
            FP4,
            qwen3("trtllm_fp4_block_scale_moe", gemm2_weights=shaped("uint8", 128, 2048, 768)),
            "intermediate_size is 1536, the definition has 768",
        ),
        (
            FP4_ROUTED,
            qwen3("trtllm_fp4_block_scale_routed_moe", topk_ids=data(np.full((3, 8), -1), "i4")),
            "topk_ids >> 16 has values from -1 to -1",
        ),
    ],
)
def test_a_call_of_another_kernel_is_no_row(name: str, call: Call, reason: str) -> None:
    assert reason in reason_of(spec_of(name), call)


@pytest.mark.parametrize(
    "arguments",
    [
        {"routing_method_type": 5},
        {"top_k": ...},
        {"num_experts": -1},
        {"hidden_states": shaped(FP8, 3)},
        {"hidden_states": ...},
        {"gemm2_weights": shaped(FP8, 32, 7168, 1024)},
        {"activation_type": 6},
        {"intermediate_size": "2048"},
    ],
)
def test_a_call_that_lacks_what_decides_implies_nothing(arguments: dict[str, Any]) -> None:
    assert implied(deepseek(**arguments)) is None


# --- gated delta networks ------------------------------------------------------------------------

GDN = {stage: f"gdn_{stage}_qk8_v16_d128_k_last" for stage in ("decode", "prefill", "mtp")}


def heads(*rows: int) -> dict[str, Tensor]:
    return {
        "q": shaped(BF16, *rows, 8, 128),
        "k": shaped(BF16, *rows, 8, 128),
        "v": shaped(BF16, *rows, 16, 128),
    }


def gates(*rows: int) -> dict[str, Tensor]:
    return {
        "A_log": shaped(F32, 16),
        "a": shaped(BF16, *rows, 16),
        "dt_bias": shaped(F32, 16),
        "b": shaped(BF16, *rows, 16),
    }


def keys(*rows: int) -> Tensor:
    """Keys of length one."""
    values = RANDOM.standard_normal((*rows, 8, 128))
    values /= np.linalg.norm(values, axis=-1, keepdims=True)
    return data(values, ml_dtypes.bfloat16)


def gdn_decode(**arguments: Any) -> Call:
    """As SGLang calls it on Hopper, but for the normalisation."""
    tensors = {**heads(4, 1), "state": shaped(F32, 4, 16, 128, 128), **gates(4, 1)}
    values = {"scale": None, "output": None, "use_qk_l2norm": False}
    call = Call("gated_delta_rule_decode_pretranspose", tensors, values)
    return changed(call, **arguments)


def gdn_prefill(**arguments: Any) -> Call:
    """As SGLang calls it: normalised before, the gates ready."""
    tensors = {
        **heads(9),
        "k": keys(9),
        "g": shaped(F32, 9, 16),
        "beta": shaped(F32, 9, 16),
        "initial_state": shaped(F32, 3, 16, 128, 128),
        "cu_seqlens": data([0, 2, 8, 9], np.int64),
        "output_state": shaped(F32, 3, 16, 128, 128),
    }
    values = {
        "scale": None,
        "output_final_state": True,
        "use_qk_l2norm_in_kernel": False,
        "state_checkpoints": None,
        "checkpoint_every_n_tokens": 0,
    }
    return changed(Call("chunk_gated_delta_rule", tensors, values), **arguments)


def gdn_mtp(**arguments: Any) -> Call:
    tensors = {
        **heads(2, 3),
        "k": keys(2, 3),
        "initial_state": shaped(F32, 90, 16, 128, 128),
        "initial_state_indices": data([7, 2], np.int32),
        **gates(2, 3),
        "intermediate_states_buffer": shaped(F32, 91, 3, 16, 128, 128),
    }
    values = {"scale": 0.25, "output": None, "disable_state_update": True, "use_qk_l2norm": False}
    return changed(Call("gated_delta_rule_mtp", tensors, values), **arguments)


@pytest.mark.parametrize(
    ("stage", "call", "axes", "scale"),
    [
        ("decode", gdn_decode(), {"batch_size": 4}, 1 / math.sqrt(128)),
        ("decode", gdn_decode(scale=0.5), {"batch_size": 4}, 0.5),
        (
            "prefill",
            gdn_prefill(),
            {"total_seq_len": 9, "num_seqs": 3, "len_cu_seqlens": 4},
            1 / math.sqrt(128),
        ),
        # The pool ends with the last slot used.
        ("mtp", gdn_mtp(), {"batch_size": 2, "seq_len": 3, "pool_size": 8}, 0.25),
    ],
)
def test_gdn_rows(stage: str, call: Call, axes: dict[str, int], scale: float) -> None:
    row = row_of(spec_of(GDN[stage]), call)
    assert row.axes == axes
    assert {name: scalar.value for name, scalar in row.scalars.items()} == {"scale": scale}
    stored = {"prefill": {"cu_seqlens", "k"}, "mtp": {"initial_state_indices", "k"}}
    stored.setdefault("decode", set())
    assert set(row.tensors) == stored[stage]
    for name in stored[stage]:
        assert np.array_equal(row.tensors[name], call.tensors[name].load())
    check_implied(GDN[stage], call)


def test_offsets_of_32_bits_are_stored_as_the_definition_has_them() -> None:
    """As SGLang passes them on Blackwell."""
    call = gdn_prefill(cu_seqlens=data([0, 0, 8, 9], np.int32))
    offsets = row_of(spec_of(GDN["prefill"]), call).tensors["cu_seqlens"]
    assert offsets.dtype == np.int64
    assert offsets.tolist() == [0, 0, 8, 9]


@pytest.mark.bench_extra
def test_the_keys_of_a_row_keep_the_recurrence_finite() -> None:
    """What FlashInfer-Bench makes up for all else is as random as here."""
    rows, size = 300, 64
    values = RANDOM.standard_normal((rows, 1, size))
    values /= np.linalg.norm(values, axis=-1, keepdims=True)
    call = gdn_prefill(
        q=shaped(BF16, rows, 1, size),
        k=data(values, ml_dtypes.bfloat16),
        v=shaped(BF16, rows, 4, size),
        g=shaped(F32, rows, 4),
        beta=shaped(F32, rows, 4),
        initial_state=shaped(F32, 2, 4, size, size),
        cu_seqlens=data([0, 40, rows], np.int64),
    )
    spec = implied(call)
    assert spec is not None
    row, definition = row_of(spec, call), op_module("gdn").definition(spec)
    axes = {**spec.axes, **row.axes}
    torch.manual_seed(3)
    made = {
        name: torch.randn([axes[axis] for axis in declared["shape"]])
        for name, declared in definition["inputs"].items()
        if declared["dtype"] in (BF16, F32) and declared["shape"]
    }
    made |= {"cu_seqlens": torch.from_numpy(row.tensors["cu_seqlens"]), "scale": 0.125}
    namespace: dict[str, Any] = {}
    exec(definition["reference"], namespace)
    keys = torch.from_numpy(row.tensors["k"].astype(np.float32))
    output, state = namespace["run"](**{**made, "k": keys})
    assert output.isfinite().all()
    # The states begin with numbers up to 5, and nothing adds more than a value for each token.
    assert state.abs().max() < 5
    _, state = namespace["run"](**made)
    assert not state.isfinite().all()


def offsets(*values: int) -> dict[str, Tensor]:
    return {"cu_seqlens": data(values, np.int64)}


@pytest.mark.parametrize(
    ("stage", "call", "reason"),
    [
        # What SGLang passes at decode and verification, and what is passed if nothing is said.
        (
            "decode",
            gdn_decode(use_qk_l2norm=True),
            "use_qk_l2norm is True: the kernel normalises q and k first, the definition takes them "
            "as they are, and none that does it is published",
        ),
        ("decode", gdn_decode(use_qk_l2norm=...), "use_qk_l2norm is True: the kernel normalises"),
        ("decode", gdn_decode(use_qk_l2norm=1), "use_qk_l2norm is 1, the definition has False"),
        ("mtp", gdn_mtp(use_qk_l2norm=True), "use_qk_l2norm is True: the kernel normalises"),
        (
            "prefill",
            gdn_prefill(use_qk_l2norm_in_kernel=True),
            "use_qk_l2norm_in_kernel is True: the kernel normalises q and k first",
        ),
        # As SGLang calls it on Blackwell.
        (
            "decode",
            gdn_decode(state=None, initial_state=shaped(F32, 90, 16, 128, 128)),
            "called with initial_state",
        ),
        ("decode", gdn_decode(state=None), "state is None, and a row cannot leave an input out"),
        (
            "decode",
            gdn_decode(state=shaped(BF16, 4, 16, 128, 128)),
            "state is bfloat16, the definition has float32",
        ),
        (
            "decode",
            gdn_decode(dt_bias=shaped(BF16, 16)),
            "dt_bias is bfloat16, the definition has float32",
        ),
        (
            "decode",
            gdn_decode(**heads(4, 2), **gates(4, 2)),
            "seq_len is 2, the definition has 1 (q)",
        ),
        (
            "decode",
            gdn_decode(state=shaped(F32, 5, 16, 128, 128)),
            "batch_size is 5 by state, 4 by other inputs",
        ),
        (
            "decode",
            gdn_decode(v=shaped(BF16, 4, 1, 32, 128)),
            "num_v_heads is 32, the definition has 16 (v)",
        ),
        ("decode", gdn_decode(scale="0.1"), "scale is '0.1', not a number"),
        ("prefill", gdn_prefill(initial_state=None), "initial_state is None, and a row cannot"),
        ("prefill", gdn_prefill(g=None), "g is None, and a row cannot leave an input out"),
        ("prefill", gdn_prefill(g=...), "the dump has no tensor 'g'"),
        ("prefill", gdn_prefill(output_final_state=...), "output_final_state is False"),
        ("prefill", gdn_prefill(**offsets(0, 9)), "2 offsets for 3 states"),
        ("prefill", gdn_prefill(**offsets(0, 2, 8, 10)), "offsets from 0 to 9 (it begins with 0"),
        ("prefill", gdn_prefill(**offsets(0, 8, 2, 9)), "not a sequence of offsets from 0 to 9"),
        ("prefill", gdn_prefill(**offsets(1, 2, 8, 9)), "(it begins with 1 and ends with 9)"),
        (
            "prefill",
            gdn_prefill(**offsets(0, 2**63 - 1, -(2**63), 9)),
            "not a sequence of offsets from 0 to 9",
        ),
        (
            "prefill",
            gdn_prefill(cu_seqlens=data([0, 2, 8, 9], np.float32)),
            "cu_seqlens is float32, the definition has int64",
        ),
        (
            "mtp",
            gdn_mtp(initial_state_indices=data([7, 90], np.int32)),
            "initial_state_indices has values from 7 to 90, expected from 0 to 89",
        ),
        (
            "mtp",
            gdn_mtp(initial_state_indices=data([-1, 2], np.int32)),
            "values from -1 to 2, expected from 0 to 89",
        ),
        (
            "mtp",
            gdn_mtp(initial_state_indices=data([7, 2**40], np.int64)),
            "is int64, the definition has int32, which does not have 1 of the 2 values",
        ),
        ("mtp", gdn_mtp(disable_state_update=False), "disable_state_update is False"),
        (
            "mtp",
            gdn_mtp(intermediate_states_buffer=None),
            "intermediate_states_buffer is None, and",
        ),
        (
            "mtp",
            gdn_mtp(intermediate_states_buffer=shaped(F32, 1, 3, 16, 128, 128)),
            "intermediate_states_buffer has shape (1, 3, 16, 128, 128) for 2 sequences",
        ),
        ("mtp", gdn_mtp(ssm_state_indices=shaped(I32, 2, 3)), "called with ssm_state_indices"),
    ],
)
def test_a_call_of_another_recurrence_is_no_row(stage: str, call: Call, reason: str) -> None:
    assert reason in reason_of(spec_of(GDN[stage]), call)


@pytest.mark.parametrize(
    "call",
    [
        gdn_decode(use_qk_l2norm=True),
        gdn_prefill(v=shaped(BF16, 9, 20, 128)),
        gdn_prefill(k=shaped(BF16, 9, 8, 64)),
        gdn_prefill(q=shaped(BF16, 9, 0, 128)),
        gdn_mtp(initial_state=shaped(BF16, 90, 16, 128, 128)),
    ],
)
def test_what_no_definition_computes_implies_none(call: Call) -> None:
    assert implied(call) is None


# --- Mamba ---------------------------------------------------------------------------------------

MAMBA = "mamba_ssu_decode_h64_d64_s128_ng4"


TIED = {"dt", "A", "D", "dt_bias"}


def per_head(dtype: Any, rows: tuple[int, ...], *spread: int) -> Tensor:
    """One value for each of `rows`, spread over the axes that follow."""
    values = RANDOM.standard_normal((*rows, *(1 for _ in spread))).astype(dtype)
    array = np.broadcast_to(values, (*rows, *spread))
    return Tensor(array.shape, array.dtype.name, array)


def uneven(name: str, *index: int) -> Tensor:
    """The argument with one element that is not its head's value."""
    values = np.array(mamba().tensors[name].load())
    values[index] += 1
    return data(values, values.dtype)


def mamba(*slots: int, **arguments: Any) -> Call:
    """As SGLang calls it: what is one value per head is dense in the dump."""
    batch = len(slots) or 3
    tensors = {
        "state": shaped(BF16, 500, 64, 64, 128),
        "x": shaped(BF16, batch, 64, 64),
        "dt": per_head(ml_dtypes.bfloat16, (batch, 64), 64),
        "A": per_head(np.float32, (64,), 64, 128),
        "B": shaped(BF16, batch, 4, 128),
        "C": shaped(BF16, batch, 4, 128),
        "D": per_head(ml_dtypes.bfloat16, (64,), 64),
        "dt_bias": per_head(ml_dtypes.bfloat16, (64,), 64),
        "state_batch_indices": data(slots or (9, 4, 30), np.int32),
        "out": shaped(BF16, batch, 64, 64),
    }
    values = {
        "z": None,
        "dt_softplus": True,
        "pad_slot_id": -1,
        "disable_state_update": False,
        "intermediate_states_buffer": None,
        "cache_steps": 0,
        "intermediate_state_indices": None,
        "rand_seed": None,
        "philox_rounds": 10,
    }
    return changed(Call("selective_state_update", tensors, values), **arguments)


@pytest.mark.parametrize(
    ("slots", "cache"),
    # The cache ends with the last slot used, and has one for each sequence.
    [((9, 4, 30), 31), ((499,), 500), ((3, -1, 0), 4), ((0, -1, -1, -1), 4)],
)
def test_mamba_rows(slots: tuple[int, ...], cache: int) -> None:
    call = mamba(*slots)
    row = row_of(spec_of(MAMBA), call)
    assert row.axes == {"batch_size": len(slots), "state_cache_size": cache}
    assert row.tensors.keys() == {"state_batch_indices", *TIED}
    assert row.tensors["state_batch_indices"].tolist() == list(slots)
    assert row.tensors["state_batch_indices"].dtype == np.int32
    for name in TIED:
        assert np.array_equal(row.tensors[name], call.tensors[name].load())
    assert row.scalars == {}
    check_implied(MAMBA, call)


@pytest.mark.bench_extra
def test_on_a_row_the_baseline_computes_what_the_reference_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With an API that takes strides of 0 only, as FlashInfer's does."""
    spec, module = spec_of(MAMBA), op_module("mamba_ssu")
    row, definition = row_of(spec, mamba(2, -1, 0)), module.definition(spec_of(MAMBA))
    reference: dict[str, Any] = {}
    exec(definition["reference"], reference)

    def api(state: Any, *given: Any, dt_bias: Any, state_batch_indices: Any, **more: Any) -> None:
        _, dt, rate, *_, share = given
        assert all(t.stride(-1) == 0 for t in (dt, rate, share, dt_bias))
        assert rate.stride(-2) == 0
        output, updated = reference["run"](state, *given, dt_bias, state_batch_indices)
        state.copy_(updated)
        more["out"].copy_(output)

    fake = types.ModuleType("flashinfer.mamba")
    monkeypatch.setattr(fake, "selective_state_update", api, raising=False)
    monkeypatch.setitem(sys.modules, "flashinfer.mamba", fake)
    baseline: dict[str, Any] = {}
    exec(module.baseline(spec) or "", baseline)
    axes = {**spec.axes, **row.axes}
    torch.manual_seed(3)
    inputs = {
        name: torch.randn([axes[axis] for axis in declared["shape"]])
        for name, declared in definition["inputs"].items()
    }
    inputs |= {
        name: torch.from_numpy(values.astype(np.int32 if "indices" in name else np.float32))
        for name, values in row.tensors.items()
    }
    expected, got = reference["run"](**inputs), baseline["run"](**inputs)
    assert all(torch.equal(one, other) for one, other in zip(expected, got, strict=True))


def test_slots_of_64_bits_are_stored_as_the_definition_has_them() -> None:
    call = mamba(state_batch_indices=data([9, 4, 30], np.int64))
    slots = row_of(spec_of(MAMBA), call).tensors["state_batch_indices"]
    assert slots.dtype == np.int32
    assert slots.tolist() == [9, 4, 30]


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (mamba(3, 500), "values from 3 to 500, expected from -1 to 499"),
        (mamba(3, -2), "values from -2 to 3, expected from -1 to 499"),
        (mamba(-1, -1), "all of 2 slots are padding"),
        (mamba(5, 5), "two sequences have the same slot"),
        (mamba(0, -1, state=shaped(BF16, 1, 64, 64, 128)), "2 sequences, 1 slots"),
        (mamba(state_batch_indices=None), "state_batch_indices is None, and a row cannot leave"),
        (mamba(state=shaped(F32, 500, 64, 64, 128)), "state is float32, the definition has bfloat"),
        (mamba(state=shaped(BF16, 500, 4096, 128)), "state has 3 dimensions, expected 4"),
        (mamba(state=shaped(BF16, 500, 128, 64, 128)), "nheads is 128, the definition has 64"),
        (mamba(B=shaped(BF16, 3, 8, 128)), "ngroups is 8, the definition has 4 (B)"),
        (mamba(A=uneven("A", 3, 5, 7)), "A has several values for a head, FlashInfer takes one"),
        (mamba(D=uneven("D", 63, 63)), "D has several values for a head"),
        (mamba(dt=uneven("dt", 2, 0, 1)), "dt has several values for a head"),
        (mamba(dt_bias=uneven("dt_bias", 0, 1)), "dt_bias has several values for a head"),
        (mamba(dt=shaped(F32, 3, 64, 64)), "dt is float32, the definition has bfloat16"),
        # Verification of drafted tokens.
        (mamba(x=shaped(BF16, 3, 4, 64, 64)), "x has 4 dimensions, expected 3"),
        (mamba(disable_state_update=True), "disable_state_update is True"),
        (mamba(dt_softplus=...), "dt_softplus is False, the definition has True"),
        (mamba(pad_slot_id=0), "pad_slot_id is 0, the definition has -1"),
        (mamba(dt_bias=None), "dt_bias is None, and a row cannot leave an input out"),
        (mamba(z=shaped(BF16, 3, 64, 64)), "called with z"),
        (mamba(rand_seed=shaped(I64, 1)), "called with rand_seed"),
    ],
)
def test_a_call_of_another_state_update_is_no_row(call: Call, reason: str) -> None:
    assert reason in reason_of(spec_of(MAMBA), call)


@given(st.lists(st.integers(-2, 12), min_size=1, max_size=8))
def test_slots_are_stored_or_refused(slots: list[int]) -> None:
    """A row has the slots as they are, inside its cache; whatever else is refused."""
    call = mamba(*slots, state=shaped(BF16, 10, 64, 64, 128))
    (result,) = op_module("mamba_ssu").rows(spec_of(MAMBA), [call])
    used = [slot for slot in slots if slot != -1]
    fine = used and len(set(used)) == len(used) and all(0 <= slot < 10 for slot in used)
    assert isinstance(result, Row) == bool(fine)
    if isinstance(result, Row):
        assert result.tensors["state_batch_indices"].tolist() == slots
        assert max(*used, len(slots) - 1) < result.axes["state_cache_size"] <= 10


# --- sparse attention ----------------------------------------------------------------------------

SPARSE = "dsa_sparse_attention_h16_ckv512_kpe64_topk2048_ps64"
INDEXER = "dsa_topk_indexer_fp8_h64_d128_topk2048_ps64"


def chosen(*counts: int) -> np.ndarray:
    """Chosen tokens of each query: so many, every third one, and -1."""
    rows = np.full((len(counts), 1, 2048), -1, dtype=np.int32)
    for row, count in zip(rows, counts, strict=True):
        row[0, :count] = 3 * np.arange(count)[::-1]
    return rows


def sparse(*lengths: int, **arguments: Any) -> Call:
    """As SGLang calls it, one query in each row; sequences of these lengths."""
    lengths = lengths or (5, 3000)
    counts = [min(length, 2048) for length in lengths]
    tensors = {
        "query": shaped(BF16, len(lengths), 1, 16, 576),
        "kv_cache": shaped(BF16, 900, 1, 64, 576),
        "workspace_buffer": shaped("uint8", 512),
        "block_tables": data(chosen(*counts), np.int32),
        "seq_lens": data(lengths, np.int32),
    }
    values = {
        "qk_nope_head_dim": 128,
        "kv_lora_rank": 512,
        "qk_rope_head_dim": 64,
        "max_seq_len": max(lengths),
        "sparse_mla_top_k": 2048,
        "bmm1_scale": 0.1352,
        "backend": "trtllm-gen",
        "skip_softmax_threshold_scale_factor": None,
        "multi_ctas_kv_counter_buffer": None,
    }
    return changed(Call("trtllm_batch_decode_with_kv_cache_mla", tensors, values), **arguments)


def test_sparse_attention_rows_have_the_chosen_tokens() -> None:
    row = row_of(spec_of(SPARSE), sparse(5, 3000))
    # The last token read is 3 * 2047, on page 95.
    assert row.axes == {"num_tokens": 2, "num_pages": 96}
    assert np.array_equal(row.tensors["sparse_indices"], chosen(5, 2048)[:, 0])
    assert set(row.tensors) == {"sparse_indices"}
    assert row.scalars["sm_scale"].value == 0.1352
    check_implied(SPARSE, sparse())
    check_implied(SPARSE, sparse(kv_cache=shaped(BF16, 900, 64, 576)))


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        # Latent attention that is not sparse has the same function.
        (sparse(sparse_mla_top_k=...), "sparse_mla_top_k is 0, block_tables (2, 1, 2048)"),
        (sparse(sparse_mla_top_k=512), "sparse_mla_top_k is 512"),
        (sparse(query=shaped(BF16, 2, 1, 32, 576)), "num_qo_heads is 32, the definition has 16"),
        (sparse(query=shaped(BF16, 1, 2, 16, 576)), "expected one query"),
        (sparse(query=shaped(FP8, 2, 1, 16, 576)), "query is float8_e4m3fn, the definition has"),
        (sparse(kv_cache=shaped(FP8, 900, 1, 64, 576)), "kv_cache is float8_e4m3fn"),
        (sparse(kv_cache=shaped(BF16, 900, 1, 32, 576)), "page_size is 32, the definition has 64"),
        (sparse(kv_cache=shaped(BF16, 900, 2, 64, 576)), "no latent cache"),
        (sparse(kv_cache=...), "kv_cache is None, no latent cache"),
        (sparse(kv_lora_rank=256), "query has rows of 576, kv_lora_rank + qk_rope_head_dim is 320"),
        (sparse(kv_cache=shaped(BF16, 90, 1, 64, 576)), "expected from -1 to 5759"),
        (sparse(seq_lens=data([6, 3000], np.int32)), "1 of 2 queries have other numbers of tokens"),
        (sparse(seq_lens=data([5, 3000, 1], np.int32)), "3 seq_lens for 2 queries"),
        (sparse(seq_lens=None), "seq_lens is None, and a row cannot leave an input out"),
        (sparse(0), "no token is chosen"),
        (sparse(bmm1_scale=...), "the dump has no bmm1_scale"),
        (sparse(bmm1_scale=shaped(F32, 1)), "bmm1_scale is a tensor"),
        (sparse(bmm2_scale=0.5), "bmm2_scale is 0.5, the definition has 1.0"),
        (sparse(sinks__0=shaped(F32, 16)), "called with sinks"),
        (sparse(cum_seq_lens_q=shaped(I32, 3)), "called with cum_seq_lens_q"),
    ],
)
def test_a_call_of_another_attention_is_no_row(call: Call, reason: str) -> None:
    assert reason in reason_of(spec_of(SPARSE), call)


def test_a_scale_that_no_dump_has_is_the_models() -> None:
    scale = Scalar(value=0.5, source="config.json")
    spec = spec_of(SPARSE).model_copy(update={"scalars": {"sm_scale": scale}})
    assert row_of(spec, sparse(bmm1_scale=...)).scalars["sm_scale"] == scale


def test_the_indexer_is_no_call_of_flashinfer() -> None:
    assert list(op_module("dsa_paged").rows(spec_of(INDEXER), [sparse()])) == []


# --- rotary embedding ----------------------------------------------------------------------------

ROPE = "rope_with_cos_sin_cache_neox_style_d128_rd64"


def rope(**arguments: Any) -> Call:
    tensors = {
        "positions": data([0, 70, 70], np.int64),
        "query": shaped(BF16, 3, 48 * 128),
        "key": shaped(BF16, 3, 8 * 128),
        "cos_sin_cache": shaped(F32, 4096, 64),
    }
    call = Call("apply_rope_with_cos_sin_cache_inplace", tensors, {"head_size": 128})
    return changed(call, **arguments)


@pytest.mark.parametrize("style", ["neox", "gptj"])
@pytest.mark.parametrize("dtype", [np.int64, np.int32])
def test_rope_rows_have_the_positions(style: str, dtype: Any) -> None:
    name = ROPE.replace("neox", style)
    call = rope(positions=data([0, 70, 70], dtype))
    if style == "gptj":
        call = changed(call, is_neox=False)
    spec = implied(call)
    assert spec is not None
    assert (spec.name, spec.variant) == (name, style)
    row = row_of(spec, call)
    assert row.axes == {
        "num_tokens": 3,
        "num_qo_heads": 48,
        "num_kv_heads": 8,
        "max_seq_len": 4096,
    }
    assert row.tensors["positions"].dtype == np.int64
    assert row.tensors["positions"].tolist() == [0, 70, 70]
    if style == "neox":
        check_implied(ROPE, call)


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (rope(is_neox=False), "is_neox is False, the definition has True"),
        (rope(is_neox=1), "is_neox is 1, the definition has True"),
        (rope(head_size=64), "head_size is 64, the definition has 128"),
        (rope(head_size=0), "head_size is 0, not an integer from 1 on"),
        (rope(head_size=...), "the dump has no head_size"),
        (rope(cos_sin_cache=shaped(F32, 4096, 128)), "rotary_dim is 128, the definition has 64"),
        (rope(cos_sin_cache=shaped(BF16, 4096, 64)), "cos_sin_cache is bfloat16"),
        (rope(positions=data([0, 1, 4096], np.int64)), "from 0 to 4096, expected from 0 to 4095"),
        (rope(positions=data([0, 1, -1], np.int64)), "values from -1 to 1"),
        (rope(positions=data([[0, 1, 2]] * 3, np.int64)), "positions has 2 dimensions, expected 1"),
        (rope(query=shaped(BF16, 4, 6144)), "query has shape (4, 6144), expected 3 tokens"),
        (rope(query=shaped(BF16, 3, 6100)), "query has shape (3, 6100), expected 3 tokens of"),
        (rope(key=shaped("float16", 3, 1024)), "key is float16, the definition has bfloat16"),
        (rope(key=shaped(BF16, 3, 0)), "key has shape (3, 0)"),
    ],
)
def test_a_call_of_another_rotation_is_no_row(call: Call, reason: str) -> None:
    assert reason in reason_of(spec_of(ROPE), call)


# --- all of them ---------------------------------------------------------------------------------

CALLS: dict[str, Callable[[], Call]] = {
    DEEPSEEK: deepseek,
    RENORM: qwen3,
    FP4: lambda: qwen3("trtllm_fp4_block_scale_moe"),
    FP4_ROUTED: lambda: qwen3("trtllm_fp4_block_scale_routed_moe"),
    PER_TENSOR: lambda: qwen3("trtllm_fp8_per_tensor_scale_moe"),
    GDN["decode"]: gdn_decode,
    GDN["prefill"]: gdn_prefill,
    GDN["mtp"]: gdn_mtp,
    MAMBA: mamba,
    SPARSE: sparse,
    ROPE: rope,
}
HOSTILE: list[Any] = [
    None,
    True,
    -1,
    0,
    10**30,
    1.5,
    float("nan"),
    "x",
    [],
    {},
    {"type": "enum"},
    ...,
]


@pytest.mark.parametrize("name", CALLS)
def test_whatever_a_dump_says_is_a_row_or_a_reason(name: str) -> None:
    """Every argument by turns missing, of another type, absurd, or with another shape."""
    spec, call = spec_of(name), CALLS[name]()
    module, form = op_module(spec.op_type), form_of(PUBLISHED[name], name)
    faulty = [changed(call, **{key: value}) for key in call.values for value in HOSTILE]
    for key, tensor in call.tensors.items():
        others = [(), (0,), tensor.shape[1:], (1, *tensor.shape), (*tensor.shape[:-1], 0)]
        faulty += [changed(call, **{key: Tensor(shape, tensor.dtype)}) for shape in others]
        faulty += [changed(call, **{key: value}) for value in (None, 3, ...)]
        faulty.append(changed(call, **{key: replace(tensor, dtype="complex64")}))
    for wrong in faulty:
        module.implied(wrong)
        for result in module.rows(spec, [wrong]):
            if isinstance(result, Row):
                form.check(result)


@pytest.mark.parametrize("name", CALLS)
def test_a_tensor_that_cannot_be_read_is_a_reason(name: str) -> None:
    class Damaged(Tensor):
        def load(self) -> np.ndarray:
            raise DumpError("selected reason")

    spec, call = spec_of(name), CALLS[name]()
    for key, tensor in call.tensors.items():
        if tensor.values is not None:
            damaged = changed(call, **{key: Damaged(tensor.shape, tensor.dtype)})
            (result,) = op_module(spec.op_type).rows(spec, [damaged])
            assert result == Rejected("a call", "selected reason")


@pytest.mark.parametrize("op_type", ["gemm", "lightning_attn"])
def test_what_flashinfer_does_not_run_has_no_rows(op_type: str) -> None:
    module = op_module(op_type)
    assert module.apis == ()
    for name, definition in PUBLISHED.items():
        if definition["op_type"] == op_type:
            assert list(module.rows(spec_of(name), [make() for make in CALLS.values()])) == []


# --- FlashInfer's signatures ---------------------------------------------------------------------

_EXPERTS = (
    "num_experts top_k n_group topk_group intermediate_size local_expert_offset local_num_experts "
    "routed_scaling_factor"
)
_FP4 = (
    "routing_bias hidden_states hidden_states_scale gemm1_weights gemm1_weights_scale gemm1_bias "
    "gemm1_alpha gemm1_beta gemm1_clamp_limit gemm2_weights gemm2_weights_scale gemm2_bias "
    "output1_scale_scalar output1_scale_gate_scalar output2_scale_scalar " + _EXPERTS
)
SIGNATURES = {
    "trtllm_fp8_block_scale_moe": (
        "fused_moe/core.py",
        "routing_logits routing_bias hidden_states hidden_states_scale gemm1_weights "
        f"gemm1_weights_scale gemm2_weights gemm2_weights_scale {_EXPERTS}",
        "routing_method_type use_shuffled_weight weight_layout do_finalize enable_pdl "
        "tune_max_num_tokens fp8_quantization_type num_fused_shared_experts activation_type "
        "norm_topk_prob routing_replay_out gemm1_alpha gemm1_beta gemm1_clamp_limit output",
    ),
    "trtllm_fp4_block_scale_moe": (
        "fused_moe/core.py",
        f"routing_logits {_FP4}",
        "routing_method_type do_finalize enable_pdl activation_type per_token_scale output "
        "tune_max_num_tokens norm_topk_prob routing_replay_out",
    ),
    "trtllm_fp4_block_scale_routed_moe": (
        "fused_moe/core.py",
        f"topk_ids {_FP4}",
        "routing_method_type do_finalize enable_pdl activation_type per_token_scale output "
        "tune_max_num_tokens",
    ),
    "trtllm_fp8_per_tensor_scale_moe": (
        "fused_moe/core.py",
        "routing_logits routing_bias hidden_states gemm1_weights output1_scales_scalar "
        f"output1_scales_gate_scalar gemm2_weights output2_scales_scalar {_EXPERTS} "
        "use_routing_scales_on_input",
        "routing_method_type do_finalize enable_pdl tune_max_num_tokens activation_type "
        "norm_topk_prob routing_replay_out output",
    ),
    "gated_delta_rule_decode_pretranspose": (
        "gdn_decode.py",
        "q k v state A_log a dt_bias b",
        "scale output use_qk_l2norm initial_state initial_state_indices output_state_indices",
    ),
    "gated_delta_rule_mtp": (
        "gdn_decode.py",
        "q k v initial_state initial_state_indices A_log a dt_bias b",
        "scale output intermediate_states_buffer ssm_state_indices disable_state_update "
        "use_qk_l2norm output_state_indices",
    ),
    "chunk_gated_delta_rule": (
        "gdn_prefill.py",
        "q k v",
        "g beta scale initial_state output_final_state cu_seqlens use_qk_l2norm_in_kernel output "
        "output_state state_checkpoints checkpoint_cu_starts checkpoint_every_n_tokens use_cp",
    ),
    "selective_state_update": (
        "mamba/selective_state_update.py",
        "state x dt A B C D",
        "z dt_bias dt_softplus state_batch_indices pad_slot_id state_scale out "
        "disable_state_update intermediate_states_buffer intermediate_state_indices "
        "intermediate_state_scales rand_seed philox_rounds cache_steps algorithm "
        "dst_state_batch_indices cu_seqlens num_accepted_tokens",
    ),
    "trtllm_batch_decode_with_kv_cache_mla": (
        "mla/_core.py",
        "query kv_cache workspace_buffer qk_nope_head_dim kv_lora_rank qk_rope_head_dim "
        "block_tables seq_lens max_seq_len",
        "sparse_mla_top_k out bmm1_scale bmm2_scale sinks skip_softmax_threshold_scale_factor "
        "enable_pdl backend is_var_seq uses_shared_paged_kv_idx lse return_lse cute_dsl_impl "
        "kv_scale_format cum_seq_lens_q max_q_len multi_ctas_kv_counter_buffer",
    ),
    "apply_rope_with_cos_sin_cache_inplace": (
        "rope.py",
        "positions query key head_size cos_sin_cache",
        "is_neox",
    ),
}
"""Function -> file, parameters without and with a default, in FlashInfer 0.6.15.post1."""


def parameter(name: str, optional: bool, *, keyword: bool = False) -> inspect.Parameter:
    kind = inspect.Parameter.KEYWORD_ONLY if keyword else inspect.Parameter.POSITIONAL_OR_KEYWORD
    return inspect.Parameter(name, kind, default=None if optional else inspect.Parameter.empty)


def older(function: str) -> inspect.Signature:
    _, required, optional = SIGNATURES[function]
    return inspect.Signature(
        [
            *(parameter(name, False) for name in required.split()),
            *(parameter(name, True) for name in optional.split()),
        ]
    )


def installed(function: str) -> inspect.Signature | None:
    """The signature in the installed FlashInfer's source, if there is one."""
    found = importlib.util.find_spec("flashinfer")
    if found is None or found.origin is None:
        return None
    source = Path(found.origin).parent / SIGNATURES[function][0]
    tree = ast.parse(source.read_bytes())
    (node,) = (
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and node.name == function
    )
    names, optional = node.args.args, len(node.args.defaults)
    return inspect.Signature(
        [
            *(parameter(a.arg, i >= len(names) - optional) for i, a in enumerate(names)),
            *(parameter(a.arg, True, keyword=True) for a in node.args.kwonlyargs),
        ]
    )


def signatures(function: str) -> list[inspect.Signature]:
    return [found for found in (older(function), installed(function)) if found is not None]


MODULES = [op_module(name) for name in ("moe", "gdn", "mamba_ssu", "dsa_paged", "rope")]
APIS = [(module, api) for module in MODULES for api in module.apis]


@pytest.mark.parametrize(("module", "api"), APIS, ids=[api.dumps[0] for _, api in APIS])
def test_what_rows_read_are_parameters(module: OpModule, api: FlashInferApi) -> None:
    (function,) = api.dumps
    assert api.recorded == (function,)
    for signature in signatures(function):
        assert set(api.reads) <= signature.parameters.keys()
    for make in CALLS.values():
        call = make()
        if call.name == function:
            loadable = {name for name, tensor in call.tensors.items() if tensor.values is not None}
            assert loadable <= set(api.reads)
            passed = call.tensors.keys() | call.values.keys()
            assert passed <= older(function).parameters.keys()


@pytest.mark.parametrize("name", CALLS)
def test_baselines_call_what_flashinfer_has(name: str) -> None:
    spec = spec_of(name)
    module = op_module(spec.op_type)
    source = module.baseline(spec)
    # Weights shuffled for a kernel, and a cache in one piece: a wrapper would copy them each time.
    assert (source is None) == (name in (FP4, FP4_ROUTED, PER_TENSOR, SPARSE))
    if source is None:
        return
    tree = ast.parse(source)
    compile(tree, name, "exec")
    (run,) = (
        node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "run"
    )
    assert [a.arg for a in run.args.args] == list(module.definition(spec)["inputs"])
    function = CALLS[name]().name
    (call,) = (
        node
        for node in ast.walk(run)
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(function)
    )
    for signature in signatures(function):
        signature.bind(*call.args, **{str(k.arg): k.value for k in call.keywords})


def test_the_wrapped_experts_are_the_definitions() -> None:
    def arguments(name: str) -> dict[str, str]:
        source = op_module("moe").baseline(spec_of(name))
        assert source is not None
        (call,) = (
            node.value
            for node in ast.walk(ast.parse(source))
            if isinstance(node, ast.Return) and isinstance(node.value, ast.Call)
        )
        return {str(k.arg): ast.unparse(k.value) for k in call.keywords}

    called = arguments(DEEPSEEK)
    assert {name: called[name] for name in called if not name.startswith(("gemm", "hidden"))} == {
        "routing_logits": "routing_logits",
        "routing_bias": "routing_bias",
        "num_experts": "256",
        "top_k": "8",
        "n_group": "8",
        "topk_group": "4",
        "intermediate_size": "2048",
        "local_expert_offset": "int(local_expert_offset)",
        "local_num_experts": "32",
        "routed_scaling_factor": "float(routed_scaling_factor)",
        "routing_method_type": "2",
        "use_shuffled_weight": "False",
    }
    called = arguments(RENORM)
    assert called["routing_bias"] == called["n_group"] == called["topk_group"] == "None"
    assert (called["num_experts"], called["local_num_experts"]) == ("128", "128")
    assert (called["routing_method_type"], called["local_expert_offset"]) == ("1", "0")
