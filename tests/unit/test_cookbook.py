"""Serving configurations, from the real cookbook and from wrong files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tasks.discover.cookbook import repository_of, serving_configs
from tasks.errors import InputError
from tasks.model import read_config
from tests.conftest import DATA

COOKBOOK = DATA / "sgl-cookbook"
PAIRS: dict[str, list[list[int]]] = json.loads((DATA / "cookbook_pairs.json").read_text())
QWEN = read_config(DATA / "configs" / "Qwen--Qwen3-30B-A3B.json")
M1 = read_config(DATA / "configs" / "MiniMaxAI--MiniMax-M1-80k.json")


@pytest.mark.parametrize(
    ("repo_id", "pairs"),
    [
        ("Qwen/Qwen3-30B-A3B", {(1, 1)}),
        ("MiniMaxAI/MiniMax-M2.7", {(4, 1), (8, 1)}),  # only in v0.5.10
        ("nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16", {(1, 1), (2, 1), (4, 1), (8, 1)}),
        ("Qwen/Qwen3-30B-A3B-NVFP4", {(1, 1)}),  # by its base name
    ],
)
def test_real_entries(repo_id: str, pairs: set[tuple[int, int]]) -> None:
    found = serving_configs(COOKBOOK, repo_id, QWEN, 141)
    assert {(serving.tp, serving.ep) for serving in found} == pairs
    assert all("sgl-cookbook data/models/generated/" in serving.origin for serving in found)


def test_data_parallel_attention_divides_tp(tmp_path: Path) -> None:
    folder = tmp_path / "data" / "models" / "generated" / "v1"
    folder.mkdir(parents=True)
    engine = "{tp: 8, dp: 4, ep: 8, enable_dp_attention: true}"
    (folder / "m.yaml").write_text(
        "families: [{models: [{model_path: v/M, hardware: {H200: "
        f"{{configurations: [{{engine: {engine}}}]}}}}}}]}}]\n"
    )
    assert [(s.tp, s.ep) for s in serving_configs(tmp_path, "v/M", QWEN, 141)] == [(2, 8)]


@pytest.mark.parametrize(("gpu_memory", "tp"), [(141, 8), (80, 16), (1000, 1)])
def test_without_an_entry_the_weights_decide(gpu_memory: float, tp: int) -> None:
    (serving,) = serving_configs(COOKBOOK, "MiniMaxAI/MiniMax-M1-80k", M1, gpu_memory)
    assert (serving.tp, serving.ep) == (tp, 1)
    assert "assumed: no sgl-cookbook entry; about 898 GB of weights" in serving.origin


def test_weights_that_fit_nowhere() -> None:
    with pytest.raises(InputError, match="do not fit 64 GPUs of 1 GB"):
        serving_configs(COOKBOOK, None, M1, 1)


def entry(engine: str, model_path: str = "v/M") -> str:
    hardware = f"{{H200: {{configurations: [{{engine: {engine}}}]}}}}"
    return f"families: [{{models: [{{model_path: {model_path}, hardware: {hardware}}}]}}]\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A version folder of a cookbook in `tmp_path`."""
    path = tmp_path / "data" / "models" / "generated" / "v1"
    path.mkdir(parents=True)
    return path


def pairs(cookbook: Path, repo_id: str = "v/M") -> set[tuple[int, int]]:
    found = serving_configs(cookbook, repo_id, QWEN, 141)
    assert all(serving.origin for serving in found)
    return {(serving.tp, serving.ep) for serving in found}


@pytest.mark.parametrize("repo_id", PAIRS)
def test_every_entry_of_the_real_cookbook(repo_id: str) -> None:
    assert pairs(COOKBOOK, repo_id) == {(tp, ep) for tp, ep in PAIRS[repo_id]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (entry("{tp: many}"), "engine.tp is 'many'"),
        (entry("{tp: '8'}"), "engine.tp is '8'"),
        (entry("{tp: 0}"), "engine.tp is 0"),
        (entry("{tp: -8}"), "engine.tp is -8"),
        (entry("{tp: [8]}"), "engine.tp is [8]"),
        (entry("{tp: true}"), "engine.tp is True"),
        (entry("{tp: 8.0}"), "engine.tp is 8.0"),
        (entry("{tp: 1000000000}"), "engine.tp is 1000000000"),
        (entry("{ep: 8}"), "engine.tp is None"),
        (entry("{tp: 8, ep: 0}"), "engine.ep is 0"),
        (entry("{tp: 8, dp: '2'}"), "engine.dp is '2'"),
        (entry("{tp: 8, enable_dp_attention: 'no'}"), "enable_dp_attention is 'no'"),
        (entry("8"), "engine is 8"),
        ("families: [{models: [{model_path: v/M, hardware: [H200]}]}]", "hardware is ['H200']"),
        ("families: [{models: [{model_path: v/M, hardware: {H200: 8}}]}]", "8 is not a dict"),
        ("# v/M\na: [", "not a readable YAML file"),
    ],
)
def test_a_wrong_entry_of_the_model_is_named(
    folder: Path, tmp_path: Path, content: str, message: str
) -> None:
    (folder / "bad.yaml").write_text(content)
    with pytest.raises(InputError) as caught:
        serving_configs(tmp_path, "v/M", QWEN, 141)
    assert message in str(caught.value)
    assert "data/models/generated/v1/bad.yaml" in str(caught.value)


BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 10)
)
MERGES = "a0: &a0 {x: 1}\n" + "".join(
    f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 10)}]}}\n" for n in range(1, 10)
)


@pytest.mark.parametrize(
    "content",
    [
        "a: [",
        "!!python/object/apply:os.system ['id']",
        "[" * 100_000,
        "- " * 50_000,
        BOMB,
        MERGES,
        "a: &a [*a]",
        "a: *nothing",
        "x: " + "y" * 2_000_001,
        "!!bool x",
        "!!timestamp x",
        "a: 2026-13-45",
        "? [a]\n: b",
        "--- 1\n--- 2\n",
        b"\xff\xfe\xff",
        "",
        "[]",
        "families: {}",
        "families: [1, {models: [1, {model_path: [v/M]}, {model_path: null}]}]",
        entry("{tp: many}", "v/Other"),
    ],
    ids=range(20),
)
def test_what_is_wrong_elsewhere_stops_no_model(
    folder: Path, tmp_path: Path, content: str | bytes
) -> None:
    (folder / "a.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    assert pairs(tmp_path) == {(1, 1)}  # Its weights decide.
    (folder / "b.yaml").write_text(entry("{tp: 4, ep: 2}"))
    assert pairs(tmp_path) == {(4, 2)}


def test_a_file_passed_over_is_logged(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (folder / "odd\nname.yaml").write_text("a: [")
    pairs(tmp_path)
    (message,) = caplog.messages
    assert "odd\\nname.yaml" in message
    assert "not a readable YAML file" in message


def test_anchors_and_aliases(folder: Path, tmp_path: Path) -> None:
    (folder / "m.yaml").write_text(
        "engine: &engine {tp: 8, ep: 4}\nfamilies:\n- models:\n  - model_path: &path v/M\n"
        "    hardware: {H200: {configurations: [{engine: {<<: *engine, ep: 2}}, "
        "{engine: *engine}]}}\n  - model_path: *path\n    hardware: null\n"
    )
    assert pairs(tmp_path) == {(8, 2), (8, 4)}


def test_links_are_not_followed(folder: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "m.yaml").write_text(entry("{tp: 8}"))
    (folder / "link.yaml").symlink_to(outside / "m.yaml")
    (folder.parent / "v2").symlink_to(outside)
    assert pairs(tmp_path) == {(1, 1)}
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "data").symlink_to(tmp_path / "data")
    with pytest.raises(InputError, match="not found"):
        pairs(tmp_path / "linked")


def test_the_exact_entry_goes_before_a_siblings(folder: Path, tmp_path: Path) -> None:
    (folder / "a.yaml").write_text(entry("{tp: 8}", "v/M-FP8"))
    (folder / "c.yaml").write_text(entry("{tp: 4}", "other/M"))
    assert pairs(tmp_path) == {(8, 1)}
    (folder / "b.yaml").write_text(entry("{tp: 2}"))
    assert pairs(tmp_path) == {(2, 1)}
    assert pairs(tmp_path, "v/M-NVFP4") == {(8, 1), (2, 1)}


@pytest.mark.parametrize(
    ("name", "repo_id"),
    [
        ("qwen3-8b", "Qwen/Qwen3-8B"),
        ("qwen3-8b-fp8", "Qwen/Qwen3-8B-FP8"),
        ("minimax-m2.7", "MiniMaxAI/MiniMax-M2.7"),
        ("kimi-k2", "moonshotai/Kimi-K2-Instruct"),
        ("qwen3", None),
        ("", None),
    ],
)
def test_the_repository_of_a_slug(name: str, repo_id: str | None) -> None:
    assert repository_of(COOKBOOK, name) == repo_id


def test_without_a_cookbook_the_weights_decide() -> None:
    (serving,) = serving_configs(None, "Qwen/Qwen3-30B-A3B", QWEN, 141)
    assert serving.origin.startswith("assumed: no sgl-cookbook entry")


@pytest.mark.parametrize("gpu_memory", [0, -1, float("nan"), float("inf")])
def test_a_memory_that_is_none(gpu_memory: float) -> None:
    with pytest.raises(InputError, match="--gpu-memory"):
        serving_configs(COOKBOOK, None, M1, gpu_memory)


def test_not_a_cookbook(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is .* a clone of sgl-cookbook"):
        serving_configs(tmp_path, "v/M", QWEN, 141)
