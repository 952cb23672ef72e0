"""gemm: the model's linear layers, C = A @ B.T."""

from __future__ import annotations

from collections.abc import Iterator

from tasks.model import SOFTMAX, Attention, ModelConfig, Serving
from tasks.ops.base import (
    Json,
    KernelSpec,
    NotProduced,
    OpModule,
    Requirement,
    TorchOnly,
    Unmapped,
    const,
    register,
    tensor,
    var,
)

_SPLIT_MODEL_TYPES = ("gemma3",)
"""Models whose published definitions split the projections that SGLang fuses; both are listed."""

_SHARED_EXPERTS = (
    "n_shared_experts",
    "num_shared_experts",
    "shared_expert_intermediate_size",
    "moe_shared_expert_intermediate_size",
    "moe_num_shared_experts",
    "shared_intermediate_size",
)

_REFERENCE = """\
import torch


@torch.no_grad()
def run(A, B):
    return torch.matmul(A, B.T)
"""


_TEST = """\
# How far apart rows of B begin in the buffer that they all are windows of: B is as large as the
# model's, and takes no time or memory to make. (Not 1, or a square B would be symmetric.)
STEP = 3


def rows(count):
    generator, n, k = seeded(count), CONST["N"], CONST["K"]
    a = random(generator, count, k, dtype="float16")
    if count > 1:
        a[-1] = 0
    buffer = random(generator, STEP * (n - 1) + k, dtype="float16")
    return {"A": a, "B": buffer.as_strided((n, k), (STEP, 1))}


CASES = {"one row": lambda: rows(1), "three rows": lambda: rows(3)}


def check(inputs, outputs, kernel):
    a, b = inputs["A"].double(), inputs["B"]
    # Multiplied by overlapping rows, A is correlated with the buffer: Fourier transforms do that.
    buffer = b.as_strided((STEP * (len(b) - 1) + b.shape[1],), (1,)).double()
    length = 1 << len(buffer).bit_length()
    spectrum = torch.fft.rfft(buffer, length) * torch.fft.rfft(a, length).conj()
    expected = torch.fft.irfft(spectrum, length)[:, : STEP * len(b) : STEP]
    # Partial sums are as large as the largest results.
    size = expected.abs().max().item()
    # Kernels add up in float32 as well, only in another order.
    assert_close(outputs["C"], expected, kernel, loose=2.0**-10, size=size)
"""


def _unpublished(model: ModelConfig) -> Iterator[Unmapped]:
    """Yield the linear layers that no definition is made for."""
    reason = "no GEMM definition is published for such projections"
    if model.is_mla:
        yield Unmapped("linear layers of latent attention (q_a, q_b, kv_a, kv_b, o_proj)", reason)
    for kind in model.mixers:
        if kind not in SOFTMAX and not model.model_type.startswith("minimax"):
            yield Unmapped(f"linear layers of {kind} (in_proj, out_proj)", reason)
    if model.moe_layers and model.fields.count(*_SHARED_EXPERTS):
        yield Unmapped("linear layers of shared experts", reason)


@register
class Gemm(OpModule):
    """`gemm_n{N}_k{K}` of linear layers, whole and as one tensor-parallel rank has it.

    The projections of attention with its own keys and values, dense feed-forward layers and routers
    are produced. Those of latent and linear attention, of state-space layers and of shared experts
    are published for no model; they are listed as unmapped. The published definitions are mostly
    the whole layers. Column-parallel layers (qkv, gate and up) divide N by tp, row-parallel ones
    (output, down) divide K.
    """

    op_type = "gemm"
    names = {"gemm": "gemm_n{N}_k{K}"}
    reference_test = _TEST
    any_architecture = True

    def required(self, model: ModelConfig, serving: Serving) -> Iterator[Requirement]:
        """Fused qkv, output, fused gate/up, down and router projections (weights `[N, K]`)."""
        hidden, tp = model.hidden_size, serving.tp
        yield from _unpublished(model)
        if not all(attention.heads_of_rank(tp) for attention in model.attentions):
            yield NotProduced(f"linear layers at tp={tp}", f"tp={tp} does not divide the heads")
            tp = 1
        for attention in model.attentions:
            yield from self._attention(model, attention, tp)
        if model.model_type.startswith("minimax") and model.mixers.get("linear_attention"):
            # modeling_minimax_m1.py, MiniMaxM1LightningAttention: qkv_proj, output_gate, out_proj.
            inner = model.num_heads * model.head_dim
            yield from self._layer(3 * inner, hidden, "linear attention qkv_proj", columns=tp)
            yield from self._layer(inner, hidden, "linear attention output_gate", columns=tp)
            yield from self._layer(hidden, inner, "linear attention out_proj", rows=tp)
        for width in model.dense_widths:
            name, columns = ("gate_up_proj", 2) if model.gated_mlp else ("up_proj", 1)
            yield from self._layer(columns * width, hidden, name, columns=tp)
            yield from self._layer(hidden, width, "down_proj", rows=tp)
            if model.model_type.startswith(_SPLIT_MODEL_TYPES):
                yield from self._layer(width, hidden, "gate_proj or up_proj alone", columns=1)
        if model.moe and model.moe_layers:
            yield from self._layer(model.moe.num_experts, hidden, "router gate", columns=1)

    def _attention(
        self, model: ModelConfig, attention: Attention, tp: int
    ) -> Iterator[Requirement]:
        hidden = model.hidden_size
        heads, kv_heads = attention.num_heads, attention.num_kv_heads
        key, value = attention.head_dim, attention.v_head_dim
        # qwen3_next.py, qwen3_5.py: qkv_proj has the output gate's heads too.
        gated = model.fields.flag("attn_output_gate")
        if gated is None:
            gated = model.model_type.startswith("qwen3_next")

        def fused(queries: int, keys: int) -> int:
            return queries * key * (2 if gated else 1) + keys * (key + value)

        yield self._spec(fused(heads, kv_heads), hidden, "qkv_proj")
        shard = attention.heads_of_rank(tp)
        if tp > 1 and shard:
            yield self._spec(fused(*shard), hidden, "qkv_proj", tp)
        yield from self._layer(hidden, heads * value, "o_proj", rows=tp)
        if model.model_type.startswith(_SPLIT_MODEL_TYPES):
            yield from self._layer(heads * key, hidden, "q_proj alone", columns=1)
            yield from self._layer(kv_heads * key, hidden, "k_proj or v_proj alone", columns=1)

    def _layer(
        self, n: int, k: int, layer: str, columns: int = 1, rows: int = 1
    ) -> Iterator[Requirement]:
        """Yield a layer whole, and divided where tensor parallelism divides it."""
        yield self._spec(n, k, layer)
        if columns * rows == 1:
            return
        if n % columns or k % rows:
            yield NotProduced(
                f"{layer} at tp={columns * rows}",
                f"tp={columns * rows} does not divide N={n}"
                if n % columns
                else f"tp={rows} does not divide K={k}",
            )
            return
        yield self._spec(n // columns, k // rows, layer, columns * rows)

    def _spec(self, n: int, k: int, layer: str, tp: int | None = None) -> KernelSpec:
        shard = f" of one rank at tp={tp}" if tp else ""
        axes = {"N": n, "K": k}
        return KernelSpec(
            name=self.name_of("gemm", axes),
            op_type=self.op_type,
            variant="gemm",
            axes=axes,
            tp=(tp,) if tp else (),
            origin=(f"{layer}{shard}: N={n}, K={k}",),
        )

    def provider(self, spec: KernelSpec) -> TorchOnly:
        """SGLang's unquantised linear layers call torch (`F.linear`)."""
        return TorchOnly("unquantised linear layers run torch.nn.functional.linear")

    def definition(self, spec: KernelSpec) -> Json:
        """C = A @ B.T in float16, the dataset's convention for this op type."""
        layers = ", ".join(origin.split(":")[0] for origin in spec.origin)
        return {
            "description": f"General matrix multiply (GEMM) C = A @ B.T: {layers}.",
            "tags": [],
            "axes": {
                "M": var("Number of rows (tokens)."),
                "N": const(spec.axes["N"], "Output features."),
                "K": const(spec.axes["K"], "Input features."),
            },
            "inputs": {
                "A": tensor(["M", "K"], "float16", "Activations."),
                "B": tensor(["N", "K"], "float16", "Weights."),
            },
            "outputs": {"C": tensor(["M", "N"], "float16", "Result.")},
            "reference": _REFERENCE,
        }
