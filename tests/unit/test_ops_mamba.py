"""Mamba-2's selective state update."""

from __future__ import annotations

import math
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from tasks.errors import ConfigError
from tasks.ops import op_module
from tasks.ops.base import KernelSpec, NotProduced, Unmapped
from tests.unit.families import (
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

LAYERS = {"layer_types": ["mamba", "full_attention"]}
NEMOTRON_H: dict[str, Any] = {
    **LAYERS,
    "mamba_num_heads": 128,
    "mamba_head_dim": 64,
    "ssm_state_size": 128,
    "n_groups": 8,
    "head_dim": 96,
}
GRANITE: dict[str, Any] = {
    **LAYERS,
    "mamba_n_heads": 48,
    "mamba_d_head": 64,
    "mamba_d_state": 128,
    "mamba_n_groups": 1,
}
FALCON_H1: dict[str, Any] = {
    **GRANITE,
    "mamba_n_heads": 24,
    "mamba_d_head": "auto",
    "mamba_d_ssm": 1536,
}
BAMBA: dict[str, Any] = {**GRANITE, "mamba_n_heads": 32, "mamba_d_head": "auto", "mamba_expand": 2}
MAMBA2: dict[str, Any] = {
    "model_type": "mamba2",
    "num_heads": 64,
    "head_dim": 64,
    "state_size": 128,
    "n_groups": 1,
}
MAMBA1: dict[str, Any] = {**LAYERS, "mamba_dt_rank": 256, "mamba_d_state": 16}


def test_published_kernels_are_exactly_those_of_nemotron_h() -> None:
    found = {
        **specs("mamba_ssu", model(**NEMOTRON_H)),
        **specs("mamba_ssu", model(**NEMOTRON_H), 2),
    }
    assert set(found) == set(published_names("mamba_ssu"))
    for name, spec in found.items():
        assert spec.axes == constants(PUBLISHED[name])
        assert f"tp:{spec.tp[0]}" in PUBLISHED[name]["tags"]


@pytest.mark.parametrize(
    ("fields", "tp", "name"),
    [
        (NEMOTRON_H, 8, "mamba_ssu_decode_h16_d64_s128_ng1"),
        (GRANITE, 1, "mamba_ssu_decode_h48_d64_s128_ng1"),
        # The only group goes to every rank.
        (GRANITE, 4, "mamba_ssu_decode_h12_d64_s128_ng1"),
        (FALCON_H1, 2, "mamba_ssu_decode_h12_d64_s128_ng1"),
        (BAMBA, 1, "mamba_ssu_decode_h32_d64_s128_ng1"),
        (MAMBA2, 1, "mamba_ssu_decode_h64_d64_s128_ng1"),
    ],
    ids=["nemotron-h", "granite", "granite tp=4", "falcon-h1", "bamba", "mamba2"],
)
def test_spellings(fields: dict[str, Any], tp: int, name: str) -> None:
    assert set(specs("mamba_ssu", model(**fields), tp)) == {name}


@pytest.mark.parametrize(
    ("fields", "tp", "reason"),
    [
        (NEMOTRON_H, 3, "tp=3 does not divide 128 Mamba heads"),
        (NEMOTRON_H, 16, "tp=16 does not divide 8 Mamba groups; SGLang replicates only a single"),
        (
            {**GRANITE, "quantization_config": {"quant_method": "fp8"}},
            4,
            "SGLang replicates the single Mamba group (tp=4) for unquantised models only",
        ),
        ({**NEMOTRON_H, "n_groups": 6}, 1, "6 groups do not divide 128 Mamba heads"),
    ],
)
def test_impossible_sharding_is_listed(fields: dict[str, Any], tp: int, reason: str) -> None:
    (found,) = required("mamba_ssu", model(**fields), tp)
    assert isinstance(found, NotProduced)
    assert found.reason.startswith(reason)


def test_mamba_1_is_listed_as_unmapped() -> None:
    (found,) = required("mamba_ssu", model(**MAMBA1))
    assert isinstance(found, Unmapped)
    assert found.what == "mamba (1 of 2 layers)"
    assert "mamba_dt_rank" in found.reason


def test_it_claims_its_own_layers_only() -> None:
    module = op_module("mamba_ssu")
    assert module.mixes("mamba", model(**NEMOTRON_H))
    assert not module.mixes("full_attention", model(**NEMOTRON_H))
    assert required("mamba_ssu", model()) == []


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({**NEMOTRON_H, "ssm_state_size": None}, "ssm_state_size.*: missing"),
        ({**NEMOTRON_H, "n_groups": 0}, "n_groups: 0"),
        ({**FALCON_H1, "mamba_d_ssm": 1537}, 'mamba_d_head: "auto", and 24 heads do not divide'),
    ],
)
def test_wrong_field_is_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        required("mamba_ssu", model(**fields))


@pytest.mark.parametrize("name", published_names("mamba_ssu"))
def test_definition_equals_the_published_one(name: str) -> None:
    check_against_published(name, "decode")
    check_described(published_spec(name, "decode"))


@pytest.mark.bench_extra
@pytest.mark.parametrize("name", published_names("mamba_ssu"))
def test_flashinfer_bench_accepts_the_definition(name: str) -> None:
    references.test_definition_is_accepted(published_spec(name, "decode"))


# --- references ----------------------------------------------------------------------------------

HEADS, DIM, STATE, GROUPS = 6, 8, 16, 2
SLOTS = (3, -1, 0, 5)


def small_inputs() -> dict[str, Tensor]:
    generator = references.seeded(51)
    batch = len(SLOTS)
    return {
        "state": references.random((7, HEADS, DIM, STATE), generator),
        "x": references.random((batch, HEADS, DIM), generator),
        # Not one value per head, which is what the definition's shapes allow.
        "dt": references.random((batch, HEADS, DIM), generator),
        "A": -torch.rand(HEADS, DIM, STATE, generator=generator),
        "B": references.random((batch, GROUPS, STATE), generator),
        "C": references.random((batch, GROUPS, STATE), generator),
        "D": references.random((HEADS, DIM), generator),
        "dt_bias": references.random((HEADS, DIM), generator),
        "state_batch_indices": torch.tensor(SLOTS, dtype=torch.int32),
    }


@pytest.mark.bench_extra
def test_selective_state_update() -> None:
    spec = KernelSpec(
        name=f"mamba_ssu_decode_h{HEADS}_d{DIM}_s{STATE}_ng{GROUPS}",
        op_type="mamba_ssu",
        variant="decode",
        axes={"nheads": HEADS, "head_dim": DIM, "dstate": STATE, "ngroups": GROUPS},
    )
    inputs = small_inputs()
    output, new_state = references.run_reference(spec, inputs)

    given = {name: references.array(value) for name, value in inputs.items()}
    expected, states = np.zeros((len(SLOTS), HEADS, DIM)), given["state"].copy()
    for i, slot in enumerate(SLOTS):
        for h, d in np.ndindex(HEADS, DIM):
            if slot < 0:
                continue
            group = h // (HEADS // GROUPS)
            step = math.log1p(math.exp(given["dt"][i, h, d] + given["dt_bias"][h, d]))
            x = given["x"][i, h, d]
            for s in range(STATE):
                decayed = math.exp(given["A"][h, d, s] * step) * states[slot, h, d, s]
                states[slot, h, d, s] = decayed + step * x * given["B"][i, group, s]
            read = (states[slot, h, d] * given["C"][i, group]).sum()
            expected[i, h, d] = read + given["D"][h, d] * x
    # Sums of 16 float32 products, which can be larger than the sum; states are rounded once.
    size = references.ACCUMULATION * float(np.abs(expected).max())
    references.assert_close(output, torch.from_numpy(expected), references.BFLOAT16, size)
    references.assert_close(new_state, torch.from_numpy(states), references.BFLOAT16, size)
    assert not output[SLOTS.index(-1)].any()
    untouched = [slot for slot in range(7) if slot not in SLOTS]
    assert torch.equal(new_state[untouched], inputs["state"][untouched])

    edits = {
        "nheads == 128 and head_dim == 64 and dstate == 128 and ngroups == 8": (
            f"nheads == {HEADS} and head_dim == {DIM} and dstate == {STATE} and ngroups == {GROUPS}"
        )
    }
    theirs = run_published("mamba_ssu_decode_h128_d64_s128_ng8", inputs, edits)
    assert_same((output, new_state), theirs)


@pytest.mark.bench_extra
def test_baseline_spreads_one_value_per_head() -> None:
    """FlashInfer wants stride 0 on the axes over which these inputs do not vary."""
    namespace: dict[str, Any] = {}
    source = op_module("mamba_ssu").baseline(
        published_spec(published_names("mamba_ssu")[0], "decode")
    )
    assert source is not None
    exec(source.replace("from flashinfer.mamba import selective_state_update", ""), namespace)
    for shape, axes in (((HEADS, DIM), 1), ((4, HEADS, DIM), 1), ((HEADS, DIM, STATE), 2)):
        per_head = torch.randn(shape[:-axes])
        dense = per_head[(..., *(None,) * axes)].expand(shape).contiguous()
        tied = namespace["_tied"](dense, axes)
        assert torch.equal(tied, dense)
        assert tied.stride()[-axes:] == (0,) * axes
        assert tied.stride()[:-axes] == per_head.stride()
