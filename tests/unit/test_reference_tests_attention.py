"""The attention families' reference tests: right references pass and wrong ones fail."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

from tasks.define.reference_test import render
from tasks.define.repair import finish
from tasks.ops import op_module
from tasks.ops.base import Json, KernelSpec
from tests.unit.families import constants, published_names
from tests.unit.test_ops import PUBLISHED

pytest.importorskip("torch")

pytestmark = pytest.mark.bench_extra

FAMILIES = ("gqa_paged", "gqa_ragged", "mla_paged", "mla_ragged", "dsa_paged")
NAMES = [name for family in FAMILIES for name in published_names(family)]


def spec_of(name: str, **axes: int) -> KernelSpec:
    """The spec of a published definition, with other const axes."""
    published = PUBLISHED[name]
    module = op_module(published["op_type"])
    spec = module.spec_of(published)
    sizes = {**constants(published), **axes}
    return spec.model_copy(update={"name": module.name_of(spec.variant, sizes), "axes": sizes})


def rendered(spec: KernelSpec, root: Path, reference: str | None = None) -> ModuleType:
    """Write definition and test as the dataset has them; return the test, imported.

    With `reference`, the definition has this one instead of its own.
    """
    module = op_module(spec.op_type)
    definition: Json = finish(module.definition(spec), spec, module.provider(spec), "a-model")
    if reference is not None:
        definition["reference"] = reference
    path = root / "definitions" / spec.op_type / f"{spec.name}.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(definition))
    test = root / "tests" / "references" / f"test_{spec.name}.py"
    test.parent.mkdir(parents=True)
    test.write_text(render(spec))
    found = importlib.util.spec_from_file_location(test.stem, test)
    assert found is not None
    assert found.loader is not None
    loaded = importlib.util.module_from_spec(found)
    found.loader.exec_module(loaded)
    return loaded


def run(test: ModuleType) -> None:
    for case in test.CASES:
        test.test_reference_is_the_independent_computation(case)


@pytest.mark.parametrize("name", NAMES)
def test_reference_passes_at_its_published_size(name: str, tmp_path: Path) -> None:
    run(rendered(spec_of(name), tmp_path))


@pytest.mark.parametrize("name", NAMES)
def test_published_reference_passes(name: str, tmp_path: Path) -> None:
    run(rendered(spec_of(name), tmp_path, PUBLISHED[name]["reference"]))


@pytest.mark.parametrize(
    ("name", "axes"),
    [
        ("mla_paged_decode_h16_ckv512_kpe64_ps64", {"num_qo_heads": 128}),
        ("mla_paged_prefill_causal_h16_ckv512_kpe64_ps64", {"num_qo_heads": 128}),
        ("mla_ragged_prefill_causal_h16_qk192_vo128", {"num_qo_heads": 128, "num_kv_heads": 128}),
        ("dsa_sparse_attention_h16_ckv512_kpe64_topk2048_ps64", {"num_qo_heads": 128}),
        ("gqa_paged_prefill_causal_h32_kv8_d128_ps64", {"page_size": 16, "head_dim": 64}),
    ],
)
def test_reference_passes_at_another_size(name: str, axes: dict[str, int], tmp_path: Path) -> None:
    run(rendered(spec_of(name, **axes), tmp_path))


# Each variant, and what its reference may get wrong: a text of it -> another.
GQA_WRONG = {
    "unscaled": (" * sm_scale", ""),
    "scale of the dimension": ("* sm_scale", "* head_dim**-0.5"),
    "natural logarithm": (" / math.log(2.0)", ""),
    "last key hidden": ("+ 1 + k_b.shape[0]", "+ k_b.shape[0]"),
    "not causal": ("~visible[:, None, :]", "torch.zeros_like(visible)[:, None, :]"),
    "heads interleaved": (
        "k_b.repeat_interleave(num_qo_heads // num_kv_heads, dim=1)",
        "k_b.repeat(1, num_qo_heads // num_kv_heads, 1)",
    ),
    "window of 128": (
        "< lengths[:, None]\n",
        "< lengths[:, None]\n        visible = visible.triu(k_b.shape[0] - q_b.shape[0] - 127)\n",
    ),
}
NEXT_KEY = {"next key seen": ("+ 1 + k_b.shape[0]", "+ 2 + k_b.shape[0]")}
FROM_THE_START = {"aligned at the start": (" + k_b.shape[0] - q_b.shape[0]", "")}
# A decode's one query sees every key in any case.
DECODE_WRONG = {wrong: GQA_WRONG[wrong] for wrong in GQA_WRONG if wrong != "not causal"}
PAGES_WRONG = {
    "first pages": ("kv_indices[first_page:end_page]", "kv_indices[: end_page - first_page]")
}
LAST_PAGE_WRONG = {
    "whole last page": ("+ int(kv_last_page_len[b])", "+ page_size"),
    "one token less": ("+ int(kv_last_page_len[b])", "+ int(kv_last_page_len[b]) - 1"),
    "no full pages": ("(pages.shape[0] - 1) * page_size +", "0 +"),
}
MLA_WRONG = {
    "unscaled": ("        logits *= sm_scale\n", ""),
    "natural logarithm": (" / math.log(2.0)", ""),
    "no rotary part": ("logits += ", "_ = "),
}
CAUSAL_WRONG = {
    "not causal": ("~visible.tril(keys - queries)", "~visible"),
    "next key seen": ("tril(keys - queries)", "tril(keys - queries + 1)"),
    "aligned at the start": ("tril(keys - queries)", "tril()"),
    "window of 128": ("tril(keys - queries)", "tril(keys - queries).triu(keys - queries - 127)"),
}
SPARSE_WRONG = {
    **MLA_WRONG,
    "filling read": (" != -1]", " != -2]"),
    "one chosen token left out": (" != -1]", " != -1][:-1]"),
    "nothing chosen is not 0": ("torch.zeros_like(q_nope)", "torch.ones_like(q_nope)"),
}
WRONG = {
    "gqa_paged_decode_h32_kv8_d128_ps1": {**DECODE_WRONG, **PAGES_WRONG},
    "gqa_paged_decode_h32_kv8_d128_ps64": {**DECODE_WRONG, **PAGES_WRONG, **LAST_PAGE_WRONG},
    "gqa_paged_prefill_causal_h32_kv8_d128_ps1": {
        **GQA_WRONG,
        **NEXT_KEY,
        **FROM_THE_START,
        **PAGES_WRONG,
    },
    "gqa_paged_prefill_causal_h32_kv8_d128_ps64": {
        **GQA_WRONG,
        **NEXT_KEY,
        **FROM_THE_START,
        **LAST_PAGE_WRONG,
    },
    "gqa_ragged_prefill_causal_h32_kv8_d128": {
        **GQA_WRONG,
        **NEXT_KEY,
        **FROM_THE_START,
    },
    "mla_paged_decode_h16_ckv512_kpe64_ps1": {**MLA_WRONG, **PAGES_WRONG},
    "mla_paged_decode_h16_ckv512_kpe64_ps64": {**MLA_WRONG, **LAST_PAGE_WRONG},
    "mla_paged_prefill_causal_h16_ckv512_kpe64_ps1": {**MLA_WRONG, **CAUSAL_WRONG, **PAGES_WRONG},
    "mla_paged_prefill_causal_h16_ckv512_kpe64_ps64": {
        **MLA_WRONG,
        **CAUSAL_WRONG,
        **LAST_PAGE_WRONG,
    },
    "mla_ragged_prefill_causal_h16_qk192_vo128": {
        **CAUSAL_WRONG,
        "unscaled": (" * sm_scale", ""),
        "natural logarithm": (" / math.log(2.0)", ""),
    },
    "dsa_sparse_attention_h16_ckv512_kpe64_topk2048_ps1": SPARSE_WRONG,
    "dsa_sparse_attention_h16_ckv512_kpe64_topk2048_ps64": SPARSE_WRONG,
    "dsa_topk_indexer_fp8_h64_d128_topk2048_ps64": {
        "unscaled keys": (" * scales.reshape(-1, 1)", ""),
        "scale after each key": (
            "data = pages.view(torch.uint8).flatten(1)",
            "data = pages.view(torch.uint8).split(head_dim, dim=-1)\n"
            "    data = torch.cat([part.flatten(1) for part in data], dim=1)",
        ),
        "scores below zero count": ("torch.relu(", "("),
        "heads weigh the same": ("weights[b] @ scores", "scores.sum(dim=0)"),
        "the last page whole": ("index_head_dim)[:length]", "index_head_dim)"),
        "one token too few": ("min(topk, length)", "min(topk, length) - 1"),
        "the worst": ("min(topk, length))", "min(topk, length), largest=False)"),
        "positions, not places in the cache": ("table[best // page_size]", "(best // page_size)"),
    },
}


def test_every_variant_has_its_errors() -> None:
    def kinds(names: list[str]) -> set[tuple[str, str, bool]]:
        specs = [spec_of(name) for name in names]
        return {(s.op_type, s.variant, s.axes.get("page_size", 1) == 1) for s in specs}

    assert kinds(list(WRONG)) == kinds(NAMES)


@pytest.mark.parametrize(
    ("name", "wrong"), [(name, wrong) for name in WRONG for wrong in WRONG[name]]
)
def test_wrong_reference_fails(name: str, wrong: str, tmp_path: Path) -> None:
    spec, (right, replacement) = spec_of(name), WRONG[name][wrong]
    reference = op_module(spec.op_type).definition(spec)["reference"]
    assert right in reference
    test = rendered(spec, tmp_path, reference.replace(right, replacement))
    with pytest.raises(AssertionError):
        run(test)
