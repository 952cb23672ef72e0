"""The source indexes against tables made by other programs, for two versions of each package.

Where they differ, the source was read; each difference is named here with what it says.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tasks.discover.sources import FlashInferIndex, SglangIndex, index_flashinfer, index_sglang
from tasks.repos.sample import download

TABLES = Path(__file__).parents[1] / "data" / "reference"


@dataclass(frozen=True)
class Pair:
    """FlashInfer and the SGLang that pins it, under the versions the tables are named by."""

    flashinfer: str
    sglang: str
    apis: FlashInferIndex
    uses: SglangIndex

    def defined(self, path: str) -> str:
        return self.apis.resolve(path)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


@pytest.fixture(scope="session", params=["0.5.17", "0.5.23"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """The older pair laid out as the repositories are, the newer as unpacked wheels."""
    if request.param == "0.5.17":
        indexes = request.getfixturevalue("indexes")
        return Pair("0.6.15", "0.5.17", indexes.flashinfer, indexes.sglang)
    tree = tmp_path_factory.mktemp("wheels")
    for folder in ("sglang/srt", "sglang/kernels"):
        source = download("sglang", "0.5.23") / folder
        shutil.copytree(source, tree / folder, copy_function=_link)
    kernel = download("sglang-kernel", "0.4.5") / "sgl_kernel"
    shutil.copytree(kernel, tree / "sgl_kernel", copy_function=_link)
    apis = index_flashinfer(download("flashinfer-python", "0.7.2.post1"))
    return Pair("0.7.2", "0.5.23", apis, index_sglang(tree))


# FlashInfer's APIs


@dataclass(frozen=True)
class Row:
    place: str
    experimental: bool
    op_types: str = ""
    names: tuple[str, ...] = ()
    more: int = 0


def _api_table(version: str) -> tuple[dict[str, Row], dict[str, Row]]:
    traced, untraced = {}, {}
    for line in (TABLES / f"api_table_{version}.md").read_text().splitlines():
        if line.startswith("| flashinfer"):
            api, place, op_types, names = (cell.strip() for cell in line[1:-1].split("|"))
            listed, _, more = names.partition(" ... +")
            traced[api.removesuffix(" (experimental)")] = Row(
                place,
                api.endswith("(experimental)"),
                op_types,
                tuple(name for name in listed.split("; ") if name),
                int(more or 0),
            )
        elif match := re.fullmatch(r"- (flashinfer\S+) \((\S+)\)( experimental)?", line):
            untraced[match[1]] = Row(match[2], bool(match[3]))
    return traced, untraced


TEMPLATE_EXCEPTIONS = {
    # A dispatcher over `_SSD_COMBINED_TRACE_BY_CONFIG`: mode x D layout x final states, each
    # with a name_prefix of its own. The table has the op type instead.
    ("0.7.2", "flashinfer.mamba.ssd_combined.ssd_combined_fwd"): (
        {"mamba_ssd_combined"},
        {
            f"ssd_combined_{mode}_d_{d}_{final}_h{{nheads}}_d{{headdim}}_g{{ngroups}}_s{{dstate}}"
            for mode in ("batched", "varlen")
            for d in ("none", "vector", "matrix")
            for final in ("final", "no_final")
        },
    ),
    # The table says "dispatch, no published templates" in place of op types: so it is.
    ("0.7.2", "flashinfer.fused_moe.layer.MoELayer.__call__"): (set(), set()),
    # The wrappers' axes are copies of the functions' in which `num_experts` and `top_k` are
    # replaced by Var; the other Const axes stay. The 0.7.2 table reads the same code so.
    ("0.6.15", "flashinfer.fused_moe.cute_dsl.fused_moe.CuteDslMoEWrapper.run"): (
        {"moe"},
        {"cute_dsl_moe_wrapper_e{num_local_experts}_h{hidden_size}"},
    ),
    ("0.6.15", "flashinfer.fused_moe.cute_dsl.b12x_moe.B12xMoEWrapper.run"): (
        {"moe"},
        {"b12x_moe_wrapper_e{num_local_experts}_h{hidden_size}"},
    ),
}


def test_api_sets_places_and_decorators(pair: Pair) -> None:
    traced, untraced = _api_table(pair.flashinfer)
    assert len(traced) == {"0.6.15": 127, "0.7.2": 213}[pair.flashinfer]
    assert len(untraced) == {"0.6.15": 120, "0.7.2": 284}[pair.flashinfer]
    apis = pair.apis.apis
    assert {path for path, api in apis.items() if api.has_template} == set(traced)
    assert {path for path, api in apis.items() if not api.has_template} == set(untraced)
    for path, row in (traced | untraced).items():
        api = apis[path]
        assert f"{api.file}:{api.line}" == row.place
        assert (api.decorator == "flashinfer_experimental_api") is row.experimental


def test_op_types_and_definition_names(pair: Pair) -> None:
    traced, _ = _api_table(pair.flashinfer)
    for path, row in traced.items():
        api = pair.apis.apis[path]
        names = {template.name for template in api.templates}
        if exception := TEMPLATE_EXCEPTIONS.get((pair.flashinfer, path)):
            assert (set(api.op_types), names) == exception
            continue
        assert api.op_types == sorted(row.op_types.split(", ")), path
        assert names >= set(row.names), path
        assert len(names) == len(row.names) + row.more, path


def test_untraced_apis_have_no_templates(pair: Pair) -> None:
    assert not [api for api in pair.apis.apis.values() if api.templates and not api.has_template]


# SGLang's uses

SITE_EXCEPTIONS: dict[tuple[str, str], tuple[set[str], set[str]]] = {
    # (lines only in the table, lines only in the index).
    # Line 103/147 stores `gdn_kernels.gdn_decode_bf16_state.gated_delta_rule_mtp`, imported under
    # another name: an undecorated function of the same name.
    ("0.5.17", "flashinfer.gdn_decode.gated_delta_rule_mtp"): (
        {"layers/attention/linear/kernels/gdn_flashinfer.py:103"},
        set(),
    ),
    ("0.5.23", "flashinfer.gdn_decode.gated_delta_rule_mtp"): (
        {"layers/attention/linear/kernels/gdn_flashinfer.py:147"},
        set(),
    ),
    # Line 58 stores SGLang's own Triton function, imported in that constructor.
    ("0.5.17", "flashinfer.mamba.selective_state_update.selective_state_update"): (
        {"sglang/kernels/ops/mamba/triton_ops/ssu_dispatch.py:58"},
        set(),
    ),
    ("0.5.23", "flashinfer.mamba.selective_state_update.selective_state_update"): (
        {"sglang/kernels/ops/mamba/triton_ops/ssu_dispatch.py:58"},
        set(),
    ),
    # LazyImport("flashinfer.sampling", ...): the other function of that name.
    ("0.5.23", "flashinfer.cake_sampling.top_k_top_p_sampling_from_probs"): (
        {"layers/sampler.py:435"},
        set(),
    ),
    # kda_flashinfer.py imports `flashinfer.kda_decode`, the prefill file `from flashinfer import
    # kda` and stores `kda.recurrent_kda`.
    ("0.5.23", "flashinfer.kda.recurrent_kda"): (
        {"layers/attention/linear/kernels/kda_flashinfer.py:46"},
        {"layers/attention/linear/kernels/kda_flashinfer_prefill.py:82"},
    ),
    # Attributes of an imported module that are passed on, which the table has only where called:
    # `inspect.signature(comm.allreduce_fusion)`, `topk_op=flashinfer.top_k`.
    ("0.5.23", "flashinfer.comm.allreduce.allreduce_fusion"): (
        set(),
        {"layers/flashinfer_comm_fusion.py:115"},
    ),
    ("0.5.23", "flashinfer.topk.top_k"): (
        set(),
        {"layers/attention/dsa/dsa_topk_backend.py:86", "layers/attention/dsv4/indexer.py:408"},
    ),
}

NOT_IN_TABLE = {
    # More of the same: attributes that are passed on, stored, or got by `getattr`, and one
    # function handed to a decorator-like call.
    "0.5.17": {
        "flashinfer.comm.allreduce.allreduce_fusion",
        "flashinfer.comm.allreduce.create_allreduce_fusion_workspace",
        "flashinfer.topk.top_k",
    },
    "0.5.23": {
        "flashinfer.comm.allreduce.create_allreduce_fusion_workspace",
        "flashinfer.gemm.gemm_base.mm_mxfp8",
        "flashinfer.kda.RecurrentKDAPrefillWrapper.plan",
        "flashinfer.kda.RecurrentKDAPrefillWrapper.run",
    },
}


def _site_table(version: str) -> dict[str, set[str]]:
    table = {}
    for line in (TABLES / f"fi_calls_{version}.md").read_text().splitlines():
        if line.startswith("| flashinfer"):
            api, _, cells = (cell.strip() for cell in line[1:-1].split("|"))
            table[api] = set(_table_sites(cells))
    return table


def _table_sites(cells: str) -> Iterator[str]:
    for cell in cells.split("; "):
        place, _, _ = cell.partition(" (")
        file, _, lines = place.partition(":")
        yield from (f"{file}:{line}" for line in lines.split(","))


def _short(file: str) -> str:
    file = re.sub(r"^(python/|sgl-kernel/python/)", "", file)
    return file.removeprefix("sglang/srt/")


def _index_sites(pair: Pair) -> dict[str, set[str]]:
    """The index's sites as the table has them.

    A method has its class's; a file's mentions count only where it calls nothing; what goes
    through sglang-kernel is named by the place there.
    """
    by_target = defaultdict(list)
    for origin, sites in pair.uses.sites.items():
        by_target[pair.defined(origin)] += sites
    found = {}
    for path in pair.apis.apis:
        owner = path.rpartition(".")[0]
        is_method = owner.rpartition(".")[2][:1].isupper()
        sites = list(by_target.get(path, ()))
        for target, others in by_target.items() if is_method else ():
            sites += others if target == owner or target.startswith(f"{owner}.") else []
        shown = {_short(site.via) for site in sites if site.via}
        by_file = defaultdict(lambda: defaultdict(set))
        for site in sites:
            if not site.via:
                by_file[site.file][site.kind].add(f"{_short(site.file)}:{site.line}")
        for kinds in by_file.values():
            shown |= kinds["call"] or kinds["mention"] or kinds["import"]
        found[path] = shown
    return found


def test_call_sites(pair: Pair) -> None:
    found = _index_sites(pair)
    table = {pair.defined(api): sites for api, sites in _site_table(pair.sglang).items()}
    assert len(table) == {"0.5.17": 79, "0.5.23": 100}[pair.sglang]
    for api, sites in table.items():
        only_table, only_index = SITE_EXCEPTIONS.get((pair.sglang, api), (set(), set()))
        assert sites - found[api] == only_table, api
        assert found[api] - sites == only_index, api
    used = {api for api, sites in found.items() if sites}
    assert used - set(table) == NOT_IN_TABLE[pair.sglang]


# SGLang's models and flags


def test_architectures(pair: Pair) -> None:
    table = json.loads((TABLES / f"models_{pair.sglang}.json").read_text())
    expected = {name: file for file, names in table.items() for name in names or ()}
    assert len(expected) == {"0.5.17": 241, "0.5.23": 290}[pair.sglang]
    root = {"0.5.17": "python/sglang/srt/models/", "0.5.23": "sglang/srt/models/"}[pair.sglang]
    assert pair.uses.architectures == {name: root + file for name, file in expected.items()}


SPELLED = {"fp8_gemm_runner_backend": "--fp8-gemm-backend"}
"""Fields whose flags have another name."""


def test_server_flags(pair: Pair) -> None:
    table = json.loads((TABLES / "flags_by_version.json").read_text())
    for name, versions in table.items():
        says = versions.get(pair.sglang, "-")
        flag = pair.uses.flags.get(SPELLED.get(name, f"--{name.replace('_', '-')}"))
        assert (flag is not None) is (says != "-"), name
        if flag is not None:
            assert flag.deprecated is says.startswith("DEPR"), name
            instead = says.removeprefix("DEPR->").removesuffix(" [cli only]")
            assert flag.instead == (instead if flag.deprecated else ""), name


# Known answers of both versions


def test_public_paths_and_dump_names(pair: Pair) -> None:
    for public, method, dump in (
        ("flashinfer.norm.rmsnorm", None, "rmsnorm"),
        (
            "flashinfer.decode.BatchDecodeWithPagedKVCacheWrapper",
            "run",
            "BatchDecodeWithPagedKVCacheWrapper.run",
        ),
        (
            "flashinfer.mla.BatchMLAPagedAttentionWrapper",
            "plan",
            "BatchMLAPagedAttentionWrapper.plan",
        ),
        ("flashinfer.comm.MoeAlltoAll", "dispatch", "dispatch"),
        ("flashinfer.attention.BatchAttention", "run", "run"),
        ("flashinfer.mamba.selective_state_update", None, "selective_state_update"),
        ("flashinfer.fp4_quantization.fp4_quantize", None, "fp4_quantize"),
    ):
        api = pair.apis.find(public, method)
        assert api is not None, public
        assert api.dump == dump
    path = pair.defined("flashinfer.fused_moe.trtllm_fp8_block_scale_moe")
    assert path == "flashinfer.fused_moe.core.trtllm_fp8_block_scale_moe"
    assert pair.apis.apis[path].public == "flashinfer.trtllm_fp8_block_scale_moe"


def test_what_only_the_newer_version_has(pair: Pair) -> None:
    layer = pair.apis.find("flashinfer.fused_moe.MoELayer", "__call__")
    lazy = pair.apis.find("flashinfer.mla.dsv41_fp4_quantize_append_sparse_mla_cache")
    if pair.flashinfer == "0.6.15":
        assert (layer, lazy) == (None, None)
    else:
        # api_logging.py lists MoELayer; the cache function is exported by a `__getattr__`.
        assert layer is not None
        assert layer.dump == "MoELayer.__call__"
        assert lazy is not None
        assert lazy.public == "flashinfer.mla.dsv41_fp4_quantize_append_sparse_mla_cache"


def test_choices_and_backends(pair: Pair) -> None:
    flags = pair.uses.flags
    assert "flashinfer_trtllm" in flags["--moe-runner-backend"].choices
    assert {"triton", "flashinfer"} <= set(flags["--linear-attn-backend"].choices)
    assert {"--tensor-parallel-size", "--tp-size"} <= set(flags)
    files = {Path(file).name for file in pair.uses.attention_backends["flashinfer"]}
    assert files == {"flashinfer_backend.py", "flashinfer_mla_backend.py"}


@pytest.mark.parametrize("name", ["top_k_sampling_from_probs", "top_p_sampling_from_probs"])
def test_apis_without_a_caller(pair: Pair, name: str) -> None:
    assert not [origin for origin in pair.uses.sites if origin.endswith(f".{name}")]
