"""rmsnorm: RMSNorm and its fused residual-add form."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

from tasks.errors import DefinitionError
from tasks.model import ModelConfig, Serving
from tasks.ops.base import (
    Call,
    DumpError,
    FlashInferApi,
    Hint,
    Json,
    KernelSpec,
    MetaTensor,
    OpModule,
    Rejected,
    Requirement,
    Row,
    TemplateCall,
    Unmapped,
    check_axes,
    const,
    register,
    rows_of,
    tensor,
    var,
)
from tasks.ops.plans import check_tensor, shown

_QK_NORM_MODEL_TYPES = (
    *("qwen3", "gemma3", "gemma4", "exaone4", "exaone_moe", "dots1", "step3p5", "lfm2", "sdar"),
    *("afmoe", "apertus"),
)
"""Models (or what their types begin with) whose attention normalises q and k per head without a
field that says so: `q_norm` and `k_norm` over head_dim in SGLang's model files."""
_QK_NORM_FIELDS = ("use_qk_norm", "qk_norm", "use_qk_layernorm")

_WHOLE_QK_NORM_MODEL_TYPES = ("olmo2", "olmo3", "olmoe")
"""Models that normalise all heads of q, and of k, together (`olmo2.py`, `olmoe.py`)."""
_POST_NORM_MODEL_TYPES = ("olmo2", "olmo3")
"""Models that normalise a layer's output before it is added: there is no fused form."""

_ONE_PLUS_WEIGHT = ("gemma", "qwen3_next", "qwen3_5")
"""Models whose norms scale by 1 + weight (`GemmaRMSNorm`): the same kernel, given that sum."""

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

_TEST = """\
def rows(count):
    generator, hidden = seeded(count), CONST["hidden_size"]
    inputs = {"hidden_states": random(generator, count, hidden)}
    if VARIANT == "fused_add_rmsnorm":
        inputs["residual"] = 3 * random(generator, count, hidden)
    inputs["weight"] = random(generator, hidden)
    # A row so small that epsilon matters, and one of zeros behind others.
    for tensor in list(inputs.values())[:-1]:
        tensor[0] *= 0.001
        if count > 1:
            tensor[-1] = 0
    return inputs


CASES = {"one row": lambda: rows(1), "seven rows": lambda: rows(7)}


def check(inputs, outputs, kernel):
    *added, weight = (tensor.double() for tensor in inputs.values())
    expected = torch.nn.functional.rms_norm(sum(added), weight.shape, weight, CONSTANTS["eps"])
    # Values are of order 1: normalised, times a weight of order 1.
    assert_close(outputs["output"], expected, kernel, loose=2.0**-6)
"""


def _stated_eps(reference: str) -> float | None:
    stated = re.search(r"^\s*EPS = (\S+)$", reference, re.MULTILINE)
    try:
        return float(stated[1]) if stated else None
    except ValueError:
        return None


def _api(function: str) -> FlashInferApi:
    return FlashInferApi(
        path=f"flashinfer.norm.{function}",
        dumps=(function,),
        sglang_layer="python/sglang/srt/layers/layernorm.py",
        hint=Hint(
            text="sglang-kernel calls FlashInfer's norms only eagerly and for dtypes that they "
            "support",
            not_with={"enable_deterministic_inference": "takes other norms"},
        ),
    )


def _shape(call: Call) -> tuple[int, int]:
    """Return the rows and the width of a call's input."""
    hidden = call.tensors.get("input")
    if hidden is None:
        raise DumpError(f"{call.name}: the dump has no tensor 'input'")
    if len(hidden.shape) != 2:
        raise DumpError(f"{call.name}: input has {len(hidden.shape)} dimensions, expected 2")
    check_tensor(call, "input", (None, None))
    return hidden.shape[0], hidden.shape[1]


def _eps(call: Call) -> float:
    """Return a call's epsilon."""
    eps = call.values.get("eps")
    if eps is None:
        raise DumpError(f"{call.name}: the dump has no eps")
    if not isinstance(eps, float) or not 0 < eps < 1:
        raise DumpError(f"{call.name}: eps is {shown(eps)}")
    return eps


@register
class RmsNorm(OpModule):
    """`rmsnorm_h{hidden}` and `fused_add_rmsnorm_h{hidden}`; not sharded by tensor parallelism."""

    op_type = "rmsnorm"
    names = {variant: f"{variant}_h{{hidden_size}}" for variant in ("rmsnorm", "fused_add_rmsnorm")}

    any_architecture = True
    reference_test = _TEST
    apis = (_api("rmsnorm"), _api("fused_add_rmsnorm"))

    def required(self, model: ModelConfig, serving: Serving) -> Iterator[Requirement]:
        """Input and post-attention norms, and those inside attention."""
        if model.rms_norm_eps is None:
            yield Unmapped("norms", "the config states no epsilon of an RMSNorm")
            return
        hidden, eps = model.hidden_size, model.rms_norm_eps
        scaled = model.model_type.startswith(_ONE_PLUS_WEIGHT)
        note = "; SGLang calls gemma_..., weight is 1 + the checkpoint's" if scaled else ""
        yield self._spec("rmsnorm", hidden, eps, "hidden_size", note)
        if not model.model_type.startswith(_POST_NORM_MODEL_TYPES):
            yield self._spec("fused_add_rmsnorm", hidden, eps, "hidden_size", note)
        if not model.mapped:
            return
        if model.is_mla:
            # deepseek_v2.py: q_a_layernorm, kv_a_layernorm.
            for field in ("q_lora_rank", "kv_lora_rank"):
                rank = model.fields.size(field)
                if rank:
                    yield self._spec("rmsnorm", rank, eps, field)
        elif model.model_type.startswith(_WHOLE_QK_NORM_MODEL_TYPES):
            for attention in model.attentions:
                for heads, what in ((attention.num_heads, "q"), (attention.num_kv_heads, "k")):
                    width = heads * attention.head_dim
                    yield self._spec("rmsnorm", width, eps, f"all heads of {what}")
        elif self._normalises_heads(model):
            for attention in model.attentions:
                dim = attention.head_dim
                yield self._spec("rmsnorm", dim, eps, "head_dim (q_norm, k_norm)", note)

    def _normalises_heads(self, model: ModelConfig) -> bool:
        if model.fields.text("qk_norm_type") == "per_layer":
            return False  # minimax_m2.py: one norm over all heads, with an all-reduce of its own
        stated = model.fields.flag(*_QK_NORM_FIELDS)
        return model.model_type.startswith(_QK_NORM_MODEL_TYPES) if stated is None else stated

    def _spec(
        self, variant: str, hidden: int, eps: float, field: str, note: str = ""
    ) -> KernelSpec:
        axes = {"hidden_size": hidden}
        return KernelSpec(
            name=self.name_of(variant, axes),
            op_type=self.op_type,
            variant=variant,
            axes=axes,
            constants={"eps": eps},
            origin=(f"{field} = {hidden}, eps = rms_norm_eps = {eps:g}{note}",),
        )

    def restored(
        self,
        definition: Json,
        variant: str,
        axes: Mapping[str, int],
        said: Mapping[str, int | str],
    ) -> KernelSpec:
        """Epsilon is no axis: the reference has it, as the number `EPS`."""
        eps = _stated_eps(definition["reference"])
        if eps is None:
            raise DefinitionError(f"{definition['name']}: its reference states no EPS")
        spec = super().restored(definition, variant, axes, said)
        return spec.model_copy(update={"constants": {"eps": eps}})

    def implied(self, call: Call) -> KernelSpec | None:
        """By the width of the rows and the epsilon it was called with."""
        if call.name not in self.names:
            return None
        try:
            (_, hidden), eps = _shape(call), _eps(call)
        except DumpError:
            return None
        return self._spec(call.name, hidden, eps, "a dumped call's input")

    def as_called(self, template: Json, spec: KernelSpec) -> tuple[Json, tuple[str, ...]]:
        """The template's epsilon is its own, whatever the call's was."""
        template, corrected = super().as_called(template, spec)
        baked, called = _stated_eps(str(template.get("reference"))), spec.constants["eps"]
        if baked not in (None, called):
            corrected = (*corrected, f"epsilon {baked:g} of the template, called with {called:g}")
        return template, corrected

    def provider(self, spec: KernelSpec) -> FlashInferApi:
        """FlashInfer's norm functions, which SGLang reaches through sglang-kernel."""
        return _api(spec.variant)

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
        rows, hidden = _shape(call)
        check_axes(call, {"hidden_size": hidden}, spec.axes)
        eps = _eps(call)
        if eps != spec.constants["eps"]:
            raise DumpError(
                f"{call.name}: eps is {eps:g}, the definition has {spec.constants['eps']:g}"
            )
        if rows == 0:
            raise DumpError(f"{call.name}: empty input")
        shapes: dict[str, tuple[int, ...]] = {"weight": (hidden,)}
        if spec.variant == "fused_add_rmsnorm":
            shapes["residual"] = (rows, hidden)
        for name, shape in shapes.items():
            if name not in call.tensors:
                raise DumpError(f"{call.name}: the dump has no tensor {name!r}")
            check_tensor(call, name, shape)
        return Row(axes={"batch_size": rows}, calls=(call.id,))

    def baseline(self, spec: KernelSpec) -> str:
        """Wrap the FlashInfer function."""
        source = _FUSED_BASELINE if spec.variant == "fused_add_rmsnorm" else _RMSNORM_BASELINE
        return source.format(eps=repr(spec.constants["eps"]))
