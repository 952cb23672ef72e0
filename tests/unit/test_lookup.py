"""Where an API, an op type or a model lives, on the real packages of the sample."""

from __future__ import annotations

import json
from typing import ClassVar

import pytest

from tasks.discover.inventory import Sources
from tasks.discover.lookup import Lookup, render
from tasks.discover.sources import (
    Api,
    FlashInferIndex,
    ServerFlag,
    SglangIndex,
    Site,
    Template,
)
from tasks.errors import InputError
from tasks.ops.base import FlashInferApi

SHAS = {"flashinfer": "aaaaaaa", "sglang": "bbbbbbb"}


@pytest.fixture(scope="module")
def lookup(indexes: Sources) -> Lookup:
    return Lookup(indexes.flashinfer, indexes.sglang, SHAS)


@pytest.mark.parametrize("name", ["flashinfer.rmsnorm", "flashinfer.norm.rmsnorm"])
def test_an_api_by_any_of_its_paths(lookup: Lookup, name: str) -> None:
    places = lookup.api(name)
    assert (places.matched_by, places.flashinfer, places.sglang) == ("path", "aaaaaaa", "bbbbbbb")
    (api,) = places.apis
    assert (api.public, api.defined) == ("flashinfer.rmsnorm", "flashinfer.norm.rmsnorm")
    assert api.file == "flashinfer/norm/__init__.py"
    assert (api.has_template, api.op_types, api.dump) == (True, ["rmsnorm"], "rmsnorm")
    assert [template.name for template in api.templates] == ["rmsnorm_h{hidden_size}"]
    assert api.tests == []  # The sample is a wheel's content, which has no tests.
    (sites,) = api.call_sites.values()
    assert list(api.call_sites) == ["flashinfer.norm.rmsnorm"]
    assert {site.via for site in sites} == {"sgl-kernel/python/sgl_kernel/elementwise.py:120"}
    assert "python/sglang/srt/layers/layernorm.py" in {site.file for site in sites}
    assert "python/sglang/srt/layers" in api.layer_folders


def test_names_come_before_parts_of_paths(lookup: Lookup) -> None:
    places = lookup.api("merge_state")
    assert (places.matched_by, [api.dump for api in places.apis]) == ("name", ["merge_state"])
    places = lookup.api("MERGE_STATE")
    names = ["merge_state", "merge_state_in_place", "merge_states"]
    assert places.matched_by == "part of the path"
    assert [api.dump for api in places.apis] == names


def test_a_class_stands_for_its_methods(lookup: Lookup) -> None:
    name = "BatchMLAPagedAttentionWrapper"
    for query, matched_by in ((name, "name"), (f"flashinfer.mla.{name}", "path")):
        places = lookup.api(query)
        assert places.matched_by == matched_by
        assert {api.dump for api in places.apis} == {
            f"{name}.{method}" for method in ("__init__", "plan", "run")
        }
    (run,) = lookup.api(f"{name}.run").apis
    sites = [site for found in run.call_sites.values() for site in found if site.kind == "call"]
    backend = "python/sglang/srt/layers/attention/flashinfer_mla_backend.py"
    assert {site.file for site in sites} == {backend}
    assert [site.line for site in sites] == [281, 287, 292, 330, 353]
    assert "--attention-backend flashinfer" in {flag.flag for flag in run.server_flags}
    assert all(flag.known for flag in run.server_flags)


def test_unknown_names_are_answered_with_close_ones(lookup: Lookup) -> None:
    with pytest.raises(InputError, match=r"'rmsnrm'; did you mean rmsnorm, "):
        lookup.api("rmsnrm")
    with pytest.raises(InputError, match=r"did you mean .*BatchDecodeWithPagedKVCacheWrapper"):
        lookup.api("flashinfer.decode.BatchDecodeWithPagedCacheWrapper")
    with pytest.raises(InputError, match=r"'gqa'; did you mean gqa_paged"):
        lookup.op_type("gqa")
    with pytest.raises(InputError, match=r"did you mean .*Qwen3MoeForCausalLM"):
        lookup.model("Qwen3MoForCausalLM")
    for ask in (lookup.api, lookup.op_type, lookup.model):
        with pytest.raises(InputError):
            ask("")


def test_op_types_of_the_dataset_and_of_flashinfer(lookup: Lookup) -> None:
    places = lookup.op_type("cascade_merge")
    assert places.matched_by == "FlashInfer's trace op type"
    names = ["merge_state", "merge_state_in_place", "merge_states"]
    assert [api.dump for api in places.apis] == names
    both = lookup.op_type("gqa_paged")
    assert both.matched_by == "the dataset's op type and FlashInfer's trace op type"
    dumps = [api.dump for api in both.apis]
    assert dumps[:2] == [
        "BatchDecodeWithPagedKVCacheWrapper.run",
        "BatchPrefillWithPagedKVCacheWrapper.run",
    ]
    assert "run" in dumps  # BatchAttention.run, which no op module uses
    torch_only = lookup.op_type("gemm")
    assert torch_only.apis == []
    assert torch_only.notes == ["op type gemm is not run by a FlashInfer API"]


def test_models_by_class_and_by_file(lookup: Lookup) -> None:
    places = lookup.model("Phi3ForCausalLM")
    (model,) = places.models
    assert (places.matched_by, model.file) == (
        "architecture",
        "python/sglang/srt/models/llama.py",
    )
    # The four classes of llama.py are known.
    assert model.same_file == ["IQuestCoderForCausalLM", "InternLM3ForCausalLM", "LlamaForCausalLM"]
    assert "python/sglang/srt/layers/radix_attention.py" in model.layers
    assert "python/sglang/srt/layers" in model.layer_folders
    for query in ("llama", "llama.py"):
        by_file = lookup.model(query)
        assert by_file.matched_by == "model file"
        assert len(by_file.models) == 4
    (gpt_oss,) = lookup.model("GptOssForCausalLM").models
    ((site,),) = gpt_oss.call_sites.values()
    assert (site.file, site.line) == ("python/sglang/srt/models/gpt_oss.py", 160)
    assert lookup.model("phi3forcausal").matched_by == "part of the name"


def test_answers_are_json_of_one_shape(lookup: Lookup) -> None:
    answers = [lookup.api("rmsnorm"), lookup.op_type("gemm"), lookup.model("llama")]
    plain = [answer.as_dict() for answer in answers]
    assert json.loads(json.dumps(plain)) == plain
    keys = {"query", "matched_by", "flashinfer", "sglang", "apis", "models", "notes"}
    assert all(set(answer) == keys for answer in plain)


# Text, on indexes made by hand


class _Module:
    apis: ClassVar = (
        FlashInferApi(
            path="flashinfer.Wrapper",
            method="run",
            dumps=("Wrapper.run",),
            server_flags=("--kind fast", "--kind gone", "--missing", "--x 1"),
            sglang_layer="python/sglang/srt/layers/a.py",
        ),
        FlashInferApi(path="flashinfer.gone", dumps=("gone",)),
    )


@pytest.fixture
def small() -> Lookup:
    flag = ServerFlag(choices=["fast"])
    old = ServerFlag(deprecated=True, instead="--kind")
    apis = {
        "flashinfer.m.Wrapper.run": Api(
            file="flashinfer/m.py",
            line=7,
            has_template=True,
            public="flashinfer.Wrapper.run",
            dump="Wrapper.run",
            templates=[Template("kind", f"p{i}", f"p{i}_h{{h}}") for i in range(8)],
            tests=["tests/test_m.py"],
        ),
        "flashinfer.m.f": Api(
            file="flashinfer/m.py", line=9, has_template=True, public="flashinfer.m.f", dump="f"
        ),
    }
    return Lookup(
        FlashInferIndex(apis=apis, exports={"flashinfer.Wrapper": "flashinfer.m.Wrapper"}),
        SglangIndex(
            sites={
                "flashinfer.Wrapper": [Site("l/b.py", 3, "call"), Site("l/b.py", 1, "mention")],
                "flashinfer.m.Wrapper.plan": [Site("l/c.py", 5, "call", "k/e.py:2")],
            },
            architectures={"A": "models/a.py"},
            model_layers={},
            flags={"--kind": flag, "--x": old},
            attention_backends={"x": ["l/b.py"]},
        ),
        SHAS,
        {"dataset_kind": _Module()},  # type: ignore[dict-item]
    )


def test_text(small: Lookup) -> None:
    assert render(small.op_type("dataset_kind")) == (
        "FlashInfer aaaaaaa, SGLang bbbbbbb\n"
        "dataset_kind: 1 found by the dataset's op type\n"
        "note: this FlashInfer has no flashinfer.gone\n"
        "\n"
        "flashinfer.Wrapper.run\n"
        "  defined   flashinfer/m.py:7  flashinfer.m.Wrapper.run  @flashinfer_api\n"
        "  template  kind: p0_h{h}\n"
        "            kind: p1_h{h}\n"
        "            kind: p2_h{h}\n"
        "            kind: p3_h{h}\n"
        "            kind: p4_h{h}\n"
        "            kind: p5_h{h}\n"
        "              and 2 more\n"
        "  dumped as Wrapper.run\n"
        "  tests     tests/test_m.py\n"
        "  called    flashinfer.Wrapper\n"
        "              l/b.py:3\n"
        "              l/b.py:1  (mention)\n"
        "            flashinfer.m.Wrapper.plan\n"
        "              l/c.py:5  via k/e.py:2\n"
        "  layers    l\n"
        "  op type   dataset_kind\n"
        "  flag      --kind fast  (op module dataset_kind)\n"
        "            --kind gone  (op module dataset_kind; not in this SGLang)\n"
        "            --missing  (op module dataset_kind; not in this SGLang)\n"
        "            --x 1  (op module dataset_kind; deprecated, use --kind)\n"
        "            --attention-backend x  (SGLang's attention registry: l/b.py; "
        "not in this SGLang)\n"
    )
    assert render(small.api("f")) == (
        "FlashInfer aaaaaaa, SGLang bbbbbbb\n"
        "f: 1 found by name\n"
        "\n"
        "flashinfer.m.f\n"
        "  defined   flashinfer/m.py:9  flashinfer.m.f  @flashinfer_api\n"
        "  template  made at run time\n"
        "  dumped as f\n"
        "  tests     none in this tree\n"
        "  called    nowhere in SGLang\n"
    )
    assert render(small.model("a")) == (
        "FlashInfer aaaaaaa, SGLang bbbbbbb\n"
        "a: 1 found by model file\n"
        "\n"
        "A\n"
        "  file      models/a.py\n"
    )
