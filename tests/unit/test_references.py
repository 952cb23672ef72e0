"""The op modules' own references, each against an independent computation of the same thing.

Independent means another algorithm, mostly in float64: `torch.nn.functional` where it has the
operation, NumPy, or plain Python loops that follow the definition of the operation literally.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from fractions import Fraction
from itertools import accumulate, pairwise, product
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from tasks.define.check import check_definition
from tasks.ops import op_module
from tasks.ops.base import Json, KernelSpec

if TYPE_CHECKING:
    from torch import Generator, Tensor

torch = pytest.importorskip("torch")

pytestmark = pytest.mark.bench_extra

# An output is the float32 result rounded once to its dtype, so it may be off by the unit roundoff:
# 2^-8 for bfloat16's 8 significant bits, 2^-11 for float16's 11.
BFLOAT16 = 2.0**-8
FLOAT16 = 2.0**-11
# float32 sums of some hundred terms: 2^-24 for each operation, relative to the largest values that
# are added up, which cancellation can make larger than the sum. 1e-5 is 168 such roundings.
ACCUMULATION = 1e-5


def make_spec(
    op_type: str,
    variant: str,
    name: str,
    axes: Mapping[str, int],
    constants: Mapping[str, float | str] | None = None,
) -> KernelSpec:
    return KernelSpec(
        name=name,
        op_type=op_type,
        variant=variant,
        axes=dict(axes),
        constants=dict(constants or {}),
        origin=(f"{variant}: a small size",),
    )


def norm_spec(variant: str, eps: float) -> KernelSpec:
    name = f"{variant}_h96_eps{eps:g}".translate(str.maketrans(".-", "__"))
    return make_spec("rmsnorm", variant, name, {"hidden_size": 96}, {"eps": eps})


def paged_spec(stage: str, page_size: int) -> KernelSpec:
    axes = {"num_qo_heads": 6, "num_kv_heads": 2, "head_dim": 16, "page_size": page_size}
    return make_spec("gqa_paged", stage, f"gqa_paged_{stage}_h6_kv2_d16_ps{page_size}", axes)


def moe_spec(
    variant: str,
    experts: int,
    local: int,
    groups: tuple[int, int] | None = None,
    routing: str = "renorm",
) -> KernelSpec:
    axes = {
        "num_experts": experts,
        "num_local_experts": local,
        "hidden_size": 256,
        "intermediate_size": 128,
        "top_k": 3,
    }
    name = f"moe_{variant}_{routing}_topk3_e{local}_h256_i128"
    if groups is None:
        return make_spec("moe", variant, name, axes, {"routing": routing})
    constants = {"routing": "ds_routing", "n_group": groups[0], "topk_group": groups[1]}
    return make_spec("moe", variant, f"{name}_ng{groups[0]}_kg{groups[1]}", axes, constants)


def lightning_spec(stage: str) -> KernelSpec:
    axes = {"num_heads": 3, "head_dim": 16}
    return make_spec("lightning_attn", stage, f"lightning_attn_{stage}_h3_d16", axes)


EPSILONS = (1e-6, 0.25)
"""What models use, and one so large that leaving it out or adding it elsewhere shows."""
VOCABULARY = 9
DEEPSEEK_GROUPS = ((4, 2), (1, 1), (16, 5))
"""Groups and kept groups of 16 experts: some, no grouping, groups of a single expert."""

RMSNORM = {eps: norm_spec("rmsnorm", eps) for eps in EPSILONS}
FUSED_ADD_RMSNORM = {eps: norm_spec("fused_add_rmsnorm", eps) for eps in EPSILONS}
PAGED_DECODE = {size: paged_spec("decode", size) for size in (1, 4)}
PAGED_PREFILL = {size: paged_spec("prefill", size) for size in (1, 4)}
RAGGED = make_spec(
    "gqa_ragged",
    "prefill",
    "gqa_ragged_prefill_causal_h6_kv2_d16",
    {"num_qo_heads": 6, "num_kv_heads": 2, "head_dim": 16},
)
FP8_BLOCK = moe_spec("fp8_block_scale", 8, 8)
DEEPSEEK = {groups: moe_spec("fp8_block_scale", 16, 4, groups) for groups in DEEPSEEK_GROUPS}
# A rank with half of the experts, which its definition counts as all of them.
FP4_BLOCK = moe_spec("fp4_block_scale", 16, 8)
FP4_ROUTED = moe_spec("fp4_block_scale_routed", 16, 8)
FP8_PER_TENSOR = moe_spec("fp8_per_tensor", 16, 8)
FP8_DEFAULT = moe_spec("fp8_block_scale", 8, 8, routing="default")
FP4_LLAMA4 = moe_spec("fp4_block_scale", 16, 8, routing="llama4")
FP8_LLAMA4 = moe_spec("fp8_per_tensor", 16, 8, routing="llama4")
SAMPLING = {
    variant: make_spec("sampling", variant, f"{variant}_v{VOCABULARY}", {"vocab_size": VOCABULARY})
    for variant in (
        "top_k_sampling_from_probs",
        "top_p_sampling_from_probs",
        "top_k_top_p_sampling_from_probs",
    )
}
LIGHTNING_DECODE, LIGHTNING_PREFILL = lightning_spec("decode"), lightning_spec("prefill")
GEMM = make_spec("gemm", "gemm", "gemm_n24_k80", {"N": 24, "K": 80})

SPECS = [
    *RMSNORM.values(),
    *FUSED_ADD_RMSNORM.values(),
    *PAGED_DECODE.values(),
    *PAGED_PREFILL.values(),
    RAGGED,
    FP8_BLOCK,
    *DEEPSEEK.values(),
    FP4_BLOCK,
    FP4_ROUTED,
    FP8_PER_TENSOR,
    FP8_DEFAULT,
    FP4_LLAMA4,
    FP8_LLAMA4,
    *SAMPLING.values(),
    LIGHTNING_DECODE,
    LIGHTNING_PREFILL,
    GEMM,
]


def full_definition(spec: KernelSpec) -> Json:
    """The definition as it is published."""
    own = op_module(spec.op_type).definition(spec)
    return {"name": spec.name, "op_type": spec.op_type, **own}


def bind_axes(tensors: Json, values: Mapping[str, Any], axes: dict[str, int]) -> None:
    """Check values against a definition's inputs or outputs, adding var axes to `axes`."""
    assert set(values) == set(tensors)
    for name, declared in tensors.items():
        value = values[name]
        if declared["shape"] is None:
            assert isinstance(value, int if declared["dtype"].startswith("int") else float), name
            continue
        assert value.dtype == getattr(torch, declared["dtype"]), name
        assert value.dim() == len(declared["shape"]), name
        for axis, size in zip(declared["shape"], value.shape, strict=True):
            assert axes.setdefault(axis, size) == size, f"{name}: {axis}"


def raw_bytes(value: Tensor) -> bytes:
    """Its memory: comparable whatever the dtype, NaN included."""
    return value.contiguous().view(torch.uint8).numpy().tobytes()


def run_reference(spec: KernelSpec, inputs: Mapping[str, Any]) -> tuple[Tensor, ...]:
    """Run a definition's reference on inputs that honour it; check the outputs' form.

    Inputs and outputs have the declared dtypes and shapes, constraints hold, inputs stay as they
    were.
    """
    definition = full_definition(spec)
    axes = {k: v["value"] for k, v in definition["axes"].items() if v["type"] == "const"}
    bind_axes(definition["inputs"], inputs, axes)
    assert set(axes) == set(definition["axes"])
    for constraint in definition.get("constraints", []):
        assert eval(constraint, {}, {**axes, **inputs}), constraint
    before = {k: raw_bytes(v) for k, v in inputs.items() if isinstance(v, torch.Tensor)}

    namespace: dict[str, Any] = {}
    exec(definition["reference"], namespace)
    result = namespace["run"](*(inputs[name] for name in definition["inputs"]))

    outputs = result if isinstance(result, tuple) else (result,)
    names = list(definition["outputs"])
    bind_axes(definition["outputs"], dict(zip(names, outputs, strict=True)), axes)
    assert {name: raw_bytes(inputs[name]) for name in before} == before
    return outputs


def random(shape: Sequence[int], generator: Generator, dtype: str = "bfloat16") -> Tensor:
    """Normally distributed values."""
    return torch.randn(*shape, generator=generator).to(getattr(torch, dtype))


def seeded(seed: int) -> Generator:
    return torch.Generator().manual_seed(seed)


def indptr(lengths: Sequence[int]) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


def assert_close(got: Tensor, expected: Tensor, rounding: float, absolute: float) -> None:
    """Compare with a float64 result; infinities must be equal."""
    torch.testing.assert_close(got.double(), expected.double(), rtol=rounding, atol=absolute)


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_definition_is_accepted(spec: KernelSpec) -> None:
    from flashinfer_bench.data import Definition

    definition = full_definition(spec)
    check_definition(definition)
    accepted = Definition.model_validate(definition)
    assert accepted.name == spec.name
    assert list(accepted.inputs) == list(definition["inputs"])


# --- rmsnorm -----------------------------------------------------------------------------------


@pytest.mark.parametrize("eps", EPSILONS)
def test_rmsnorm(eps: float) -> None:
    generator = seeded(1)
    x, weight = random((7, 96), generator), random((96,), generator)
    x[3] = 0
    x[4] *= 0.01
    (output,) = run_reference(RMSNORM[eps], {"hidden_states": x, "weight": weight})
    expected = torch.nn.functional.rms_norm(x.double(), (96,), weight.double(), eps)
    # Values are of order 1 (normalised, times a weight of order 1).
    assert_close(output, expected, BFLOAT16, ACCUMULATION)


@pytest.mark.parametrize("eps", EPSILONS)
def test_fused_add_rmsnorm(eps: float) -> None:
    generator = seeded(2)
    x, residual = random((5, 96), generator), 3 * random((5, 96), generator)
    weight = random((96,), generator)
    residual[2] = -x[2]
    inputs = {"hidden_states": x, "residual": residual, "weight": weight}
    (output,) = run_reference(FUSED_ADD_RMSNORM[eps], inputs)
    summed = x.double() + residual.double()
    expected = torch.nn.functional.rms_norm(summed, (96,), weight.double(), eps)
    # Values are of order 1, as above; the sum of two bfloat16 is exact enough in float32.
    assert_close(output, expected, BFLOAT16, ACCUMULATION)


# --- grouped-query attention -------------------------------------------------------------------

SOFTMAX_SCALE = 0.3
"""Not 1/sqrt(head_dim): the input must be what decides."""


def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Attend one sequence's queries [length, heads, dim] in float64, the last one to every key.

    Returns:
        The output, 0 for a query that sees no key, and the base-2 log-sum-exp of the logits.
    """
    q, k, v = (x.double().transpose(0, 1) for x in (q, k, v))
    queries, keys, repeats = q.shape[1], k.shape[1], q.shape[0] // k.shape[0]
    # Query i of `queries` stands `queries - 1 - i` tokens before the last key.
    mask = torch.tensor(
        [[key <= keys - queries + query for key in range(keys)] for query in range(queries)],
        dtype=torch.bool,
    ).reshape(queries, keys)
    k, v = (torch.stack([x[h // repeats] for h in range(q.shape[0])]) for x in (k, v))
    output = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, scale=SOFTMAX_SCALE
    )
    output[:, ~mask.any(dim=1)] = 0.0
    powers = torch.exp2(q @ k.transpose(1, 2) * SOFTMAX_SCALE * math.log2(math.e))
    lse = torch.log2((powers * mask).sum(dim=-1))
    return output.transpose(0, 1), lse.transpose(0, 1)


def check_attention(
    got: tuple[Tensor, ...],
    queries: Sequence[Tensor],
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
) -> None:
    """Compare all sequences' outputs, given each sequence's own tensors."""
    expected = [attend(q, k, v) for q, k, v in zip(queries, keys, values, strict=True)]
    output, lse = (torch.cat(parts) for parts in zip(*expected, strict=True))
    # Outputs are averages of values of order 1; the lse is float32 and of order 10.
    assert_close(got[0], output, BFLOAT16, ACCUMULATION)
    assert_close(got[1], lse, 0.0, ACCUMULATION)


def paged_cache(
    keys: Sequence[Tensor], values: Sequence[Tensor], page_size: int, generator: Generator
) -> dict[str, Any]:
    """Lay sequences out over shuffled pages; slots that no token has are NaN, and not to be read.

    Returns:
        The inputs k_cache, v_cache, kv_indptr, kv_indices and, for pages of several tokens,
        kv_last_page_len (0 for an empty sequence).
    """
    counts = [math.ceil(len(k) / page_size) for k in keys]
    shuffled = torch.randperm(sum(counts) + 3, generator=generator).tolist()
    shape = (len(shuffled), page_size, *keys[0].shape[1:])
    caches = {
        name: torch.full(shape, math.nan, dtype=torch.bfloat16) for name in ("k_cache", "v_cache")
    }
    pages, last = [], []
    for k, v, count in zip(keys, values, counts, strict=True):
        own = [shuffled.pop() for _ in range(count)]
        for position in range(len(k)):
            page, slot = own[position // page_size], position % page_size
            caches["k_cache"][page, slot] = k[position]
            caches["v_cache"][page, slot] = v[position]
        pages += own
        last.append(len(k) - (count - 1) * page_size if count else 0)
    assert pages != sorted(pages)
    inputs = {
        **caches,
        "kv_indptr": indptr(counts),
        "kv_indices": torch.tensor(pages, dtype=torch.int32),
        "sm_scale": SOFTMAX_SCALE,
    }
    if page_size > 1:
        inputs["kv_last_page_len"] = torch.tensor(last, dtype=torch.int32)
    return inputs


# Empty, one token, one page of 4 exactly, several pages ending full and partly filled.
KV_LENGTHS = (5, 0, 1, 4, 8, 11)


@pytest.mark.parametrize("page_size", PAGED_DECODE)
def test_gqa_paged_decode(page_size: int) -> None:
    generator = seeded(3)
    keys = [random((n, 2, 16), generator) for n in KV_LENGTHS]
    values = [random((n, 2, 16), generator) for n in KV_LENGTHS]
    q = random((len(KV_LENGTHS), 6, 16), generator)
    inputs = {"q": q, **paged_cache(keys, values, page_size, generator)}
    got = run_reference(PAGED_DECODE[page_size], inputs)
    check_attention(got, q.split(1), keys, values)
    assert not got[0][1].any()
    assert torch.isneginf(got[1][1]).all()


# As long as the KV, no query at all, behind a cached prefix, and over an empty KV.
PREFILL_LENGTHS = ((5, 5), (2, 0), (0, 3), (1, 1), (3, 4), (4, 11), (1, 9), (8, 8))
# More queries than keys: the first ones see nothing.
LONGER_QUERY = ((3, 2), (5, 1), (2, 6))


@pytest.mark.parametrize("lengths", [PREFILL_LENGTHS, LONGER_QUERY], ids=["prefill", "longer_q"])
@pytest.mark.parametrize("page_size", PAGED_PREFILL)
def test_gqa_paged_prefill(page_size: int, lengths: Sequence[tuple[int, int]]) -> None:
    generator = seeded(4)
    queries = [random((n, 6, 16), generator) for n, _ in lengths]
    keys = [random((n, 2, 16), generator) for _, n in lengths]
    values = [random((n, 2, 16), generator) for _, n in lengths]
    inputs = {
        "q": torch.cat(queries),
        "qo_indptr": indptr([n for n, _ in lengths]),
        **paged_cache(keys, values, page_size, generator),
    }
    got = run_reference(PAGED_PREFILL[page_size], inputs)
    check_attention(got, queries, keys, values)


@pytest.mark.parametrize("lengths", [PREFILL_LENGTHS, LONGER_QUERY], ids=["prefill", "longer_q"])
def test_gqa_ragged(lengths: Sequence[tuple[int, int]]) -> None:
    generator = seeded(5)
    queries = [random((n, 6, 16), generator) for n, _ in lengths]
    keys = [random((n, 2, 16), generator) for _, n in lengths]
    values = [random((n, 2, 16), generator) for _, n in lengths]
    inputs = {
        "q": torch.cat(queries),
        "k": torch.cat(keys),
        "v": torch.cat(values),
        "qo_indptr": indptr([n for n, _ in lengths]),
        "kv_indptr": indptr([n for _, n in lengths]),
        "sm_scale": SOFTMAX_SCALE,
    }
    got = run_reference(RAGGED, inputs)
    check_attention(got, queries, keys, values)


# --- mixture of experts ------------------------------------------------------------------------

TOKENS, HIDDEN, WIDTH, TOP_K, BLOCK = 7, 256, 128, 3, 128
Weights = list[list[float]]
"""Weight of each expert for each token, mostly 0."""


def largest(values: Sequence[float], count: int) -> list[int]:
    return sorted(range(len(values)), key=lambda i: values[i], reverse=True)[:count]


def renormalised(logits: Tensor) -> Weights:
    """Softmax over all experts; the chosen ones' probabilities are scaled to a sum of 1."""
    rows = []
    for row in logits.double().tolist():
        exponentials = [math.exp(value) for value in row]
        chosen = largest(row, TOP_K)
        total = sum(exponentials[e] for e in chosen)
        rows.append([exponentials[e] / total if e in chosen else 0.0 for e in range(len(row))])
    return rows


def deepseek(logits: Tensor, bias: Tensor, groups: int, kept_groups: int, factor: float) -> Weights:
    """DeepSeek-V3's group-limited routing, literally (arXiv 2412.19437, section 2.1.2).

    Experts are chosen by biased sigmoid scores out of the groups whose two best add up to most;
    they are weighted by their scores without the bias.
    """
    rows = []
    for row in logits.double().tolist():
        scores = [1.0 / (1.0 + math.exp(-value)) for value in row]
        biased = [s + b for s, b in zip(scores, bias.double().tolist(), strict=True)]
        size = len(row) // groups
        members = [range(g * size, (g + 1) * size) for g in range(groups)]
        marks = [sum(sorted((biased[e] for e in m), reverse=True)[:2]) for m in members]
        open_to = [e for g in largest(marks, kept_groups) for e in members[g]]
        chosen = sorted(open_to, key=lambda e: biased[e], reverse=True)[:TOP_K]
        total = sum(scores[e] for e in chosen)
        rows.append([factor * scores[e] / total if e in chosen else 0.0 for e in range(len(row))])
    return rows


def dense_experts(
    x: np.ndarray, up: np.ndarray, gate: np.ndarray, down: np.ndarray, weights: Weights
) -> Tensor:
    """Evaluate every expert for every token in float64 and add them up by weight."""
    output = np.zeros_like(x)
    for expert, column in enumerate(np.array(weights).T):
        opened = x @ gate[expert].T
        hidden = opened / (1.0 + np.exp(-opened)) * (x @ up[expert].T)
        output += column[:, None] * (hidden @ down[expert].T)
    return torch.from_numpy(output)


def check_experts(got: Tensor, expected: Tensor) -> None:
    # Two matrix products of at most 256 terms after each other; entries cancel to far below the
    # largest one, which is the size of what is added up.
    assert_close(got, expected, BFLOAT16, ACCUMULATION * expected.abs().max().item())


def distinct_logits(experts: int, generator: Generator) -> Tensor:
    """Router logits exact in bfloat16 and different from each other, so that top-k is unique."""
    rows = [torch.randperm(experts, generator=generator) for _ in range(TOKENS)]
    return ((torch.stack(rows) - experts / 2) / 4).to(torch.bfloat16)


def array(value: Tensor) -> np.ndarray:
    return value.double().numpy()


def fp8_block_inputs(local: int, generator: Generator) -> dict[str, Tensor]:
    """Everything but the routing, with a scale of its own for each block."""

    def scales(*shape: int) -> Tensor:
        return 0.02 + 0.1 * torch.rand(*shape, generator=generator)

    return {
        "hidden_states": random((TOKENS, HIDDEN), generator, "float8_e4m3fn"),
        "hidden_states_scale": scales(HIDDEN // BLOCK, TOKENS) * 20,
        "gemm1_weights": random((local, 2 * WIDTH, HIDDEN), generator, "float8_e4m3fn"),
        "gemm1_weights_scale": scales(local, 2 * WIDTH // BLOCK, HIDDEN // BLOCK),
        "gemm2_weights": random((local, HIDDEN, WIDTH), generator, "float8_e4m3fn"),
        "gemm2_weights_scale": scales(local, HIDDEN // BLOCK, WIDTH // BLOCK),
    }


def fp8_block_expected(inputs: Mapping[str, Any], weights: Weights) -> Tensor:
    """Scale each value by its block's scale (a Kronecker product), then the dense computation."""
    square = np.ones((BLOCK, BLOCK))
    scale = np.kron(array(inputs["hidden_states_scale"]).T, np.ones((1, BLOCK)))
    w13, w2 = (
        np.stack([array(w) * np.kron(array(s), square) for w, s in zip(*pair, strict=True)])
        for pair in (
            (inputs["gemm1_weights"], inputs["gemm1_weights_scale"]),
            (inputs["gemm2_weights"], inputs["gemm2_weights_scale"]),
        )
    )
    x = array(inputs["hidden_states"]) * scale
    return dense_experts(x, w13[:, :WIDTH], w13[:, WIDTH:], w2, weights)


def test_moe_fp8_block_scale_renormalised() -> None:
    generator = seeded(6)
    logits = distinct_logits(8, generator)
    inputs = {"routing_logits": logits, **fp8_block_inputs(8, generator)}
    (output,) = run_reference(FP8_BLOCK, inputs)
    check_experts(output, fp8_block_expected(inputs, renormalised(logits)))


def top_k_of(scores: Sequence[Sequence[float]]) -> list[list[float]]:
    """Keep the three largest scores of every row, zero the others."""
    kept = [sorted(row, reverse=True)[:TOP_K] for row in scores]
    return [
        [score if score in best else 0.0 for score in row]
        for row, best in zip(scores, kept, strict=True)
    ]


def test_moe_fp8_block_scale_default() -> None:
    generator = seeded(12)
    logits = distinct_logits(8, generator)
    inputs = {"routing_logits": logits, **fp8_block_inputs(8, generator)}
    rows = logits.double().tolist()
    scores = [[math.exp(x) / sum(map(math.exp, row)) for x in row] for row in rows]
    (output,) = run_reference(FP8_DEFAULT, inputs)
    check_experts(output, fp8_block_expected(inputs, top_k_of(scores)))


def llama4_experts(
    x: np.ndarray, up: np.ndarray, gate: np.ndarray, down: np.ndarray, logits: Tensor
) -> Tensor:
    """Each chosen expert applied to the token scaled by the sigmoid of its logit."""
    output = np.zeros((TOKENS, HIDDEN))
    for token, row in enumerate(logits.double().tolist()):
        chosen = sorted(range(len(row)), key=lambda expert: -row[expert])[:TOP_K]
        for expert in chosen:
            scaled = x[token] / (1.0 + math.exp(-row[expert]))
            opened = gate[expert] @ scaled
            hidden = opened / (1.0 + np.exp(-opened)) * (up[expert] @ scaled)
            output[token] += down[expert] @ hidden
    return torch.from_numpy(output)


def test_moe_fp4_llama4() -> None:
    generator = seeded(13)
    logits = distinct_logits(8, generator)
    bias = {"routing_bias": random((8,), generator)}
    inputs = {"routing_logits": logits, **bias, **fp4_inputs(generator)}
    w13, w2 = array(inputs["gemm1_weights"]), array(inputs["gemm2_weights"])
    x = array(inputs["hidden_states"])
    (output,) = run_reference(FP4_LLAMA4, inputs)
    check_experts(output, llama4_experts(x, w13[:, :WIDTH], w13[:, WIDTH:], w2, logits))


def test_moe_fp8_per_tensor_llama4() -> None:
    generator = seeded(14)
    logits = distinct_logits(8, generator)
    inputs = {
        "routing_logits": logits,
        "routing_bias": random((8,), generator),
        **per_tensor_inputs(generator),
    }
    (output,) = run_reference(FP8_LLAMA4, inputs)
    x, up, gate, down = per_tensor_weights(inputs)
    down = down * array(inputs["output2_scales_scalar"])[:, None, None]
    check_experts(output, llama4_experts(x, up, gate, down, logits))


@pytest.mark.parametrize("offset", [0, 4, 12])
@pytest.mark.parametrize("groups", DEEPSEEK_GROUPS, ids=str)
def test_moe_fp8_block_scale_deepseek(groups: tuple[int, int], offset: int) -> None:
    generator = seeded(7)
    inputs = {
        "routing_logits": 2 * random((TOKENS, 16), generator, "float32"),
        # About -1: biased scores are negative too. The spread is as large as that of the scores.
        "routing_bias": 0.3 * random((16,), generator) - 1,
        **fp8_block_inputs(4, generator),
        "local_expert_offset": offset,
        "routed_scaling_factor": 2.5,
    }
    weights = deepseek(inputs["routing_logits"], inputs["routing_bias"], *groups, factor=2.5)
    assert all(sum(1 for weight in row if weight) == TOP_K for row in weights)
    # This rank has 4 of the 16 experts and adds up only those.
    own = [row[offset : offset + 4] for row in weights]
    assert any(map(any, own)), "these inputs give the rank nothing to do"
    (output,) = run_reference(DEEPSEEK[groups], inputs)
    check_experts(output, fp8_block_expected(inputs, own))


def fp4_inputs(generator: Generator) -> dict[str, Tensor]:
    return {
        "hidden_states": random((TOKENS, HIDDEN), generator),
        "gemm1_weights": random((8, 2 * WIDTH, HIDDEN), generator, "float32") / 8,
        "gemm2_weights": random((8, HIDDEN, WIDTH), generator, "float32") / 8,
    }


def fp4_expected(inputs: Mapping[str, Any], weights: Weights) -> Tensor:
    w13, w2 = array(inputs["gemm1_weights"]), array(inputs["gemm2_weights"])
    x = array(inputs["hidden_states"])
    return dense_experts(x, w13[:, :WIDTH], w13[:, WIDTH:], w2, weights)


def test_moe_fp4_block_scale() -> None:
    generator = seeded(8)
    logits = distinct_logits(8, generator)
    inputs = {"routing_logits": logits, **fp4_inputs(generator)}
    (output,) = run_reference(FP4_BLOCK, inputs)
    check_experts(output, fp4_expected(inputs, renormalised(logits)))


def test_moe_fp4_block_scale_routed() -> None:
    generator = seeded(9)
    packed, weights = [], []
    for token in range(TOKENS):
        chosen = torch.randperm(8, generator=generator)[:TOP_K].tolist()
        if token == 2:
            chosen[1] = chosen[0]
        row = [0.0] * 8
        ids = []
        for expert, value in zip(
            chosen, torch.randn(TOP_K, generator=generator).tolist(), strict=True
        ):
            # bfloat16 is the upper half of float32 (IEEE 754 binary32, big-endian here).
            upper = struct.pack(">f", value)[:2]
            row[expert] += struct.unpack(">f", upper + b"\0\0")[0]
            ids.append(expert << 16 | int.from_bytes(upper, "big"))
        packed.append(ids)
        weights.append(row)
    flat = [weight for row in weights for weight in row]
    assert min(flat) < 0 < max(flat)
    inputs = {"topk_ids": torch.tensor(packed, dtype=torch.int32), **fp4_inputs(generator)}
    (output,) = run_reference(FP4_ROUTED, inputs)
    check_experts(output, fp4_expected(inputs, weights))


def per_tensor_inputs(generator: Generator) -> dict[str, Tensor]:
    return {
        "hidden_states": random((TOKENS, HIDDEN), generator, "float8_e4m3fn"),
        "gemm1_weights": random((8, 2 * WIDTH, HIDDEN), generator, "float8_e4m3fn"),
        "output1_scales_scalar": 0.05 + torch.rand(8, generator=generator),
        "output1_scales_gate_scalar": 0.05 + 0.2 * torch.rand(8, generator=generator),
        "gemm2_weights": random((8, HIDDEN, WIDTH), generator, "float8_e4m3fn"),
        "output2_scales_scalar": 0.05 + torch.rand(8, generator=generator),
    }


def per_tensor_weights(inputs: Mapping[str, Any]) -> tuple[np.ndarray, ...]:
    """The tokens, and the up, gate and down weights with the scales of the first product."""
    w13, w2 = array(inputs["gemm1_weights"]), array(inputs["gemm2_weights"])
    up = w13[:, :WIDTH] * array(inputs["output1_scales_scalar"])[:, None, None]
    gate = w13[:, WIDTH:] * array(inputs["output1_scales_gate_scalar"])[:, None, None]
    return array(inputs["hidden_states"]), up, gate, w2


def test_moe_fp8_per_tensor() -> None:
    generator = seeded(10)
    logits = distinct_logits(8, generator)
    inputs = {"routing_logits": logits, **per_tensor_inputs(generator)}
    (output,) = run_reference(FP8_PER_TENSOR, inputs)
    x, up, gate, down = per_tensor_weights(inputs)
    # The output scale is applied to the result: as a part of the weights, it is the same.
    scale2 = array(inputs["output2_scales_scalar"])
    weights = [[w * s for w, s in zip(row, scale2, strict=True)] for row in renormalised(logits)]
    check_experts(output, dense_experts(x, up, gate, down, weights))


# --- sampling ----------------------------------------------------------------------------------

DRAWS = 3000
"""Per setting. The rarest token has probability 1/64: it is missed with (63/64)^3000 < 1e-20."""
DISTRIBUTIONS = ((4, 20, 1, 9, 7, 13, 2, 5, 3), (0, 3, 30, 2, 0, 16, 5, 8, 0))
"""In 64ths, so exact in float32 and without ties among what can be drawn."""
TOP_K_SETTINGS = (1, 3, 4, VOCABULARY, 0, VOCABULARY + 11)
"""0 and more than the vocabulary filter nothing."""
TOP_P_SETTINGS = (0.0, 0.3, 0.5, 0.6, 0.9, 0.98, 1.0)
# Where top-p sees the probabilities as top-k has renormalised them, (2, 0.6) and (3, 0.7) leave one
# token less than on the original ones.
BOTH_SETTINGS = ((2, 0.6), (3, 0.7), (5, 0.45), (0, 0.5), (4, 1.0), (4, 0.0), (VOCABULARY, 0.9))


def remaining(masses: Sequence[int], top_k: int | None, top_p: float | None) -> dict[int, Fraction]:
    """The tokens that may be drawn, with their probabilities, in exact arithmetic.

    The `top_k` most likely tokens; of those, renormalised, the fewest most likely ones whose
    probabilities reach `top_p`, and at least one.
    """
    ranked = sorted(range(len(masses)), key=lambda token: masses[token], reverse=True)
    if top_k is not None and top_k > 0:
        ranked = ranked[:top_k]
    if top_p is not None:
        whole = sum(masses[token] for token in ranked)
        nucleus: list[int] = []
        threshold = Fraction(float(np.float32(top_p)))
        while not nucleus or Fraction(sum(masses[t] for t in nucleus), whole) < threshold:
            nucleus.append(ranked[len(nucleus)])
        ranked = nucleus
    total = sum(masses[token] for token in ranked)
    return {token: Fraction(masses[token], total) for token in ranked if masses[token]}


def check_draws(samples: Sequence[int], expected: Mapping[int, Fraction]) -> None:
    """Check that exactly the expected tokens are drawn, about as often as they should be."""
    counts = {token: samples.count(token) for token in set(samples)}
    assert set(counts) == set(expected)
    share = {token: float(p) * len(samples) for token, p in expected.items()}
    statistic = sum((counts[t] - share[t]) ** 2 / share[t] for t in expected)
    # Pearson's statistic is about chi-square with n - 1 degrees of freedom, and a chi-square
    # variable exceeds n + 2 sqrt(n t) + 2 t with probability at most exp(-t) (Laurent and Massart
    # 2000, lemma 1). t = 14: one correct sampler in a million fails, and the seed is fixed.
    freedom, t = len(expected) - 1, 14.0
    assert statistic <= freedom + 2 * math.sqrt(freedom * t) + 2 * t


def check_sampling(variant: str, settings: Sequence[tuple[int | None, float | None]]) -> None:
    """Draw from both distributions at all settings, in one batch whose rows alternate."""
    cases = [(masses, *setting) for masses in DISTRIBUTIONS for setting in settings]
    rows = cases * DRAWS
    inputs = {"probs": torch.tensor([masses for masses, _, _ in rows], dtype=torch.float32) / 64}
    if "top_k" in variant:
        inputs["top_k"] = torch.tensor([k for _, k, _ in rows], dtype=torch.int32)
    if "top_p" in variant:
        inputs["top_p"] = torch.tensor([p for _, _, p in rows], dtype=torch.float32)
    torch.manual_seed(11)
    (samples,) = run_reference(SAMPLING[variant], inputs)
    for i, case in enumerate(cases):
        check_draws(samples[i :: len(cases)].tolist(), remaining(*case))


def test_top_k_sampling() -> None:
    check_sampling("top_k_sampling_from_probs", [(k, None) for k in TOP_K_SETTINGS])


def test_top_p_sampling() -> None:
    check_sampling("top_p_sampling_from_probs", [(None, p) for p in TOP_P_SETTINGS])


def test_top_k_top_p_sampling() -> None:
    check_sampling("top_k_top_p_sampling_from_probs", BOTH_SETTINGS)


@pytest.mark.parametrize(
    ("variant", "top_k"),
    [("top_p_sampling_from_probs", None), ("top_k_top_p_sampling_from_probs", VOCABULARY)],
)
def test_nucleus_ends_where_top_p_is_reached_exactly(variant: str, top_k: int | None) -> None:
    # 33/64 is 20/64 + 13/64 of the first distribution, and all of them are exact in float32.
    assert len(remaining(DISTRIBUTIONS[0], top_k, 33 / 64)) == 2
    check_sampling(variant, [(top_k, 33 / 64)])


# --- lightning attention -----------------------------------------------------------------------

SLOPES = (0.02, 0.3, 1.5)


def lightning(q: Tensor, k: Tensor, v: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """One sequence [length, heads, dim] in float64 by the quadratic form, without a recurrence.

    Returns:
        o_t = sum over s <= t of exp(-slope (t - s)) (q_t . k_s) v_s, and q_t times the initial
        state decayed t + 1 times; the same sum of k_s v_s^T for the last t, the final state.
    """
    q, k, v = (x.double().transpose(0, 1) for x in (q, k, v))
    length, initial = q.shape[1], state.double()
    # decay[h, t, s]: how much of token s is left at token t; s = -1 is the initial state.
    decay = np.zeros((len(SLOPES), length, length + 1))
    for (head, slope), t in product(enumerate(SLOPES), range(length)):
        for s in range(-1, t + 1):
            decay[head, t, s + 1] = math.exp(-slope * (t - s))
    of_initial, of_tokens = torch.from_numpy(decay).split([1, length], dim=2)
    output = (of_tokens * (q @ k.transpose(1, 2))) @ v + of_initial * (q @ initial)
    if length == 0:
        return output.transpose(0, 1), initial
    final = of_initial[:, -1:] * initial + (k.transpose(1, 2) * of_tokens[:, -1:]) @ v
    return output.transpose(0, 1), final


def lightning_inputs(rows: int, sequences: int, generator: Generator) -> dict[str, Tensor]:
    return {
        **{name: random((rows, 3, 16), generator) for name in "qkv"},
        "state": 4 * random((sequences, 3, 16, 16), generator, "float32"),
        "slope": torch.tensor(SLOPES, dtype=torch.float32),
    }


def check_lightning(
    got: tuple[Tensor, ...], inputs: Mapping[str, Tensor], lengths: Sequence[int]
) -> None:
    """Compare all sequences' outputs and final states."""
    qkv = zip(*(inputs[name].split(list(lengths)) for name in "qkv"), strict=True)
    expected = [lightning(*x, state) for x, state in zip(qkv, inputs["state"], strict=True)]
    output = torch.cat([part for part, _ in expected])
    state = torch.stack([part for _, part in expected])
    # Sums of values as large as the largest ones; the float32 slope and its exponential add some
    # 2^-24 per token, for at most 37 tokens.
    assert_close(got[0], output, BFLOAT16, ACCUMULATION * output.abs().max().item())
    assert_close(got[1], state, 0.0, ACCUMULATION * state.abs().max().item())


def test_lightning_attention_decode() -> None:
    inputs = lightning_inputs(5, 5, seeded(12))
    check_lightning(run_reference(LIGHTNING_DECODE, inputs), inputs, (1,) * 5)


LIGHTNING_LENGTHS = (1, 6, 0, 37)


def test_lightning_attention_prefill() -> None:
    inputs = lightning_inputs(sum(LIGHTNING_LENGTHS), len(LIGHTNING_LENGTHS), seeded(13))
    inputs["qo_indptr"] = indptr(LIGHTNING_LENGTHS)
    check_lightning(run_reference(LIGHTNING_PREFILL, inputs), inputs, LIGHTNING_LENGTHS)


def test_lightning_prefill_is_decode_token_by_token() -> None:
    inputs = lightning_inputs(sum(LIGHTNING_LENGTHS), len(LIGHTNING_LENGTHS), seeded(14))
    offsets = indptr(LIGHTNING_LENGTHS)
    output, state = run_reference(LIGHTNING_PREFILL, {**inputs, "qo_indptr": offsets})
    for b, (first, end) in enumerate(pairwise(offsets.tolist())):
        expected = inputs["state"][b : b + 1]
        for t in range(first, end):
            token = {name: inputs[name][t : t + 1] for name in "qkv"}
            token |= {"state": expected, "slope": inputs["slope"]}
            step, expected = run_reference(LIGHTNING_DECODE, token)
            # Rounded to bfloat16 on both sides: up to one unit in the last place apart.
            largest_output = step.abs().max().item()
            assert_close(output[t : t + 1], step, 2 * BFLOAT16, ACCUMULATION * largest_output)
        # The same float32 operations in the same order; a contracted multiply-add may differ.
        assert_close(state[b : b + 1], expected, 0.0, 1e-6 * state[b].abs().max().item())


# --- gemm --------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 13])
def test_gemm(rows: int) -> None:
    generator = seeded(15)
    inputs = {
        "A": random((rows, 80), generator, "float16"),
        "B": random((24, 80), generator, "float16"),
    }
    (output,) = run_reference(GEMM, inputs)
    a, b = array(inputs["A"]), array(inputs["B"])
    # One rounding to float16; sums of 80 float32 products, which together are below 100.
    assert_close(output, torch.from_numpy(a @ b.T), FLOAT16, 100 * ACCUMULATION)
