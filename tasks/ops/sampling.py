"""sampling: drawing tokens from probabilities under top-k and top-p filters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from tasks.model import ModelConfig, Serving
from tasks.ops.base import (
    Call,
    DumpError,
    Effort,
    FlashInferApi,
    Hint,
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
from tasks.ops.plans import check_tensor, shown

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

_ORDERS = (None, "top_k_first", "joint")
"""FlashInfer's ways to combine two filters. The definition's is the default, `top_k_first`; SGLang
asks for `joint` (`sampler.py`). Which tokens stay may differ, what a row holds does not."""

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


_TEST = '''\
# Probabilities in 64ths, most likely first: two near-even ones, and one that nearly decides.
EVEN, FLAT, STEEP = (21, 20, 17, 4, 2), (19, 18, 16, 11), (61, 3)
VOCABULARY = CONST["vocab_size"]
# Probabilities, top-k, top-p and how many rows draw so. Most filters leave two tokens about as
# likely as each other, and out a third that would be drawn often.
# No top-p is a sum of the probabilities: there FlashInfer's own references differ from its kernels.
SETTINGS = {
    "top_k_sampling_from_probs": {
        "filters": [(EVEN, 2, None, 14), (FLAT, 2, None, 10), (FLAT, 1, None, 2)],
        # 0, and as many as the vocabulary or more, filter nothing.
        "no filters": [
            (EVEN, 0, None, 14),
            (STEEP, VOCABULARY, None, 12),
            (STEEP, VOCABULARY + 11, None, 12),
        ],
    },
    "top_p_sampling_from_probs": {
        "filters": [(EVEN, None, 0.5, 14), (FLAT, None, 0.55, 10), (FLAT, None, 0.25, 2)],
        # 0 leaves the most likely token.
        "no filters": [(STEEP, None, 1.0, 24), (EVEN, None, 1.0, 14), (EVEN, None, 0.0, 3)],
    },
    "top_k_top_p_sampling_from_probs": {
        "filters": [
            # Top-p sees what top-k has left and made to add up to 1: otherwise 3 tokens stay.
            (EVEN, 3, 0.7, 12),
            (FLAT, 2, 0.95, 6),
            (FLAT, 4, 0.55, 6),
            # Otherwise 2.
            (EVEN, 2, 0.45, 3),
        ],
        "no filters": [
            (EVEN, 0, 1.0, 14),
            (STEEP, VOCABULARY, 1.0, 12),
            (STEEP, VOCABULARY + 11, 1.0, 12),
            (FLAT, 0, 0.55, 2),
            (EVEN, 3, 0.0, 3),
        ],
    },
}[VARIANT]


def draws(settings):
    rows = [(masses, k, p) for masses, k, p, count in settings for _ in range(count)]
    probs = torch.zeros(len(rows), VOCABULARY)
    for row, (masses, _, _) in enumerate(rows):
        # Scattered, the first and the last token among them; no two rows have the same ones.
        places = [VOCABULARY // 3 + row, VOCABULARY - 1, 0, VOCABULARY // 2 - row, 1 + row]
        probs[row, places[: len(masses)]] = torch.tensor(masses) / 64
    inputs = {"probs": probs}
    if "top_k" in DEFINITION["inputs"]:
        inputs["top_k"] = torch.tensor([k for _, k, _ in rows], dtype=torch.int32)
    if "top_p" in DEFINITION["inputs"]:
        inputs["top_p"] = torch.tensor([p for _, _, p in rows])
    torch.manual_seed(11)
    return inputs


CASES = {
    "filters": lambda: draws(SETTINGS["filters"]),
    "no filters": lambda: draws(SETTINGS["no filters"]),
}


def remaining(row, k, p):
    """Return the tokens that may be drawn and their probabilities, most likely first."""
    ranked = sorted(((row[token].item(), token) for token in row.nonzero()[:, 0].tolist()))[::-1]
    ranked = ranked[:k] if k else ranked
    whole = sum(mass for mass, _ in ranked)
    nucleus = ranked[:1]
    while sum(mass for mass, _ in nucleus) < p * whole:
        nucleus.append(ranked[len(nucleus)])
    whole = sum(mass for mass, _ in nucleus)
    return {token: mass / whole for mass, token in nucleus}


def divergence(share, expected):
    """Return how unlikely a share is, the Kullback-Leibler divergence of two yes or no's."""
    pairs = ((share, expected), (1 - share, 1 - expected))
    return sum(a * math.log(a / b) for a, b in pairs if a)


def check(inputs, outputs, kernel):
    rows = len(inputs["probs"])
    top_k, top_p = inputs.get("top_k", [0] * rows), inputs.get("top_p", [1.0] * rows)
    # Whether each row drew its most likely token, and how likely that was, by about how likely.
    drawn = {}
    samples = outputs["samples"].tolist()
    for row, k, p, sample in zip(inputs["probs"], top_k, top_p, samples, strict=True):
        if kernel and (p == 0 or ("top_k" in inputs and k == 0)):
            continue  # A server passes neither, and FlashInfer's kernels mean nothing by them.
        stays = remaining(row, int(k), float(p))
        assert sample in stays, f"token {sample} was filtered out, {stays} were not"
        first = next(iter(stays))
        if len(stays) > 1:
            kind = "nearly sure" if stays[first] > 0.9 else "even"
            drawn.setdefault(kind, []).append((sample == first, stays[first]))
    for kind, pairs in drawn.items():
        shares = [sum(values) / len(pairs) for values in zip(*pairs, strict=True)]
        # By Chernoff's bound (Hoeffding 1963, theorem 1) n draws diverge so far with probability
        # at most 2 e^-12: one correct sampler in 80,000 fails, and the seed is fixed. Half of the
        # tokens never drawn, or all drawn alike, diverge further.
        distance = len(pairs) * divergence(*shares)
        assert distance < 12, f"{kind}: the likelier token has a share of {shares}"
'''


_DETERMINISTIC = "enable_deterministic_inference"


def _api(function: str) -> FlashInferApi:
    return FlashInferApi(
        path=f"flashinfer.sampling.{function}",
        dumps=(function,),
        server_flags=("--sampling-backend flashinfer",),
        hint=Hint(
            text="give --sampling-backend flashinfer; SGLang takes the largest probability at "
            "temperature 0, and samples with torch without top_k, top_p or min_p",
            not_with={_DETERMINISTIC: "samples with torch"},
        ),
        sglang_layer="python/sglang/srt/layers/sampler.py",
        reads=_FILTERS[function],
    )


def _shape(call: Call) -> tuple[int, int]:
    """Return the rows and the width of a call's probabilities."""
    probs = call.tensors.get("probs")
    if probs is None or len(probs.shape) != 2:
        raise DumpError(f"{call.name}: the dump has no two-dimensional tensor 'probs'")
    check_tensor(call, "probs", (None, None), dtype="float32")
    return probs.shape[0], probs.shape[1]


def _thresholds(call: Call, name: str, batch: int) -> np.ndarray:
    """Load one threshold per row, as the definition has it.

    Raises:
        DumpError: there are none, or some that FlashInfer's kernels mean nothing by.
    """
    dumped = call.tensors.get(name)
    if dumped is None:
        one = call.values.get(name)
        raise DumpError(
            f"{call.name}: the dump has no tensor {name!r}"
            if one is None
            else f"{call.name}: {name} is {shown(one)} for all rows, the definition has one of each"
        )
    check_tensor(call, name, (batch,), dtype=_DTYPE[name])
    values = dumped.load()
    if values.shape != (batch,) or values.dtype != _DTYPE[name]:
        raise DumpError(f"{call.name}: {name} is {values.dtype}{list(values.shape)}")
    # A top-k of at least the vocabulary filters nothing: SGLang's default is 2^30.
    means = values >= 1 if name == "top_k" else (values > 0) & (values <= 1)
    if not means.all():
        raise DumpError(f"{call.name}: {name} has a {values[~means][0]}")
    return values


@register
class Sampling(OpModule):
    """`{filter}_sampling_from_probs_v{vocab}`; runs on the whole vocabulary on every rank."""

    op_type = "sampling"
    names = {variant: f"{variant}_v{{vocab_size}}" for variant in _FILTERS}
    any_architecture = True
    apis = tuple(_api(variant) for variant in _FILTERS)
    reference_test = _TEST

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

    def implied(self, call: Call) -> KernelSpec | None:
        """By the width of the probabilities."""
        if call.name not in self.names:
            return None
        try:
            _, vocabulary = _shape(call)
        except DumpError:
            return None
        axes = {"vocab_size": vocabulary}
        name = self.name_of(call.name, axes)
        return KernelSpec(name=name, op_type=self.op_type, variant=call.name, axes=axes)

    def rows(self, spec: KernelSpec, calls: Sequence[Call]) -> Iterator[Row | Rejected]:
        """One row per call; the thresholds are stored, the probabilities are activations."""
        return rows_of(calls, spec.variant, lambda call: self._row(spec, call))

    def _row(self, spec: KernelSpec, call: Call) -> Row:
        batch, vocabulary = _shape(call)
        check_axes(call, {"vocab_size": vocabulary}, spec.axes)
        if batch == 0:
            raise DumpError(f"{call.name}: empty batch")
        if "indices" in call.tensors or call.values.get("indices") is not None:
            raise DumpError(f"{call.name}: rows share probabilities (indices is given)")
        order = call.values.get("filter_apply_order")
        if order not in _ORDERS:
            raise DumpError(f"{call.name}: filter_apply_order is {shown(order)}")
        stored = {name: _thresholds(call, name, batch) for name in _FILTERS[spec.variant]}
        return Row(axes={"batch_size": batch}, tensors=stored, calls=(call.id,))

    def baseline(self, spec: KernelSpec) -> str:
        """Wrap the FlashInfer function."""
        return _BASELINE.format(function=spec.variant, arguments=", ".join(_FILTERS[spec.variant]))

    def effort(self, spec: KernelSpec) -> Effort:
        """Draws are counted one by one: half a million for each sequence of the batch."""
        return Effort(row_seconds=3600)
