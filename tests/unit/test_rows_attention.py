"""Rows of attention, norms and sampling: of calls recorded on an H200, and of made-up ones."""

from __future__ import annotations

import math
import tarfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.collect.dumps import read_calls
from tasks.ops import op_module
from tasks.ops.base import Call, FlashInferApi, KernelSpec, Rejected, Row, Scalar
from tests.conftest import DATA

DECODE = "BatchDecodeWithPagedKVCacheWrapper"
PAGED = "BatchPrefillWithPagedKVCacheWrapper"
RAGGED = "BatchPrefillWithRaggedKVCacheWrapper"
LATENT = "BatchMLAPagedAttentionWrapper"
BF16 = {"type": "torch.dtype", "value": "torch.bfloat16"}
SCALE = {"sm_scale": Scalar(value=128**-0.5, source="a test")}


# --- calls in memory -----------------------------------------------------------------------------


@dataclass(frozen=True)
class MadeTensor:
    """A tensor argument in memory; activations have no data."""

    shape: tuple[int, ...]
    dtype: str = "bfloat16"
    data: np.ndarray | None = None

    def load(self) -> np.ndarray:
        assert self.data is not None, "an activation is never read"
        return self.data


@dataclass(frozen=True)
class MadeCall:
    """A dumped call in memory."""

    name: str
    tensors: Mapping[str, MadeTensor] = field(default_factory=dict)
    values: Mapping[str, Any] = field(default_factory=dict)
    id: str = "a call"
    process: str = "1"
    self_id: int | None = 10
    captured: bool = False
    prefill: str = ""

    def given(self, **arguments: Any) -> MadeCall:
        """Return the call with other arguments; None takes a tensor away."""
        tensors = {k: v for k, v in arguments.items() if isinstance(v, MadeTensor)}
        values = {k: v for k, v in arguments.items() if k not in tensors}
        kept = {k: v for k, v in self.tensors.items() if k not in values}
        return replace(self, tensors={**kept, **tensors}, values={**self.values, **values})


def whole(values: Iterable[float], dtype: str = "int32") -> MadeTensor:
    data = np.array(list(values), dtype=dtype)
    return MadeTensor(data.shape, dtype, data)


def offsets(lengths: Iterable[int]) -> MadeTensor:
    return whole([0, *np.cumsum(list(lengths))])


def decode_plan(lengths: Sequence[int], first: int = 1, **identity: Any) -> MadeCall:
    tables = {"indptr": offsets(lengths), "indices": whole(range(first, first + sum(lengths)))}
    sizes = {"num_qo_heads": 8, "num_kv_heads": 2, "head_dim": 128, "page_size": 1}
    dtypes = {"data_type": BF16, "q_data_type": BF16}
    return MadeCall(f"{DECODE}.plan", tables, {**sizes, **dtypes}, **identity)


def decode_run(rows: int, pool: int = 1025, **identity: Any) -> MadeCall:
    item = {"type": "torch.Tensor", "shape": [pool, 2, 128], "dtype": "torch.bfloat16"}
    values = {"paged_kv_cache": {"type": "tuple", "items": [item, item]}, "k_scale": None}
    return MadeCall(f"{DECODE}.run", {"q": MadeTensor((rows, 8, 128))}, values, **identity)


PAGED_SERVER = {"prefill": "paged"}


def paged_plan(queries: Sequence[int], keys: Sequence[int], **identity: Any) -> MadeCall:
    tables = {
        "qo_indptr": offsets(queries),
        "paged_kv_indptr": offsets(keys),
        # What SGLang allocates and does not write is whatever was there.
        "paged_kv_indices": whole([*range(1, 1 + sum(keys)), -7, 2**31 - 1]),
    }
    sizes = {"num_qo_heads": 8, "num_kv_heads": 2, "head_dim_qk": 128, "page_size": 1}
    options = {"q_data_type": BF16, "kv_data_type": BF16, "custom_mask": None}
    return MadeCall(f"{PAGED}.plan", tables, {**sizes, **options}, **PAGED_SERVER | identity)


def ragged_plan(queries: Sequence[int], keys: Sequence[int], **identity: Any) -> MadeCall:
    tables = {"qo_indptr": offsets(queries), "kv_indptr": offsets(keys)}
    sizes = {"num_qo_heads": 8, "num_kv_heads": 2, "head_dim_qk": 128}
    return MadeCall(f"{RAGGED}.plan", tables, {**sizes, "q_data_type": BF16}, **identity)


def latent_plan(
    queries: Sequence[int], keys: Sequence[int], causal: bool, **identity: Any
) -> MadeCall:
    tables = {
        "qo_indptr": offsets(queries),
        "kv_indptr": offsets(keys),
        "kv_indices": whole(range(1, 1 + sum(keys))),
        "kv_len_arr": whole(keys),
    }
    sizes = {"num_heads": 16, "head_dim_ckv": 512, "head_dim_kpe": 64, "page_size": 1}
    options = {"causal": causal, "sm_scale": 0.125, "q_data_type": BF16, "kv_data_type": BF16}
    return MadeCall(f"{LATENT}.plan", tables, {**sizes, **options}, **PAGED_SERVER | identity)


def latent_ragged_plan(lengths: Sequence[int]) -> MadeCall:
    plan = ragged_plan(lengths, lengths)
    return plan.given(num_qo_heads=16, num_kv_heads=16, head_dim_qk=192, head_dim_vo=128)


def rms_norm(**arguments: Any) -> MadeCall:
    tensors = {"input": MadeTensor((5, 512)), "weight": MadeTensor((512,))}
    return MadeCall("rmsnorm", tensors, {"eps": 1e-5}, self_id=None).given(**arguments)


def sampling(**arguments: Any) -> MadeCall:
    tensors = {
        "probs": MadeTensor((2, 4096), "float32"),
        "top_k": whole([50, 1 << 30]),
        "top_p": whole([0.9, 1.0], "float32"),
    }
    order = {"filter_apply_order": "joint"}
    name = "top_k_top_p_sampling_from_probs"
    return MadeCall(name, tensors, order, self_id=None).given(**arguments)


def kernel(op_type: str, variant: str, axes: dict[str, int], **more: Any) -> KernelSpec:
    name = op_module(op_type).name_of(variant, axes)
    return KernelSpec(name=name, op_type=op_type, variant=variant, axes=axes, **more)


HEADS = {"num_qo_heads": 8, "num_kv_heads": 2, "head_dim": 128}
LATENT_DIMS = {"num_qo_heads": 16, "head_dim_ckv": 512, "head_dim_kpe": 64}
GQA = {
    (stage, page): kernel("gqa_paged", stage, {**HEADS, "page_size": page}, scalars=SCALE)
    for stage in ("decode", "prefill")
    for page in (1, 64)
}
GQA_RAGGED = kernel("gqa_ragged", "prefill", HEADS, scalars=SCALE)
MLA = {
    (stage, page): kernel("mla_paged", stage, {**LATENT_DIMS, "page_size": page})
    for stage in ("decode", "prefill")
    for page in (1, 64)
}
MLA_RAGGED = kernel(
    "mla_ragged",
    "prefill",
    {"num_qo_heads": 16, "num_kv_heads": 16, "qk_dim": 192, "vo_dim": 128},
    scalars=SCALE,
)
NORM = kernel("rmsnorm", "rmsnorm", {"hidden_size": 512}, constants={"eps": 1e-5})
SAMPLING = kernel("sampling", "top_k_top_p_sampling_from_probs", {"vocab_size": 4096})


def results(spec: KernelSpec, *calls: Call) -> list[Row | Rejected]:
    return list(op_module(spec.op_type).rows(spec, calls))


def row_of(spec: KernelSpec, *calls: Call) -> Row:
    (result,) = results(spec, *calls)
    assert isinstance(result, Row), result
    return result


def reason_of(spec: KernelSpec, *calls: Call) -> str:
    (result,) = results(spec, *calls)
    assert isinstance(result, Rejected), result
    return result.reason


# --- recorded calls ------------------------------------------------------------------------------


ARCHIVES = {
    "llama": ["llama_calls"],
    "moe": ["moe_calls"],
    "mla": ["mla_calls"],
    "qwen3": ["qwen3_30b_a3b_a", "qwen3_30b_a3b_c"],
}


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Call]]:
    """Calls of four models, plans without their runs."""
    folder = tmp_path_factory.mktemp("recorded")
    found: dict[str, list[Call]] = {}
    for model, archives in ARCHIVES.items():
        for archive in archives:
            with tarfile.open(DATA / "dumps_h200" / f"{archive}.tar.xz") as packed:
                packed.extractall(folder / model, filter="data")
        found[model] = list(read_calls(folder / model).calls)
    return found


QWEN3 = "h32_kv4_d128"
TINY = "h8_kv2_d128"
RECORDED = [
    # The number of each kind of folder in the archives.
    ("llama", f"gqa_paged_decode_{TINY}_ps1", 2),
    ("llama", f"gqa_ragged_prefill_causal_{TINY}", 2),
    # Its second plan was run over a cached prefix, without a mask.
    ("llama", f"gqa_paged_prefill_causal_{TINY}_ps1", 0),
    ("llama", "rmsnorm_h512", 2),
    ("llama", "fused_add_rmsnorm_h512", 2),
    ("moe", f"gqa_paged_decode_{TINY}_ps1", 2),
    ("moe", f"gqa_ragged_prefill_causal_{TINY}", 2),
    ("moe", f"gqa_paged_prefill_causal_{TINY}_ps1", 0),
    ("mla", "mla_paged_decode_h16_ckv512_kpe64_ps1", 2),
    ("mla", "mla_ragged_prefill_causal_h16_qk192_vo128", 1),
    ("qwen3", f"gqa_paged_decode_{QWEN3}_ps1", 88),
    ("qwen3", f"gqa_ragged_prefill_causal_{QWEN3}", 17),
    # Planned with every ragged prefill, and never run.
    ("qwen3", f"gqa_paged_prefill_causal_{QWEN3}_ps1", 0),
    ("qwen3", "fused_add_rmsnorm_h2048", 89),
    ("qwen3", "rmsnorm_h2048", 1),
]


def implied_by(calls: Iterable[Call]) -> dict[str, KernelSpec]:
    modules = [op_module(o) for o in ("gqa_paged", "gqa_ragged", "mla_paged", "mla_ragged")]
    modules += [op_module("rmsnorm"), op_module("sampling")]
    found = (module.implied(call) for call in calls for module in modules)
    return {spec.name: spec for spec in found if spec is not None}


@pytest.mark.parametrize(("model", "name", "rows"), RECORDED)
def test_recorded_calls_are_rows_of_what_they_imply(
    recorded: dict[str, list[Call]], model: str, name: str, rows: int
) -> None:
    calls = recorded[model]
    spec = implied_by(calls)[name]
    if "gqa" in name or name.startswith("mla_ragged"):
        assert not any(isinstance(result, Row) for result in results(spec, *calls))
        spec = spec.model_copy(update={"scalars": SCALE})
    found = results(spec, *calls)
    assert sum(isinstance(result, Row) for result in found) == rows
    if not rows:
        reasons = {result.reason for result in found if isinstance(result, Rejected)}
        assert all("no evidence of a causal run" in reason for reason in reasons)


def test_recorded_calls_imply_what_was_served(recorded: dict[str, list[Call]]) -> None:
    for model, calls in recorded.items():
        listed = {name for of, name, _ in RECORDED if of == model}
        small = {"rmsnorm_h512", "fused_add_rmsnorm_h512", "top_k_top_p_sampling_from_probs_v4096"}
        assert set(implied_by(calls)) == listed | (set() if model == "qwen3" else small)


def test_recorded_scale_is_the_plan_s_own(recorded: dict[str, list[Call]]) -> None:
    spec = implied_by(recorded["mla"])["mla_paged_decode_h16_ckv512_kpe64_ps1"]
    scales = {
        result.scalars["sm_scale"]
        for result in results(spec, *recorded["mla"])
        if isinstance(result, Row)
    }
    source = f"dumped: {LATENT}.plan sm_scale"
    assert scales == {Scalar(value=0.07216878364870323, source=source)}


# --- plans and runs ------------------------------------------------------------------------------


def test_two_wrappers_planned_before_either_runs() -> None:
    """Layers with and without a sliding window alternate; each has a wrapper of its own."""
    full = decode_plan([90, 40], id="full", self_id=1)
    window = decode_plan([32, 32], first=300, id="window", self_id=2)
    runs = [decode_run(2, id=f"run {i}", self_id=1 + i % 2) for i in range(4)]
    found = results(GQA["decode", 1], full, window, *runs)
    assert [row.axes["num_kv_indices"] for row in found if isinstance(row, Row)] == [130, 64]
    found = results(GQA["decode", 1], full, window, runs[0], runs[2])
    assert isinstance(found[0], Row)
    assert isinstance(found[1], Rejected)
    assert "planned but not run" in found[1].reason


@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 2), st.sampled_from("prc"))))
def test_a_plan_is_run_by_its_object_before_that_plans_again(
    events: list[tuple[int, int, str]],
) -> None:
    """Against each object's events alone, one after another."""
    calls, histories = [], dict[tuple[int, int], list[tuple[str, str]]]()
    for number, (process, wrapper, kind) in enumerate(events):
        identity: dict[str, Any] = {"id": str(number), "process": str(process), "self_id": wrapper}
        if kind == "p":
            calls.append(decode_plan([3, 4], **identity))
        else:
            calls.append(decode_run(2, captured=kind == "c", **identity))
        histories.setdefault((process, wrapper), []).append((kind, str(number)))
    expected: dict[str, bool] = {}
    for (process, _), history in histories.items():
        recorded = any(p == process and kind != "p" for p, _, kind in events)
        text = "".join(kind for kind, _ in history)
        for at, (kind, plan) in enumerate(history):
            if kind == "p":
                own = text[at + 1 :].split("p")[0]
                expected[plan] = "c" not in own and ("r" in own or not recorded)
            elif "p" not in text[:at]:
                expected[plan] = False
    found = results(GQA["decode", 1], *calls)
    rows = {result.calls[0]: True for result in found if isinstance(result, Row)}
    refused = {result.call: False for result in found if isinstance(result, Rejected)}
    assert rows | refused == expected


def test_a_plan_of_a_captured_graph_has_its_own_reason() -> None:
    run = decode_run(2, captured=True)
    text = "planned to capture a CUDA graph"
    assert text in reason_of(GQA["decode", 1], decode_plan([3, 4]), run)
    # Warming up before the capture runs with the same made-up indices.
    assert text in reason_of(GQA["decode", 1], decode_plan([3, 4]), decode_run(2), run)
    padding = decode_plan([1, 1]).given(indices=whole([0] * 2048))
    assert "slot 0 alone" in reason_of(GQA["decode", 1], padding)


def test_plans_count_by_themselves_where_no_run_was_recorded() -> None:
    elsewhere = decode_run(2, process="2")
    row, unplanned = results(GQA["decode", 1], decode_plan([3, 4]), elsewhere)
    assert isinstance(row, Row)
    assert isinstance(unplanned, Rejected)
    assert row_of(GQA_RAGGED, ragged_plan([3, 4], [3, 4]))
    assert row_of(GQA["prefill", 1], paged_plan([3, 4], [3, 9]), ragged_plan([3], [3], process="2"))
    nameless = decode_plan([3, 4], self_id=None)
    assert row_of(GQA["decode", 1], nameless)
    assert "no self_id" in reason_of(GQA["decode", 1], nameless, decode_run(2))


@pytest.mark.parametrize(
    ("spec", "wrapper"),
    [
        (GQA["decode", 1], DECODE),
        (GQA["prefill", 64], PAGED),
        (GQA_RAGGED, RAGGED),
        (MLA["decode", 1], LATENT),
        (MLA_RAGGED, RAGGED),
    ],
)
def test_runs_without_a_plan_are_counted(spec: KernelSpec, wrapper: str) -> None:
    runs = [MadeCall(f"{wrapper}.run", id=f"run {i}", self_id=i % 2) for i in range(6)]
    text = f"{wrapper}.run: run without a readable plan"
    assert results(spec, *runs) == [Rejected(run.id, text) for run in runs]
    # A plan that is no row is counted itself, and its runs are not; nor can be those of any object
    # where the plan does not say its own.
    for self_id, planned in ((1, runs[1::2]), (None, runs)):
        plan = MadeCall(f"{wrapper}.plan", id="plan", self_id=self_id)
        refused = [result for result in results(spec, plan, *runs) if isinstance(result, Rejected)]
        left = {run.id for run in runs} - {run.id for run in planned}
        assert {result.call for result in refused} == {"plan", *left}
    # A later plan does not explain an earlier run.
    late = results(spec, *runs[:2], MadeCall(f"{wrapper}.plan", id="plan", self_id=1))
    assert Rejected("run 1", text) in late


def nested(depth: int) -> list[Any]:
    inner: list[Any] = []
    for _ in range(depth):
        inner = [inner]
    return inner


@pytest.mark.parametrize(
    "value", [10**400, -(10**400), "x" * 9999, [10**400] * 99, nested(5000), {"value": "y" * 9999}]
)
def test_reasons_are_of_a_sane_length(value: Any) -> None:
    scale = decode_plan([3, 4]).given(sm_scale=value)
    refused = [
        (GQA["decode", 1], scale.given(num_qo_heads=value)),
        (GQA["decode", 1], scale.given(head_dim=value)),
        (GQA["decode", 1], scale.given(page_size=value)),
        (GQA["decode", 1], scale.given(logits_soft_cap=value)),
        (GQA["decode", 1], scale.given(data_type=value)),
        (GQA["decode", 1], scale.given(**{f"arg_4__{'z' * 9999}": 1})),
        (NORM, rms_norm(eps=value)),
        (SAMPLING, sampling(top_p=value)),
        (SAMPLING, sampling(filter_apply_order=value)),
    ]
    for spec, call in refused:
        assert len(reason_of(spec, call)) < 250


def test_ranks_give_equal_rows() -> None:
    plans = [
        decode_plan([3, 4], process=str(rank), self_id=rank, id=str(rank)) for rank in range(8)
    ]
    rows = [row for row in results(GQA["decode", 1], *plans) if isinstance(row, Row)]
    assert len(rows) == 8
    assert (
        len({(tuple(row.axes.items()), row.tensors["kv_indices"].tobytes()) for row in rows}) == 1
    )


def test_one_plain_run_is_evidence() -> None:
    """Layers that share a wrapper may differ: capped in one, plain in another."""
    capped = decode_run(2).given(k_scale=0.5)
    assert row_of(GQA["decode", 1], decode_plan([3, 4]), capped, decode_run(2))
    assert "k_scale is 0.5" in reason_of(GQA["decode", 1], decode_plan([3, 4]), capped)


# --- causal or not -------------------------------------------------------------------------------

NO_EVIDENCE = "no evidence of a causal run"


def test_a_cached_prefix_s_plan_is_no_causal_prefill() -> None:
    """SGLang plans both, and runs the paged one over prefixes without a mask; see `llama`."""
    prefix, own = paged_plan([3, 9], [33, 64]), ragged_plan([3, 9], [3, 9], self_id=11)
    run = MadeCall(f"{PAGED}.run", {"q": MadeTensor((12, 8, 128))}, {"return_lse": True})
    assert NO_EVIDENCE in reason_of(GQA["prefill", 1], own, prefix)
    assert NO_EVIDENCE in reason_of(GQA["prefill", 1], own, prefix, run)
    assert row_of(GQA_RAGGED, own, prefix, run).axes == {
        "len_indptr": 3,
        "total_q": 12,
        "total_kv": 12,
    }
    stated = prefix.given(causal=True)
    assert NO_EVIDENCE in reason_of(GQA["prefill", 1], own, stated)
    assert row_of(GQA["prefill", 1], own, stated, run)


def test_a_paged_plan_needs_its_run_or_a_server_that_prefills_paged() -> None:
    """Only the paged calls of `llama` were recorded: nothing shows that they cover prefixes."""
    plan = paged_plan([3, 9], [33, 64], prefill="")
    run = MadeCall(f"{PAGED}.run", {"q": MadeTensor((12, 8, 128))})
    merged = run.given(return_lse=True)
    assert "no run was recorded" in reason_of(GQA["prefill", 1], plan)
    assert "returns the LSE" in reason_of(GQA["prefill", 1], plan, merged)
    assert row_of(GQA["prefill", 1], plan, run)
    latent = latent_plan([3, 4], [3, 9], causal=True, prefill="ragged")
    assert "no run was recorded" in reason_of(MLA["prefill", 1], latent)


@pytest.mark.parametrize(
    ("spec", "plan"),
    [
        (GQA["prefill", 1], paged_plan([3, 4], [3, 9])),
        (GQA_RAGGED, ragged_plan([3, 4], [3, 9])),
        (MLA_RAGGED, latent_ragged_plan([3, 4])),
        (MLA["prefill", 1], latent_plan([3, 4], [3, 9], causal=True)),
    ],
    ids=["paged", "ragged", "mla ragged", "mla paged"],
)
def test_a_plan_without_a_mask_is_no_causal_prefill(spec: KernelSpec, plan: MadeCall) -> None:
    module = op_module(spec.op_type)
    assert row_of(spec, plan)
    implied = module.implied(plan)
    assert implied is not None
    assert (implied.name, implied.axes) == (spec.name, spec.axes)
    for causal in (False, "yes", 1):
        without = plan.given(causal=causal)
        assert f"causal is {causal!r}" in reason_of(spec, without)
        implied = module.implied(without)
        assert implied is None or implied.variant == "decode"


def test_queries_without_their_own_keys_are_not_masked() -> None:
    plan = paged_plan([5, 4], [3, 9])
    assert "1 of 2 sequences have fewer keys" in reason_of(GQA["prefill", 1], plan)
    assert row_of(GQA["prefill", 1], plan.given(causal=True))


# --- more than the definition --------------------------------------------------------------------

FLOAT8 = {"type": "torch.dtype", "value": "torch.float8_e4m3fn"}
BEYOND: list[tuple[dict[str, Any], str]] = [
    ({"logits_soft_cap": 30.0}, "logits_soft_cap is 30.0"),
    ({"logits_soft_cap": math.nan}, "logits_soft_cap is nan"),
    ({"window_left": 1023}, "window_left is 1023"),
    ({"pos_encoding_mode": "ROPE_LLAMA"}, "pos_encoding_mode is 'ROPE_LLAMA'"),
    ({"custom_mask": MadeTensor((12,), "bool")}, "custom_mask is a tensor [12]"),
    ({"prefix_len_ptr": whole([3])}, "prefix_len_ptr is a tensor [1]"),
    ({"q_data_type": FLOAT8}, "q_data_type is float8_e4m3fn, the definition has bfloat16"),
    ({"q_data_type": "float16"}, "q_data_type is float16, the definition has bfloat16"),
    ({"o_data_type": []}, "o_data_type is [], the definition has bfloat16"),
    ({"num_qo_heads": 16}, "num_qo_heads is 16, the definition has 8"),
    ({"num_kv_heads": 8}, "num_kv_heads is 8, the definition has 2"),
    ({"num_kv_heads": "2"}, "no integer 'num_kv_heads'"),
    ({"num_kv_heads": True}, "no integer 'num_kv_heads'"),
    ({"arg_8": "NONE"}, "arg_8 is no parameter"),
]


@pytest.mark.parametrize(("arguments", "reason"), BEYOND)
def test_a_plan_of_more_than_the_definition_is_rejected(
    arguments: dict[str, Any], reason: str
) -> None:
    plan = decode_plan([3, 4])
    assert row_of(GQA["decode", 1], plan.given(logits_soft_cap=0.0, window_left=-1, sinks=None))
    other = plan.given(**arguments)
    assert reason in reason_of(GQA["decode", 1], other)
    implied = op_module("gqa_paged").implied(other)
    assert implied is None or implied.axes != GQA["decode", 1].axes
    if arguments.keys() & {"num_qo_heads", "num_kv_heads", "arg_8"} == set():
        assert reason in reason_of(GQA["prefill", 1], paged_plan([3], [3]).given(**arguments))
        assert reason in reason_of(GQA_RAGGED, ragged_plan([3], [3]).given(**arguments))
        latent = latent_plan([1], [3], causal=False).given(**arguments)
        assert reason in reason_of(MLA["decode", 1], latent)


CACHE = {"type": "torch.Tensor", "shape": [1025, 2, 128], "dtype": "torch.bfloat16"}


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"k_scale": 0.5}, "k_scale is 0.5"),
        ({"v_scale": MadeTensor((1,), "float32")}, "v_scale is a tensor [1]"),
        ({"sinks": MadeTensor((8,), "float32")}, "sinks is a tensor [8]"),
        ({"window_left": 127}, "window_left is 127"),
        ({"arg_3__0": MadeTensor((1,))}, "arg_3__0 is no parameter"),
        ({"q": MadeTensor((3, 8, 128))}, "q is [3, 8, 128], expected [2, 8, 128]"),
        ({"q": MadeTensor((2, 16, 128))}, "q is [2, 16, 128], expected [2, 8, 128]"),
        ({"q": MadeTensor((2, 8, 128), "float16")}, "q is float16, the definition has bfloat16"),
        *(
            ({"paged_kv_cache": {"type": "tuple", "items": [{**CACHE, **changed}]}}, reason)
            for changed, reason in (
                ({"shape": [1025, 4, 128]}, "the KV cache is [1025, 4, 128]"),
                ({"shape": [1025, 2, 64]}, "the KV cache is [1025, 2, 64]"),
                ({"shape": [7, 2, 128]}, "a KV cache of 7 slots, slot 7 planned"),
                ({"shape": [True, 2, 128]}, "shape is [True, 2, 128]"),
                ({"shape": "many"}, "shape is 'many'"),
                ({"shape": []}, "shape is []"),
                ({"dtype": "torch.float8_e5m2"}, "the KV cache is float8_e5m2"),
            )
        ),
    ],
)
def test_a_run_of_more_than_the_definition_is_rejected(
    arguments: dict[str, Any], reason: str
) -> None:
    plan, run = decode_plan([3, 4]), decode_run(2)
    assert row_of(GQA["decode", 1], plan, run.given(k_scale=1.0, return_lse=True))
    assert reason in reason_of(GQA["decode", 1], plan, run.given(**arguments))


@pytest.mark.parametrize(
    ("spec", "plan", "shapes"),
    [
        (
            MLA["prefill", 1],
            latent_plan([3, 4], [3, 9], causal=True),
            {
                "q_nope": (7, 16, 512),
                "q_pe": (7, 16, 64),
                "ckv_cache": (1025, 1, 512),
                "kpe_cache": (1025, 1, 64),
            },
        ),
        (
            MLA_RAGGED,
            latent_ragged_plan([3, 4]),
            {"q": (7, 16, 192), "k": (7, 16, 192), "v": (7, 16, 128)},
        ),
        (
            GQA_RAGGED,
            ragged_plan([3, 4], [3, 9]),
            {"q": (7, 8, 128), "k": (12, 2, 128), "v": (12, 2, 128)},
        ),
    ],
    ids=["mla paged", "mla ragged", "gqa ragged"],
)
def test_a_run_has_the_shapes_that_the_plan_says(
    spec: KernelSpec, plan: MadeCall, shapes: dict[str, tuple[int, ...]]
) -> None:
    tensors = {name: MadeTensor(shape) for name, shape in shapes.items()}
    run = MadeCall(plan.name.replace(".plan", ".run"), tensors)
    assert row_of(spec, plan, run)
    for name, shape in shapes.items():
        wrong = (*shape[:-1], shape[-1] + 8)
        assert f"{name} is {list(wrong)}" in reason_of(
            spec, plan, run.given(**{name: MadeTensor(wrong)})
        )
        assert f"{name} is float16" in reason_of(
            spec, plan, run.given(**{name: MadeTensor(shape, "float16")})
        )


# --- latent attention ----------------------------------------------------------------------------


def test_latent_decode_has_one_query_of_each_sequence() -> None:
    row = row_of(MLA["decode", 1], latent_plan([1, 1], [3, 9], causal=False))
    assert row.axes == {"batch_size": 2, "len_indptr": 3, "num_kv_indices": 12, "num_pages": 13}
    assert {name: array.tolist() for name, array in row.tensors.items()} == {
        "kv_indptr": [0, 3, 12],
        "kv_indices": list(range(1, 13)),
    }
    assert row.scalars == {
        "sm_scale": Scalar(value=0.125, source=f"dumped: {LATENT}.plan sm_scale")
    }
    assert "4 queries of 2 sequences" in reason_of(
        MLA["decode", 1], latent_plan([1, 3], [3, 9], causal=False)
    )
    assert "causal is True, a decode has no mask" in reason_of(
        MLA["decode", 1], latent_plan([1, 1], [3, 9], causal=True)
    )


def test_latent_prefill_needs_evidence_where_ragged_is_planned() -> None:
    """It is planned for a cached prefix, which SGLang may then prefill as one ragged call."""
    plan, ragged = latent_plan([3, 4], [3, 9], causal=True), latent_ragged_plan([3, 4])
    assert NO_EVIDENCE in reason_of(MLA["prefill", 1], plan, ragged)
    run = MadeCall(f"{LATENT}.run", {"q_nope": MadeTensor((7, 16, 512))})
    row = row_of(MLA["prefill", 1], plan, ragged, run)
    assert row.axes == {"total_q": 7, "len_indptr": 3, "num_kv_indices": 12, "num_pages": 13}
    assert row.tensors["qo_indptr"].tolist() == [0, 3, 7]


def test_latent_lengths_are_those_of_the_offsets() -> None:
    plan = latent_plan([1, 1], [3, 9], causal=False).given(kv_len_arr=whole([3, 8]))
    assert "kv_len_arr is not what kv_indptr says" in reason_of(MLA["decode", 1], plan)


# --- scalars -------------------------------------------------------------------------------------


def test_scale_is_dumped_or_of_the_config() -> None:
    plan, spec = decode_plan([3, 4]), GQA["decode", 1]
    without = spec.model_copy(update={"scalars": {}})
    assert row_of(spec, plan).scalars == SCALE
    assert "neither in the dump nor from a model config" in reason_of(without, plan)
    assert row_of(without, plan.given(sm_scale=1)).scalars["sm_scale"].value == 1
    assert type(row_of(without, plan.given(sm_scale=1)).scalars["sm_scale"].value) is int
    rounded = float(np.float32(128**-0.5))
    assert row_of(spec, plan.given(sm_scale=rounded)).scalars["sm_scale"].value == rounded
    other = 128**-0.5 * (1 + 1e-6)
    assert f"sm_scale is {other!r}, the model config gives {128**-0.5!r}" in reason_of(
        spec, plan.given(sm_scale=other)
    )


@pytest.mark.parametrize(
    "scale", [math.nan, math.inf, -0.1, 0, 10**400, True, "0.1", [0.1], MadeTensor((1,))]
)
def test_impossible_scale_is_rejected(scale: Any) -> None:
    assert "sm_scale is" in reason_of(GQA["decode", 1], decode_plan([3]).given(sm_scale=scale))


# --- indices -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("indptr", "indices", "reason"),
    [
        ([0, 0], [1], "the KV is empty"),
        ([0, 2, 2], [1, 2], "1 of 2 sequences have no KV"),
        ([0, 3], [1, 2], "2 indices for 3 KV tokens"),
        ([0, 2, 1], [1, 2], "indptr is not a sequence of offsets"),
        ([1, 2], [1, 2], "indptr is not a sequence of offsets"),
        ([], [1, 2], "indptr is not a sequence of offsets"),
        # A difference in int32 would wrap around to 1.
        ([0, 2**31 - 1, -(2**31)], [1, 2], "indptr is not a sequence of offsets"),
        ([0, 2], [1, -1], "negative page index -1"),
    ],
)
@pytest.mark.parametrize("dtype", ["int32", "int64"])
def test_impossible_indices_are_rejected(
    indptr: list[int], indices: list[int], reason: str, dtype: str
) -> None:
    plan = decode_plan([3]).given(indptr=whole(indptr, dtype), indices=whole(indices, dtype))
    assert reason in reason_of(GQA["decode", 1], plan)


def test_indices_are_stored_as_int32_where_they_fit() -> None:
    plan = decode_plan([3])
    row = row_of(GQA["decode", 1], plan.given(indices=whole([5, 6, 7, 2**40], "int64")))
    assert row.tensors["kv_indices"].dtype == np.int32
    assert row.tensors["kv_indices"].tolist() == [5, 6, 7]
    wide = plan.given(indices=whole([5, 6, 2**40], "int64"))
    assert f"indices has values from 5 to {2**40}" in reason_of(GQA["decode", 1], wide)
    assert "indices is float32[3], not indices" in reason_of(
        GQA["decode", 1], plan.given(indices=whole([5, 6, 7], "float32"))
    )
    assert "no tensor 'indices'" in reason_of(GQA["decode", 1], plan.given(indices=None))


def test_prefill_indices_are_cut_to_the_offsets() -> None:
    row = row_of(GQA["prefill", 1], paged_plan([3, 4], [3, 9]))
    assert row.tensors["kv_indices"].tolist() == list(range(1, 13))
    assert row.axes == {"total_q": 7, "len_indptr": 3, "num_kv_indices": 12, "num_pages": 13}
    assert "2 query offsets, 3 KV offsets" in reason_of(GQA["prefill", 1], paged_plan([3], [3, 9]))
    assert "the query is empty" in reason_of(GQA["prefill", 1], paged_plan([0, 0], [3, 9]))


def test_recorded_page_size_64_is_exact() -> None:
    """A decode of four requests as SGLang laid them out with `--page-size 64`."""
    indices = [*range(64, 70), *range(128, 146), *range(192, 226), *range(256, 321)]
    row = row_of(GQA["decode", 64], decode_plan([6, 18, 34, 65]).given(indices=whole(indices)))
    assert {name: array.tolist() for name, array in row.tensors.items()} == {
        "kv_indptr": [0, 1, 2, 3, 5],
        "kv_indices": [1, 2, 3, 4, 5],
        "kv_last_page_len": [6, 18, 34, 1],
    }
    assert row.axes == {"batch_size": 4, "len_indptr": 5, "num_kv_indices": 5, "num_pages": 6}


@given(
    st.lists(st.integers(1, 300), min_size=1, max_size=6),
    st.sampled_from(["decode", "prefill"]),
    st.booleans(),
    st.randoms(use_true_random=False),
)
def test_page_rows_are_the_inverse_of_token_indices(
    lengths: list[int], stage: str, latent: bool, random: Any
) -> None:
    """Lay requests out on random pages of 64 as SGLang does; the rows must name those pages."""
    free = list(range(1, 100))
    random.shuffle(free)
    pages = [[free.pop() for _ in range(-(-length // 64))] for length in lengths]
    tokens = [
        slot
        for own, length in zip(pages, lengths, strict=True)
        for slot in [page * 64 + i for page in own for i in range(64)][:length]
    ]
    queries = [1 if stage == "decode" else min(length, 7) for length in lengths]
    if latent:
        spec, name = MLA[stage, 64], "kv_indices"
        plan = latent_plan(queries, lengths, causal=stage == "prefill")
    elif stage == "decode":
        spec, name, plan = GQA[stage, 64], "indices", decode_plan(lengths)
    else:
        spec, name, plan = GQA[stage, 64], "paged_kv_indices", paged_plan(queries, lengths)
    row = row_of(spec, plan.given(**{name: whole([*tokens, 3, 3])}))
    assert row.tensors["kv_indices"].tolist() == [page for own in pages for page in own]
    assert np.diff(row.tensors["kv_indptr"]).tolist() == [len(own) for own in pages]
    last = [length - 64 * (len(own) - 1) for own, length in zip(pages, lengths, strict=True)]
    assert row.tensors["kv_last_page_len"].tolist() == last
    assert row.axes["batch_size"] == len(lengths)
    shifted = whole([token + 1 for token in tokens])
    assert "not whole pages of 64" in reason_of(spec, plan.given(**{name: shifted}))


# --- norms and sampling --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"input": MadeTensor((5, 512), "float16")}, "input is float16"),
        ({"input": MadeTensor((5, 4, 512))}, "input has 3 dimensions, expected 2"),
        ({"input": MadeTensor((0, 512))}, "empty input"),
        ({"input": MadeTensor((5, 256))}, "hidden_size is 256, the definition has 512"),
        ({"weight": MadeTensor((512,), "float32")}, "weight is float32"),
        ({"weight": MadeTensor((1, 512))}, "weight is [1, 512], expected [512]"),
        ({"eps": 1e-6}, "eps is 1e-06, the definition has 1e-05"),
        ({"eps": None}, "the dump has no eps"),
        ({"eps": math.nan}, "eps is nan"),
        ({"eps": "small"}, "eps is 'small'"),
    ],
)
def test_another_norm_is_rejected(arguments: dict[str, Any], reason: str) -> None:
    assert row_of(NORM, rms_norm(out=None, enable_pdl=True)).axes == {"batch_size": 5}
    assert reason in reason_of(NORM, rms_norm(**arguments))


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"top_k": 50}, "top_k is 50 for all rows, the definition has one of each"),
        ({"top_p": 0.9}, "top_p is 0.9 for all rows, the definition has one of each"),
        ({"top_k": None}, "no tensor 'top_k'"),
        ({"top_k": whole([0, 1])}, "top_k has a 0"),
        ({"top_k": whole([50, 50], "int64")}, "top_k is int64, the definition has int32"),
        ({"top_k": whole([50])}, "top_k is [1], expected [2]"),
        ({"top_p": whole([0.9, 0.0], "float32")}, "top_p has a 0.0"),
        ({"top_p": whole([0.9, 1.5], "float32")}, "top_p has a 1.5"),
        ({"top_p": whole([0.9, math.nan], "float32")}, "top_p has a nan"),
        ({"top_p": whole([0.9, 0.9], "float64")}, "top_p is float64"),
        ({"indices": whole([0, 0])}, "indices is given"),
        ({"filter_apply_order": "top_p_first"}, "filter_apply_order is 'top_p_first'"),
        ({"filter_apply_order": []}, "filter_apply_order is []"),
        ({"probs": MadeTensor((2, 4096))}, "probs is bfloat16, the definition has float32"),
        ({"probs": MadeTensor((2, 100), "float32")}, "vocab_size is 100"),
        ({"probs": MadeTensor((0, 4096), "float32")}, "empty batch"),
        ({"probs": None}, "no two-dimensional tensor 'probs'"),
    ],
)
def test_another_sampling_is_rejected(arguments: dict[str, Any], reason: str) -> None:
    row = row_of(SAMPLING, sampling())
    assert {name: array.tolist() for name, array in row.tensors.items()} == {
        "top_k": [50, 1 << 30],
        "top_p": [np.float32(0.9), 1.0],
    }
    assert reason in reason_of(SAMPLING, sampling(**arguments))


# --- any arguments -------------------------------------------------------------------------------

EVERY = [
    (GQA["decode", 1], decode_plan([3, 4]), decode_run(2)),
    (GQA["prefill", 64], paged_plan([3, 4], [3, 9]), None),
    (GQA_RAGGED, ragged_plan([3, 4], [3, 9]), None),
    (MLA["decode", 1], latent_plan([1, 1], [3, 9], causal=False), None),
    (MLA_RAGGED, latent_ragged_plan([3, 4]), None),
    (NORM, rms_norm(), None),
    (SAMPLING, sampling(), None),
]
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)
ANY_TENSOR = st.builds(
    lambda shape, dtype: MadeTensor(tuple(shape), dtype, np.ones(shape, dtype)),
    st.lists(st.integers(0, 3), max_size=3),
    st.sampled_from(["int32", "int64", "uint8", "float32", "bool"]),
)


@given(st.sampled_from(EVERY), st.data())
def test_whatever_is_dumped_is_a_row_or_a_reason(
    every: tuple[KernelSpec, MadeCall, MadeCall | None], data: st.DataObject
) -> None:
    spec, call, run = every
    known = (*call.values, *call.tensors, "causal", "sm_scale", "head_dim_vo", "custom_mask")
    name = data.draw(st.sampled_from(known))
    odd = call.given(**{name: data.draw(ANYTHING | ANY_TENSOR)})
    calls = [odd]
    if run is not None:
        name = data.draw(st.sampled_from((*run.values, *run.tensors, "sinks")))
        calls.append(run.given(**{name: data.draw(ANYTHING | ANY_TENSOR)}))
    assert len(results(spec, *calls)) == 1
    op_module(spec.op_type).implied(odd)


@pytest.mark.parametrize("value", [0, -8, 1 << 40, 1.0, None])
def test_impossible_axes_imply_no_kernel(value: Any) -> None:
    assert op_module("gqa_paged").implied(decode_plan([3]).given(num_qo_heads=value)) is None


# --- what a session must do ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "prefill", "reads"),
    [
        (GQA["decode", 1], "", {"indptr", "indices"}),
        (GQA["prefill", 1], "paged", {"qo_indptr", "paged_kv_indptr", "paged_kv_indices"}),
        (GQA_RAGGED, "ragged", {"qo_indptr", "kv_indptr"}),
        (MLA["decode", 1], "", {"qo_indptr", "kv_indptr", "kv_indices", "kv_len_arr"}),
        (MLA["prefill", 1], "paged", {"qo_indptr", "kv_indptr", "kv_indices", "kv_len_arr"}),
        (MLA_RAGGED, "ragged", {"qo_indptr", "kv_indptr"}),
        (NORM, "", set()),
        (SAMPLING, "", {"top_k", "top_p"}),
    ],
)
def test_what_is_read_and_how_sglang_must_prefill(
    spec: KernelSpec, prefill: str, reads: set[str]
) -> None:
    api = op_module(spec.op_type).provider(spec)
    assert isinstance(api, FlashInferApi)
    assert (api.prefill, set(api.reads)) == (prefill, reads)


@pytest.mark.parametrize(("spec", "call", "run"), EVERY)
def test_rows_load_only_what_the_api_reads(
    spec: KernelSpec, call: MadeCall, run: MadeCall | None
) -> None:
    """Of everything else a reader need not keep the data."""
    api = op_module(spec.op_type).provider(spec)
    assert isinstance(api, FlashInferApi)
    bare = {
        name: given if name in api.reads else replace(given, data=None)
        for name, given in call.tensors.items()
    }
    found = results(spec, replace(call, tensors=bare), *([run] if run else []))
    assert Counter(type(result) for result in found).total() == 1
