"""The rendered reference tests of all families but attention and norms.

They pass with the op modules' own references, at real sizes, and fail when a reference is wrong.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tasks import files
from tasks.dataset import DefinitionFiles
from tasks.define.reference_test import render
from tasks.ops import op_module
from tasks.ops.base import KernelSpec
from tasks.ops.sampling import _TOP_K, _TOP_P
from tests.unit.test_ops import PUBLISHED

with suppress(ImportError):  # the bench extra: tests marked so are skipped without it
    from tests.unit import test_references as references

torch = pytest.importorskip("torch")

pytestmark = pytest.mark.bench_extra


def published(name: str) -> KernelSpec:
    theirs = PUBLISHED[name]
    return op_module(theirs["op_type"]).spec_of(theirs)


def moe(variant: str, routing: str, top_k: int, experts: int, size: tuple[int, int]) -> KernelSpec:
    axes = {
        "num_experts": experts,
        "num_local_experts": experts,
        "hidden_size": size[0],
        "intermediate_size": size[1],
        "top_k": top_k,
    }
    name = f"moe_{variant}_{routing}_topk{top_k}_e{experts}_h{size[0]}_i{size[1]}"
    return references.make_spec("moe", variant, name, axes, {"routing": routing})


def unpublished() -> Iterator[KernelSpec]:
    """MiniMax's lightning attention (tp=8), GLM-4's embedding, Qwen1.5-MoE's routing."""
    for stage in ("decode", "prefill"):
        axes = {"num_heads": 8, "head_dim": 128}
        name = f"lightning_attn_{stage}_h8_d128"
        yield references.make_spec("lightning_attn", stage, name, axes)
    axes = {"head_size": 128, "rotary_dim": 64}
    name = "rope_with_cos_sin_cache_gptj_style_d128_rd64"
    yield references.make_spec("rope", "gptj", name, axes)
    yield moe("fp8_block_scale", "default", 4, 60, (2048, 1408))
    yield moe("fp4_block_scale_routed", "default", 4, 60, (2048, 1408))
    # Groups of a single expert, and groups where all experts are here.
    yield references.DEEPSEEK[16, 5]
    grouped = {"routing": "ds_routing", "n_group": 8, "topk_group": 4}
    axes = {**moe("", "", 6, 64, (512, 256)).axes}
    name = "moe_fp8_block_scale_ds_routing_topk6_ng8_kg4_e64_h512_i256"
    yield references.make_spec("moe", "fp8_block_scale", name, axes, grouped)


SPECS = {
    **{
        name: published(name)
        for name in (
            "gdn_decode_qk8_v16_d128_k_last",
            "gdn_prefill_qk16_v32_d128_k_last",
            "gdn_mtp_qk4_v8_d128_k_last",
            "mamba_ssu_decode_h128_d64_s128_ng8",
            "rope_with_cos_sin_cache_neox_style_d128_rd64",
            "gemm_n4096_k14336",
            "gemm_n128_k2048",
            "top_k_sampling_from_probs_v151936",
            "top_p_sampling_from_probs_v151936",
            "top_k_top_p_sampling_from_probs_v151936",
            "moe_fp8_block_scale_ds_routing_topk8_ng8_kg4_e32_h7168_i2048",
            "moe_fp8_block_scale_ds_routing_topk8_ng1_kg1_e48_h7168_i2048",
            "moe_fp8_block_scale_renorm_topk8_e128_h2048_i768",
            "trtllm_fp4_block_scale_moe_topk8_e128_h2048_i768",
            "trtllm_fp4_block_scale_moe_topk1_e16_h5120_i8192",
            "trtllm_fp4_block_scale_routed_moe_topk10_e128_h2048_i512",
            "trtllm_fp4_block_scale_routed_moe_topk1_e16_h5120_i8192",
            "trtllm_fp8_per_tensor_scale_moe_topk8_e128_h2048_i768",
            "trtllm_fp8_per_tensor_scale_moe_topk1_e16_h5120_i8192",
        )
    },
    **{spec.name: spec for spec in unpublished()},
}


def load(spec: KernelSpec, root: Path, edits: Mapping[str, str] | None = None) -> ModuleType:
    """Import the test of a dataset with this definition alone, its reference edited."""
    definition: Any = references.full_definition(spec)
    for old, new in (edits or {}).items():
        assert old in definition["reference"], old
        definition["reference"] = definition["reference"].replace(old, new)
    place = DefinitionFiles(spec.op_type, spec.name)
    files.write_json(root / place.definition, definition)
    files.write_text(root / place.reference_test, render(spec))
    found = importlib.util.spec_from_file_location("reference_test", root / place.reference_test)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", SPECS)
def test_reference_passes(name: str, tmp_path: Path) -> None:
    module = load(SPECS[name], tmp_path)
    assert module.CASES
    for case in module.CASES:
        module.test_reference_is_the_independent_computation(case)


STAYS = "torch.cumsum(values, dim=0) - values < p"
UP_AND_GATE = "up, gate = (x[tokens] @ w13.t())"
MUTATIONS = [
    # name, what is replaced by what: wrong alone.
    ("gdn_decode", "F.softplus(a.float() + dt_bias.float())", "(a.float() + dt_bias.float())"),
    ("gdn_decode", "F.softplus", "F.relu"),
    ("gdn_decode", "or scale == 0.0", ""),
    # The decay after the update.
    ("gdn_decode", "    state = decay[..., None, None] * state\n", ""),
    (
        "gdn_decode",
        "return state, torch",
        "state = decay[..., None, None] * state; return state, torch",
    ),
    # Value heads that share a key head are not neighbours.
    (
        "gdn_decode",
        "x.float().repeat_interleave(v.shape[-2] // x.shape[-2], dim=-2)",
        "torch.cat([x.float()] * (v.shape[-2] // x.shape[-2]), dim=-2)",
    ),
    (
        "gdn_decode",
        "correction[..., :, None] * k[..., None, :]",
        "correction[..., None, :] * k[..., None]",
    ),
    ("gdn_prefill", "int(cu_seqlens[i + 1])", "int(cu_seqlens[i + 1]) - 1"),
    (
        "gdn_prefill",
        "new_state[i], read = _step(new_state[i]",
        "new_state[i], read = _step(state[i].float()",
    ),
    ("gdn_prefill", "state.float().clone()", "torch.zeros_like(state)"),
    # Inputs that are written to.
    ("gdn_prefill", "state.float().clone()", "state.float()"),
    ("mamba", "state.clone()", "state"),
    ("lightning_attn_prefill", "state.clone()", "state"),
    (
        "gdn_mtp",
        "initial_state[initial_state_indices.to(torch.long)]",
        "initial_state[: q.shape[0]]",
    ),
    ("gdn_mtp", "return output, initial_state.clone()", "return output, initial_state * 1.001"),
    ("mamba", "F.softplus(dt[i].float() + dt_bias.float())", "F.softplus(dt[i].float())"),
    ("mamba", "step * x[i].float()", "x[i].float()"),
    ("mamba", "(nheads // ngroups, dim=0)", "(1, dim=0).repeat(nheads // ngroups, 1)"),
    ("mamba", "new_state[slot].float() + added", "new_state[i].float() + added"),
    ("mamba", "if slot < 0:", "if False:"),
    ("mamba", "+ D.float() * x[i].float()", "+ x[i].float()"),
    ("neox", "second * cos + first * sin", "second * cos - first * sin"),
    ("neox", ": rotary_dim // 2]", ":rotary_dim:2]"),
    ("gptj", "unsqueeze(1).chunk(2, dim=-1)", "unsqueeze(1).chunk(2, dim=-1)[::-1]"),
    ("gptj", "cos_sin_cache[positions]", "cos_sin_cache[: q.shape[0]]"),
    ("lightning_attn_decode", "-slope", "slope"),
    ("lightning_attn_decode", "head_dim == 128\n", "head_dim == 128\n    state = state.mT\n"),
    ("lightning_attn_prefill", "decay * new_state[b] + added", "decay * (new_state[b] + added)"),
    ("lightning_attn_prefill", "state.clone()", "torch.zeros_like(state)"),
    ("gemm_n128", "torch.matmul(A, B.T)", "torch.matmul(A, B.flip(0).T)"),
    ("gemm_n128", "torch.matmul(A, B.T)", "torch.matmul(A.bfloat16(), B.bfloat16().T).half()"),
    ("top_k_sampling", "torch.topk(row, k)", "torch.topk(row, k + 1)"),
    ("top_k_sampling", "torch.topk(row, k)", "torch.topk(row, max(1, k - 1))"),
    ("top_k_sampling", "int(top_k[i].item())", "max(1, int(top_k[i].item()))"),
    ("top_k_sampling", "torch.multinomial(row,", "torch.multinomial((row > 0).float(),"),
    (
        "top_k_sampling",
        "torch.multinomial(row, 1, replacement=True).squeeze(0)",
        "torch.argmax(row)",
    ),
    ("top_p_sampling", STAYS, "(torch.cumsum(values, dim=0) < p) | (values == values[0])"),
    ("top_p_sampling", STAYS, "torch.cumsum(values, dim=0) - 2 * values < p"),
    ("top_p_sampling", "torch.argmax(row)", "torch.multinomial(row, 1).squeeze(0)"),
    ("top_k_top_p", "filtered / filtered.sum()", "filtered"),
    ("top_k_top_p", _TOP_K + _TOP_P, _TOP_P + _TOP_K),
    ("top_k_top_p", "if p < 1.0", "if False"),
    ("top_k_top_p", "0 < k < vocab_size", "False"),
    ("e128_h2048_i768", UP_AND_GATE, UP_AND_GATE.replace("up, gate", "gate, up")),
    ("e128_h2048_i768", "functional.silu", "functional.gelu"),
    ("block_scale_renorm", "torch.softmax(top_logits, dim=-1)", "torch.sigmoid(top_logits)"),
    ("block_scale_renorm", "expand(gemm1_weights_scale[e])", "expand(gemm1_weights_scale[0])"),
    (
        "block_scale_renorm",
        "expand(gemm2_weights_scale[e])",
        "expand(gemm2_weights_scale[e].flip(0))",
    ),
    ("block_scale_renorm", "hidden_states_scale.t()", "hidden_states_scale.t().roll(1, 0)"),
    (
        "moe_fp8_block_scale_default",
        "probabilities, chosen = torch.topk(scores, k=top_k, dim=-1)",
        "probabilities, chosen = torch.topk(scores, k=top_k, dim=-1)\n"
        "    probabilities = probabilities / probabilities.sum(dim=-1, keepdim=True)",
    ),
    ("_ng8_kg4_e64", "masked_fill(~allowed", "masked_fill(~torch.ones_like(allowed)"),
    ("_ng8_kg4_e64", "k=min(2, groups.shape[-1])", "k=1"),
    ("_ng8_kg4_e32", "k=min(2, groups.shape[-1])", "k=1"),
    ("_ng8_kg4_e32", ".values.sum(dim=-1)", ".values.max(dim=-1).values"),
    ("_ng8_kg4_e64", "torch.gather(scores", "torch.gather(biased"),
    ("_ng8_kg4_e64", "(probabilities.sum(dim=-1, keepdim=True) + 1e-20)", "1"),
    ("_ng8_kg4_e64", "* float(routed_scaling_factor)", ""),
    ("_ng8_kg4_e64", "scores + routing_bias.to(torch.float32)", "scores"),
    (references.DEEPSEEK[16, 5].name, "offset = int(local_expert_offset)", "offset = 0"),
    ("trtllm_fp4_block_scale_moe_topk1", "(weight * x[tokens])", "x[tokens]"),
    ("trtllm_fp4_block_scale_moe_topk8", "gemm2_weights[e]", "gemm2_weights[0]"),
    ("routed_moe_topk10", "bits - 0x10000", "bits - 0x8000"),
    ("routed_moe_topk10", "topk_ids >> 16", "(topk_ids >> 16) + 1"),
    (
        "routed_moe_topk10",
        "output.index_add_(0, tokens, weight",
        "output.index_copy_(0, tokens, weight",
    ),
    ("per_tensor_scale_moe_topk8", "* output1_scales_gate_scalar[e]", "* output1_scales_scalar[e]"),
    ("per_tensor_scale_moe_topk8", "* output2_scales_scalar[e]", "* output2_scales_scalar[0]"),
]


@pytest.mark.parametrize(("part", "old", "new"), MUTATIONS)
def test_wrong_reference_fails(part: str, old: str, new: str, tmp_path: Path) -> None:
    name = next(name for name in SPECS if part in name)
    module = load(SPECS[name], tmp_path, {old: new})

    def right(case: str) -> bool:
        try:
            module.prove(case)
        except AssertionError:
            return False
        return True

    assert not all(right(case) for case in module.CASES)
