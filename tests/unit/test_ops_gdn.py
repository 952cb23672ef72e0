"""Gated delta networks: decode, prefill and verification of drafted tokens."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from tasks.errors import ConfigError
from tasks.ops import op_module
from tasks.ops.base import KernelSpec, NotProduced
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

HEADS: dict[str, Any] = {
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
}
QWEN3_NEXT = {**HEADS, "layer_types": ["linear_attention", "full_attention"]}


def variant_of(name: str) -> str:
    return name.split("_")[1]


def test_published_kernels_are_exactly_those_of_qwen3_next() -> None:
    found = {}
    for tp in (1, 2, 4):
        found |= specs("gdn", model(**QWEN3_NEXT), tp)
    assert set(found) == set(published_names("gdn"))
    for name, spec in found.items():
        assert spec.axes == constants(PUBLISHED[name])
        assert spec.variant == variant_of(name)
        assert f"tp:{spec.tp[0]}" in PUBLISHED[name]["tags"]
        assert spec.scalars["scale"].value == pytest.approx(128**-0.5, rel=1e-15)


@pytest.mark.parametrize(
    ("fields", "tp", "reason"),
    [
        ({}, 3, "tp=3 does not divide 16 key and 32 value heads"),
        ({}, 32, "tp=32 does not divide 16 key and 32 value heads"),
        ({"linear_value_head_dim": 256}, 1, "linear_key_head_dim 128 and .* 256 differ"),
        ({"linear_num_value_heads": 24}, 1, "16 key heads do not divide 24 value heads"),
    ],
)
def test_impossible_heads_are_listed(fields: dict[str, Any], tp: int, reason: str) -> None:
    (found,) = required("gdn", model(**{**QWEN3_NEXT, **fields}), tp)
    assert isinstance(found, NotProduced)
    assert re.search(reason, found.reason)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"layer_types": ["linear_attention"] * 2},
        {**HEADS, "layer_types": ["full_attention"] * 2},
    ],
    ids=["no linear attention", "another linear attention", "no layer of it"],
)
def test_other_models_need_none(fields: dict[str, Any]) -> None:
    assert required("gdn", model(**fields)) == []


def test_it_claims_its_own_layers_only() -> None:
    module = op_module("gdn")
    assert module.mixes("linear_attention", model(**QWEN3_NEXT))
    assert not module.mixes("full_attention", model(**QWEN3_NEXT))
    assert not module.mixes("linear_attention", model())


def test_missing_dimension_is_named() -> None:
    config = model(**{k: v for k, v in QWEN3_NEXT.items() if k != "linear_key_head_dim"})
    with pytest.raises(ConfigError, match="linear_key_head_dim: missing"):
        required("gdn", config)


@pytest.mark.parametrize("name", published_names("gdn"))
def test_definition_equals_the_published_one(name: str) -> None:
    check_against_published(name, variant_of(name))
    check_described(published_spec(name, variant_of(name)))


@pytest.mark.bench_extra
@pytest.mark.parametrize("name", published_names("gdn"))
def test_flashinfer_bench_accepts_the_definition(name: str) -> None:
    references.test_definition_is_accepted(published_spec(name, variant_of(name)))


# --- references ----------------------------------------------------------------------------------

KEYS, VALUES, DIM = 2, 4, 16
SCALE = 0.3
"""Not 1/sqrt(DIM): the input must be what decides."""


def small(stage: str) -> KernelSpec:
    axes = {"num_q_heads": KEYS, "num_k_heads": KEYS, "num_v_heads": VALUES, "head_size": DIM}
    return KernelSpec(
        name=f"gdn_{stage}_qk{KEYS}_v{VALUES}_d{DIM}_k_last",
        op_type="gdn",
        variant=stage,
        axes={"seq_len": 1, **axes} if stage == "decode" else axes,
    )


def tokens(rows: tuple[int, ...], seed: int) -> dict[str, Any]:
    """Random inputs but the states; keys of length one, as the model makes them."""
    generator = references.seeded(seed)
    k = torch.nn.functional.normalize(torch.randn(*rows, KEYS, DIM, generator=generator), dim=-1)
    return {
        "q": references.random((*rows, KEYS, DIM), generator),
        "k": k.to(torch.bfloat16),
        "v": references.random((*rows, VALUES, DIM), generator),
        "A_log": references.random((VALUES,), generator, "float32"),
        "a": references.random((*rows, VALUES), generator),
        "dt_bias": references.random((VALUES,), generator, "float32"),
        "b": references.random((*rows, VALUES), generator),
        "scale": SCALE,
    }


def states(number: int, seed: int) -> Tensor:
    shape = (number, VALUES, DIM, DIM)
    return references.random(shape, references.seeded(seed), "float32")


def delta_rule(
    inputs: Mapping[str, Any], at: tuple[Any, ...], state: np.ndarray, head: int
) -> tuple[np.ndarray, np.ndarray]:
    """One token of one value head in float64, as the paper writes it (arXiv 2412.06464).

    The new state is S g (I - beta k k^T) + beta v k^T: all of it is one linear map of the old.

    Returns:
        The output and the new state, [value, key].
    """
    array = references.array
    q, k = (array(inputs[name][at][head * KEYS // VALUES]) for name in "qk")
    v = array(inputs["v"][at][head])
    a, b = (float(inputs[name][at][head]) for name in "ab")
    rate = math.exp(float(inputs["A_log"][head]))
    decay = math.exp(-rate * math.log1p(math.exp(a + float(inputs["dt_bias"][head]))))
    beta = 1.0 / (1.0 + math.exp(-b))
    new = decay * state @ (np.eye(DIM) - beta * np.outer(k, k)) + beta * np.outer(v, k)
    return inputs["scale"] * new @ q, new


def follow(
    inputs: Mapping[str, Any], places: list[tuple[Any, ...]], state: Tensor
) -> tuple[np.ndarray, np.ndarray]:
    """One sequence, token by token: the outputs [token, head, DIM] and the last state."""
    outputs = np.zeros((len(places), VALUES, DIM))
    last = references.array(state).copy()
    for head in range(VALUES):
        for t, place in enumerate(places):
            outputs[t, head], last[head] = delta_rule(inputs, place, last[head], head)
    return outputs, last


def check(got: Tensor, expected: np.ndarray) -> None:
    rounding = references.BFLOAT16 if got.dtype == torch.bfloat16 else 0.0
    # Sums of values as large as the largest ones, in float32.
    size = references.ACCUMULATION * max(1.0, float(np.abs(expected).max()))
    references.assert_close(got, torch.from_numpy(expected), rounding, size)


def edits(stage: str) -> dict[str, str]:
    changed = {
        "num_q_heads == 4": f"num_q_heads == {KEYS}",
        "num_k_heads == 4": f"num_k_heads == {KEYS}",
        "num_v_heads == 8": f"num_v_heads == {VALUES}",
    }
    if stage == "decode":
        return {**changed, "K == 128 and V == 128": f"K == {DIM} and V == {DIM}"}
    return {**changed, "head_size == 128": f"head_size == {DIM}"}


def compare_published(stage: str, inputs: Mapping[str, Any], got: tuple[Tensor, ...]) -> None:
    assert_same(got, run_published(f"gdn_{stage}_qk4_v8_d128_k_last", inputs, edits(stage)))


@pytest.mark.bench_extra
def test_decode() -> None:
    inputs = {**tokens((5, 1), 41), "state": states(5, 42)}
    got = references.run_reference(small("decode"), inputs)
    expected = [follow(inputs, [(b, 0)], inputs["state"][b]) for b in range(5)]
    check(got[0], np.stack([output for output, _ in expected]))
    check(got[1], np.stack([state for _, state in expected]))
    compare_published("decode", inputs, got)


LENGTHS = (1, 7, 33)


def prefill_inputs(lengths: tuple[int, ...]) -> dict[str, Any]:
    return {
        **tokens((sum(lengths),), 43),
        "state": states(len(lengths), 44),
        "cu_seqlens": references.indptr(lengths).to(torch.int64),
    }


@pytest.mark.bench_extra
def test_prefill() -> None:
    inputs = prefill_inputs(LENGTHS)
    got = references.run_reference(small("prefill"), inputs)
    compare_published("prefill", inputs, got)


@pytest.mark.bench_extra
def test_prefill_keeps_the_state_of_an_empty_sequence() -> None:
    """Unlike the published reference, which gives an empty sequence a state of zeros."""
    lengths = (2, 0, 5)
    inputs = prefill_inputs(lengths)
    output, state = references.run_reference(small("prefill"), inputs)
    first = 0
    for i, length in enumerate(lengths):
        places = [(t,) for t in range(first, first + length)]
        expected, last = follow(inputs, places, inputs["state"][i])
        if length:
            check(output[first : first + length], expected)
        check(state[i], last)
        first += length
    assert torch.equal(state[1], inputs["state"][1])


@pytest.mark.bench_extra
@pytest.mark.parametrize("given", [0.0, None])
def test_no_scale_and_no_state_stand_for_the_defaults(given: float | None) -> None:
    inputs = {**tokens((3, 1), 45), "state": states(3, 46)}
    namespace: dict[str, Any] = {}
    exec(op_module("gdn").definition(small("decode"))["reference"], namespace)
    names = list(op_module("gdn").definition(small("decode"))["inputs"])
    zeros = torch.zeros_like(inputs["state"])
    expected = {**inputs, "scale": DIM**-0.5, "state": zeros}
    got = {**inputs, "scale": given, "state": None}
    results = [namespace["run"](*(case[name] for name in names)) for case in (got, expected)]
    assert_same(*results)


@pytest.mark.bench_extra
def test_mtp() -> None:
    pool, slots, drafted = 6, (4, 0, 5), 4
    inputs = {
        **tokens((len(slots), drafted), 47),
        "initial_state": states(pool, 48),
        "initial_state_indices": torch.tensor(slots, dtype=torch.int32),
        "intermediate_states_buffer": torch.zeros(pool, drafted, VALUES, DIM, DIM),
    }
    output, final = references.run_reference(small("mtp"), inputs)
    for b, slot in enumerate(slots):
        places = [(b, t) for t in range(drafted)]
        check(output[b], follow(inputs, places, inputs["initial_state"][slot])[0])
    assert torch.equal(final, inputs["initial_state"])
    # The published reference also fills the scratch buffer, an input, which is no output of it.
    compare_published("mtp", inputs, (output, final))


@pytest.mark.bench_extra
def test_prefill_is_decode_token_by_token() -> None:
    inputs = prefill_inputs(LENGTHS)
    output, final = references.run_reference(small("prefill"), inputs)
    first = 0
    for i, length in enumerate(LENGTHS):
        state = inputs["state"][i : i + 1]
        for t in range(first, first + length):
            step = {name: inputs[name][t][None, None] for name in ("q", "k", "v", "a", "b")}
            step |= {name: inputs[name] for name in ("A_log", "dt_bias", "scale")}
            one, state = references.run_reference(small("decode"), {**step, "state": state})
            assert_same([output[t]], [one[0, 0]])
        assert_same([final[i]], [state[0]])
        first += length
