"""Rotary embedding of part of each head."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any

import pytest

from tasks.errors import ConfigError
from tasks.ops import op_module
from tasks.ops.base import FlashInferApi, KernelSpec, Unmapped
from tests.unit.families import (
    LATENT,
    assert_same,
    check_against_published,
    check_described,
    constants,
    model,
    published_names,
    published_spec,
    required,
    run_published,
    specs,
)
from tests.unit.test_ops import PUBLISHED

with suppress(ImportError):  # the bench extra: tests marked so are skipped without it
    import torch

    from tests.unit import test_references as references

if TYPE_CHECKING:
    from torch import Tensor

HEAD = {"head_dim": 128}


def test_published_kernel_is_that_of_minimax() -> None:
    found = specs("rope", model(**HEAD, rotary_dim=64), tp=8)
    assert list(found) == published_names("rope")
    ((name, spec),) = found.items()
    assert spec.axes == constants(PUBLISHED[name])
    provider = op_module("rope").provider(spec)
    assert isinstance(provider, FlashInferApi)
    assert f"fi_api:{provider.path}" in PUBLISHED[name]["tags"]


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({**HEAD, "partial_rotary_factor": 0.5}, "neox_style_d128_rd64"),
        ({"head_dim": 256, "partial_rotary_factor": 0.25}, "neox_style_d256_rd64"),
        ({"head_dim": 192, "partial_rotary_factor": 0.334}, "neox_style_d192_rd64"),
        ({"rope_parameters": {"partial_rotary_factor": 0.25}}, "neox_style_d128_rd32"),
        ({"rope_scaling": {"partial_rotary_factor": 0.25}}, "neox_style_d128_rd32"),
        ({"rope_pct": 0.25}, "neox_style_d128_rd32"),
        ({"model_type": "glm4", "partial_rotary_factor": 0.5}, "gptj_style_d128_rd64"),
        ({"model_type": "glm4"}, "gptj_style_d128_rd64"),
        ({"model_type": "glm4_moe"}, "neox_style_d128_rd64"),
        ({"model_type": "chatglm", "kv_channels": 128}, "gptj_style_d128_rd64"),
        ({"model_type": "gptj", "rotary_dim": 64}, "gptj_style_d128_rd64"),
        ({"rotary_dim": 64, "rope_interleave": True}, "gptj_style_d128_rd64"),
        ({"rotary_dim": 64, "rope_is_neox_style": False}, "gptj_style_d128_rd64"),
    ],
)
def test_what_is_rotated_and_how(fields: dict[str, Any], name: str) -> None:
    assert list(specs("rope", model(**fields))) == [f"rope_with_cos_sin_cache_{name}"]


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"rotary_dim": 128},
        {"partial_rotary_factor": 1.0},
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
        {"rope_scaling": {"mrope_section": [24, 20, 20]}},
        {**LATENT, "partial_rotary_factor": 0.5},
    ],
    ids=["nothing said", "all elements", "factor 1", "yarn", "whole M-RoPE", "latent attention"],
)
def test_models_that_rotate_whole_heads_need_none(fields: dict[str, Any]) -> None:
    assert required("rope", model(**fields)) == []


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        (
            {"rope_parameters": {"partial_rotary_factor": 0.25, "mrope_section": [11, 11, 10]}},
            "M-RoPE",
        ),
        ({"partial_rotary_factors": [0.5, 1.0]}, "partial_rotary_factors"),
        (
            {
                "rope_parameters": {
                    "full_attention": {"partial_rotary_factor": 0.25, "rope_type": "proportional"},
                    "sliding_attention": {"rope_type": "default"},
                }
            },
            "full_attention 0.25, sliding_attention 1",
        ),
    ],
)
def test_other_rules_are_listed_as_unmapped(fields: dict[str, Any], reason: str) -> None:
    (found,) = required("rope", model(**fields))
    assert isinstance(found, Unmapped)
    assert reason in found.reason


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rotary_dim": 63}, "rotary_dim: 63 of 128"),
        ({"rotary_dim": 256}, "rotary_dim: 256 of 128"),
        ({"rotary_dim": "all"}, "rotary_dim: 'all' is not an integer"),
        ({"partial_rotary_factor": 0.001}, "partial_rotary_factor: 0 of 128"),
        ({"partial_rotary_factor": 2}, "partial_rotary_factor: 256 of 128"),
        (
            {"rope_parameters": {"partial_rotary_factor": 0}},
            "rope_parameters.partial_rotary_factor",
        ),
    ],
)
def test_impossible_number_is_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        required("rope", model(**fields))


@pytest.mark.parametrize("name", published_names("rope"))
def test_definition_equals_the_published_one(name: str) -> None:
    check_against_published(name, "neox")
    check_described(published_spec(name, "neox"))
    check_described(published_spec(name, "gptj"))


@pytest.mark.bench_extra
@pytest.mark.parametrize("name", published_names("rope"))
def test_flashinfer_bench_accepts_the_definition(name: str) -> None:
    references.test_definition_is_accepted(published_spec(name, "neox"))


# --- references ----------------------------------------------------------------------------------

POSITIONS = (0, 5, 5, 19, 1)
HEAD_SIZE, ROTARY = 16, 8


def rotated(x: Tensor, angles: Tensor, style: str) -> Tensor:
    """Multiply each pair, as a complex number, by e^(i angle), in complex double precision."""
    token = x[..., :ROTARY].double()
    pairs = token.unflatten(-1, (2, -1)).transpose(-1, -2)
    if style == "gptj":
        pairs = token.unflatten(-1, (-1, 2))
    turned = torch.view_as_complex(pairs.contiguous()) * torch.polar(
        torch.ones_like(angles), angles
    )
    pairs = torch.view_as_real(turned)
    flat = pairs.flatten(-2) if style == "gptj" else pairs.transpose(-1, -2).flatten(-2)
    return torch.cat([flat, x[..., ROTARY:].double()], dim=-1)


@pytest.mark.bench_extra
@pytest.mark.parametrize("style", ["neox", "gptj"])
def test_rope(style: str) -> None:
    generator = references.seeded(61)
    frequencies = 100.0 ** (-torch.arange(ROTARY // 2, dtype=torch.float64) / (ROTARY // 2))
    angles = torch.arange(20, dtype=torch.float64)[:, None] * frequencies
    inputs = {
        "q": references.random((len(POSITIONS), 3, HEAD_SIZE), generator),
        "k": references.random((len(POSITIONS), 1, HEAD_SIZE), generator),
        "cos_sin_cache": torch.cat([angles.cos(), angles.sin()], dim=-1).float(),
        "positions": torch.tensor(POSITIONS),
    }
    spec = KernelSpec(
        name=f"rope_with_cos_sin_cache_{style}_style_d{HEAD_SIZE}_rd{ROTARY}",
        op_type="rope",
        variant=style,
        axes={"head_size": HEAD_SIZE, "rotary_dim": ROTARY},
    )
    got = references.run_reference(spec, inputs)
    at = angles[list(POSITIONS)][:, None]
    for result, name in zip(got, ("q", "k"), strict=True):
        # Rounded once; a cosine or sine in float32, and a sum of two products below 10.
        expected = rotated(inputs[name], at, style)
        references.assert_close(result, expected, references.BFLOAT16, references.ACCUMULATION)
        assert torch.equal(result[..., ROTARY:], inputs[name][..., ROTARY:])
    if style == "gptj":
        return  # Only the neox style is published.
    edits = {
        "head_size = 128": f"head_size = {HEAD_SIZE}",
        "rotary_dim = 64": f"rotary_dim = {ROTARY}",
    }
    assert_same(got, run_published(published_names("rope")[0], inputs, edits))
