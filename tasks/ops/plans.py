"""Attention wrappers that are planned first and run afterwards: what their dumped calls show.

A plan holds everything structural of a batch (offsets, page ids, heads, data types), a run the
queries and the KV pool of one layer. They belong together by the wrapper object: a plan is run by
the runs of its object before that object's next plan, whatever other wrappers are planned and run
in between.

A plan is not a run. Where a process recorded runs of the wrapper's class, a plan without one of
its own is no workload, nor is one whose run a CUDA graph recorded: its indices are made up for the
capture. Where it recorded none (serving sessions record plans), decode and ragged plans count,
since SGLang always runs them. A paged prefill then counts only where its server is known to prefill
so: otherwise it covers cached prefixes (`flashinfer_backend.py: forward_extend`), whose run returns
the log-sum-exp for a merge, or is replaced by a ragged one after it was planned
(`attention_backend_handler.py: MHA_ONE_SHOT`), and never in a process that plans ragged prefill.

SGLang tells most plans neither the mask nor the softmax scale: `forward()` sets both on the object
before it calls `run()`, and no dump has them. Without a mask in the plan, a prefill is causal by
the way of prefilling that the process is in, and only where each sequence's keys include its
queries'.
"""

from __future__ import annotations

import math
import re
import reprlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np

from tasks.ops.base import (
    Call,
    DumpError,
    KernelSpec,
    OpModule,
    Rejected,
    Row,
    Scalar,
    check_axes,
    rows_of,
)

RAGGED = "BatchPrefillWithRaggedKVCacheWrapper"
DTYPE = "bfloat16"
"""Of queries and caches in every attention definition."""

_INT32 = np.iinfo(np.int32)
_INT64 = np.iinfo(np.int64)
_LARGEST_AXIS = 1 << 16
"""No const axis of attention comes near; larger numbers are damage."""
_MOST_SHOWN = 80
"""Characters of a dumped value that a reason has."""
_UNNAMED = re.compile(r"arg_\d+(__\w+)?")
_MULTI_ITEM = ("prefix_len_ptr", "token_pos_in_items_ptr", "max_item_len_ptr")
_SCALES = ("q_scale", "k_scale", "v_scale", "o_scale", "ckv_scale", "kpe_scale")
_PLAIN: Mapping[str, tuple[object, ...]] = {
    "logits_soft_cap": (0,),
    "window_left": (-1,),
    "pos_encoding_mode": ("NONE",),
    "use_fp16_qk_reduction": (False,),
    "token_pos_in_items_len": (0,),
    "q_len_per_req": (1,),
    "skip_softmax_threshold_scale_factor": (0,),
    **dict.fromkeys(("custom_mask", "packed_custom_mask", *_MULTI_ITEM), ()),
    **dict.fromkeys(("v_indptr", "o_indptr", "sinks", "kv_cache_sf"), ()),
    **dict.fromkeys(_SCALES, (1,)),
}
"""Arguments of plans and runs that make attention more than a definition computes, and with which
values they do not; absent and None always do not."""
_DTYPES = ("data_type", "q_data_type", "kv_data_type", "o_data_type")
_LIMITED = reprlib.Repr()
_LIMITED.maxlevel = 4
_LIMITED.maxstring = _LIMITED.maxlong = _LIMITED.maxother = _MOST_SHOWN
_LIMITED.maxlist = _LIMITED.maxtuple = _LIMITED.maxdict = 8


@dataclass(frozen=True)
class Evidence:
    """What a session shows of one plan, besides the plan."""

    runs: tuple[Call, ...] = ()
    """Runs of the same object before its next plan that ran when they were called."""
    captured: int = 0
    """Runs of it that a CUDA graph recorded."""
    recorded: bool = False
    """Whether the process recorded any run of the wrapper's class."""
    ragged: bool = False
    """Whether the process plans ragged prefill."""


def rows_of_plans(
    calls: Sequence[Call], wrapper: str, make: Callable[[Call, Evidence], Row]
) -> Iterator[Row | Rejected]:
    """Make a row of every plan of a wrapper class; reject runs that none of the plans is for.

    Runs of a plan that is no row are not rejected besides: the plan is.

    Args:
        calls: a session's calls, each process's in the order in which it made them.
        wrapper: the class.
        make: makes one plan's row; it raises DumpError where the plan is none.
    """
    found = evidence_of(calls, wrapper)
    yield from rows_of(calls, f"{wrapper}.plan", lambda call: make(call, found[call.id]))
    for run in _runs_without_plan(calls, wrapper):
        yield Rejected(run.id, f"{run.name}: run without a readable plan")


def _runs_without_plan(calls: Sequence[Call], wrapper: str) -> Iterator[Call]:
    """Yield the runs that no plan comes before which is, or may be, of their object."""
    plan, run = f"{wrapper}.plan", f"{wrapper}.run"
    planned_on: set[tuple[str, int | None]] = set()
    for call in calls:
        if call.name == plan:
            planned_on.add((call.process, call.self_id))
        elif call.name == run:
            # A plan without self_id is refused for it, and may be the plan of any run.
            own = {(call.process, call.self_id), (call.process, None)}
            if planned_on.isdisjoint(own):
                yield call


def evidence_of(calls: Sequence[Call], wrapper: str) -> dict[str, Evidence]:
    """Pair the plans of a wrapper class with their runs; return what there is by the plan's id."""
    plan, run = f"{wrapper}.plan", f"{wrapper}.run"
    ragged = {call.process for call in calls if call.name == f"{RAGGED}.plan"}
    recorded = {call.process for call in calls if call.name == run}
    latest: dict[tuple[str, int], str] = {}
    process_of: dict[str, str] = {}
    runs: dict[str, list[Call]] = {}
    for call in calls:
        if call.name == plan:
            process_of[call.id] = call.process
            if call.self_id is not None:
                latest[call.process, call.self_id] = call.id
        elif call.name == run and call.self_id is not None:
            planned_by = latest.get((call.process, call.self_id))
            if planned_by is not None:
                runs.setdefault(planned_by, []).append(call)
    return {
        plan_id: Evidence(
            runs=tuple(call for call in runs.get(plan_id, ()) if not call.captured),
            captured=sum(call.captured for call in runs.get(plan_id, ())),
            recorded=process in recorded,
            ragged=process in ragged,
        )
        for plan_id, process in process_of.items()
    }


def check_run(plan: Call, evidence: Evidence, accept: Callable[[Call], None]) -> None:
    """Check that a plan was run, at least once as the definition has it.

    Args:
        plan: the plan.
        evidence: what is known of it.
        accept: checks one run; it raises DumpError where that is not of the definition.

    Raises:
        DumpError: it was not; the text is that of the first run, if there is one.
    """
    if plan.captured or evidence.captured:
        raise DumpError(f"{plan.name}: planned to capture a CUDA graph, its indices are made up")
    if not evidence.recorded:
        return
    if plan.self_id is None:
        raise DumpError(f"{plan.name}: the dump has no self_id to find its run by")
    refused: DumpError | None = None
    for run in evidence.runs:
        try:
            accept(run)
        except DumpError as error:
            refused = refused or error
        else:
            return
    raise refused or DumpError(f"{plan.name}: planned but not run")


def may_be_causal(plan: Call) -> bool:
    """Whether a prefill's plan says a causal mask, or leaves that to `forward()`."""
    causal = plan.values.get("causal")
    return causal is None or causal is True


def check_causal(plan: Call, evidence: Evidence, *, paged: bool) -> None:
    """Check that a prefill's plan was run with a causal mask, or count on SGLang's way.

    Raises:
        DumpError: it was not, or nothing says so.
    """
    causal = plan.values.get("causal")
    if not may_be_causal(plan):
        raise DumpError(f"{plan.name}: causal is {shown(causal)}, the definition's mask is causal")
    if paged and evidence.ragged and not (causal and evidence.recorded):
        raise DumpError(
            f"{plan.name}: no evidence of a causal run (the process plans ragged prefill, where a "
            "paged plan covers cached prefixes only, or is not run)"
        )
    if paged and not evidence.recorded and plan.prefill != "paged":
        raise DumpError(
            f"{plan.name}: no evidence of a causal run (no run was recorded, and nothing says that "
            "the server prefills paged only)"
        )
    merged = evidence.runs and all(run.values.get("return_lse") is True for run in evidence.runs)
    if paged and causal is None and merged:
        raise DumpError(
            f"{plan.name}: no evidence of a causal run (its run returns the LSE, as those over a "
            "cached prefix do)"
        )


def check_reach(plan: Call, qo_indptr: np.ndarray, kv_indptr: np.ndarray) -> None:
    """Check a prefill's offsets against each other.

    Raises:
        DumpError: they are of different batches, there is no query, or a plan without a mask of
            its own has sequences with fewer keys than queries, which SGLang runs without a mask.
    """
    if qo_indptr.size != kv_indptr.size:
        raise DumpError(f"{plan.name}: {qo_indptr.size} query offsets, {kv_indptr.size} KV offsets")
    if qo_indptr[-1] == 0:
        raise DumpError(f"{plan.name}: the query is empty")
    short = int((np.diff(kv_indptr) < np.diff(qo_indptr)).sum())
    if short and plan.values.get("causal") is None:
        raise DumpError(
            f"{plan.name}: no evidence of a causal run ({short} of {qo_indptr.size - 1} sequences "
            "have fewer keys than queries)"
        )


def check_plain(call: Call) -> None:
    """Check that a plan's or a run's arguments ask for nothing that a definition does not do.

    Raises:
        DumpError: one does; the text has its value.
    """
    for name in (*call.values, *call.tensors):
        if _UNNAMED.fullmatch(name):
            raise DumpError(
                f"{call.name}: {name[:_MOST_SHOWN]} is no parameter that the signature names"
            )
    for name, plain in _PLAIN.items():
        given = call.tensors.get(name)
        if given is not None:
            shape = shown(list(given.shape))
            raise DumpError(f"{call.name}: {name} is a tensor {shape}, the definition has none")
        value = call.values.get(name)
        if value is not None and value not in plain:
            raise DumpError(f"{call.name}: {name} is {shown(value)}, the definition has none")
    for name in _DTYPES:
        dtype = dtype_name(call.values.get(name))
        if dtype not in (None, DTYPE):
            raise DumpError(f"{call.name}: {name} is {dtype}, the definition has {DTYPE}")


def dtype_name(value: Any) -> str | None:
    """Return the data type that a dumped argument names; None where it names none."""
    if isinstance(value, Mapping):
        value = value.get("value")
    return None if value is None else shown(value).strip("'").removeprefix("torch.")


def shown(value: Any) -> str:
    """Return a dumped value as reasons show it, cut to a part of a line."""
    # Limited in depth too, as damaged values can be too deep for `repr`.
    text = _LIMITED.repr(value)
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}..."


def is_int64(value: int) -> bool:
    """Whether a number is one that a kernel could be given as an integer."""
    return _INT64.min <= value <= _INT64.max


def check_tensor(
    call: Call, name: str, shape: tuple[int | None, ...], *, dtype: str = DTYPE
) -> None:
    """Check a tensor's data type and shape, where the dump has the tensor.

    Args:
        call: the call.
        name: the parameter.
        shape: what the definition and the plan want; None for a dimension that may be any.
        dtype: what the definition has.

    Raises:
        DumpError: they differ; the text has both.
    """
    given = call.tensors.get(name)
    if given is None:
        return
    if given.dtype != dtype:
        raise DumpError(f"{call.name}: {name} is {given.dtype}, the definition has {dtype}")
    same = len(given.shape) == len(shape) and all(
        want in (None, have) for want, have in zip(shape, given.shape, strict=True)
    )
    if not same:
        wanted = ", ".join("?" if want is None else str(want) for want in shape)
        raise DumpError(f"{call.name}: {name} is {shown(list(given.shape))}, expected [{wanted}]")


def integers(call: Call, names: Mapping[str, str]) -> dict[str, int]:
    """Return axis -> value of a plan's integer arguments, given axis -> parameter.

    Raises:
        DumpError: one is missing, no integer, or none of 64 bits.
    """
    seen = {}
    for axis, name in names.items():
        value = call.values.get(name)
        if not isinstance(value, int) or isinstance(value, bool):
            raise DumpError(f"{call.name}: the dump has no integer {name!r}")
        if not is_int64(value):
            raise DumpError(f"{call.name}: {name} is {shown(value)}, no 64-bit integer")
        seen[axis] = value
    return seen


def check_plan(plan: Call, spec: KernelSpec, names: Mapping[str, str]) -> None:
    """Check a plan's integer arguments and options against a definition.

    Args:
        plan: the plan.
        spec: the definition's spec.
        names: const axis -> the plan's parameter; a page size may be planned as single tokens.

    Raises:
        DumpError: one differs; the text has the numbers.
    """
    planned_axes = integers(plan, names)
    page_size = planned_axes.pop("page_size", 1)
    check_axes(plan, planned_axes, spec.axes)
    if page_size != 1:
        raise DumpError(f"{plan.name}: planned with page_size {page_size}, expected 1")
    check_plain(plan)


def planned(
    module: OpModule, variant: str, call: Call, names: Mapping[str, str]
) -> KernelSpec | None:
    """Return the kernel that a plan's arguments name.

    Nothing if one was not dumped, or if they ask for what no definition of the family does.

    Args:
        module: the op module.
        variant: which of its kernels.
        call: the plan.
        names: const axis -> the plan's parameter.
    """
    try:
        check_plain(call)
        axes = integers(call, names)
    except DumpError:
        return None
    if not all(0 < size <= _LARGEST_AXIS for size in axes.values()):
        return None
    name = module.name_of(variant, axes)
    return KernelSpec(name=name, op_type=module.op_type, variant=variant, axes=axes)


def softmax_scale(plan: Call, spec: KernelSpec) -> dict[str, Scalar]:
    """Return the softmax scale as a row's scalar: the plan's own, else the model config's.

    Raises:
        DumpError: neither has one, or they disagree by more than float32 rounding.
    """
    if "sm_scale" in plan.tensors:
        raise DumpError(f"{plan.name}: sm_scale is a tensor, the definition has a scalar")
    dumped, stated = plan.values.get("sm_scale"), spec.scalars.get("sm_scale")
    if dumped is None:
        if stated is None:
            raise DumpError(
                "sm_scale: neither in the dump nor from a model config (give --model-config)"
            )
        return {"sm_scale": stated}
    number = isinstance(dumped, int | float) and not isinstance(dumped, bool)
    if not number or not 0 < dumped < 1e6:
        raise DumpError(f"{plan.name}: sm_scale is {shown(dumped)}")
    if stated is not None and not math.isclose(dumped, stated.value, rel_tol=2.0**-22):
        raise DumpError(
            f"{plan.name}: sm_scale is {dumped!r}, the model config gives {stated.value!r} "
            f"({stated.source})"
        )
    return {"sm_scale": Scalar(value=dumped, source=f"dumped: {plan.name} sm_scale")}


def offsets(call: Call, name: str) -> np.ndarray:
    """Load an offset array as int32 [sequences + 1]; it must start at 0 and not decrease.

    Raises:
        DumpError: it does not, is no array of integers, or is missing.
    """
    values = _integer_array(call, name)
    if values.size == 0 or values[0] != 0 or (values[1:] < values[:-1]).any():
        raise DumpError(f"{call.name}: {name} is not a sequence of offsets")
    return _as_int32(call, name, values)


def lengths(call: Call, name: str) -> np.ndarray:
    """Load an int32 array [sequences] of lengths.

    Raises:
        DumpError: it is no array of integers, or is missing.
    """
    return _as_int32(call, name, _integer_array(call, name))


def tables(call: Call, indptr: str, indices: str, page_size: int) -> dict[str, np.ndarray]:
    """Load where each sequence's keys are, as a paged definition's inputs have it.

    Args:
        call: a plan with page size 1.
        indptr: its parameter for each sequence's offset, in tokens.
        indices: its parameter for the tokens' slots.
        page_size: the definition's.

    Returns:
        `kv_indptr` [sequences + 1] and `kv_indices` [kv_indptr[-1]], and for pages of several
        tokens `kv_last_page_len` [sequences]; all int32.

    Raises:
        DumpError: there are none, or they are not what they should be.
    """
    kv_indptr = offsets(call, indptr)
    total = int(kv_indptr[-1])
    if total == 0:
        raise DumpError(f"{call.name}: the KV is empty")
    slots = _integer_array(call, indices)
    if slots.size < total:
        raise DumpError(f"{call.name}: {slots.size} indices for {total} KV tokens")
    # SGLang allocates prefill indices with slack; only the first indptr[-1] are meant.
    kv_indices = _as_int32(call, indices, slots[:total])
    if kv_indices.min() < 0:
        raise DumpError(f"{call.name}: negative page index {kv_indices.min()}")
    if not kv_indices.any():
        # So are the plans that a CUDA graph is captured with, whose runs may not be in the dump.
        raise DumpError(f"{call.name}: the KV is slot 0 alone, which SGLang reserves for padding")
    stored = {"kv_indptr": kv_indptr, "kv_indices": kv_indices}
    return stored if page_size == 1 else _regroup(call, stored, page_size)


def paged_row(
    plan: Call, spec: KernelSpec, stored: Mapping[str, np.ndarray], qo_indptr: np.ndarray | None
) -> Row:
    """Return the row of a paged decode, or of a paged prefill where there are query offsets."""
    sequences = stored["kv_indptr"].size - 1
    axes = {
        "len_indptr": sequences + 1,
        "num_kv_indices": stored["kv_indices"].size,
        # The pool's size is not in a plan; the smallest pool that holds every page is exact.
        "num_pages": int(stored["kv_indices"].max()) + 1,
    }
    if qo_indptr is None or spec.axes["page_size"] > 1:
        axes["batch_size"] = sequences
    tensors = dict(stored)
    if qo_indptr is not None:
        axes["total_q"] = int(qo_indptr[-1])
        tensors = {"qo_indptr": qo_indptr, **tensors}
    scalars = softmax_scale(plan, spec)
    return Row(axes=axes, tensors=tensors, scalars=scalars, calls=(plan.id,))


def check_decode(plan: Call, kv_indptr: np.ndarray) -> None:
    """Check that every sequence of a decode has keys: FlashInfer leaves the others' output unset.

    Raises:
        DumpError: one has none.
    """
    empty = int((np.diff(kv_indptr) == 0).sum())
    if empty:
        raise DumpError(f"{plan.name}: {empty} of {kv_indptr.size - 1} sequences have no KV")


def ragged_row(plan: Call, spec: KernelSpec, evidence: Evidence, names: Mapping[str, str]) -> Row:
    """Return the row of a prefill over contiguous keys and values.

    Args:
        plan: the plan.
        spec: the definition's spec.
        evidence: what is known of the plan.
        names: the axes of q's heads, k's and v's heads, q's and k's dimension and v's dimension,
            under `heads`, `kv_heads`, `qk` and `vo`.

    Raises:
        DumpError: it is no causal prefill as the definition has it.
    """
    axes = {role: spec.axes[axis] for role, axis in names.items()}
    check_causal(plan, evidence, paged=False)
    qo_indptr, kv_indptr = offsets(plan, "qo_indptr"), offsets(plan, "kv_indptr")
    check_reach(plan, qo_indptr, kv_indptr)
    total_q, total_kv = int(qo_indptr[-1]), int(kv_indptr[-1])
    if total_kv == 0:
        raise DumpError(f"{plan.name}: the KV is empty")
    shapes = {
        "q": (total_q, axes["heads"], axes["qk"]),
        "k": (total_kv, axes["kv_heads"], axes["qk"]),
        "v": (total_kv, axes["kv_heads"], axes["vo"]),
    }
    check_run(plan, evidence, partial(check_tensors, shapes=shapes))
    return Row(
        axes={"len_indptr": qo_indptr.size, "total_q": total_q, "total_kv": total_kv},
        tensors={"qo_indptr": qo_indptr, "kv_indptr": kv_indptr},
        scalars=softmax_scale(plan, spec),
        calls=(plan.id,),
    )


def check_tensors(run: Call, shapes: Mapping[str, tuple[int | None, ...]]) -> None:
    """Check that a run is plain attention over tensors of these shapes, where it shows them.

    Raises:
        DumpError: it is not.
    """
    check_plain(run)
    for name, shape in shapes.items():
        check_tensor(run, name, shape)


def _integer_array(call: Call, name: str) -> np.ndarray:
    dumped = call.tensors.get(name)
    if dumped is None:
        raise DumpError(f"{call.name}: the dump has no tensor {name!r}")
    values = dumped.load()
    if values.ndim != 1 or values.dtype not in (np.int32, np.int64):
        raise DumpError(
            f"{call.name}: {name} is {values.dtype}{shown(list(values.shape))}, not indices"
        )
    return values


def _as_int32(call: Call, name: str, values: np.ndarray) -> np.ndarray:
    """Return values in the definitions' dtype, all of them unchanged."""
    if values.size and not _INT32.min <= values.min() <= values.max() <= _INT32.max:
        raise DumpError(
            f"{call.name}: {name} has values from {values.min()} to {values.max()}, "
            "the definition has int32"
        )
    return values.astype(np.int32)


def _regroup(call: Call, stored: Mapping[str, np.ndarray], page_size: int) -> dict[str, np.ndarray]:
    """Turn token indices into page ids, exactly or not at all.

    SGLang plans with page size 1 whatever its own page size is; with `--page-size 64` every
    request's token indices run page by page, from the start of a page.

    Raises:
        DumpError: a request's indices do not, so they are no indices of pages.
    """
    indptr, indices = stored["kv_indptr"], stored["kv_indices"]
    pages, last = [], []
    for first, end in pairwise(indptr):
        tokens = indices[first:end]
        heads = tokens[::page_size]
        expected = (heads[:, None] + np.arange(page_size)).reshape(-1)[: tokens.size]
        if (heads % page_size).any() or not np.array_equal(tokens, expected):
            raise DumpError(f"{call.name}: token indices are not whole pages of {page_size}")
        pages.append(heads // page_size)
        last.append((tokens.size - 1) % page_size + 1 if tokens.size else 0)
    counts = [page.size for page in pages]
    return {
        "kv_indptr": np.concatenate([[0], np.cumsum(counts)]).astype(np.int32),
        "kv_indices": np.concatenate(pages).astype(np.int32),
        "kv_last_page_len": np.array(last, dtype=np.int32),
    }
