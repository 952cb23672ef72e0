"""Sessions: as few launches as show all calls, with the flags of the SGLang that will run."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks import ops
from tasks.collect.live import check_model
from tasks.collect.plan import (
    NodeGroup,
    Wish,
    eager_options,
    estimate,
    few_layers,
    plan_sessions,
    read_arguments,
    shown,
)
from tasks.collect.request import parse_request
from tasks.collect.session import Lengths, Session, Traffic
from tasks.discover.inventory import requirements
from tasks.errors import CollectError, InputError
from tasks.manifest import RunManifest
from tasks.model import ModelConfig, Serving, read_config
from tasks.ops.base import FlashInferApi, KernelSpec
from tests.conftest import DATA

FLAGS = frozenset(
    re.findall(
        r"\S+",
        """--attention-backend --sampling-backend --disable-cuda-graph --cuda-graph-backend-decode
        --cuda-graph-backend-prefill --json-model-override-args --disable-radix-cache --tp-size
        --page-size --ep-size --max-running-requests --skip-server-warmup --skip-tokenizer-init
        --flashinfer-mla-disable-ragged --linear-attn-backend --mamba-backend --mamba-ssm-dtype
        --moe-runner-backend --dsa-prefill-backend --dsa-decode-backend --kv-cache-dtype --nnodes
        --node-rank --dist-init-addr --load-format --speculative-algorithm
        --speculative-eagle-topk""",
    )
)
"""Of SGLang 0.5.17's, those that sessions use."""
CONFIGS = sorted(path.stem for path in (DATA / "configs").glob("*.json"))


def model_of(name: str) -> ModelConfig:
    return read_config(DATA / "configs" / f"{name}.json")


def needed(model: ModelConfig, *sizes: int, ep: int = 1) -> list[KernelSpec]:
    servings = [Serving(tp=tp, ep=ep, origin="test") for tp in sizes]
    return [
        spec
        for spec in requirements(model, servings).kernels
        if isinstance(ops.op_module(spec.op_type).provider(spec), FlashInferApi)
    ]


def flags_of(words: tuple[str, ...]) -> dict[str, str]:
    """Return flag -> value, empty for one that takes none."""
    found = {}
    for word, following in zip(words, (*words[1:], "--"), strict=True):
        if word.startswith("--"):
            found[word] = "" if following.startswith("--") else following
    return found


def test_a_dense_model_needs_four_launches() -> None:
    model = model_of("meta-llama--Meta-Llama-3.1-8B")
    plan = plan_sessions(needed(model, 1), model, Wish("m"), FLAGS)
    served = {session.id: set(session.definitions) for session in plan.sessions}
    heads = "h32_kv8_d128"
    filters = ("top_k", "top_p", "top_k_top_p")
    assert served == {
        "tp1-ep1-ps64-paged-prefill": {
            f"gqa_paged_decode_{heads}_ps64",
            f"gqa_paged_prefill_causal_{heads}_ps64",
        },
        "tp1-ep1-ps1-paged-prefill": {
            f"gqa_paged_decode_{heads}_ps1",
            f"gqa_paged_prefill_causal_{heads}_ps1",
        },
        "tp1-ep1-ps1-ragged-prefill": {f"gqa_ragged_prefill_causal_{heads}"},
        "tp1-ep1-ps1-calls": {
            "rmsnorm_h4096",
            "fused_add_rmsnorm_h4096",
            *(f"{name}_sampling_from_probs_v128256" for name in filters),
        },
    }
    assert plan.launches_one_by_one(5) == 50


def test_each_launch_is_what_its_kernels_ask_for() -> None:
    model = model_of("meta-llama--Meta-Llama-3.1-8B")
    plan = plan_sessions(needed(model, 1), model, Wish("m"), FLAGS)
    sessions = {session.id: session for session in plan.sessions}
    paged = sessions["tp1-ep1-ps64-paged-prefill"]
    ragged = sessions["tp1-ep1-ps1-ragged-prefill"]
    calls = sessions["tp1-ep1-ps1-calls"]
    assert (paged.mode, ragged.mode, calls.mode) == ("paged_prefill", "ragged_prefill", "decode")
    assert paged.env == {"SGLANG_FLASHINFER_USE_PAGED": "1"}
    assert not ragged.env
    assert flags_of(paged.flags)["--page-size"] == "64"
    # A cached prefix is what paged prefill is for, and would be run paged in ragged mode.
    assert "--disable-radix-cache" not in paged.flags
    assert paged.traffic.shared_prefix > 0
    assert "--disable-radix-cache" in ragged.flags
    for session in plan.sessions:
        flags = flags_of(session.flags)
        assert flags["--attention-backend"] == "flashinfer"
        assert "--disable-cuda-graph" in flags
        assert "--skip-server-warmup" in flags
    # Plans where there are plans; whole calls of few layers, with short answers.
    assert paged.record == (
        "BatchDecodeWithPagedKVCacheWrapper.plan",
        "BatchPrefillWithPagedKVCacheWrapper.plan",
    )
    assert "rmsnorm" in calls.record
    assert json.loads(flags_of(calls.flags)["--json-model-override-args"]) == {
        "num_hidden_layers": 2
    }
    assert max(length.osl for length in calls.traffic.lengths) == 16
    assert calls.traffic.batch_sizes == paged.traffic.batch_sizes


@pytest.mark.parametrize("name", CONFIGS)
def test_every_definition_is_in_one_launch_that_suits_it(name: str) -> None:
    model = model_of(name)
    specs = needed(model, 1, 2, 4, 8)
    plan = plan_sessions(specs, model, Wish("m"), FLAGS)
    placed = Counter(name for session in plan.sessions for name in session.definitions)
    assert placed.keys() | plan.not_collected.keys() == {spec.name for spec in specs}
    assert set(placed.values()) <= {1}
    ids = [session.id for session in plan.sessions]
    assert len(ids) == len(set(ids))
    by_name = {spec.name: spec for spec in specs}
    for session in plan.sessions:
        for definition in session.definitions:
            spec = by_name[definition]
            provider = ops.op_module(spec.op_type).provider(spec)
            assert isinstance(provider, FlashInferApi)
            assert not spec.tp or session.tp in spec.tp
            assert spec.axes.get("page_size", session.page_size) == session.page_size
            assert provider.prefill in ("", session.mode.removesuffix("_prefill"))
            assert set(provider.recorded) <= set(session.record)
            given = flags_of(session.flags)
            for flag in provider.server_flags:
                option, _, value = flag.partition(" ")
                assert given[option] == value


def test_tensor_parallel_sizes_are_kept_apart_and_shared_kernels_are_served_once() -> None:
    model = model_of("meta-llama--Meta-Llama-3.1-70B")
    plan = plan_sessions(needed(model, 4, 8), model, Wish("m"), FLAGS)
    sizes = Counter(session.tp for session in plan.sessions if "calls" not in session.id)
    assert sizes == {4: 3, 8: 3}
    [calls] = [session for session in plan.sessions if "calls" in session.id]
    assert calls.tp_choices == (1, 2, 4, 8)


def test_speculative_decoding_has_a_launch_of_its_own() -> None:
    model = model_of("Qwen--Qwen3-Next-80B-A3B-Instruct")
    plan = plan_sessions(needed(model, 1), model, Wish("m"), FLAGS)
    [session] = [s for s in plan.sessions if "--speculative-algorithm" in s.flags]
    assert all(name.startswith("gdn_mtp_") for name in session.definitions)


def test_kernels_of_other_weights_are_not_collected() -> None:
    model = model_of("Qwen--Qwen3-30B-A3B")
    plan = plan_sessions(needed(model, 1), model, Wish("m"), FLAGS)
    reason = plan.not_collected["moe_fp8_block_scale_renorm_topk8_e128_h2048_i768"]
    assert "fp8 weights" in reason
    assert "16 bits" in reason
    quantised = model_of("Qwen--Qwen3-30B-A3B-FP8")
    plan = plan_sessions(needed(quantised, 1), quantised, Wish("m"), FLAGS)
    served = {name for session in plan.sessions for name in session.definitions}
    assert "moe_fp8_block_scale_renorm_topk8_e128_h2048_i768" in served


def test_experts_are_spread_over_as_many_ranks() -> None:
    model = model_of("deepseek-ai--DeepSeek-V3")
    plan = plan_sessions(needed(model, 8, ep=8), model, Wish("m"), FLAGS)
    [session] = [s for s in plan.sessions if any(name.startswith("moe_") for name in s.definitions)]
    assert (session.tp, session.ep) == (8, 8)
    flags = flags_of(session.flags)
    assert (flags["--ep-size"], flags["--moe-runner-backend"]) == ("8", "flashinfer_trtllm")
    # Three dense layers come before the first with experts.
    assert json.loads(flags["--json-model-override-args"]) == {"num_hidden_layers": 4}


@pytest.mark.parametrize(
    ("version", "expected"),
    # Which flags each SGLang release has, from its own server_args.py.
    [
        ("0.5.9", {"--disable-cuda-graph"}),
        ("0.5.10", {"--disable-cuda-graph", "--disable-piecewise-cuda-graph"}),
        ("0.5.13", {"--disable-cuda-graph", "--disable-piecewise-cuda-graph"}),
        ("0.5.14", {"--disable-cuda-graph"}),
        ("0.5.17", {"--disable-cuda-graph"}),
        ("0.5.20", {"--disable-cuda-graph"}),
        ("0.5.23", {"--disable-cuda-graph"}),
    ],
)
def test_graphs_are_turned_off_as_the_version_wants_it(version: str, expected: set[str]) -> None:
    number = int(version.rpartition(".")[2])
    flags = {"--disable-cuda-graph", "--skip-server-warmup", "--skip-tokenizer-init"}
    if 10 <= number < 20:
        flags.add("--disable-piecewise-cuda-graph")
    if number >= 14:
        flags |= {"--cuda-graph-backend-decode", "--cuda-graph-backend-prefill"}
    assert {name for name in eager_options(flags) if "graph" in name} == expected


def test_a_flag_that_sglang_lacks_is_named() -> None:
    model = model_of("meta-llama--Meta-Llama-3.1-8B")
    with pytest.raises(CollectError, match="--skip-server-warmup: the SGLang that is to run"):
        plan_sessions(needed(model, 1), model, Wish("m"), FLAGS - {"--skip-server-warmup"})
    with pytest.raises(InputError, match="--server-flag: --no-such-flag"):
        plan_sessions(needed(model, 1), model, Wish("m", flags=("--no-such-flag",)), FLAGS)


@pytest.mark.parametrize(
    ("name", "override"),
    [
        ("meta-llama--Meta-Llama-3.1-8B", {"num_hidden_layers": 2}),
        ("deepseek-ai--DeepSeek-V3", {"num_hidden_layers": 4}),
        (
            "openai--gpt-oss-20b",
            {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]},
        ),
        (
            "MiniMaxAI--MiniMax-M1-80k",
            {"num_hidden_layers": 8, "attn_type_list": [0, 0, 0, 0, 0, 0, 0, 1]},
        ),
        (
            "XiaomiMiMo--MiMo-V2-Flash",
            {
                "num_hidden_layers": 6,
                "hybrid_layer_pattern": [0, 1, 1, 1, 1, 0],
                "moe_layer_freq": [0, 1, 1, 1, 1, 1],
            },
        ),
        # The last entry is of the layer that predicts a second token.
        (
            "nvidia--DeepSeek-V4-Flash-NVFP4",
            {"num_hidden_layers": 4, "compress_ratios": [0, 0, 4, 128, 0]},
        ),
        # SGLang takes the number of layers from the pattern.
        (
            "nvidia--Nemotron-H-56B-Base-8K",
            {"num_hidden_layers": 8, "hybrid_override_pattern": "M-M-M-M*"},
        ),
        ("moonshotai--Kimi-K2.5", {"text_config": {"num_hidden_layers": 4}}),
        (
            "Qwen--Qwen3.5-35B-A3B",
            {
                "text_config": {
                    "num_hidden_layers": 4,
                    "layer_types": [*["linear_attention"] * 3, "full_attention"],
                }
            },
        ),
    ],
)
def test_few_layers_show_every_kind(name: str, override: dict[str, object]) -> None:
    model = model_of(name)
    calls = [s for s in sessions_of(model) if s.id.rpartition("-ps")[2].endswith("calls")]
    assert calls
    for session in calls:
        assert json.loads(flags_of(session.flags)["--json-model-override-args"]) == override


def sessions_of(model: ModelConfig, **wish: Any) -> list[Session]:
    return plan_sessions(needed(model, 1), model, Wish("m", **wish), FLAGS, 141).sessions


@pytest.mark.parametrize("name", CONFIGS)
def test_as_few_layers_as_there_are_kinds(name: str) -> None:
    model = model_of(name)
    fewer = few_layers(model, dummies=True)
    assert fewer is not None
    assert fewer <= model.num_layers
    for fact in ("mixers", "attention", "has_experts"):
        kinds = [getattr(layer, fact) for layer in model.layers]
        assert set(kinds[:fewer]) == set(kinds)


@pytest.mark.parametrize("name", CONFIGS)
def test_whole_calls_are_recorded_within_bounds(name: str) -> None:
    model = model_of(name)
    for session in sessions_of(model):
        assert estimate(session, model).recorded_mb < 20_000
        if session.mode == "decode" and "--json-model-override-args" not in session.flags:
            assert f"all {model.num_layers} layers are recorded" in session.warnings[0]


def test_a_model_whose_layers_cannot_be_left_out_is_served_briefly() -> None:
    model = model_of("google--gemma-3-27b-it")
    [calls] = [session for session in sessions_of(model) if "calls" in session.id]
    assert calls.traffic.lengths == (Lengths(isl=4, osl=2),)
    assert calls.traffic.batch_sizes == (1, 8, 32, 64)
    assert calls.warnings == (
        "all 62 layers are recorded, so of prompts of at most 4 tokens, at batch sizes 1, 8, 32, "
        "64; SGLang loads fewer of this model with --server-flag='--load-format dummy' only",
    )
    for flags in (("--load-format", "dummy"), ("--load-format=dummy",)):
        [calls] = [s for s in sessions_of(model, flags=flags) if "calls" in s.id]
        override = json.loads(flags_of(calls.flags)["--json-model-override-args"])
        assert override == {"text_config": {"num_hidden_layers": 4}}
        assert calls.traffic.batch_sizes == Traffic().batch_sizes
        assert calls.warnings == ()


def test_what_was_asked_for_is_not_cut() -> None:
    model = model_of("google--gemma-3-27b-it")
    [calls] = [s for s in sessions_of(model, all_layers=True) if "calls" in s.id]
    assert calls.traffic.lengths == (Lengths(isl=1024, osl=16),)
    assert calls.warnings == ()


def test_weights_that_do_not_fit_are_told() -> None:
    model = model_of("deepseek-ai--DeepSeek-V3")
    sessions = {session.id: session for session in sessions_of(model)}
    assert sessions["tp1-ep1-ps1-paged-prefill"].warnings == (
        "the weights take about 673 GB, and 1 GPU has 141 (gpu_memory_gb); its kernels are of no "
        "larger tp",
    )
    assert sessions["tp1-ep1-ps1-calls-2"].warnings == ()  # few layers fit
    shown_first = shown(sessions["tp1-ep1-ps1-paged-prefill"], model)
    assert "673 GB" in shown_first["warnings"][0]
    fitting = plan_sessions(needed(model, 8), model, Wish("m"), FLAGS, 141).sessions
    assert not [session for session in fitting if session.warnings]


def test_sessions_say_which_gpu_they_need() -> None:
    model = model_of("Qwen--Qwen3-30B-A3B-FP8")
    needs = {session.id: session.gpu for session in sessions_of(model)}
    assert needs["tp1-ep1-ps1-calls"] == "SM100"
    assert sorted(set(needs.values())) == ["", "SM100"]
    for session in sessions_of(model):
        moe = any(name.startswith("moe_") for name in session.definitions)
        assert shown(session, model)["gpu"] == ("SM100" if moe else "")


def test_a_flag_of_one_family_that_sglang_lacks_costs_only_that_family() -> None:
    model = model_of("deepseek-ai--DeepSeek-V3")
    lacking = FLAGS - {"--flashinfer-mla-disable-ragged"}
    plan = plan_sessions(needed(model, 8), model, Wish("m"), lacking)
    assert (
        "--flashinfer-mla-disable-ragged"
        in plan.not_collected["mla_paged_prefill_causal_h16_ckv512_kpe64_ps1"]
    )
    served = {name for session in plan.sessions for name in session.definitions}
    assert {"mla_ragged_prefill_causal_h16_qk192_vo128", "rmsnorm_h7168"} <= served


def test_kernels_of_newer_gpus_do_not_take_others_down() -> None:
    model = model_of("Qwen--Qwen3-30B-A3B-FP8")
    plan = plan_sessions(needed(model, 1), model, Wish("m"), FLAGS)
    for session in plan.sessions:
        families = {name.partition("_")[0] for name in session.definitions}
        assert not (families & {"moe", "trtllm"} and families & {"rmsnorm", "top"})


def test_a_launch_that_may_choose_takes_enough_gpus() -> None:
    model = model_of("meta-llama--Llama-4-Scout-17B-16E-Instruct")
    norms = [spec for spec in needed(model, 8) if not spec.tp]
    # 109 billion parameters of two bytes.
    [session] = plan_sessions(norms, model, Wish("m"), FLAGS, 141).sessions
    assert session.tp == 2
    [session] = plan_sessions(norms, model, Wish("m"), FLAGS, 60).sessions
    assert session.tp == 4


def test_an_override_of_one_s_own_is_not_joined_by_ours() -> None:
    model = model_of("meta-llama--Meta-Llama-3.1-8B")
    own = ("--json-model-override-args", '{"rope_theta": 1}')
    for session in plan_sessions(needed(model, 1), model, Wish("m", flags=own), FLAGS).sessions:
        assert session.flags.count("--json-model-override-args") == 1


def test_all_layers_can_be_asked_for() -> None:
    model = model_of("meta-llama--Meta-Llama-3.1-8B")
    plan = plan_sessions(needed(model, 1), model, Wish("m", all_layers=True), FLAGS)
    assert not any("--json-model-override-args" in session.flags for session in plan.sessions)


def test_runs_are_recorded_where_they_are_asked_for() -> None:
    model = model_of("meta-llama--Meta-Llama-3.1-8B")
    plan = plan_sessions(needed(model, 1), model, Wish("m", record_runs=True), FLAGS)
    recorded = {name for session in plan.sessions for name in session.record}
    assert "BatchDecodeWithPagedKVCacheWrapper.run" in recorded


def test_several_hosts_are_handed_to_sglang() -> None:
    model = model_of("meta-llama--Meta-Llama-3.1-8B")
    wish = Wish("m", nodes=NodeGroup(2, 1, "10.0.0.1:5000"))
    for session in plan_sessions(needed(model, 2, 4), model, wish, FLAGS).sessions:
        assert session.tp % 2 == 0
        assert all(size % 2 == 0 for size in session.tp_choices)
        assert (session.nodes, session.node_rank) == (2, 1)
        flags = flags_of(session.flags)
        assert flags["--tp-size"] == str(session.tp)
        assert (flags["--nnodes"], flags["--node-rank"]) == ("2", "1")
        assert flags["--dist-init-addr"] == "10.0.0.1:5000"


def test_hosts_that_cannot_share_a_kernels_ranks_are_refused() -> None:
    model = model_of("meta-llama--Meta-Llama-3.1-8B")
    wish = Wish("m", nodes=NodeGroup(2, 0, "10.0.0.1:5000"))
    with pytest.raises(InputError, match="--nnodes: gqa_paged_.* is of tp 1, which 2 hosts"):
        plan_sessions(needed(model, 1), model, wish, FLAGS)
    norms = [spec for spec in needed(model, 1) if not spec.tp]
    three = Wish("m", nodes=NodeGroup(3, 0, "10.0.0.1:5000"))
    assert [s.tp for s in plan_sessions(norms, model, three, FLAGS).sessions] == [3]


def test_waves_that_do_not_fit_the_model_are_told_and_not_estimated() -> None:
    model = model_of("meta-llama--Meta-Llama-3.1-8B")
    whole = Traffic(lengths=(Lengths(isl=100, osl=50),), batch_sizes=(2, 4))
    longer = (*whole.lengths, Lengths(isl=131_072, osl=50))
    plans = [
        plan_sessions(needed(model, 1), model, Wish("m", traffic), FLAGS).sessions
        for traffic in (whole, whole.model_copy(update={"lengths": longer}))
    ]
    for fitting, session in zip(*plans, strict=True):
        expected, told = estimate(fitting, model), estimate(session, model)
        assert expected.not_sent == {}
        if max(length.isl for length in session.traffic.lengths) < 131_072:
            assert told.not_sent == {}  # whole calls are recorded of short requests
            continue
        assert told.calls == expected.calls
        ((reason, count),) = told.not_sent.items()
        assert count == len(whole.batch_sizes)
        assert "131072 + 50 tokens are longer than the server takes (131072" in reason


def test_an_estimate_counts_the_traffic() -> None:
    model = model_of("meta-llama--Meta-Llama-3.1-8B")
    traffic = Traffic(
        lengths=(Lengths(isl=100, osl=50),), batch_sizes=(2, 4), rounds=3, random_range_ratio=1
    )
    plan = plan_sessions(needed(model, 1), model, Wish("m", traffic), FLAGS)
    [ragged] = [session for session in plan.sessions if session.mode == "ragged_prefill"]
    # Two waves of 3 rounds: 6 + 12 requests.
    assert estimate(ragged, model).calls == {"BatchPrefillWithRaggedKVCacheWrapper.plan": 18}


def test_server_arguments_are_split_and_ours_are_refused() -> None:
    given = ["--load-format dummy", "--json-model-override-args", "{}"]
    assert read_arguments(given) == ("--load-format", "dummy", "--json-model-override-args", "{}")
    allowed = "--mem-fraction-static 0.5 --grammar-backend none --quantization fp8"
    assert read_arguments([allowed, "--trust-remote-code"]) == (
        *allowed.split(),
        "--trust-remote-code",
    )
    # Some models need it said for each phase.
    same = "--prefill-attention-backend flashinfer"
    assert read_arguments([same]) == tuple(same.split())
    with pytest.raises(InputError, match="is no flag"):
        read_arguments(["dummy"])
    with pytest.raises(InputError, match="quotation"):
        read_arguments(["--name 'open"])


@pytest.mark.parametrize(
    "text",
    [
        *("--port 80", "--host=0.0.0.0", "--model-path /x", "--tp-size 4", "--config x.yaml"),
        *("--prefill-attention-backend fa3", "--decode-attention-backend=triton"),
        *("--sampling-backend pytorch", "--attention-backend triton", "--disable-radix-cache"),
        *("--max-running-requests 4", "--max-total-tokens 4096", "--enable-dp-attention"),
        *("--cuda-graph-max-bs 8", "--enforce-piecewise-cuda-graph", "--api-key x"),
    ],
)
def test_arguments_that_a_session_rests_on_are_refused(text: str) -> None:
    name = re.split("[ =]", text)[0]
    with pytest.raises(InputError, match=f"--server-flag: {name} is decided by the session: its"):
        read_arguments(["--load-format dummy", text])


def test_all_that_sessions_emit_is_theirs() -> None:
    emitted = {
        name
        for model in map(model_of, CONFIGS)
        for session in plan_sessions(needed(model, 1, 8, ep=8), model, Wish("m"), FLAGS).sessions
        for name in flags_of(session.flags)
    }
    kernels_own = {
        flag.partition(" ")[0]
        for model in map(model_of, CONFIGS)
        for spec in needed(model, 1, 8, ep=8)
        if isinstance(api := ops.op_module(spec.op_type).provider(spec), FlashInferApi)
        for flag in api.server_flags
    }
    for name in emitted - kernels_own - {"--json-model-override-args"}:
        with pytest.raises(InputError, match="decided by the session"):
            read_arguments([f"{name} 1"])


def test_a_kernels_own_argument_is_not_overridden() -> None:
    model = model_of("Qwen--Qwen3-30B-A3B-FP8")
    other = ("--moe-runner-backend", "triton")
    with pytest.raises(
        InputError,
        match="--server-flag: --moe-runner-backend is decided by the session: flashinfer_trtllm",
    ):
        sessions_of(model, flags=other)
    assert sessions_of(model_of("Qwen--Qwen3-30B-A3B"), flags=other)


def manifest_of(*specs: KernelSpec) -> RunManifest:
    kernels = [
        {
            "definition_name": spec.name,
            "op_type": spec.op_type,
            "phase1_status": "new",
            "fi_status": "fi_supported",
            "sgl_status": "sgl_integrated",
            "spec": spec.model_dump(mode="json"),
        }
        for spec in specs
    ]
    facts = {"model_slug": "m", "hf_repo_id": "a/m", "date": "2026-11-21", "kernels": kernels}
    return RunManifest.model_validate(facts)


def test_a_request_names_the_kernels_that_are_not_done() -> None:
    one, two = needed(model_of("meta-llama--Meta-Llama-3.1-8B"), 1)[:2]
    run = manifest_of(one, two)
    run.kernels[0].phase3_status = "done"
    everything = parse_request(manifest=Path("m.json"))
    assert [entry.definition_name for entry in everything.chosen(run)] == [two.name]
    named = parse_request(manifest=Path("m.json"), definitions=(one.name,))
    assert [entry.definition_name for entry in named.chosen(run)] == [one.name]
    with pytest.raises(InputError, match="has no nonsense"):
        parse_request(manifest=Path("m.json"), definitions=("nonsense",)).chosen(run)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"isl": 5}, "--isl, --osl: give both or none"),
        ({"dataset_kind": "sharegpt"}, "--dataset-path: is for"),
        ({"dataset_kind": "poems"}, "--dataset-kind: "),
        ({"rounds": 0}, "--rounds: "),
        ({"rounds": 10**12}, "--rounds: .* less than or equal to 1000"),
        ({"random_range_ratio": 0}, "--random-range-ratio: "),
        ({"max_workloads": 0}, "--max-workloads: "),
        ({"batch_sizes": (1, "x")}, "--batch-sizes: "),
        ({"batch_sizes": (1, 0)}, "--batch-sizes: "),
        ({"server_flags": (1,)}, "--server-flag: "),
        ({"nnodes": 2}, "--dist-init-addr: missing"),
        ({"nnodes": 2, "node_rank": 2, "dist_init_addr": "a:1"}, "--node-rank: 2 is not one of 2"),
        ({"node_rank": 5}, "--node-rank: 5 is not one of 1"),
        ({"dist_init_addr": "a:1"}, "--dist-init-addr: is for several nodes"),
        ({"dist_init_addr": "--foo", "nnodes": 2}, "--dist-init-addr: '--foo' is not host:port"),
        ({"dist_init_addr": "a:70000", "nnodes": 2}, "--dist-init-addr: 'a:70000' is not"),
        ({"server_env": {"HF_TOKEN": "x"}}, "--server-env: HF_TOKEN would be shown"),
        ({"server_env": {"MYSECRET": "x"}}, "--server-env: MYSECRET would be shown"),
        *(
            ({"server_env": {name: "x"}}, f"--server-env: {name} is decided by the session: it ")
            for name in (
                *("FLASHINFER_DUMP_DIR", "FLASHINFER_DUMP_INCLUDE", "FLASHINFER_LOGLEVEL"),
                *("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "SGLANG_FLASHINFER_USE_PAGED"),
            )
        ),
        ({"server_env": {"PYTHONPATH": "/x"}}, "--server-env: PYTHONPATH .*: the server is found"),
    ],
)
def test_wrong_requests_name_the_option(fields: dict[str, object], said: str) -> None:
    with pytest.raises(InputError, match=f"^{said}"):
        parse_request(manifest=Path("m.json"), **fields)


def test_other_variables_of_the_server_may_be_set() -> None:
    env = {"SGLANG_ENABLE_JIT_DEEPGEMM": "0", "FLASHINFER_WORKSPACE_BASE": "/x", "NCCL_DEBUG": "1"}
    assert parse_request(manifest=Path("m.json"), server_env=env).server_env == env


def changed(name: str, folder: Path, **fields: object) -> ModelConfig:
    """A model with other fields in its config."""
    raw = json.loads((DATA / "configs" / f"{name}.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | fields))
    return read_config(folder / "config.json")


@pytest.mark.parametrize(
    ("other", "fields", "said"),
    [
        ("Qwen--Qwen3-30B-A3B", {}, "architecture Qwen3MoeForCausalLM, .* LlamaForCausalLM"),
        ("meta-llama--Meta-Llama-3.1-8B", {"num_hidden_layers": 4}, "num_layers 4, .* of, 32"),
        ("meta-llama--Meta-Llama-3.1-70B", {}, "hidden_size 8192, .* of, 4096"),
    ],
)
def test_another_model_than_the_manifests_is_not_served(
    tmp_path: Path, other: str, fields: dict[str, object], said: str
) -> None:
    own = model_of("meta-llama--Meta-Llama-3.1-8B")
    run = manifest_of(*needed(own, 1))
    run.architecture = own.architecture
    check_model(changed("meta-llama--Meta-Llama-3.1-8B", tmp_path, torch_dtype="x"), run, own)
    model = changed(other, tmp_path, **fields)
    with pytest.raises(InputError, match=f"--model-path, --config: .*config.json has {said}"):
        check_model(model, run, own)


def test_another_model_is_known_by_its_kernels_too(tmp_path: Path) -> None:
    own = model_of("meta-llama--Meta-Llama-3.1-8B")
    run = manifest_of(*needed(own, 1)[:1])
    check_model(own, run, None)
    with pytest.raises(InputError, match="none of the kernels .* of a/m .gqa_paged_decode_h32"):
        check_model(model_of("meta-llama--Meta-Llama-3.1-70B"), run, None)


@given(st.lists(st.integers(1, 512), min_size=1, max_size=6))
def test_batch_sizes_are_sent_once_each_in_order(sizes: list[int]) -> None:
    traffic = parse_request(manifest=Path("m.json"), batch_sizes=tuple(sizes)).traffic
    assert traffic.batch_sizes == tuple(sorted(set(sizes)))
