"""What the tests of the attention and state-space families share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from tasks.define.check import check_definition
from tasks.model import ModelConfig, Serving, parse_config
from tasks.ops import op_module
from tasks.ops.base import Json, KernelSpec, Requirement
from tests.unit.test_ops import PUBLISHED

with suppress(ImportError):  # the bench extra: tests marked so are skipped without it
    import torch

    from tests.unit import test_references as references

if TYPE_CHECKING:
    from torch import Tensor

YARN = {"type": "yarn", "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0}
LATENT: dict[str, Any] = {
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}


def model(**fields: Any) -> ModelConfig:
    """A model of two layers, with these fields in its config."""
    plain = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 1024,
        "vocab_size": 320,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "intermediate_size": 512,
    }
    return parse_config({**plain, **fields}, "config.json")


def required(op_type: str, config: ModelConfig, tp: int = 1) -> list[Requirement]:
    return list(op_module(op_type).required(config, Serving(tp=tp, ep=1, origin="a test")))


def specs(op_type: str, config: ModelConfig, tp: int = 1) -> dict[str, KernelSpec]:
    """The kernels that a model needs, when nothing stands in the way of any."""
    found = required(op_type, config, tp)
    assert all(isinstance(item, KernelSpec) for item in found), found
    return {item.name: item for item in found if isinstance(item, KernelSpec)}


def published_names(op_type: str) -> list[str]:
    return [name for name, definition in PUBLISHED.items() if definition["op_type"] == op_type]


def constants(definition: Json) -> dict[str, int]:
    return {k: v["value"] for k, v in definition["axes"].items() if v["type"] == "const"}


def published_spec(name: str, variant: str) -> KernelSpec:
    """The spec with a published definition's const axes."""
    theirs = PUBLISHED[name]
    axes = constants(theirs)
    return KernelSpec(name=name, op_type=theirs["op_type"], variant=variant, axes=axes)


def check_against_published(name: str, variant: str) -> None:
    """Compare everything but prose: axes, inputs and outputs in order, constraints."""
    spec, theirs = published_spec(name, variant), PUBLISHED[name]
    own = op_module(spec.op_type).definition(spec)
    kinds = [{k: v["type"] for k, v in d["axes"].items()} for d in (own, theirs)]
    assert kinds[0] == kinds[1]
    assert constants(own) == constants(theirs) == spec.axes
    for part in ("inputs", "outputs"):
        described = [
            [(k, v["shape"], v["dtype"], v.get("optional", False)) for k, v in d[part].items()]
            for d in (own, theirs)
        ]
        assert described[0] == described[1]
    assert own["constraints"] == theirs["constraints"]
    stages = [[tag for tag in d["tags"] if tag.startswith("stage:")] for d in (own, theirs)]
    assert stages[0] == stages[1]


def check_described(spec: KernelSpec) -> None:
    """Check that nothing lacks a description, and that structure and baseline hold together."""
    module = op_module(spec.op_type)
    own = module.definition(spec)
    assert all(
        entry["description"].endswith(".")
        for part in ("axes", "inputs", "outputs")
        for entry in own[part].values()
    )
    definition = {"name": spec.name, "op_type": spec.op_type, **own}
    check_definition(definition)
    baseline = module.baseline(spec)
    if baseline is not None:
        check_definition({**definition, "reference": baseline})
        compile(baseline, spec.name, "exec")


def run_published(
    name: str, inputs: Mapping[str, Any], edits: Mapping[str, str]
) -> tuple[Tensor, ...]:
    """Run a published reference on small inputs: `edits` replace the sizes it asserts."""
    source = PUBLISHED[name]["reference"]
    for old, new in edits.items():
        assert old in source, old
        source = source.replace(old, new)
    namespace: dict[str, Any] = {}
    exec(source, namespace)
    own = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    result = namespace["run"](*(own[key] for key in PUBLISHED[name]["inputs"]))
    return result if isinstance(result, tuple) else (result,)


def assert_same(got: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """Compare two float32 computations of the same thing.

    Both are rounded to the output's dtype, so they may be a unit in its last place apart (twice
    the roundoff), and sums were added up in different orders.
    """
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.dtype == theirs.dtype
        rounding = 2 * references.BFLOAT16 if ours.dtype == torch.bfloat16 else 0.0
        finite = theirs[theirs.isfinite()]
        size = finite.abs().max().item() if finite.numel() else 0.0
        references.assert_close(ours, theirs, rounding, references.ACCUMULATION * size)
