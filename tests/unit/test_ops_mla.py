"""Multi-head latent attention."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from contextlib import suppress
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from tasks.errors import ConfigError
from tasks.model import Serving
from tasks.ops import op_module
from tasks.ops.base import FlashInferApi, KernelSpec, NotProduced
from tests.unit.families import (
    LATENT,
    YARN,
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
    from torch import Generator, Tensor


# --- names and axes ------------------------------------------------------------------------------

DEEPSEEK_V3 = {**LATENT, "num_attention_heads": 128, "rope_scaling": YARN}
KIMI_K2 = {**LATENT, "num_attention_heads": 64}


def variant_of(name: str) -> str:
    return "decode" if "_decode_" in name else "prefill"


@pytest.mark.parametrize("config", [DEEPSEEK_V3, KIMI_K2], ids=["deepseek-v3", "kimi-k2"])
def test_published_kernels_are_required_at_tp_8(config: dict[str, Any]) -> None:
    heads = f"_h{config['num_attention_heads'] // 8}_"
    found = {**specs("mla_paged", model(**config), 8), **specs("mla_ragged", model(**config), 8)}
    names = published_names("mla_paged") + published_names("mla_ragged")
    expected = {name for name in names if heads in name}
    assert expected <= set(found)
    assert len(found) == 5
    for name in expected:
        assert found[name].axes == constants(PUBLISHED[name])
        assert found[name].variant == variant_of(name)


def test_page_sizes_are_those_served() -> None:
    serving = Serving(tp=8, ep=1, origin="a test", page_sizes=(32,))
    found = list(op_module("mla_paged").required(model(**DEEPSEEK_V3), serving))
    assert [item.name for item in found if isinstance(item, KernelSpec)] == [
        "mla_paged_decode_h16_ckv512_kpe64_ps32",
        "mla_paged_prefill_causal_h16_ckv512_kpe64_ps32",
    ]


def test_heads_that_tp_does_not_divide_are_listed() -> None:
    for op_type in ("mla_paged", "mla_ragged"):
        (found,) = required(op_type, model(**DEEPSEEK_V3), tp=3)
        assert isinstance(found, NotProduced)
        assert found.reason == "tp=3 does not divide 128 heads"


@pytest.mark.parametrize("fields", [{}, {**LATENT, "index_topk": 2048}], ids=["gqa", "sparse"])
def test_other_attention_is_not_latent(fields: dict[str, Any]) -> None:
    for op_type in ("mla_paged", "mla_ragged"):
        assert required(op_type, model(**fields)) == []
        assert not op_module(op_type).mixes("full_attention", model(**fields))
        assert op_module(op_type).mixes("full_attention", model(**LATENT))
        assert not op_module(op_type).mixes("linear_attention", model(**LATENT))


def test_missing_dimension_is_named() -> None:
    config = model(**{key: value for key, value in LATENT.items() if key != "v_head_dim"})
    with pytest.raises(ConfigError, match="v_head_dim: missing"):
        required("mla_ragged", config)


@pytest.mark.parametrize(
    ("scaling", "expected"),
    [
        # What the published workloads of DeepSeek-V3 have.
        ({"rope_scaling": YARN}, 0.1352337747812271),
        ({}, 192**-0.5),
        ({"rope_scaling": {**YARN, "mscale_all_dim": 0}}, 192**-0.5),
        ({"rope_scaling": {**YARN, "factor": 1.0}}, 192**-0.5),
        ({"rope_scaling": {**YARN, "apply_yarn_scaling": False}}, 192**-0.5),
        ({"rope_parameters": {**YARN, "rope_type": "default"}}, 192**-0.5),
        # DeepSeek-V2-Lite.
        (
            {"rope_scaling": {**YARN, "mscale_all_dim": 0.707}},
            (0.1 * 0.707 * math.log(40) + 1) ** 2 / math.sqrt(192),
        ),
    ],
)
def test_softmax_scale(scaling: dict[str, Any], expected: float) -> None:
    for op_type in ("mla_paged", "mla_ragged"):
        for spec in specs(op_type, model(**LATENT, **scaling)).values():
            scale = spec.scalars["sm_scale"]
            assert scale.value == pytest.approx(expected, rel=1e-7)
            assert "128 + 64" in scale.source
            assert ("mscale^2" in scale.source) == (expected != 192**-0.5)


def test_server_flags_lead_to_the_kernel() -> None:
    found = specs("mla_paged", model(**LATENT), tp=8)
    flags = {}
    for name, spec in found.items():
        provider = op_module("mla_paged").provider(spec)
        assert isinstance(provider, FlashInferApi)
        flags[name] = provider.server_flags[1:]
    assert flags == {
        "mla_paged_decode_h1_ckv512_kpe64_ps1": (),
        "mla_paged_decode_h1_ckv512_kpe64_ps64": ("--page-size 64",),
        "mla_paged_prefill_causal_h1_ckv512_kpe64_ps1": ("--flashinfer-mla-disable-ragged",),
        "mla_paged_prefill_causal_h1_ckv512_kpe64_ps64": (
            "--flashinfer-mla-disable-ragged",
            "--page-size 64",
        ),
    }


# --- definitions ---------------------------------------------------------------------------------

NAMES = published_names("mla_paged") + published_names("mla_ragged")


@pytest.mark.parametrize("name", NAMES)
def test_definition_equals_the_published_one(name: str) -> None:
    check_against_published(name, variant_of(name))
    check_described(published_spec(name, variant_of(name)))


@pytest.mark.bench_extra
@pytest.mark.parametrize("name", NAMES)
def test_flashinfer_bench_accepts_the_definition(name: str) -> None:
    references.test_definition_is_accepted(published_spec(name, variant_of(name)))


@pytest.mark.bench_extra
def test_baseline_plans_lengths_in_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlashInfer's plan wants each sequence's tokens, and offsets of the queries at decode too."""
    planned: list[Tensor] = []

    class Wrapper:
        def __init__(self, workspace: Tensor) -> None:
            assert workspace.dtype == torch.uint8

        def plan(self, *tensors: Tensor, **options: Any) -> None:
            planned.extend(tensors)

        def run(self, *tensors: Tensor, return_lse: bool) -> None:
            assert return_lse

    fake = SimpleNamespace(mla=SimpleNamespace(BatchMLAPagedAttentionWrapper=Wrapper))
    monkeypatch.setitem(sys.modules, "flashinfer", fake)
    source = op_module("mla_paged").baseline(
        published_spec("mla_paged_decode_h16_ckv512_kpe64_ps64", "decode")
    )
    namespace: dict[str, Any] = {}
    exec(source, namespace)
    generator = references.seeded(24)
    cache = [references.random((n, CKV + KPE), generator) for n in references.KV_LENGTHS]
    query = references.random((len(cache), HEADS, CKV + KPE), generator)
    inputs = {**split_query([query]), **latent_cache(cache, 4, generator)}
    names = PUBLISHED["mla_paged_decode_h16_ckv512_kpe64_ps64"]["inputs"]
    namespace["run"](*(inputs[name] for name in names))
    offsets, indptr, indices, lengths = planned
    assert offsets.tolist() == list(range(len(cache) + 1))
    assert indptr is inputs["kv_indptr"]
    assert indices is inputs["kv_indices"]
    assert lengths.tolist() == list(references.KV_LENGTHS)
    assert {t.dtype for t in planned} == {torch.int32}


# --- references ----------------------------------------------------------------------------------

HEADS, CKV, KPE = 3, 32, 8


def paged(stage: str, page_size: int) -> KernelSpec:
    return KernelSpec(
        name=f"mla_paged_{stage}_h{HEADS}_ckv{CKV}_kpe{KPE}_ps{page_size}",
        op_type="mla_paged",
        variant=stage,
        axes={
            "num_qo_heads": HEADS,
            "head_dim_ckv": CKV,
            "head_dim_kpe": KPE,
            "page_size": page_size,
        },
    )


def latent_cache(cache: Sequence[Tensor], page_size: int, generator: Generator) -> dict[str, Any]:
    """Lay tokens [length, CKV + KPE] out in shuffled pages; what no sequence owns is NaN."""
    made = references.paged_cache(cache, cache, page_size, generator)
    both = made.pop("k_cache")
    del made["v_cache"]
    return {
        "ckv_cache": both[..., :CKV].contiguous(),
        "kpe_cache": both[..., CKV:].contiguous(),
        **made,
    }


def check_latent(
    got: tuple[Tensor, ...], queries: Sequence[Tensor], cache: Sequence[Tensor]
) -> None:
    """Compare with ordinary attention in which all query heads share one key and value head.

    The key is the whole cached vector, the value its compressed part.
    """
    keys = [tokens[:, None, :] for tokens in cache]
    references.check_attention(got, queries, keys, [key[..., :CKV] for key in keys])


def published_edits(name: str) -> dict[str, str]:
    heads = PUBLISHED[name]["axes"]["num_qo_heads"]["value"]
    return {
        f"num_qo_heads == {heads}": f"num_qo_heads == {HEADS}",
        "head_dim_ckv == 512": f"head_dim_ckv == {CKV}",
        "head_dim_kpe == 64": f"head_dim_kpe == {KPE}",
    }


def split_query(queries: Sequence[Tensor]) -> dict[str, Tensor]:
    both = torch.cat(list(queries))
    return {"q_nope": both[..., :CKV].contiguous(), "q_pe": both[..., CKV:].contiguous()}


@pytest.mark.bench_extra
@pytest.mark.parametrize("page_size", [1, 4])
def test_paged_decode(page_size: int) -> None:
    generator = references.seeded(21)
    cache = [references.random((n, CKV + KPE), generator) for n in references.KV_LENGTHS]
    queries = [references.random((1, HEADS, CKV + KPE), generator) for _ in cache]
    inputs = {**split_query(queries), **latent_cache(cache, page_size, generator)}
    got = references.run_reference(paged("decode", page_size), inputs)
    check_latent(got, queries, cache)
    name = f"mla_paged_decode_h16_ckv512_kpe64_ps{1 if page_size == 1 else 64}"
    edits = published_edits(name)
    if page_size > 1:
        edits["page_size == 64"] = f"page_size == {page_size}"
    assert_same(got, run_published(name, inputs, edits))


@pytest.mark.bench_extra
@pytest.mark.parametrize("longer_query", [False, True])
@pytest.mark.parametrize("page_size", [1, 4])
def test_paged_prefill(page_size: int, longer_query: bool) -> None:
    generator = references.seeded(22)
    lengths = references.LONGER_QUERY if longer_query else references.PREFILL_LENGTHS
    queries = [references.random((n, HEADS, CKV + KPE), generator) for n, _ in lengths]
    cache = [references.random((n, CKV + KPE), generator) for _, n in lengths]
    inputs = {
        **split_query(queries),
        "qo_indptr": references.indptr([n for n, _ in lengths]),
        **latent_cache(cache, page_size, generator),
    }
    got = references.run_reference(paged("prefill", page_size), inputs)
    check_latent(got, queries, cache)
    if longer_query:
        return  # The published reference gives NaN to a query that sees no key, ours gives 0.
    name = f"mla_paged_prefill_causal_h16_ckv512_kpe64_ps{1 if page_size == 1 else 64}"
    edits = published_edits(name)
    if page_size > 1:
        edits["page_size == 64"] = f"page_size == {page_size}"
    assert_same(got, run_published(name, inputs, edits))


@pytest.mark.bench_extra
@pytest.mark.parametrize("longer_query", [False, True])
def test_ragged(longer_query: bool) -> None:
    generator = references.seeded(23)
    lengths = references.LONGER_QUERY if longer_query else references.PREFILL_LENGTHS
    queries = [references.random((n, HEADS, 24), generator) for n, _ in lengths]
    keys = [references.random((n, HEADS, 24), generator) for _, n in lengths]
    values = [references.random((n, HEADS, 16), generator) for _, n in lengths]
    spec = KernelSpec(
        name="mla_ragged_prefill_causal_h3_qk24_vo16",
        op_type="mla_ragged",
        variant="prefill",
        axes={"num_qo_heads": HEADS, "num_kv_heads": HEADS, "qk_dim": 24, "vo_dim": 16},
    )
    inputs = {
        "q": torch.cat(queries),
        "k": torch.cat(keys),
        "v": torch.cat(values),
        "qo_indptr": references.indptr([n for n, _ in lengths]),
        "kv_indptr": references.indptr([n for _, n in lengths]),
        "sm_scale": references.SOFTMAX_SCALE,
    }
    got = references.run_reference(spec, inputs)
    references.check_attention(got, queries, keys, values)
    if longer_query:
        return  # As for the paged prefill.
    edits = {
        "num_qo_heads == 16": "num_qo_heads == 3",
        "num_kv_heads == 16": "num_kv_heads == 3",
        "qk_dim == 192": "qk_dim == 24",
        "vo_dim == 128": "vo_dim == 16",
    }
    name = "mla_ragged_prefill_causal_h16_qk192_vo128"
    assert_same(got, run_published(name, inputs, edits))
