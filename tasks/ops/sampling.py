"""sampling: drawing tokens from probabilities under top-k and top-p filters."""

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

_FILTERS = {
    "top_k_sampling_from_probs": ("top_k",),
    "top_p_sampling_from_probs": ("top_p",),
    "top_k_top_p_sampling_from_probs": ("top_k", "top_p"),
}
_DTYPE = {"top_k": "int32", "top_p": "float32"}
_DESCRIPTION = {
    "top_k": "How many of the most likely tokens stay, per sequence.",
    "top_p": "Cumulative probability that stays (nucleus), per sequence.",
}

_HEAD = """\
import torch


@torch.no_grad()
def run(probs, {arguments}):
    batch_size, vocab_size = probs.shape
    assert vocab_size == {vocab}

    probs = probs.to(torch.float32)
    samples = torch.empty(batch_size, dtype=torch.int64, device=probs.device)
    for i in range(batch_size):
        row = probs[i]
"""
_TOP_K = """\
        k = int(top_k[i].item())
        if 0 < k < vocab_size:
            kept = torch.topk(row, k).indices
            filtered = torch.zeros_like(row)
            filtered[kept] = row[kept]
            row = filtered / filtered.sum()
"""
_TOP_P = """\
        p = float(top_p[i].item())
        if p <= 0.0:
            samples[i] = torch.argmax(row)
            continue
        if p < 1.0:
            values, order = torch.sort(row, descending=True)
            # A token stays while those before it have not yet reached p, as FlashInfer counts.
            stays = torch.cumsum(values, dim=0) - values < p
            filtered = torch.zeros_like(row)
            filtered[order[stays]] = values[stays]
            row = filtered / filtered.sum()
"""
_TAIL = """\
        samples[i] = torch.multinomial(row, 1, replacement=True).squeeze(0)
    return samples
"""

_BASELINE = """\
import flashinfer
import torch


def run(probs, {arguments}):
    return flashinfer.sampling.{function}(probs, {arguments}).to(torch.int64)
"""


def _api(function: str) -> FlashInferApi:
    return FlashInferApi(
        path=f"flashinfer.sampling.{function}",
        dumps=(function,),
        server_flags=("--sampling-backend flashinfer",),
        sglang_layer="python/sglang/srt/layers/sampler.py",
    )


@register
class Sampling(OpModule):
    """`{filter}_sampling_from_probs_v{vocab}`; runs on the whole vocabulary on every rank."""

    op_type = "sampling"
    names = {variant: f"{variant}_v{{vocab_size}}" for variant in _FILTERS}
    any_architecture = True
    apis = tuple(_api(variant) for variant in _FILTERS)

    def required(self, model: ModelConfig, serving: Serving) -> Iterator[KernelSpec]:
        """The three filters over the model's vocabulary."""
        for variant in _FILTERS:
            axes = {"vocab_size": model.vocab_size}
            yield KernelSpec(
                name=self.name_of(variant, axes),
                op_type=self.op_type,
                variant=variant,
                axes=axes,
                origin=(f"vocab_size = {model.vocab_size}",),
            )

    def provider(self, spec: KernelSpec) -> FlashInferApi:
        """FlashInfer's sampling functions; SGLang's flashinfer sampling backend."""
        return _api(spec.variant)

    def template_call(self, spec: KernelSpec) -> TemplateCall:
        """Probabilities and per-sequence thresholds."""
        arguments = {"probs": MetaTensor((8, spec.axes["vocab_size"]), "float32")}
        for name in _FILTERS[spec.variant]:
            arguments[name] = MetaTensor((8,), _DTYPE[name])
        return TemplateCall(f"flashinfer.sampling:{spec.variant}", arguments)

    def definition(self, spec: KernelSpec) -> Json:
        """Filter, renormalise, draw; top-k is applied before top-p."""
        vocab, filters = spec.axes["vocab_size"], _FILTERS[spec.variant]
        steps = {"top_k": _TOP_K, "top_p": _TOP_P}
        inputs = {
            "probs": tensor(["batch_size", "vocab_size"], "float32", "Probabilities (softmax).")
        }
        for name in filters:
            inputs[name] = tensor(["batch_size"], _DTYPE[name], _DESCRIPTION[name])
        what = " and ".join(name.replace("_", "-") for name in filters)
        return {
            "description": (
                f"{what} sampling from probabilities with vocab_size={vocab}: filter, "
                "renormalise, then sample."
            ).capitalize(),
            "tags": [],
            "axes": {
                "batch_size": var("Number of sequences to sample from."),
                "vocab_size": const(vocab, "Size of the vocabulary."),
            },
            "inputs": inputs,
            "outputs": {"samples": tensor(["batch_size"], "int64", "Sampled token indices.")},
            "reference": _HEAD.format(arguments=", ".join(filters), vocab=vocab)
            + "".join(steps[name] for name in filters)
            + _TAIL,
        }

    def rows(self, spec: KernelSpec, calls: Sequence[Call]) -> Iterator[Row | Rejected]:
        """One row per call; the thresholds are stored, the probabilities are activations."""
        return rows_of(calls, spec.variant, lambda call: self._row(spec, call))

    def _row(self, spec: KernelSpec, call: Call) -> Row:
        probs = call.tensors.get("probs")
        if probs is None or len(probs.shape) != 2:
            raise DumpError(f"{call.name}: the dump has no two-dimensional tensor 'probs'")
        check_axes(call, {"vocab_size": probs.shape[1]}, spec.axes)
        stored = {}
        for name in _FILTERS[spec.variant]:
            dumped = call.tensors.get(name)
            if dumped is None:
                raise DumpError(f"{call.name}: {name} is not a tensor in the dump")
            if dumped.shape != (probs.shape[0],):
                raise DumpError(f"{call.name}: {name} has shape {dumped.shape}")
            stored[name] = dumped.load()
        return Row(axes={"batch_size": probs.shape[0]}, tensors=stored, calls=(call.id,))

    def baseline(self, spec: KernelSpec) -> str:
        """Wrap the FlashInfer function."""
        return _BASELINE.format(function=spec.variant, arguments=", ".join(_FILTERS[spec.variant]))
