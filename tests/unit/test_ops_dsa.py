"""DeepSeek sparse attention: the indexer and the attention over what it chose."""

from __future__ import annotations

import math
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import pytest

from tasks.ops import op_module
from tasks.ops.base import FlashInferApi, KernelSpec, NoKernel, NotProduced
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

INDEXER: dict[str, Any] = {"index_topk": 2048, "index_n_heads": 64, "index_head_dim": 128}
DEEPSEEK_V32 = {**LATENT, **INDEXER, "num_attention_heads": 128, "rope_scaling": YARN}


def variant_of(name: str) -> str:
    return "topk_indexer" if "indexer" in name else "sparse_attention"


def test_published_kernels_are_exactly_those_of_deepseek_v32_at_tp_8() -> None:
    found = specs("dsa_paged", model(**DEEPSEEK_V32), tp=8)
    assert set(found) == set(published_names("dsa_paged"))
    for name, spec in found.items():
        assert spec.axes == constants(PUBLISHED[name])
        assert spec.variant == variant_of(name)
        if spec.variant == "sparse_attention":
            assert spec.scalars["sm_scale"].value == pytest.approx(0.1352337747812271, rel=1e-7)


def test_indexer_is_not_sharded() -> None:
    assert "dsa_topk_indexer_fp8_h64_d128_topk2048_ps64" in specs(
        "dsa_paged", model(**DEEPSEEK_V32), tp=16
    )
    indexer, attention = required("dsa_paged", model(**DEEPSEEK_V32), tp=3)
    assert isinstance(indexer, KernelSpec)
    assert indexer.tp == ()
    assert isinstance(attention, NotProduced)
    assert attention.reason == "tp=3 does not divide 128 heads"


def test_index_keys_of_another_size_have_no_cache() -> None:
    indexer, *attention = required("dsa_paged", model(**{**DEEPSEEK_V32, "index_head_dim": 64}))
    assert isinstance(indexer, NotProduced)
    assert indexer.reason.startswith("index_head_dim is 64")
    assert len(attention) == 2


def test_models_without_an_indexer_or_a_latent_cache() -> None:
    module = op_module("dsa_paged")
    assert required("dsa_paged", model(**LATENT)) == []
    assert not module.mixes("full_attention", model(**LATENT))
    assert module.mixes("full_attention", model(**DEEPSEEK_V32))
    assert required("dsa_paged", model(**INDEXER)) == []
    assert not module.mixes("full_attention", model(**INDEXER))


def test_who_runs_them() -> None:
    module, found = op_module("dsa_paged"), specs("dsa_paged", model(**DEEPSEEK_V32), tp=8)
    for spec in found.values():
        provider = module.provider(spec)
        assert module.baseline(spec) is None
        if spec.variant == "topk_indexer":
            assert isinstance(provider, NoKernel)
            assert provider.sglang_file.endswith("dsa_indexer.py")
        else:
            assert isinstance(provider, FlashInferApi)
            assert f"fi_api:{provider.path}" in PUBLISHED[spec.name]["tags"]


@pytest.mark.parametrize("name", published_names("dsa_paged"))
def test_definition_equals_the_published_one(name: str) -> None:
    check_against_published(name, variant_of(name))
    check_described(published_spec(name, variant_of(name)))


@pytest.mark.bench_extra
@pytest.mark.parametrize("name", published_names("dsa_paged"))
def test_flashinfer_bench_accepts_the_definition(name: str) -> None:
    references.test_definition_is_accepted(published_spec(name, variant_of(name)))


# --- references ----------------------------------------------------------------------------------

HEADS, CKV, KPE, TOPK = 3, 32, 8, 6


def chosen_tokens(total: int, generator: Generator) -> list[list[int]]:
    """For each query the tokens it attends to: none, one, some, and as many as fit."""
    return [torch.randperm(total, generator=generator)[:n].tolist() for n in (0, 1, 4, TOPK, 5)]


@pytest.mark.bench_extra
@pytest.mark.parametrize("page_size", [1, 4])
def test_sparse_attention(page_size: int) -> None:
    generator = references.seeded(31)
    pages = 24 // page_size
    chosen = chosen_tokens(24, generator)
    indices = torch.full((len(chosen), TOPK), -1, dtype=torch.int32)
    for row, tokens in zip(indices, chosen, strict=True):
        # Padding is found by its value, wherever it stands.
        places = torch.randperm(TOPK, generator=generator)[: len(tokens)]
        row[places] = torch.tensor(tokens, dtype=torch.int32)
    inputs = {
        "q_nope": references.random((len(chosen), HEADS, CKV), generator),
        "q_pe": references.random((len(chosen), HEADS, KPE), generator),
        "ckv_cache": references.random((pages, page_size, CKV), generator),
        "kpe_cache": references.random((pages, page_size, KPE), generator),
        "sparse_indices": indices,
        "sm_scale": references.SOFTMAX_SCALE,
    }
    axes = {
        "num_qo_heads": HEADS,
        "head_dim_ckv": CKV,
        "head_dim_kpe": KPE,
        "page_size": page_size,
        "topk": TOPK,
    }
    spec = KernelSpec(
        name="dsa_sparse_attention_small",
        op_type="dsa_paged",
        variant="sparse_attention",
        axes=axes,
    )
    got = references.run_reference(spec, inputs)

    # Ordinary attention over the chosen tokens, gathered one by one: one query at the end of each.
    query = torch.cat([inputs["q_nope"], inputs["q_pe"]], dim=-1)
    cache = [
        (inputs["ckv_cache"][t // page_size, t % page_size], t) for t in range(pages * page_size)
    ]
    keys = []
    for tokens in chosen:
        vectors = [
            torch.cat([cache[t][0], inputs["kpe_cache"][t // page_size, t % page_size]])
            for t in sorted(tokens)
        ]
        keys.append(torch.stack(vectors)[:, None] if vectors else query.new_zeros(0, 1, CKV + KPE))
    references.check_attention(got, query.split(1), keys, [key[..., :CKV] for key in keys])

    name = f"dsa_sparse_attention_h16_ckv512_kpe64_topk2048_ps{1 if page_size == 1 else 64}"
    edits = {
        "num_qo_heads == 16": f"num_qo_heads == {HEADS}",
        "head_dim_ckv == 512": f"head_dim_ckv == {CKV}",
        "head_dim_kpe == 64": f"head_dim_kpe == {KPE}",
        "topk == 2048": f"topk == {TOPK}",
    }
    if page_size > 1:
        edits["page_size == 64"] = f"page_size == {page_size}"
    assert_same(got, run_published(name, inputs, edits))


INDEX_HEADS, INDEX_DIM, INDEX_PAGE, INDEX_TOPK = 4, 128, 64, 40
SEQUENCES = (0, 1, 40, 41, 64, 130)
"""Nothing cached, fewer tokens than are chosen, as many, more; a page exactly, several pages."""


def index_cache(pages: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """Make random index keys; return them dequantised, and the bytes of the cache."""
    values = references.random((pages, INDEX_PAGE, INDEX_DIM), generator, "float8_e4m3fn")
    scales = 0.1 + torch.rand(pages, INDEX_PAGE, generator=generator)
    data = [
        torch.cat([page.contiguous().view(torch.uint8).flatten(), scale.view(torch.uint8)])
        for page, scale in zip(values, scales, strict=True)
    ]
    packed = torch.stack(data).view(torch.int8)
    shape = (pages, INDEX_PAGE, 1, INDEX_DIM + 4)
    return values.double() * scales.double()[..., None], packed.reshape(shape)


@pytest.mark.bench_extra
def test_topk_indexer() -> None:
    generator = references.seeded(32)
    widest = math.ceil(max(SEQUENCES) / INDEX_PAGE)
    pages = len(SEQUENCES) * widest
    keys, packed = index_cache(pages, generator)
    table = torch.randperm(pages, generator=generator).reshape(len(SEQUENCES), widest)
    inputs = {
        "q_index_fp8": references.random(
            (len(SEQUENCES), INDEX_HEADS, INDEX_DIM), generator, "float8_e4m3fn"
        ),
        "k_index_cache_fp8": packed,
        # Weights of both signs: a token with all scores below zero is not the worst.
        "weights": references.random((len(SEQUENCES), INDEX_HEADS), generator, "float32"),
        "seq_lens": torch.tensor(SEQUENCES, dtype=torch.int32),
        "block_table": table.to(torch.int32),
    }
    spec = KernelSpec(
        name="dsa_topk_indexer_small",
        op_type="dsa_paged",
        variant="topk_indexer",
        axes={
            "num_index_heads": INDEX_HEADS,
            "index_head_dim": INDEX_DIM,
            "page_size": INDEX_PAGE,
            "topk": INDEX_TOPK,
            "kv_cache_num_heads": 1,
            "head_dim_with_scale": INDEX_DIM + 4,
        },
    )
    (got,) = references.run_reference(spec, inputs)

    for row, length in enumerate(SEQUENCES):
        score: dict[int, float] = {}
        for position in range(length):
            page, offset = int(table[row, position // INDEX_PAGE]), position % INDEX_PAGE
            scores = inputs["q_index_fp8"][row].double() @ keys[page, offset]
            weighted = zip(scores.tolist(), inputs["weights"][row].double().tolist(), strict=True)
            score[page * INDEX_PAGE + offset] = sum(max(s, 0.0) * w for s, w in weighted)
        count = min(length, INDEX_TOPK)
        chosen = got[row, :count].tolist()
        assert (got[row, count:] == -1).all()
        assert len(set(chosen)) == count
        assert set(chosen) <= set(score)
        # The order is free, and float32 may swap scores this close at the edge of the choice.
        best = sorted(score.values(), reverse=True)[:count]
        assert sorted((score[t] for t in chosen), reverse=True) == pytest.approx(best, abs=1e-4)

    edits = {"num_index_heads == 64": f"num_index_heads == {INDEX_HEADS}"}
    edits["topk = 2048"] = f"topk = {INDEX_TOPK}"
    (theirs,) = run_published("dsa_topk_indexer_fp8_h64_d128_topk2048_ps64", inputs, edits)
    assert torch.equal(got.sort(dim=1).values, theirs.sort(dim=1).values)
