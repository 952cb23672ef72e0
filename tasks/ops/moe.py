"""moe: fused mixture-of-experts kernels of FlashInfer's TensorRT-LLM backend.

Experts are sharded by expert parallelism only: `e` in a name counts the experts of one rank.

What decides the routing is stored in rows, since random logits would spread the tokens over all
experts alike; tokens and weights are random. Definitions without `local_expert_offset` route among
one rank's experts, so that a call on one rank of several is none of theirs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum

from tasks.errors import DefinitionError
from tasks.model import ModelConfig, Moe, Serving
from tasks.ops.arguments import (
    bound_axes,
    check_range,
    check_setting,
    check_without,
    integer_of,
    scalar_of,
    stored,
    tensor_of,
    value_of,
)
from tasks.ops.base import (
    Call,
    DumpError,
    FlashInferApi,
    Hint,
    Json,
    KernelSpec,
    NotProduced,
    OpModule,
    Rejected,
    Requirement,
    Row,
    Scalar,
    Unmapped,
    check_axes,
    const,
    register,
    rows_of,
    scalar,
    tensor,
    var,
)

_BLOCK = 128
"""Side of a block that shares one FP8 scale."""


class _Routing(Enum):
    """How a router turns logits into experts and weights (FlashInfer's `RoutingMethodType`)."""

    DEEPSEEK = "ds_routing"
    """Sigmoid scores plus a bias, the best groups, the top k, weights made to add up to one."""
    RENORMALIZE = "renorm"
    """Softmax over the top k."""
    DEFAULT = "default"
    """The top k of a softmax over all experts."""
    LLAMA4 = "llama4"
    """The top k, each weighted by its sigmoid; the weight scales the expert's input."""


_METHODS = {
    0: _Routing.DEFAULT,
    1: _Routing.RENORMALIZE,
    2: _Routing.DEEPSEEK,
    3: _Routing.LLAMA4,
    # The k most likely of a softmax, made to add up to one, are the softmax of the top k.
    4: _Routing.RENORMALIZE,
}
"""FlashInfer's numbers of them (tllm_enums.py: `RoutingMethodType`)."""
_NUMBERS = {_Routing.DEFAULT: 0, _Routing.RENORMALIZE: 1, _Routing.DEEPSEEK: 2}

_VARIANTS = {
    _Routing.DEEPSEEK: ("fp8_block_scale",),
    _Routing.RENORMALIZE: (
        "fp8_block_scale",
        "fp4_block_scale",
        "fp4_block_scale_routed",
        "fp8_per_tensor",
    ),
    # The names of the others say nothing of the routing: they are published for one kind each.
    _Routing.DEFAULT: ("fp8_block_scale", "fp4_block_scale_routed"),
    _Routing.LLAMA4: ("fp4_block_scale", "fp4_block_scale_routed", "fp8_per_tensor"),
}

_ROUTERS: dict[str, _Routing | str] = {
    "afmoe": _Routing.DEEPSEEK,
    "bailing_moe": _Routing.RENORMALIZE,
    "dbrx": _Routing.RENORMALIZE,
    "dots1": _Routing.DEEPSEEK,
    "ernie4_5": "the router adds a bias to softmax scores",
    "exaone_moe": _Routing.DEEPSEEK,
    "glm4_moe": _Routing.DEEPSEEK,
    "glm4v_moe": _Routing.DEEPSEEK,
    "glm_moe": _Routing.DEEPSEEK,
    "gpt_oss": "experts have biases and a clamped SwiGLU, which no definition here has",
    "granitemoe": _Routing.RENORMALIZE,
    "hunyuan": _Routing.RENORMALIZE,
    "jamba": _Routing.DEFAULT,
    "lfm2_moe": _Routing.DEEPSEEK,
    "llama4": _Routing.LLAMA4,
    "minimax_m1": _Routing.RENORMALIZE,
    "minimax_text": _Routing.RENORMALIZE,
    "mixtral": _Routing.RENORMALIZE,
    "nemotron_h": _Routing.DEEPSEEK,
    "olmoe": _Routing.DEFAULT,
    "phimoe": "the router is a sparse mixer (SparseMixer-v2)",
    "qwen2_moe": _Routing.DEFAULT,
    "qwen3": _Routing.RENORMALIZE,
    "sdar_moe": _Routing.RENORMALIZE,
}
"""How model types (or what they begin with) route where their config does not say it all, by
SGLang's model files; a reason where no kernel here routes so."""
_SCORING = (
    "scoring_func",
    "score_function",
    "score_func",
    "moe_router_activation_func",
    "router_score_function",
)
_BIAS = (
    "use_expert_bias",
    "use_routing_bias",
    "use_moe_router_bias",
    "moe_router_enable_expert_bias",
)
_RENORMALIZE = (
    "norm_topk_prob",
    "route_norm",
    "moe_renormalize",
    "renormalize",
    "norm_expert_weight",
)
_SWIGLU = ("silu", "swish", "swiglu", None)


@dataclass(frozen=True)
class _Kernel:
    """One precision of the kernel: its API, and what SGLang needs to take it."""

    api: str
    quantization: str
    sglang_layer: str


_LAYERS = "python/sglang/srt/layers/moe"
_KERNELS = {
    "fp8_block_scale": _Kernel(
        "trtllm_fp8_block_scale_moe", "float8_e4m3fn", f"{_LAYERS}/flashinfer_trtllm_moe.py"
    ),
    "fp4_block_scale": _Kernel(
        "trtllm_fp4_block_scale_moe",
        "float4_e2m1fn_mxfp4",
        f"{_LAYERS}/moe_runner/flashinfer_trtllm.py",
    ),
    "fp4_block_scale_routed": _Kernel(
        "trtllm_fp4_block_scale_routed_moe",
        "float4_e2m1fn_mxfp4",
        f"{_LAYERS}/moe_runner/flashinfer_trtllm.py",
    ),
    "fp8_per_tensor": _Kernel(
        "trtllm_fp8_per_tensor_scale_moe", "float8_e4m3fn", f"{_LAYERS}/flashinfer_trtllm_moe.py"
    ),
}

_SCALED = {"fp8_block_scale": "block", "fp8_per_tensor": "tensor"}
"""Variant -> of what its weights have one scale."""
_BY_CHANNEL = ("fbgemm_fp8", "w8a8_fp8")
"""Ways to quantise with one scale for each output channel (SGLang's fpgemm_fp8.py, w8a8_fp8.py)."""

_STORED = ("routing_logits", "routing_bias", "topk_ids")
"""Inputs that decide the routing."""
_PLAIN: dict[str, tuple[object, ...]] = {
    "activation_type": (3,),  # SwiGLU
    "do_finalize": (True,),
    "norm_topk_prob": (True,),
    "num_fused_shared_experts": (None, 0),
    "valid_hidden_size": (None,),
    "valid_intermediate_size": (None,),
}
"""What a call may not ask for otherwise; the first value is the API's default."""
_EXTRAS = (
    *("gemm1_bias", "gemm2_bias", "gemm1_alpha", "gemm1_beta", "gemm1_clamp_limit"),
    "gemm1_lora_delta",
)

_SHAPE = "e{num_local_experts}_h{hidden_size}_i{intermediate_size}"
_GROUPED = " with groups"
"""Of a variant in `names`: its name says the routing's groups."""

_BASELINE = """\
from flashinfer.fused_moe import trtllm_fp8_block_scale_moe


def run({arguments}):
    return trtllm_fp8_block_scale_moe(
        routing_logits=routing_logits,
        routing_bias={bias},
        hidden_states=hidden_states,
        hidden_states_scale=hidden_states_scale,
        gemm1_weights=gemm1_weights,
        gemm1_weights_scale=gemm1_weights_scale,
        gemm2_weights=gemm2_weights,
        gemm2_weights_scale=gemm2_weights_scale,
        num_experts={num_experts},
        top_k={top_k},
        n_group={n_group},
        topk_group={topk_group},
        intermediate_size={intermediate_size},
        local_expert_offset={offset},
        local_num_experts={num_local_experts},
        routed_scaling_factor={factor},
        routing_method_type={method},
        use_shuffled_weight=False,
    )
"""

_HEAD = """\
import torch


@torch.no_grad()
def run({arguments}):
    num_tokens, hidden_size = hidden_states.shape
    num_local_experts, _, _ = gemm1_weights.shape
    assert hidden_size == {hidden}
    assert num_local_experts == {experts}
    intermediate_size, top_k = {intermediate}, {top_k}

"""

_DEQUANTIZE_BLOCKS = """\
    def expand(scale):
        return scale.repeat_interleave({block}, dim=-1).repeat_interleave({block}, dim=-2)

    x = hidden_states.to(torch.float32)
    x = x * hidden_states_scale.t().repeat_interleave({block}, dim=-1)

    def weights(e):
        w13 = gemm1_weights[e].to(torch.float32) * expand(gemm1_weights_scale[e])
        w2 = gemm2_weights[e].to(torch.float32) * expand(gemm2_weights_scale[e])
        return w13, w2

"""

_PLAIN_WEIGHTS = """\
    x = hidden_states.to(torch.float32)

    def weights(e):
        return gemm1_weights[e].to(torch.float32), gemm2_weights[e].to(torch.float32)

"""

_SCALED_WEIGHTS = """\
    x = hidden_states.to(torch.float32)

    def weights(e):
        # The scales of up, gate and output, folded into the rows they multiply.
        w13 = gemm1_weights[e].to(torch.float32)
        up = w13[:intermediate_size] * output1_scales_scalar[e]
        gate = w13[intermediate_size:] * output1_scales_gate_scalar[e]
        w2 = gemm2_weights[e].to(torch.float32) * output2_scales_scalar[e]
        return torch.cat([up, gate]), w2

"""

_ROUTE_RENORMALIZE = """\
    # Renormalize routing: top-k, then softmax over the k.
    top_logits, chosen = torch.topk(routing_logits.to(torch.float32), k=top_k, dim=-1)
    probabilities = torch.softmax(top_logits, dim=-1)
    offset = 0

"""

_ROUTE_DEFAULT = """\
    # Default routing: softmax over all experts, then the k most likely as they are.
    scores = torch.softmax(routing_logits.to(torch.float32), dim=-1)
    probabilities, chosen = torch.topk(scores, k=top_k, dim=-1)
    offset = 0

"""

_ROUTE_LLAMA4 = """\
    # Llama 4 routing: top-k of the logits, the sigmoid of each scales its expert's input. The
    # kernel takes routing_bias and does not use it.
    top_logits, chosen = torch.topk(routing_logits.to(torch.float32), k=top_k, dim=-1)
    probabilities = torch.sigmoid(top_logits)
    offset = 0

"""

_ROUTE_DEEPSEEK = """\
    # DeepSeek-V3 routing: sigmoid scores, groups chosen by their two best biased scores, the
    # top-k experts of those groups, weights from the unbiased scores.
    scores = torch.sigmoid(routing_logits.to(torch.float32))
    biased = scores + routing_bias.to(torch.float32)
    groups = biased.view(num_tokens, {groups}, -1)
    best = torch.topk(groups, k=min(2, groups.shape[-1]), dim=-1).values.sum(dim=-1)
    kept = torch.zeros_like(best, dtype=torch.bool)
    kept.scatter_(1, torch.topk(best, k={topk_group}, dim=-1).indices, True)
    allowed = kept.unsqueeze(-1).expand_as(groups).reshape_as(biased)
    chosen = torch.topk(biased.masked_fill(~allowed, -float("inf")), k=top_k, dim=-1).indices
    probabilities = torch.gather(scores, 1, chosen)
    probabilities = probabilities / (probabilities.sum(dim=-1, keepdim=True) + 1e-20)
    probabilities = probabilities * float(routed_scaling_factor)
    offset = int(local_expert_offset)

"""

_ROUTE_PRECOMPUTED = """\
    # Expert index in the upper 16 bits, its weight as bfloat16 in the lower.
    chosen = (topk_ids >> 16).to(torch.int64)
    bits = (topk_ids & 0xFFFF).to(torch.int32)
    probabilities = torch.where(bits > 0x7FFF, bits - 0x10000, bits).to(torch.int16)
    probabilities = probabilities.view(torch.bfloat16).to(torch.float32)
    offset = 0

"""

_EXPERTS = """\
    output = torch.zeros(
        (num_tokens, hidden_size), dtype=torch.float32, device=hidden_states.device
    )
    for e in range(num_local_experts):
        tokens, slots = torch.nonzero(chosen == e + offset, as_tuple=True)
        if tokens.numel() == 0:
            continue
        w13, w2 = weights(e)
        weight = probabilities[tokens, slots].unsqueeze(-1)
        up, gate = ({scaled} @ w13.t()).split(intermediate_size, dim=-1)
        expert = (torch.nn.functional.silu(gate) * up) @ w2.t()
        output.index_add_(0, tokens, {added})
    return output.to(torch.bfloat16)
"""


_TEST = '''\
# How far apart experts, and rows of a weight matrix, begin in the buffer that they are windows of:
# the weights are as many as the model's, differ, and take no time or memory to make.
EXPERT, STEP = 1001, 3
BLOCK = 128
HIDDEN, WIDTH = CONST["hidden_size"], CONST["intermediate_size"]
EXPERTS = CONST.get("num_experts", CONST.get("num_local_experts"))
LOCAL = CONST.get("num_local_experts", EXPERTS)
TOP_K = CONST.get("top_k", CONSTANTS.get("top_k"))
ROUTING = "precomputed" if VARIANT == "fp4_block_scale_routed" else CONSTANTS["routing"]
# A rank in the middle, where there are several.
OFFSET = EXPERTS // LOCAL // 2 * LOCAL


def scattered(size, count):
    """Return some of the numbers below `size`, the first and the last among them."""
    return [i * (size - 1) // max(1, count - 1) for i in range(min(size, count))]


def logits(generator, count):
    """Return logits by which tokens choose all but one of a few experts.

    Each expert that any token chooses costs time. All differ, or the choice would not be unique.
    """
    values = -2 - torch.rand(count, EXPERTS, generator=generator)
    few = scattered(EXPERTS, TOP_K + 1)
    for row in values:
        row[few] = torch.randperm(len(few), generator=generator) / 4 - 0.5
    return values.to(torch.bfloat16)


def grouped_logits(generator, count):
    """Return the same for experts in groups, a few in each and this rank's first and last."""
    groups, kept = CONSTANTS["n_group"], CONSTANTS["topk_group"]
    size, rank = EXPERTS // groups, slice(OFFSET, OFFSET + LOCAL)
    values = -3 - torch.rand(count, EXPERTS, generator=generator)
    few = scattered(size, math.ceil(TOP_K / kept) + 1)
    chosen = [group * size + expert for group in range(groups) for expert in few]
    chosen = sorted({*chosen, OFFSET, OFFSET + LOCAL - 1})
    values[:, chosen] = 0.5 + 2 * torch.rand(count, len(chosen), generator=generator)
    if LOCAL < EXPERTS:
        # The first token's experts are this rank's, as far as they can be, the last one's not.
        values[0, rank] += 2
        values[-1, rank] = -4 - torch.rand(LOCAL, generator=generator)
    if count > 1 and kept < groups and size > 1:
        values[count // 2] = decided_by_two(generator, few)
    return values


def decided_by_two(generator, few):
    """Return a token's logits by which the best two of each group keep other groups than the best.

    In this rank's group two experts are good, the rank's first one among them. In another group a
    single one is better. One of these groups is kept; so are further ones for one better and one
    fair expert. Biases differ by less than all that.
    """
    groups, kept = CONSTANTS["n_group"], CONSTANTS["topk_group"]
    size = EXPERTS // groups
    own = OFFSET // size
    alone, *others = [group for group in range(groups) if group != own]
    others = others[: kept - 1]
    row = -6 - torch.rand(EXPERTS, generator=generator)
    for group in [own, *others]:
        # So that the choice ends between experts that differ.
        row[[group * size + i for i in few]] = -2 + torch.rand(len(few), generator=generator)
    for group in others:
        row[group * size], row[group * size + 1] = 5, 0
    row[alone * size] = 5
    row[[OFFSET, OFFSET + 1 if (OFFSET + 1) % size else OFFSET - 1]] = 1
    return row


def packed(generator, count):
    """Return experts and weights of both signs; one expert is chosen twice."""
    few = torch.tensor(scattered(EXPERTS, TOP_K + 1))
    order = torch.rand(count, len(few), generator=generator).argsort(dim=1)[:, :TOP_K]
    experts = few[order].int()
    experts[0, -1] = experts[0, 0]
    bits = random(generator, count, TOP_K).view(torch.int16).int() & 0xFFFF
    return experts << 16 | bits


def routing(generator, count):
    if ROUTING == "precomputed":
        return {"topk_ids": packed(generator, count)}
    if ROUTING != "ds_routing":
        return {"routing_logits": logits(generator, count)}
    # Biased scores are negative too; the bias matters as much as the score.
    bias = 0.2 * torch.rand(EXPERTS, generator=generator) - 1
    return {
        "routing_logits": grouped_logits(generator, count),
        "routing_bias": bias.to(torch.bfloat16),
    }


def matrices(generator, rows, columns, dtype, factor=1.0):
    length = EXPERT * (LOCAL - 1) + STEP * (rows - 1) + columns
    buffer = (factor * torch.randn(length, generator=generator)).to(getattr(torch, dtype))
    return buffer.as_strided((LOCAL, rows, columns), (EXPERT, STEP, 1))


def scales(generator, *shape, terms=1):
    """Return scales that keep sums of so many terms near 1, where SwiGLU is bent most."""
    return (0.5 + torch.rand(*shape, generator=generator)) / math.sqrt(terms)


def tokens(count):
    generator = seeded(count)
    inputs = routing(generator, count)
    if VARIANT.startswith("fp4"):
        inputs["hidden_states"] = random(generator, count, HIDDEN)
        for name, rows, columns in (("gemm1", 2 * WIDTH, HIDDEN), ("gemm2", HIDDEN, WIDTH)):
            weights = matrices(generator, rows, columns, "float32", 1 / math.sqrt(columns))
            inputs[f"{name}_weights"] = weights
    else:
        fp8 = "float8_e4m3fn"
        inputs["hidden_states"] = random(generator, count, HIDDEN, dtype=fp8)
        if VARIANT == "fp8_block_scale":
            inputs["hidden_states_scale"] = scales(generator, HIDDEN // BLOCK, count)
        inputs["gemm1_weights"] = matrices(generator, 2 * WIDTH, HIDDEN, fp8)
        if VARIANT == "fp8_block_scale":
            blocks = (LOCAL, 2 * WIDTH // BLOCK, HIDDEN // BLOCK)
            inputs["gemm1_weights_scale"] = scales(generator, *blocks, terms=HIDDEN)
        else:
            for name in ("output1_scales_scalar", "output1_scales_gate_scalar"):
                inputs[name] = scales(generator, LOCAL, terms=HIDDEN)
        inputs["gemm2_weights"] = matrices(generator, HIDDEN, WIDTH, fp8)
        if VARIANT == "fp8_block_scale":
            blocks = (LOCAL, HIDDEN // BLOCK, WIDTH // BLOCK)
            inputs["gemm2_weights_scale"] = scales(generator, *blocks, terms=WIDTH)
        else:
            inputs["output2_scales_scalar"] = scales(generator, LOCAL, terms=WIDTH)
    if ROUTING == "ds_routing":
        inputs["local_expert_offset"] = OFFSET
        inputs["routed_scaling_factor"] = 2.5
    if ROUTING == "llama4":
        # Taken and not used.
        inputs["routing_bias"] = random(generator, EXPERTS)
    return inputs


if ROUTING == "ds_routing" and LOCAL < EXPERTS:
    CASES = {
        "three tokens": lambda: tokens(3),
        "one token, its experts elsewhere": lambda: tokens(1),
    }
elif ROUTING == "ds_routing":
    # All chosen experts are here, and as many as a test has time for.
    CASES = {"two tokens": lambda: tokens(2)}
else:
    CASES = {"three tokens": lambda: tokens(3)}
    # So alone only where its experts are small.
    if TOP_K * HIDDEN * WIDTH < 2e7:
        CASES["one token"] = lambda: tokens(1)


def largest(values, count):
    """Return where the largest of some values are."""
    return sorted(values, key=values.get, reverse=True)[:count]


def chosen_by_groups(row, bias):
    """Route as DeepSeek-V3 does (arXiv 2412.19437, section 2.1.2): expert -> weight.

    Experts are chosen by their biased scores out of the groups whose two best add up to most, and
    weighted by their scores without the bias.
    """
    scores = [1 / (1 + math.exp(-value)) for value in row]
    biased = [score + b for score, b in zip(scores, bias, strict=True)]
    size = EXPERTS // CONSTANTS["n_group"]
    marks = {
        first: sum(sorted(biased[first : first + size])[-2:]) for first in range(0, EXPERTS, size)
    }
    kept = largest(marks, CONSTANTS["topk_group"])
    experts = {first + i: biased[first + i] for first in kept for i in range(size)}
    chosen = largest(experts, TOP_K)
    total = sum(scores[expert] for expert in chosen)
    return {expert: scores[expert] / total for expert in chosen}


def unpacked(row):
    """Expert -> weight; the lower 16 bits are a bfloat16: sign, 8 bits of exponent, 7 of fraction.

    The weights of an expert that is chosen twice add up.
    """
    weights = {}
    for value in row:
        expert, bits = divmod(value, 1 << 16)
        weight = (1 + (bits & 127) / 128) * 2.0 ** ((bits >> 7 & 255) - 127)
        weights[expert] = weights.get(expert, 0.0) + (-weight if bits >> 15 else weight)
    return weights


def routes(inputs):
    """Return each token's expert -> weight, by sorting numbers."""
    if ROUTING == "precomputed":
        return [unpacked(row) for row in inputs["topk_ids"].tolist()]
    rows = inputs["routing_logits"].double().tolist()
    if ROUTING == "ds_routing":
        bias = inputs["routing_bias"].double().tolist()
        factor = inputs["routed_scaling_factor"]
        chosen = [chosen_by_groups(row, bias) for row in rows]
        return [{expert: factor * w for expert, w in row.items()} for row in chosen]
    found = []
    for row in rows:
        chosen = largest(dict(enumerate(row)), TOP_K)
        if ROUTING == "llama4":
            found.append({expert: 1 / (1 + math.exp(-row[expert])) for expert in chosen})
            continue
        # A softmax over all experts, or over the chosen ones.
        among = range(EXPERTS) if ROUTING == "default" else chosen
        total = sum(math.exp(row[expert]) for expert in among)
        found.append({expert: math.exp(row[expert]) / total for expert in chosen})
    return found


def product(x, weights, scale=None):
    """Return x @ weights.T, the blocks of the weights multiplied by `scale`.

    Multiplied by overlapping rows, x is correlated with their buffer: Fourier transforms do that,
    for each block of columns, without a matrix.
    """
    rows, columns = weights.shape
    blocks = 1 if scale is None else columns // BLOCK
    width = columns // blocks
    length = STEP * (rows - 1) + width
    buffers = weights.as_strided((blocks, length), (width, 1)).double()
    parts = x.unflatten(1, (blocks, width)).transpose(0, 1)
    padded = 1 << length.bit_length()
    spectrum = torch.fft.rfft(buffers, padded)[:, None] * torch.fft.rfft(parts, padded).conj()
    sums = torch.fft.irfft(spectrum, padded)[..., : STEP * rows : STEP]
    if scale is not None:
        sums = sums * scale.double().t().repeat_interleave(BLOCK, dim=1)[:, None]
    return sums.sum(dim=0)


def expert_output(inputs, expert, x):
    """Apply one expert's SwiGLU layer; the upper half of the first matrix is not the gate."""
    scale1 = scale2 = None
    if VARIANT == "fp8_block_scale":
        scale1, scale2 = (inputs[f"{name}_weights_scale"][expert] for name in ("gemm1", "gemm2"))
    up, gate = product(x, inputs["gemm1_weights"][expert], scale1).split(WIDTH, dim=1)
    if VARIANT == "fp8_per_tensor":
        up = up * inputs["output1_scales_scalar"][expert].double()
        gate = gate * inputs["output1_scales_gate_scalar"][expert].double()
    output = product(gate / (1 + (-gate).exp()) * up, inputs["gemm2_weights"][expert], scale2)
    if VARIANT == "fp8_per_tensor":
        output = output * inputs["output2_scales_scalar"][expert].double()
    return output


def check(inputs, outputs, kernel):
    x = inputs["hidden_states"].double()
    if VARIANT == "fp8_block_scale":
        scale = inputs["hidden_states_scale"].double()
        x = (x.unflatten(1, (-1, BLOCK)) * scale.t()[..., None]).flatten(1)
    chosen = routes(inputs)
    expected = torch.zeros(len(x), HIDDEN, dtype=torch.float64)
    for expert in range(LOCAL):
        weight = [row.get(OFFSET + expert, 0.0) for row in chosen]
        if any(weight):
            weight = torch.tensor(weight).double()[:, None]
            if ROUTING == "llama4":
                # The weight scales the expert's input.
                expected += expert_output(inputs, expert, weight * x)
            else:
                expected += weight * expert_output(inputs, expert, x)
    # Two products after each other, whose terms cancel to far below the largest result. A kernel
    # quantises what is between them, to 8 bits of which 3 are fraction: each value is off by up
    # to 2^-4, their sum by less.
    size = expected.abs().max().item()
    assert_close(outputs["output"], expected, kernel, loose=2.0**-4, size=size)
'''


def _routing(model: ModelConfig, moe: Moe) -> _Routing | str:
    """Return how the model routes, or why no kernel here routes so."""
    fields, model_type = model.fields, model.model_type
    activation = fields.text("mlp_hidden_act", "hidden_act", "hidden_activation")
    known = next((r for kind, r in _ROUTERS.items() if model_type.startswith(kind)), None)
    if isinstance(known, str) or known is _Routing.LLAMA4:
        return known
    if activation not in _SWIGLU:
        return f"experts use {activation}, the definitions SwiGLU"
    bias = fields.text("topk_method") == "noaux_tc" or bool(fields.flag(*_BIAS))
    biased = bias or known is _Routing.DEEPSEEK
    scoring = fields.text(*_SCORING)
    if scoring is None:
        if known is None and not bias:
            return "nothing says how the router scores"
        scoring = "sigmoid" if biased else "softmax"
    renormalizes = fields.flag(*_RENORMALIZE)
    if renormalizes is None:
        renormalizes = known is not _Routing.DEFAULT
    grouped = (moe.num_groups or 1) > 1 and fields.text("topk_method") != "greedy"
    routing = {
        # One group of all experts is no limit: then DeepSeek's routing is a biased sigmoid.
        ("sigmoid", True, True): _Routing.DEEPSEEK,
        ("sigmoid", True, False): _Routing.DEEPSEEK if biased or moe.num_groups else None,
        ("softmax", True, False): _Routing.RENORMALIZE,
        ("softmax", False, False): _Routing.DEFAULT,
    }.get((scoring, renormalizes, grouped))
    kind = "weights made to add up to one" if renormalizes else "weights as they are"
    return routing or (
        f"no kernel here routes by {'grouped ' if grouped else ''}"
        f"{'biased ' if biased else ''}{scoring}, {kind}"
    )


def _other_scales(variant: str, model: ModelConfig) -> str:
    """Return how an FP8 checkpoint's weights are scaled, if not as the kernel takes them."""
    taken = _SCALED.get(variant)
    if taken is None or model.quantization is None or model.quantization.width != "fp8":
        return ""
    scaled = _scaled_by(model)
    if scaled == taken:
        return ""
    return f"it takes one scale for each {taken}, the checkpoint has one for each {scaled}"


def _scaled_by(model: ModelConfig) -> str:
    """Return what shares a scale in an FP8 checkpoint: a `block`, `channel` or `tensor`.

    By what SGLang's layers/quantization reads: `weight_block_size` (fp8.py), the strategy of
    compressed-tensors. ModelOpt has one for each tensor (modelopt_quant.py), and says so elsewhere.

    Raises:
        ConfigError: a field of it is of the wrong type.
    """
    fields = model.fields
    config = fields.nested("quantization_config") or fields.nested("compression_config")
    if config is None:
        return "tensor"
    if config.has("weight_block_size"):
        return "block"
    groups = config.nested("config_groups")
    if groups is not None:
        for name in groups.raw:
            group = groups.nested(name)
            weights = group.nested("weights") if group else None
            strategy = weights.text("strategy") if weights else None
            if strategy:
                return strategy
    return "channel" if config.text("quant_method") in _BY_CHANNEL else "tensor"


def _route(spec: KernelSpec) -> str:
    return {
        _Routing.DEEPSEEK.value: _ROUTE_DEEPSEEK,
        _Routing.RENORMALIZE.value: _ROUTE_RENORMALIZE,
        _Routing.DEFAULT.value: _ROUTE_DEFAULT,
        _Routing.LLAMA4.value: _ROUTE_LLAMA4,
    }[str(spec.constants["routing"])]


def _routing_scalars(model: ModelConfig) -> dict[str, Scalar]:
    factor = model.fields.number("routed_scaling_factor")
    if factor is None:
        return {}
    source = f"config.json routed_scaling_factor = {factor:g}"
    return {"routed_scaling_factor": Scalar(value=factor, source=source)}


_BY_API = {kernel.api: variant for variant, kernel in _KERNELS.items()}
_APIS = {
    variant: FlashInferApi(
        path=f"flashinfer.fused_moe.{kernel.api}",
        dumps=(kernel.api,),
        server_flags=("--moe-runner-backend flashinfer_trtllm",),
        gpu="SM100",
        hint=Hint(text="it needs an SM100 GPU and weights of its own precision"),
        sglang_layer=kernel.sglang_layer,
        reads=("topk_ids",)
        if variant == "fp4_block_scale_routed"
        else ("routing_logits", "routing_bias"),
        quantization="fp4" if variant.startswith("fp4") else "fp8",
    )
    for variant, kernel in _KERNELS.items()
}


@register
class FusedMoe(OpModule):
    """Block-scaled FP8, block-scaled FP4 (with and without routing) and per-tensor FP8.

    No trace template is taken: the one whose schema is ours (DeepSeek's routing) dequantises all
    experts before it routes, for which the sizes of DeepSeek-V3 want more than 8 GB; the others
    take a bias that their models do not have.
    """

    op_type = "moe"
    crosschecked = False
    names = {
        "fp8_block_scale": f"moe_fp8_block_scale_{{routing}}_topk{{top_k}}_{_SHAPE}",
        "fp8_block_scale" + _GROUPED: (
            f"moe_fp8_block_scale_{{routing}}_topk{{top_k}}_ng{{n_group}}_kg{{topk_group}}_{_SHAPE}"
        ),
        **{
            variant: f"{kernel.api}_topk{{top_k}}_{_SHAPE}"
            for variant, kernel in _KERNELS.items()
            if variant != "fp8_block_scale"
        },
    }
    apis = tuple(_APIS.values())
    reference_test = _TEST

    def required(self, model: ModelConfig, serving: Serving) -> Iterator[Requirement]:
        """The precisions whose routing and shapes the model has."""
        moe = model.moe
        if moe is None or not model.moe_layers:
            return
        routing = _routing(model, moe)
        if isinstance(routing, str):
            yield Unmapped("mixture of experts", routing)
            return
        what = f"experts at ep={serving.ep}"
        if moe.num_experts % serving.ep:
            yield NotProduced(what, f"ep={serving.ep} does not divide {moe.num_experts} experts")
            return
        if moe.hidden_size % _BLOCK or moe.intermediate_size % _BLOCK:
            yield NotProduced(
                what,
                f"hidden_size {moe.hidden_size} or expert width {moe.intermediate_size} is not "
                f"a multiple of the {_BLOCK}-wide scale blocks",
            )
            return
        local = moe.num_experts // serving.ep
        variants = _VARIANTS[routing]
        if model.quantization and model.quantization.width == "fp4":
            variants = tuple(dict.fromkeys((*variants, "fp4_block_scale_routed")))
        if moe.top_k > local:
            # Only this kernel knows of the other ranks' experts (local_expert_offset).
            variants = ("fp8_block_scale",) if routing is _Routing.DEEPSEEK else ()
            yield NotProduced(
                f"kernels that route among one rank's experts at ep={serving.ep}",
                f"{local} experts of a rank are fewer than top_k={moe.top_k}",
            )
        for variant in variants:
            other = _other_scales(variant, model)
            if other:
                yield NotProduced(_KERNELS[variant].api, other)
            else:
                yield self._spec(variant, routing, model, moe, serving)

    def _spec(
        self, variant: str, routing: _Routing, model: ModelConfig, moe: Moe, serving: Serving
    ) -> KernelSpec:
        local = moe.num_experts // serving.ep
        axes = {
            "num_experts": moe.num_experts,
            "num_local_experts": local,
            "hidden_size": moe.hidden_size,
            "intermediate_size": moe.intermediate_size,
            "top_k": moe.top_k,
        }
        constants: dict[str, int | float | str] = {"routing": routing.value}
        named = variant
        if routing is _Routing.DEEPSEEK and variant == "fp8_block_scale":
            constants |= {"n_group": moe.num_groups or 1, "topk_group": moe.topk_group or 1}
            named += _GROUPED
        return KernelSpec(
            name=self.name_of(named, axes, constants),
            op_type=self.op_type,
            variant=variant,
            axes=axes,
            constants=constants,
            scalars=_routing_scalars(model) if routing is _Routing.DEEPSEEK else {},
            tp=(serving.tp,),
            ep=(serving.ep,),
            origin=(
                f"{moe.num_experts} experts, top {moe.top_k}, width {moe.intermediate_size} at "
                f"ep={serving.ep} ({serving.origin}); the width is the whole expert's",
            ),
        )

    def restored(
        self,
        definition: Json,
        variant: str,
        axes: Mapping[str, int],
        said: Mapping[str, int | str],
    ) -> KernelSpec:
        """The name has the routing, or the inputs have: only Llama 4's takes a bias unused."""
        variant = variant.removesuffix(_GROUPED)
        routing = said.get("routing")
        if routing is None:
            biased = "routing_bias" in definition["inputs"]
            routing = (_Routing.LLAMA4 if biased else _Routing.RENORMALIZE).value
        elif routing not in {kind.value for kind in _Routing}:
            raise DefinitionError(f"{definition['name']}: the name says routing {routing!r}")
        local = int(said["num_local_experts"])
        primary = {
            "num_experts": axes.get("num_experts", local),
            "num_local_experts": local,
            "hidden_size": int(said["hidden_size"]),
            "intermediate_size": int(said["intermediate_size"]),
        }
        constants = {key: said[key] for key in ("n_group", "topk_group") if key in said}
        if "top_k" in axes:
            primary["top_k"] = axes["top_k"]
        else:
            constants["top_k"] = said["top_k"]
        return KernelSpec(
            name=definition["name"],
            op_type=self.op_type,
            variant=variant,
            axes=primary,
            constants={"routing": routing, **constants},
        )

    def provider(self, spec: KernelSpec) -> FlashInferApi:
        """The TensorRT-LLM MoE functions (Blackwell, SM100)."""
        return _APIS[spec.variant]

    def definition(self, spec: KernelSpec) -> Json:
        """Route each token, apply its experts' SwiGLU layers, add them up by weight."""
        blocks = spec.variant == "fp8_block_scale"
        built = self._fp8_block_scale(spec) if blocks else self._one_rank(spec)
        kernel = _KERNELS[spec.variant]
        tags = [f"quantization:{kernel.quantization}"]
        if spec.variant.startswith("fp4"):
            tags.append("gpu:sm100")
        if spec.variant == "fp4_block_scale_routed":
            tags.append("routing:pre-computed")
        return {
            "description": f"Fused mixture of experts, {spec.variant.replace('_', ' ')}, SwiGLU.",
            "tags": tags,
            "constraints": [
                "gemm1_weights.shape[1] == 2 * intermediate_size",
                "gemm2_weights.shape[1] == hidden_size",
                "gemm2_weights.shape[2] == intermediate_size",
            ],
            "outputs": {"output": tensor(["seq_len", "hidden_size"], "bfloat16", "Weighted sum.")},
            **built,
        }

    def _axes(self, spec: KernelSpec, experts: dict[str, str]) -> Json:
        axes = spec.axes
        return {
            "seq_len": var("Number of tokens."),
            **{name: const(axes[name], text) for name, text in experts.items()},
            "hidden_size": const(axes["hidden_size"], "Hidden dimension."),
            "intermediate_size": const(axes["intermediate_size"], "Width of one expert."),
            "gemm1_out_size": const(2 * axes["intermediate_size"], "Up and gate together."),
            **({"top_k": const(axes["top_k"], "Experts per token.")} if "top_k" in axes else {}),
        }

    def _reference(self, spec: KernelSpec, inputs: Json, *parts: str) -> str:
        axes = spec.axes
        # What comes routed already has the weights for the output, whatever chose them.
        routed = spec.variant == "fp4_block_scale_routed"
        on_input = spec.constants["routing"] == _Routing.LLAMA4.value and not routed
        return "".join((_HEAD, *parts, _EXPERTS)).format(
            arguments=", ".join(inputs),
            hidden=axes["hidden_size"],
            experts=axes["num_local_experts"],
            intermediate=axes["intermediate_size"],
            top_k=axes.get("top_k", spec.constants.get("top_k")),
            block=_BLOCK,
            groups=spec.constants.get("n_group"),
            topk_group=spec.constants.get("topk_group"),
            scaled="(weight * x[tokens])" if on_input else "x[tokens]",
            added="expert" if on_input else "weight * expert",
        )

    def _fp8_block_scale(self, spec: KernelSpec) -> Json:
        deepseek = spec.constants["routing"] == _Routing.DEEPSEEK.value
        blocks = {
            "num_hidden_blocks": spec.axes["hidden_size"] // _BLOCK,
            "num_intermediate_blocks": spec.axes["intermediate_size"] // _BLOCK,
            "num_gemm1_out_blocks": 2 * spec.axes["intermediate_size"] // _BLOCK,
        }
        experts = {"num_local_experts": "Experts of this rank."}
        if deepseek:
            experts = {"num_experts": "Experts of all ranks.", **experts}
        logits = tensor(["seq_len", "num_local_experts"], "bfloat16", "Router logits.")
        if deepseek:
            logits = tensor(["seq_len", "num_experts"], "float32", "Router logits.")
        inputs = {"routing_logits": logits}
        if deepseek:
            inputs["routing_bias"] = tensor(["num_experts"], "bfloat16", "Added to the scores.")
        fp8, local = "float8_e4m3fn", "num_local_experts"
        inputs |= {
            "hidden_states": tensor(["seq_len", "hidden_size"], fp8, "Tokens."),
            "hidden_states_scale": tensor(
                ["num_hidden_blocks", "seq_len"], "float32", "Scales of hidden_states, transposed."
            ),
            "gemm1_weights": tensor(
                [local, "gemm1_out_size", "hidden_size"], fp8, "Up and gate projections."
            ),
            "gemm1_weights_scale": tensor(
                [local, "num_gemm1_out_blocks", "num_hidden_blocks"], "float32", "Their scales."
            ),
            "gemm2_weights": tensor(
                [local, "hidden_size", "intermediate_size"], fp8, "Down projections."
            ),
            "gemm2_weights_scale": tensor(
                [local, "num_hidden_blocks", "num_intermediate_blocks"], "float32", "Their scales."
            ),
        }
        if deepseek:
            inputs["local_expert_offset"] = scalar("int32", "First expert of this rank.")
            inputs["routed_scaling_factor"] = scalar("float32", "Factor of all weights.")
        return {
            "axes": {
                **self._axes(spec, experts),
                **{name: const(n, f"{_BLOCK}-wide blocks.") for name, n in blocks.items()},
            },
            "inputs": inputs,
            "reference": self._reference(spec, inputs, _DEQUANTIZE_BLOCKS, _route(spec)),
        }

    def _one_rank(self, spec: KernelSpec) -> Json:
        """Kernels whose definitions count one rank's experts as `num_experts`.

        FP4 weights are float32 here: the reference computes what the quantised kernel approximates.
        """
        routed = spec.variant == "fp4_block_scale_routed"
        per_tensor = spec.variant == "fp8_per_tensor"
        local = spec.model_copy(
            update={"axes": {**spec.axes, "num_experts": spec.axes["num_local_experts"]}}
        )
        inputs = {
            "routing_logits": tensor(["seq_len", "num_experts"], "bfloat16", "Router logits.")
        }
        if routed:
            inputs = {
                "topk_ids": tensor(["seq_len", "top_k"], "int32", "Expert and weight, packed.")
            }
        weights = "float8_e4m3fn" if per_tensor else "float32"
        inputs["hidden_states"] = tensor(
            ["seq_len", "hidden_size"], "float8_e4m3fn" if per_tensor else "bfloat16", "Tokens."
        )
        inputs["gemm1_weights"] = tensor(
            ["num_experts", "gemm1_out_size", "hidden_size"], weights, "Up and gate projections."
        )
        if per_tensor:
            inputs["output1_scales_scalar"] = tensor(["num_experts"], "float32", "Scale of up.")
            inputs["output1_scales_gate_scalar"] = tensor(
                ["num_experts"], "float32", "Scale of gate."
            )
        inputs["gemm2_weights"] = tensor(
            ["num_experts", "hidden_size", "intermediate_size"], weights, "Down projections."
        )
        if per_tensor:
            inputs["output2_scales_scalar"] = tensor(["num_experts"], "float32", "Output scale.")
        if spec.constants["routing"] == _Routing.LLAMA4.value and not routed:
            inputs["routing_bias"] = tensor(["num_experts"], "bfloat16", "Taken and not used.")
        return {
            "axes": self._axes(local, {"num_experts": "Experts of this rank."}),
            "inputs": inputs,
            "reference": self._reference(
                local,
                inputs,
                _SCALED_WEIGHTS if per_tensor else _PLAIN_WEIGHTS,
                _ROUTE_PRECOMPUTED if routed else _route(spec),
            ),
        }

    def implied(self, call: Call) -> KernelSpec | None:
        """By the call's routing method, experts and sizes, where a definition has all of them."""
        if call.name not in _BY_API:
            return None
        with suppress(DumpError):
            spec = self._called(call)
            self._axes_of(spec, self.definition(spec), call)
            return spec
        return None

    def rows(self, spec: KernelSpec, calls: Sequence[Call]) -> Iterator[Row | Rejected]:
        """One row per call, with the tensors that decide its routing."""
        definition = self.definition(spec)
        api = _KERNELS[spec.variant].api
        return rows_of(calls, api, lambda call: self._row(spec, definition, call))

    def _called(self, call: Call) -> KernelSpec:
        """Return the kernel that a call's numbers describe.

        Raises:
            DumpError: they describe none of this family's.
        """
        variant = _BY_API[call.name]
        local = integer_of(call, "local_num_experts")
        axes = {
            "num_experts": integer_of(call, "num_experts"),
            "num_local_experts": local,
            "hidden_size": _hidden_size(call),
            "intermediate_size": integer_of(call, "intermediate_size"),
            "top_k": integer_of(call, "top_k"),
        }
        routing = _Routing.RENORMALIZE
        # What comes routed already has no method; SGLang passes 1, "unused".
        if variant != "fp4_block_scale_routed":
            method = integer_of(call, "routing_method_type", 0, least=0)
            if method not in _METHODS or variant not in _VARIANTS[_METHODS[method]]:
                raise DumpError(
                    f"{call.name}: routing_method_type is {method}, which no definition has"
                )
            routing = _METHODS[method]
        constants: dict[str, int | float | str] = {"routing": routing.value}
        named = variant
        if routing is _Routing.DEEPSEEK:
            constants |= {name: _groups(call, name) for name in ("n_group", "topk_group")}
            named += _GROUPED
        return KernelSpec(
            name=self.name_of(named, axes, constants),
            op_type=self.op_type,
            variant=variant,
            axes=axes,
            constants=constants,
            origin=("a dumped call's arguments",),
        )

    def _axes_of(self, spec: KernelSpec, definition: Json, call: Call) -> dict[str, int]:
        """Check a call against a definition and return the var axes.

        Raises:
            DumpError: it is a call of another kernel.
        """
        called, inputs = self._called(call), definition["inputs"]
        deepseek = "local_expert_offset" in inputs
        wanted = {
            **spec.axes,
            **{name: n for name, n in spec.constants.items() if isinstance(n, int)},
        }
        if not deepseek:
            wanted["num_experts"] = spec.axes["num_local_experts"]
        routings = called.constants["routing"], spec.constants["routing"]
        if spec.variant != "fp4_block_scale_routed" and routings[0] != routings[1]:
            raise DumpError(
                f"{call.name}: the routing is {routings[0]}, the definition has {routings[1]}"
            )
        numbers = {name: n for name, n in called.constants.items() if isinstance(n, int)}
        check_axes(call, {**called.axes, **numbers}, wanted)
        self._check_settings(spec, deepseek, call)
        carried = [name for name, declared in inputs.items() if declared["shape"] is not None]
        if spec.variant.startswith("fp4"):
            # In these definitions FP4 is float32 or bfloat16, in calls two numbers to a byte.
            carried = [name for name in carried if name in _STORED]
            _check_packed_weights(call, spec)
        axes = bound_axes(call, definition, {name: name for name in carried}, _STORED)
        tokens = tensor_of(call, "hidden_states", 2).shape[0]
        if tokens != axes["seq_len"]:
            raise DumpError(f"{call.name}: {tokens} tokens, routing for {axes['seq_len']}")
        return axes

    def _check_settings(self, spec: KernelSpec, deepseek: bool, call: Call) -> None:
        """Check that a call asks for nothing that the definition does not compute.

        Raises:
            DumpError: it does.
        """
        for name, values in _PLAIN.items():
            check_setting(call, name, *values, default=values[0])
        check_without(call, _EXTRAS)
        on_input = spec.constants["routing"] == _Routing.LLAMA4.value
        if not deepseek:
            check_setting(call, "local_expert_offset", 0)
            check_setting(call, "routed_scaling_factor", None, 1.0, 1)
            if not on_input:
                check_without(call, ("routing_bias",))
        if spec.variant == "fp8_per_tensor":
            check_setting(call, "use_routing_scales_on_input", on_input)

    def _row(self, spec: KernelSpec, definition: Json, call: Call) -> Row:
        axes = self._axes_of(spec, definition, call)
        inputs = definition["inputs"]
        # Logits in bfloat16 become the float32 ones of DeepSeek's routing as they are. Those that
        # would have to be rounded are refused: the router would choose other experts.
        tensors = {name: stored(call, definition, name) for name in _STORED if name in inputs}
        if "topk_ids" in tensors:
            experts = tensors["topk_ids"] >> 16
            check_range(call, "topk_ids >> 16", experts, 0, spec.axes["num_local_experts"] - 1)
            # A bfloat16 whose exponent is all ones.
            if (tensors["topk_ids"] & 0x7F80 == 0x7F80).any():
                raise DumpError(f"{call.name}: topk_ids has weights that are not finite")
        scalars = {}
        if "local_expert_offset" in inputs:
            offset = scalar_of(call, spec, "local_expert_offset", "local_expert_offset")
            last = spec.axes["num_experts"] - spec.axes["num_local_experts"]
            if type(offset.value) is not int or not 0 <= offset.value <= last:
                raise DumpError(
                    f"{call.name}: local_expert_offset is {offset.value}, expected 0 to {last}"
                )
            scalars = {
                "local_expert_offset": offset,
                "routed_scaling_factor": scalar_of(
                    call, spec, "routed_scaling_factor", "routed_scaling_factor"
                ),
            }
        return Row(axes=axes, tensors=tensors, scalars=scalars, calls=(call.id,))

    def baseline(self, spec: KernelSpec) -> str | None:
        """Wrap the FP8 block-scale function.

        None for the others: their kernels take weights that are quantised (FP4) and shuffled for
        them, so that a wrapper would do that to all weights on each call.
        """
        if spec.variant != "fp8_block_scale":
            return None
        axes, deepseek = spec.axes, spec.constants["routing"] == _Routing.DEEPSEEK.value
        return _BASELINE.format(
            arguments=", ".join(self.definition(spec)["inputs"]),
            bias="routing_bias" if deepseek else None,
            num_experts=axes["num_experts" if deepseek else "num_local_experts"],
            num_local_experts=axes["num_local_experts"],
            top_k=axes.get("top_k", spec.constants.get("top_k")),
            n_group=spec.constants.get("n_group"),
            topk_group=spec.constants.get("topk_group"),
            intermediate_size=axes["intermediate_size"],
            offset="int(local_expert_offset)" if deepseek else 0,
            factor="float(routed_scaling_factor)" if deepseek else 1.0,
            method=_NUMBERS[_Routing(spec.constants["routing"])],
        )


def _hidden_size(call: Call) -> int:
    """Return the width of the tokens, of which FP4 has two numbers in a byte."""
    tokens = tensor_of(call, "hidden_states", 2)
    return tokens.shape[1] * (2 if tokens.dtype == "uint8" else 1)


def _groups(call: Call, name: str) -> int:
    """Return a number of groups; None, 0 and 1 are the same to the kernel: all experts."""
    return 1 if value_of(call, name) is None else max(1, integer_of(call, name, least=0))


def _check_packed_weights(call: Call, spec: KernelSpec) -> None:
    """Check the shapes of the weights, of which FP4 has two numbers in a byte.

    Raises:
        DumpError: one is missing, or they are of another model.
    """
    wanted = {**spec.axes, "gemm1_out_size": 2 * spec.axes["intermediate_size"]}
    for name, output, width in (
        ("gemm1_weights", "gemm1_out_size", "hidden_size"),
        ("gemm2_weights", "hidden_size", "intermediate_size"),
    ):
        experts, rows, columns = tensor_of(call, name, 3).shape
        check_axes(call, {"num_local_experts": experts, output: rows, width: 2 * columns}, wanted)
