"""Rows of every family, of calls with arguments that no caller passes: a true row, or a reason."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.collect.rows import form_of
from tasks.ops import op_module, registry
from tasks.ops.base import DumpError, KernelSpec, Rejected, Row
from tests.unit import test_rows_attention as attention
from tests.unit import test_rows_others as others
from tests.unit.test_rows_others import Call, Tensor, changed


def as_call(made: attention.MadeCall) -> Call:
    tensors = {
        name: Tensor(given.shape, given.dtype, given.data) for name, given in made.tensors.items()
    }
    return Call(made.name, tensors, dict(made.values), self_id=made.self_id, prefill=made.prefill)


def fused_norm() -> attention.MadeCall:
    rows = attention.MadeTensor((5, 512))
    tensors = {"input": rows, "residual": rows, "weight": attention.MadeTensor((512,))}
    return attention.MadeCall("fused_add_rmsnorm", tensors, {"eps": 1e-5}, self_id=None)


def filters(variant: str) -> attention.MadeCall:
    made = attention.sampling()
    kept = {name: t for name, t in made.tensors.items() if name == "probs" or name in variant}
    return attention.MadeCall(variant, kept, made.values, self_id=None)


def samplers() -> Iterator[tuple[KernelSpec, attention.MadeCall]]:
    for variant in op_module("sampling").names:
        yield attention.kernel("sampling", variant, {"vocab_size": 4096}), filters(variant)


FUSED = attention.kernel(
    "rmsnorm", "fused_add_rmsnorm", {"hidden_size": 512}, constants={"eps": 1e-5}
)
TOKENS = attention.whole([*range(64, 128), *range(128, 198)])
"""Of two sequences of one page and a part of the next."""
MADE: list[tuple[KernelSpec, attention.MadeCall, attention.MadeCall | None]] = [
    *(every for every in attention.EVERY if every[0] != attention.GQA["prefill", 64]),
    (
        attention.GQA["decode", 64],
        attention.decode_plan([64, 70]).given(indices=TOKENS),
        attention.decode_run(2),
    ),
    (
        attention.GQA["prefill", 64],
        attention.paged_plan([3, 4], [64, 70]).given(paged_kv_indices=TOKENS),
        None,
    ),
    (attention.GQA["prefill", 1], attention.paged_plan([3, 4], [3, 9]), None),
    (attention.MLA["prefill", 1], attention.latent_plan([3, 4], [3, 9], causal=True), None),
    (FUSED, fused_norm(), None),
    *((spec, call, None) for spec, call in samplers()),
]
EVERY: list[tuple[KernelSpec, list[Call]]] = [
    *((spec, [as_call(made) for made in (call, run) if made]) for spec, call, run in MADE),
    *((others.spec_of(name), [make()]) for name, make in others.CALLS.items()),
]
NAMES = [f"{spec.name}-{calls[0].name}" for spec, calls in EVERY]

WHOLE = ("int8", "uint8", "int16", "int32", "int64", "uint64")
DTYPES = (*WHOLE, "float16", "float32", "float64", "bool")


def numbers(dtype: np.dtype[Any]) -> st.SearchStrategy[Any]:
    if dtype.kind == "b":
        return st.booleans()
    if dtype.kind == "f":
        return st.floats(width=16) | st.just(math.nan) | st.just(math.inf)
    lowest, highest = int(np.iinfo(dtype).min), int(np.iinfo(dtype).max)
    return st.integers(max(-3, lowest), 120) | st.integers(lowest, highest)


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    """A tensor of any small shape and of any numbers, the worst among them."""
    shape = tuple(draw(st.lists(st.integers(0, 4), max_size=4)))
    dtype = np.dtype(draw(st.sampled_from(DTYPES)))
    size = math.prod(shape)
    values = draw(st.lists(numbers(dtype), min_size=size, max_size=size))
    return Tensor(shape, dtype.name, np.array(values, dtype=dtype).reshape(shape))


@st.composite
def nudged(draw: st.DrawFn, tensor: Tensor) -> Tensor:
    """The tensor with one of its numbers changed."""
    assert tensor.values is not None
    values = np.array(tensor.values)
    index = draw(st.integers(0, values.size - 1))
    kind = values.dtype if values.dtype.kind in "iuf" else np.dtype(np.float32)
    values.reshape(-1)[index] = draw(numbers(kind))
    return replace(tensor, values=values)


def wrong(tensor: Tensor | None) -> st.SearchStrategy[Any]:
    """Return what may be passed instead of an argument."""
    anything = st.just(...) | attention.ANYTHING | tensors()
    if tensor is None or tensor.values is None or not 0 < tensor.values.size < 5000:
        return anything
    return st.one_of(nudged(tensor), nudged(tensor), nudged(tensor), anything)


def check_row(spec: KernelSpec, row: Row) -> None:
    """The row's tensors have the shapes and the meaning that the definition gives them."""
    definition = op_module(spec.op_type).definition(spec)
    axes = {**spec.axes, **row.axes}
    for name, values in row.tensors.items():
        declared = definition["inputs"][name]
        known = {a: d["value"] for a, d in definition["axes"].items() if d["type"] == "const"}
        wanted = [{**axes, **known}[axis] for axis in declared["shape"]]
        assert (list(values.shape), values.dtype.name) == (wanted, declared["dtype"])
        assert np.isfinite(values.astype(np.float64)).all()
    assert all(type(size) is int and size > 0 for size in row.axes.values())
    assert all(math.isfinite(scalar.value) for scalar in row.scalars.values())
    check_indices(axes, row.tensors)


def check_indices(axes: Mapping[str, int], tensors: Mapping[str, np.ndarray]) -> None:
    ends = {"qo_indptr": "total_q", "cu_seqlens": "total_seq_len"}
    ends["kv_indptr"] = "num_kv_indices" if "num_kv_indices" in axes else "total_kv"
    for name, axis in ends.items():
        if name in tensors:
            offsets = tensors[name].astype(object)
            assert offsets[0] == 0
            assert offsets[-1] == axes[axis]
            assert all(a <= b for a, b in pairwise(offsets))
    if "kv_indptr" in tensors and "qo_indptr" not in tensors:
        assert (np.diff(tensors["kv_indptr"]) > 0).all(), "a sequence without keys"
    bounds = {
        "kv_indices": (0, axes.get("num_pages", 0)),
        "kv_last_page_len": (1, axes.get("page_size", 0) + 1),
        "initial_state_indices": (0, axes.get("pool_size", 0)),
        "state_batch_indices": (-1, axes.get("state_cache_size", 0)),
        "positions": (0, axes.get("max_seq_len", 0)),
        "sparse_indices": (-1, axes.get("num_pages", 0) * axes.get("page_size", 0)),
        "top_k": (1, 1 << 31),
    }
    for name, (first, end) in bounds.items():
        if name in tensors:
            assert first <= tensors[name].min()
            assert tensors[name].max() < end


def results(spec: KernelSpec, calls: list[Call]) -> list[Row | Rejected]:
    return list(op_module(spec.op_type).rows(spec, calls))


@pytest.mark.parametrize(("spec", "calls"), EVERY, ids=NAMES)
def test_what_is_passed_is_a_true_row(spec: KernelSpec, calls: list[Call]) -> None:
    (row,) = results(spec, calls)
    assert isinstance(row, Row), row
    check_row(spec, row)


def test_no_family_is_left_out() -> None:
    """Of those whose kernels FlashInfer runs."""
    made = {(spec.op_type, spec.variant) for spec, _ in EVERY}
    for op_type, module in registry().items():
        for variant in module.names if module.apis else ():
            if variant != "topk_indexer" and "routing" not in variant:
                named = {known for family, known in made if family == op_type}
                assert variant.split(" ")[0] in named or variant == "gptj", (op_type, variant)


@given(st.sampled_from(EVERY), st.data())
def test_whatever_is_passed_is_a_true_row_or_a_reason(
    every: tuple[KernelSpec, list[Call]], data: st.DataObject
) -> None:
    spec, calls = every
    module, odd = op_module(spec.op_type), list(calls)
    for _ in range(data.draw(st.integers(1, 3))):
        index = data.draw(st.integers(0, len(odd) - 1))
        call = odd[index]
        names = [*call.tensors, *call.values]
        read = [name for name, tensor in call.tensors.items() if tensor.values is not None]
        name = data.draw(st.sampled_from(read or names) | st.sampled_from(names))
        odd[index] = changed(call, **{name: data.draw(wrong(call.tensors.get(name)))})
    for call in odd:
        module.implied(call)
    definition = {"name": spec.name, "op_type": spec.op_type, **module.definition(spec)}
    for result in results(spec, odd):
        if isinstance(result, Row):
            try:
                checked = form_of(definition, spec.name).check(result)
            except DumpError:
                continue  # Counted as well.
            check_row(spec, checked)


OUTPUTS = {"out", "output_state", "workspace_buffer"}
"""Where kernels write to."""


@pytest.mark.parametrize("lost", [None, ...], ids=["None", "absent"])
@pytest.mark.parametrize(("spec", "calls"), EVERY, ids=NAMES)
def test_an_input_that_a_call_did_not_have_is_never_random(
    spec: KernelSpec, calls: list[Call], lost: Any
) -> None:
    call, *rest = calls
    for name in sorted(call.tensors.keys() - OUTPUTS):
        for result in results(spec, [changed(call, **{name: lost}), *rest]):
            assert isinstance(result, Rejected), f"a row without {name}"
            assert name in result.reason
