"""rmsnorm: RMSNorm and its fused residual-add form."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tasks.model import ModelConfig, Serving
from tasks.ops.base import (
    Call,
    DumpError,
    FlashInferApi,
    Json,
    KernelSpec,
    MetaTensor,
    NotProduced,
    OpModule,
    Rejected,
    Row,
    TemplateCall,
    check_axes,
    const,
    register,
    rows_of,
    tensor,
    var,
)

_QK_NORM_MODEL_TYPES = frozenset({"qwen3", "qwen3_moe", "qwen3_vl_text", "qwen3_vl_moe_text"})
"""Models whose attention normalises q and k per head (`q_norm`, `k_norm` in SGLang's qwen3.py)."""

_GEMMA_MODEL_TYPES = ("gemma",)
"""Gemma scales by (1 + weight): another kernel (`gemma_rmsnorm`), not this op type's."""

_TEMPLATE_EPS = 1e-6
"""The epsilon in FlashInfer's own trace templates."""

_RMSNORM = """\
import torch


@torch.no_grad()
def run(hidden_states, weight):
    batch_size, hidden_size = hidden_states.shape
    assert hidden_size == {hidden}

    EPS = {eps}

    x = hidden_states.to(torch.float32)
    inv_rms = torch.rsqrt(x.pow(2).mean(dim=-1, keepdim=True) + EPS)
    y = (x * inv_rms) * weight.to(torch.float32)
    return y.to(hidden_states.dtype)
"""

_FUSED = """\
import torch


@torch.no_grad()
def run(hidden_states, residual, weight):
    batch_size, hidden_size = hidden_states.shape
    assert hidden_size == {hidden}

    EPS = {eps}

    x = hidden_states.to(torch.float32) + residual.to(torch.float32)
    inv_rms = torch.rsqrt(x.pow(2).mean(dim=-1, keepdim=True) + EPS)
    y = (x * inv_rms) * weight.to(torch.float32)
    return y.to(hidden_states.dtype)
"""

_RMSNORM_BASELINE = """\
import flashinfer


def run(hidden_states, weight):
    return flashinfer.norm.rmsnorm(hidden_states, weight, eps={eps})
"""

_FUSED_BASELINE = """\
import flashinfer


def run(hidden_states, residual, weight):
    # The API works in place, on both.
    output, summed = hidden_states.clone(), residual.clone()
    flashinfer.norm.fused_add_rmsnorm(output, summed, weight, eps={eps})
    return output
"""


@register
class RmsNorm(OpModule):
    """`rmsnorm_h{hidden}` and `fused_add_rmsnorm_h{hidden}`; not sharded by tensor parallelism."""

    op_type = "rmsnorm"

    def required(self, model: ModelConfig, serving: Serving) -> Iterator[KernelSpec | NotProduced]:
        """Input and post-attention norms over hidden_size, q/k norms over head_dim."""
        if model.rms_norm_eps is None or model.model_type.startswith(_GEMMA_MODEL_TYPES):
            yield NotProduced("norms", f"{model.model_type or 'the model'} has no plain RMSNorm")
            return
        hidden, eps = model.hidden_size, model.rms_norm_eps
        yield self._spec("rmsnorm", hidden, eps, "hidden_size")
        yield self._spec("fused_add_rmsnorm", hidden, eps, "hidden_size")
        if model.model_type in _QK_NORM_MODEL_TYPES or model.raw.get("use_qk_norm") is True:
            yield self._spec("rmsnorm", model.head_dim, eps, "head_dim (q_norm, k_norm)")

    def _spec(self, variant: str, hidden: int, eps: float, field: str) -> KernelSpec:
        return KernelSpec(
            name=f"{variant}_h{hidden}",
            op_type=self.op_type,
            variant=variant,
            axes={"hidden_size": hidden},
            constants={"eps": eps},
            origin=(f"hidden_size = {field} = {hidden}, eps = rms_norm_eps = {eps:g}",),
        )

    def provider(self, spec: KernelSpec) -> FlashInferApi:
        """FlashInfer's norm functions, which SGLang reaches through sglang-kernel."""
        return FlashInferApi(
            path=f"flashinfer.norm.{spec.variant}",
            dumps=(spec.variant,),
            sglang_layer="python/sglang/srt/layers/layernorm.py",
        )

    def template_call(self, spec: KernelSpec) -> TemplateCall | None:
        """The template has its epsilon baked in: trusted only for models that use the same."""
        if spec.constants["eps"] != _TEMPLATE_EPS:
            return None
        hidden = spec.axes["hidden_size"]
        rows, weight = MetaTensor((8, hidden), "bfloat16"), MetaTensor((hidden,), "bfloat16")
        arguments = {"input": rows, "weight": weight}
        if spec.variant == "fused_add_rmsnorm":
            arguments["residual"] = rows
        return TemplateCall(f"flashinfer.norm:{spec.variant}", arguments)

    def definition(self, spec: KernelSpec) -> Json:
        """RMSNorm, y = x / sqrt(mean(x^2) + eps) * weight, computed in float32."""
        hidden, eps = spec.axes["hidden_size"], repr(spec.constants["eps"])
        shape = ["batch_size", "hidden_size"]
        fused = spec.variant == "fused_add_rmsnorm"
        inputs = {"hidden_states": tensor(shape, "bfloat16", "Input, one row per token.")}
        if fused:
            inputs["residual"] = tensor(shape, "bfloat16", "Residual added before the norm.")
        inputs["weight"] = tensor(["hidden_size"], "bfloat16", "Scale of each element.")
        what = "Fused Add + RMSNorm" if fused else "RMSNorm"
        return {
            "description": f"{what} with hidden_size={hidden}. Epsilon is fixed at {eps}.",
            "tags": ["fused"] if fused else [],
            "axes": {
                "batch_size": var("Number of rows (tokens, or tokens times heads)."),
                "hidden_size": const(hidden, "Elements normalised together."),
            },
            "inputs": inputs,
            "outputs": {"output": tensor(shape, "bfloat16", "Normalised rows.")},
            "reference": (_FUSED if fused else _RMSNORM).format(hidden=hidden, eps=eps),
        }

    def rows(self, spec: KernelSpec, calls: Sequence[Call]) -> Iterator[Row | Rejected]:
        """One row per call: only the number of rows varies, all inputs are activations."""
        return rows_of(calls, spec.variant, lambda call: self._row(spec, call))

    def _row(self, spec: KernelSpec, call: Call) -> Row:
        hidden = call.tensors.get("input")
        if hidden is None:
            raise DumpError(f"{call.name}: the dump has no tensor 'input'")
        if len(hidden.shape) != 2:
            raise DumpError(f"{call.name}: input has {len(hidden.shape)} dimensions, expected 2")
        check_axes(call, {"hidden_size": hidden.shape[1]}, spec.axes)
        eps = call.values.get("eps")
        if eps is None:
            raise DumpError(f"{call.name}: the dump has no eps")
        if eps != spec.constants["eps"]:
            raise DumpError(
                f"{call.name}: eps is {eps:g}, the definition has {spec.constants['eps']:g}"
            )
        if hidden.shape[0] == 0:
            raise DumpError(f"{call.name}: empty input")
        return Row(axes={"batch_size": hidden.shape[0]}, calls=(call.id,))

    def baseline(self, spec: KernelSpec) -> str:
        """Wrap the FlashInfer function."""
        source = _FUSED_BASELINE if spec.variant == "fused_add_rmsnorm" else _RMSNORM_BASELINE
        return source.format(eps=repr(spec.constants["eps"]))
