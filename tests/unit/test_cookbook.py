"""Serving configurations, from the real cookbook and from wrong files."""

from __future__ import annotations

from pathlib import Path

import pytest

from tasks.discover.cookbook import serving_configs
from tasks.errors import InputError
from tasks.model import read_config
from tests.conftest import DATA

COOKBOOK = DATA / "sgl-cookbook"
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


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a: [", "not a readable YAML file"),
        ("!!python/object/apply:os.system ['id']", "not a readable YAML file"),
        (
            "families: [{models: [{model_path: v/M, hardware: {H: {configurations: "
            "[{engine: {tp: many}}]}}}]}]",
            "engine.tp is 'many'",
        ),
    ],
)
def test_wrong_file_is_named(tmp_path: Path, content: str, message: str) -> None:
    folder = tmp_path / "data" / "models" / "generated" / "v1"
    folder.mkdir(parents=True)
    (folder / "bad.yaml").write_text(content)
    with pytest.raises(InputError) as caught:
        serving_configs(tmp_path, "v/M", QWEN, 141)
    assert message in str(caught.value)
    assert "bad.yaml" in str(caught.value)


def test_not_a_cookbook(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is .* a clone of sgl-cookbook"):
        serving_configs(tmp_path, "v/M", QWEN, 141)
