"""rope: rotary position embedding of part of each head, from a cache of cosines and sines.

Only partial rotary embedding (a rotary dimension below the head dimension) is produced: the dataset
has the kernel for such a model only (MiniMax-M2), and models that rotate whole heads are served by
SGLang's own kernels, often fused with the norm or with the write to the KV cache.

Not for latent attention: its rotary part is a tensor of its own (`kpe`), rotated as a whole. Models
that take three positions for each token (M-RoPE), or whose layers differ, are listed as unmapped.

In the `neox` style the two elements of a pair are half the rotary dimension apart, in the `gptj`
style they are neighbours.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress

from tasks.model import Fields, ModelConfig, Serving
from tasks.ops.arguments import (
    bound_axes,
    check_range,
    check_setting,
    integer_of,
    stored,
    tensor_of,
)
from tasks.ops.base import (
    Call,
    DumpError,
    FlashInferApi,
    Json,
    KernelSpec,
    OpModule,
    Rejected,
    Requirement,
    Row,
    Unmapped,
    check_axes,
    const,
    register,
    rows_of,
    tensor,
    var,
)

_FACTOR = ("partial_rotary_factor", "rotary_pct", "rope_pct", "rotary_percent")
_DEFAULT_FACTORS = {
    "glm4": 0.5,
    "glm4_moe": 0.5,
    "zaya": 0.5,
    "chatglm": 0.5,
}
"""Model types that rotate part of a head although their config does not say so
(sglang/srt/models/glm4.py, glm4_moe.py, zaya.py: `getattr(config, "partial_rotary_factor", 0.5)`;
chatglm.py: `rotary_dim=self.head_dim // 2`)."""
_GPTJ_MODEL_TYPES = frozenset(
    {"glm4", "chatglm", "gptj", "cohere", "cohere2", "cohere2_moe", "ernie4_5", "ernie4_5_moe"}
)
"""Model types whose attention SGLang builds with `is_neox_style=False`, of those with one position
for each token (sglang/srt/models/glm4.py, chatglm.py, gpt_j.py, commandr.py, cohere2_moe.py,
ernie4.py); GLM-4-MoE is neox (glm4_moe.py)."""

_REFERENCE = """\
import torch


@torch.no_grad()
def run(q, k, cos_sin_cache, positions):
    head_size, rotary_dim = {head_size}, {rotary_dim}
    assert q.shape[-1] == k.shape[-1] == head_size
    assert cos_sin_cache.shape[-1] == rotary_dim

    cos, sin = cos_sin_cache[positions].unsqueeze(1).chunk(2, dim=-1)
    outputs = []
    for x in (q, k):
        rotated = x.to(torch.float32, copy=True)
        first, second = rotated[..., {first}].clone(), rotated[..., {second}].clone()
        rotated[..., {first}] = first * cos - second * sin
        rotated[..., {second}] = second * cos + first * sin
        outputs.append(rotated.to(x.dtype))
    return tuple(outputs)
"""

_PAIRS = {
    "neox": (": rotary_dim // 2", "rotary_dim // 2 : rotary_dim"),
    "gptj": (":rotary_dim:2", "1:rotary_dim:2"),
}

_BASELINE = """\
import flashinfer


def run(q, k, cos_sin_cache, positions):
    # The API works in place and takes heads side by side.
    q_out, k_out = q.clone(), k.clone()
    flashinfer.rope.apply_rope_with_cos_sin_cache_inplace(
        positions,
        q_out.view(q.shape[0], -1),
        k_out.view(k.shape[0], -1),
        head_size=q.shape[-1],
        cos_sin_cache=cos_sin_cache,
        is_neox={is_neox},
    )
    return q_out, k_out
"""


_TEST = '''\
def tokens(positions, heads, kv_heads):
    generator, rotary = seeded(len(positions)), CONST["rotary_dim"]
    frequencies = 10000.0 ** -torch.arange(0, 1, 2 / rotary, dtype=torch.float64)
    angles = torch.arange(max(positions) + 1)[:, None] * frequencies
    return {
        "q": random(generator, len(positions), heads, CONST["head_size"]),
        "k": random(generator, len(positions), kv_heads, CONST["head_size"]),
        "cos_sin_cache": torch.cat([angles.cos(), angles.sin()], dim=1).float(),
        "positions": torch.tensor(positions),
    }


CASES = {
    "positions out of order": lambda: tokens([0, 5, 5, 4000, 1, 3999], heads=8, kv_heads=2),
    "one token": lambda: tokens([17], heads=1, kv_heads=1),
}


def rotated(x, turns):
    """Multiply each pair, a complex number, by e^(i angle)."""
    if VARIANT == "neox":
        # The elements of a pair are half the rotary dimension apart.
        turned = torch.complex(*x.chunk(2, dim=-1)) * turns
        return torch.cat([turned.real, turned.imag], dim=-1)
    # They are neighbours.
    return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * turns).flatten(-2)


def check(inputs, outputs, kernel):
    rotary = CONST["rotary_dim"]
    cache = inputs["cos_sin_cache"][inputs["positions"]].double()
    turns = torch.complex(*cache.chunk(2, dim=1))[:, None]
    for name in ("q", "k"):
        output, x = outputs[f"{name}_out"], inputs[name]
        # Sums of two products below 10.
        expected = rotated(x[..., :rotary].double().contiguous(), turns)
        assert_close(output[..., :rotary], expected, kernel, loose=2.0**-6)
        assert torch.equal(output[..., rotary:], x[..., rotary:])
'''


_DUMPED = "apply_rope_with_cos_sin_cache_inplace"
_NEOX = {"neox": True, "gptj": False}


@register
class Rope(OpModule):
    """`rope_with_cos_sin_cache_{neox|gptj}_style_d{head_dim}_rd{rotary_dim}`; not sharded."""

    op_type = "rope"
    crosschecked = False
    reference_test = _TEST
    names = {
        style: f"rope_with_cos_sin_cache_{style}_style_d{{head_size}}_rd{{rotary_dim}}"
        for style in _PAIRS
    }
    apis = (
        FlashInferApi(
            path="flashinfer.rope.apply_rope_with_cos_sin_cache_inplace",
            dumps=(_DUMPED,),
            reads=("positions",),
            # It calls SGLang's own kernel of the same name (sglang.kernels.ops.attention.rope).
            sglang_layer="python/sglang/srt/layers/rotary_embedding/base.py",
        ),
    )

    def required(self, model: ModelConfig, serving: Serving) -> Iterator[Requirement]:
        """One kernel for each head dimension of which a part is rotated."""
        if model.is_mla:
            return
        uneven = _uneven(model)
        if uneven is not None:
            yield uneven
            return
        style = _style(model)
        for head_dim in sorted({attention.head_dim for attention in model.attentions}):
            rotary_dim, source = _rotary_dim(model, head_dim)
            if rotary_dim == head_dim:
                continue
            if any(rule.has("mrope_section") for rule in _rules(model)):
                yield Unmapped(
                    f"rotary embedding of {rotary_dim} of {head_dim} elements",
                    "M-RoPE: three positions for each token",
                    "python/sglang/srt/layers/rotary_embedding/mrope.py",
                )
                continue
            axes = {"head_size": head_dim, "rotary_dim": rotary_dim}
            yield KernelSpec(
                name=self.name_of(style, axes),
                op_type=self.op_type,
                variant=style,
                axes=axes,
                origin=(f"head_dim = {head_dim}, {source}",),
            )

    def provider(self, spec: KernelSpec) -> FlashInferApi:
        """FlashInfer's function, which SGLang would have to call instead of its own."""
        (api,) = self.apis
        return api

    def definition(self, spec: KernelSpec) -> Json:
        """The rotation of both tensors, computed in float32."""
        head_size, rotary_dim = spec.axes["head_size"], spec.axes["rotary_dim"]
        first, second = _PAIRS[spec.variant]
        q, k = (["num_tokens", heads, "head_size"] for heads in ("num_qo_heads", "num_kv_heads"))
        pairs = "half the rotary dimension apart" if spec.variant == "neox" else "side by side"
        return {
            "description": (
                f"Rotary position embedding of the first {rotary_dim} of {head_size} elements of "
                f"each head, pairs {pairs}, with a precomputed cache of cosines and sines."
            ),
            "tags": [],
            "axes": {
                "head_size": const(head_size, "Dimension of one head."),
                "rotary_dim": const(rotary_dim, "Elements that are rotated, from the first on."),
                "num_tokens": var("Tokens of all sequences."),
                "num_qo_heads": var("Query heads."),
                "num_kv_heads": var("Key heads."),
                "max_seq_len": var("Positions in the cache."),
            },
            "constraints": [],
            "inputs": {
                "q": tensor(q, "bfloat16", "Queries."),
                "k": tensor(k, "bfloat16", "Keys."),
                "cos_sin_cache": tensor(
                    ["max_seq_len", "rotary_dim"],
                    "float32",
                    "For each position the cosines of all pairs, then the sines.",
                ),
                "positions": tensor(["num_tokens"], "int64", "Position of each token."),
            },
            "outputs": {
                "q_out": tensor(q, "bfloat16", "Rotated queries."),
                "k_out": tensor(k, "bfloat16", "Rotated keys."),
            },
            "reference": _REFERENCE.format(
                head_size=head_size, rotary_dim=rotary_dim, first=first, second=second
            ),
        }

    def implied(self, call: Call) -> KernelSpec | None:
        """By the head size, the width of the cache and the style."""
        if call.name != _DUMPED:
            return None
        with suppress(DumpError):
            cache = tensor_of(call, "cos_sin_cache", 2)
            axes = {
                "head_size": integer_of(call, "head_size"),
                "rotary_dim": cache.shape[1],
            }
            style = "neox" if call.values.get("is_neox", True) is True else "gptj"
            spec = KernelSpec(
                name=self.name_of(style, axes),
                op_type=self.op_type,
                variant=style,
                axes=axes,
                origin=("a dumped call's arguments",),
            )
            self._axes_of(spec, self.definition(spec), call)
            return spec
        return None

    def rows(self, spec: KernelSpec, calls: Sequence[Call]) -> Iterator[Row | Rejected]:
        """One row per call, with its positions; the cache is random, as weights are."""
        definition = self.definition(spec)
        return rows_of(calls, _DUMPED, lambda call: self._row(spec, definition, call))

    def _axes_of(self, spec: KernelSpec, definition: Json, call: Call) -> dict[str, int]:
        """Check a call against a definition and return the var axes.

        Raises:
            DumpError: it is a call of another kernel.
        """
        check_setting(call, "is_neox", _NEOX[spec.variant], default=True)
        head_size = integer_of(call, "head_size")
        check_axes(call, {"head_size": head_size}, spec.axes)
        parameters = {name: name for name in ("cos_sin_cache", "positions")}
        axes = bound_axes(call, definition, parameters, ("positions",))
        # The API takes heads side by side, the definition one behind the other.
        for name, parameter in (("q", "query"), ("k", "key")):
            given, wanted = tensor_of(call, parameter, 2), definition["inputs"][name]
            tokens, width = given.shape
            if given.dtype != wanted["dtype"]:
                raise DumpError(
                    f"{call.name}: {parameter} is {given.dtype}, the definition has "
                    f"{wanted['dtype']}"
                )
            if tokens != axes["num_tokens"] or width < 1 or width % head_size:
                raise DumpError(
                    f"{call.name}: {parameter} has shape {given.shape}, expected "
                    f"{axes['num_tokens']} tokens of heads of {head_size}"
                )
            axes[wanted["shape"][1]] = width // head_size
        return axes

    def _row(self, spec: KernelSpec, definition: Json, call: Call) -> Row:
        axes = self._axes_of(spec, definition, call)
        positions = stored(call, definition, "positions")
        check_range(call, "positions", positions, 0, axes["max_seq_len"] - 1)
        return Row(axes=axes, tensors={"positions": positions}, calls=(call.id,))

    def baseline(self, spec: KernelSpec) -> str:
        """Call the API on copies."""
        return _BASELINE.format(is_neox=_NEOX[spec.variant])


def _rules(model: ModelConfig) -> list[Fields]:
    """Return the objects of the config that may say how heads are rotated."""
    nested = (model.fields.nested(name) for name in ("rope_parameters", "rope_scaling"))
    return [model.fields, *(rule for rule in nested if rule is not None)]


def _rotary_dim(model: ModelConfig, head_dim: int) -> tuple[int, str]:
    """Return how many elements of a head are rotated, and what says so.

    Raises:
        ConfigError: the number is not even, or not between 1 and the head dimension.
    """
    names = ("rotary_dim", *_FACTOR)
    rule = next((rule for rule in _rules(model) if rule.has(*names)), model.fields)
    name = rule.has(*names)
    dim = rule.size("rotary_dim")
    if dim is None:
        factor = rule.number(*_FACTOR) or _DEFAULT_FACTORS.get(model.model_type, 1.0)
        # Truncated as sglang/srt/layers/rotary_embedding/factory.py: get_rope does.
        dim = int(head_dim * factor)
    if dim != head_dim and (dim % 2 or not 0 < dim < head_dim):
        raise rule.fail(
            name or "head_dim", f"{dim} of {head_dim} elements of a head cannot be rotated in pairs"
        )
    if name is None:
        return dim, f"rotated part of a head of model type {model.model_type!r}"
    return dim, f"config.json {rule.prefix}{name} = {rule.raw[name]}"


def _style(model: ModelConfig) -> str:
    stated = model.fields.flag("rope_is_neox_style")
    interleaved = model.fields.flag("rope_interleave", "rope_interleaved")
    if stated is None:
        stated = not interleaved and model.model_type not in _GPTJ_MODEL_TYPES
    return "neox" if stated else "gptj"


def _uneven(model: ModelConfig) -> Unmapped | None:
    """Return what says that layers rotate different parts of their heads, if something does."""
    what = "rotary embedding"
    name = model.fields.has("partial_rotary_factors", "swa_partial_rotary_factor")
    if name:
        return Unmapped(what, f"{name}: layers rotate different parts of their heads")
    for rule in _rules(model)[1:]:
        kinds = [kind for kind, value in rule.raw.items() if isinstance(value, Mapping)]
        factors = {kind: (rule.nested(kind) or rule).number(*_FACTOR) or 1.0 for kind in kinds}
        if any(factor < 1 for factor in factors.values()):
            shown = ", ".join(f"{kind} {factor:g}" for kind, factor in factors.items())
            return Unmapped(what, f"layers rotate different parts of their heads: {shown}")
    return None
