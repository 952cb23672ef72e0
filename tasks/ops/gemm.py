"""gemm: the model's linear layers, C = A @ B.T."""

from __future__ import annotations

from collections.abc import Iterator

from tasks.model import ModelConfig, Serving
from tasks.ops.base import (
    Json,
    KernelSpec,
    OpModule,
    TorchOnly,
    const,
    register,
    tensor,
    var,
)

_OUTPUT_GATE_MODEL_TYPES = ("qwen3_next", "qwen3_5")

_REFERENCE = """\
import torch


@torch.no_grad()
def run(A, B):
    return torch.matmul(A, B.T)
"""


@register
class Gemm(OpModule):
    """`gemm_n{N}_k{K}`, unsharded, as the dataset has them."""

    op_type = "gemm"

    def required(self, model: ModelConfig, serving: Serving) -> Iterator[KernelSpec]:
        """Fused qkv, output, fused gate/up, down and router projections (weights `[N, K]`)."""
        hidden, dim = model.hidden_size, model.head_dim
        if model.has_softmax_attention and not model.is_mla:
            # qwen3_next.py: qkv_proj has the output gate's heads too.
            gated = model.model_type.startswith(_OUTPUT_GATE_MODEL_TYPES)
            heads = model.num_heads * (2 if gated else 1)
            yield self._spec((heads + 2 * model.num_kv_heads) * dim, hidden, "qkv_proj")
            yield self._spec(hidden, model.num_heads * dim, "o_proj")
        if model.linear_attention_layers:
            # modeling_minimax_m1.py, MiniMaxM1LightningAttention: qkv_proj, output_gate, out_proj.
            yield self._spec(3 * model.num_heads * dim, hidden, "linear attention qkv_proj")
            yield self._spec(model.num_heads * dim, hidden, "linear attention output_gate")
            yield self._spec(hidden, model.num_heads * dim, "linear attention out_proj")
        if model.moe_layers < model.num_layers and model.intermediate_size:
            yield self._spec(2 * model.intermediate_size, hidden, "gate_up_proj")
            yield self._spec(hidden, model.intermediate_size, "down_proj")
        if model.moe:
            yield self._spec(model.moe.num_experts, hidden, "router gate")

    def _spec(self, n: int, k: int, layer: str) -> KernelSpec:
        return KernelSpec(
            name=f"gemm_n{n}_k{k}",
            op_type=self.op_type,
            variant="gemm",
            axes={"N": n, "K": k},
            origin=(f"{layer}: N={n}, K={k}",),
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
