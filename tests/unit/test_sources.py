"""The source indexes, on the real packages and on small trees."""

from __future__ import annotations

from pathlib import Path

import pytest

from tasks.discover.sources import (
    FlashInferIndex,
    SglangIndex,
    cached,
    index_flashinfer,
    index_sglang,
)
from tasks.errors import InputError


@pytest.fixture(scope="session")
def flashinfer(cloned: Path) -> FlashInferIndex:
    return index_flashinfer(cloned / "flashinfer")


@pytest.fixture(scope="session")
def sglang(cloned: Path) -> SglangIndex:
    return index_sglang(cloned / "sglang")


def test_counts_of_the_real_flashinfer(flashinfer: FlashInferIndex) -> None:
    # An independent scan of flashinfer-python 0.6.15.post1: 247 decorated, 127 with a template.
    assert len(flashinfer.apis) == 247
    assert sum(api.has_template for api in flashinfer.apis.values()) == 127


def test_public_paths_resolve_through_packages(flashinfer: FlashInferIndex) -> None:
    api = flashinfer.find("flashinfer.fused_moe.trtllm_fp8_block_scale_moe")
    assert api is not None
    assert (api.file, api.has_template) == ("flashinfer/fused_moe/core.py", True)
    assert flashinfer.find("flashinfer.BatchDecodeWithPagedKVCacheWrapper", "run") is not None
    assert flashinfer.find("flashinfer.decode.BatchDecodeWithPagedKVCacheWrapper") is None
    assert flashinfer.find("flashinfer.norm.no_such_norm") is None


@pytest.mark.parametrize(
    ("api", "site"),
    # Call sites found by an independent scan of sglang 0.5.17 and sglang-kernel 0.4.5.
    [
        ("flashinfer.norm.rmsnorm", "sgl-kernel/python/sgl_kernel/elementwise.py:120"),
        ("flashinfer.norm.fused_add_rmsnorm", "sgl-kernel/python/sgl_kernel/elementwise.py:160"),
        ("flashinfer.norm.layernorm", "python/sglang/srt/layers/layernorm.py:81"),
        ("flashinfer.sampling.top_k_top_p_sampling_from_probs", "srt/layers/sampler.py:277"),
        (
            "flashinfer.fused_moe.trtllm_fp8_block_scale_moe",
            "srt/layers/moe/flashinfer_trtllm_moe.py:109",
        ),
        (
            "flashinfer.decode.BatchDecodeWithPagedKVCacheWrapper",
            "srt/layers/attention/flashinfer_backend.py:500",
        ),
        ("flashinfer.cascade.merge_state", "srt/layers/attention/flashinfer_backend.py:107"),
    ],
)
def test_real_call_sites(
    flashinfer: FlashInferIndex, sglang: SglangIndex, api: str, site: str
) -> None:
    defined = flashinfer.resolve(api)
    sites = [
        place
        for origin, places in sglang.references.items()
        if flashinfer.resolve(origin) == defined
        for place in places
    ]
    assert any(place.endswith(site) for place in sites), sites


@pytest.mark.parametrize("name", ["top_k_sampling_from_probs", "top_p_sampling_from_probs"])
def test_apis_without_a_caller(sglang: SglangIndex, name: str) -> None:
    assert not [origin for origin in sglang.references if origin.endswith(f".{name}")]


def test_architectures(sglang: SglangIndex) -> None:
    assert len(sglang.architectures) == 241
    assert sglang.architectures["Phi3ForCausalLM"] == "python/sglang/srt/models/llama.py"


def _tree(root: Path, files: dict[str, str]) -> Path:
    (root / "python/sglang/srt/models").mkdir(parents=True)
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_origin_decides_and_not_the_name(tmp_path: Path) -> None:
    root = _tree(
        tmp_path,
        {
            "python/sglang/srt/own.py": (
                "from sglang.kernels import rmsnorm  # not flashinfer\nrmsnorm()\n"
            ),
            "python/sglang/srt/lazy.py": (
                "def LazyImport(a, b): ...\n"
                "sample = LazyImport('flashinfer.sampling', 'top_k')\n"
                "def f():\n    return sample()\n"
            ),
            "python/sglang/srt/module.py": "import flashinfer.norm as n\nn.rmsnorm(1)\n",
            "python/sglang/srt/branches.py": (
                "try:\n    from flashinfer.a import f\n"
                "except ImportError:\n    from sgl_kernel import f\nf()\n"
            ),
            "sgl-kernel/python/sgl_kernel/a.py": (
                "import flashinfer.norm as _n\ndef f(x):\n    return _n.gemma(x)\n"
            ),
            "python/sglang/srt/bom.py": "\ufefffrom flashinfer import g\ng()\n",
            "python/sglang/srt/broken.py": "from flashinfer import (\n",
        },
    )
    assert index_sglang(root).references == {
        "flashinfer.sampling.top_k": ["python/sglang/srt/lazy.py:4"],
        "flashinfer.norm.rmsnorm": ["python/sglang/srt/module.py:2"],
        "flashinfer.a.f": ["python/sglang/srt/branches.py:5"],
        "flashinfer.g": ["python/sglang/srt/bom.py:2"],
        "flashinfer.norm.gemma": [
            "python/sglang/srt/branches.py:5 via sgl-kernel/python/sgl_kernel/a.py:3"
        ],
    }


def test_not_a_checkout(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is it an SGLang checkout"):
        index_sglang(tmp_path)
    with pytest.raises(InputError, match="is it a FlashInfer checkout"):
        index_flashinfer(tmp_path)


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"version": 0}', '{"version": 1, "apis": 3}'])
def test_damaged_cache_is_rebuilt(tmp_path: Path, damage: str) -> None:
    built = []

    def build() -> FlashInferIndex:
        built.append(1)
        return FlashInferIndex(apis={}, exports={"a": "b"})

    for _ in range(2):
        assert cached(tmp_path, FlashInferIndex, "abc1234", build).exports == {"a": "b"}
    assert len(built) == 1
    (path,) = tmp_path.iterdir()
    path.write_text(damage)
    assert cached(tmp_path, FlashInferIndex, "abc1234", build).exports == {"a": "b"}
    assert len(built) == 2
