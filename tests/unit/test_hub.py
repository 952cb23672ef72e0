"""Fetching configs with the real client from an HTTP server in the Hub's place."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest

from tasks.discover.hub import fetch_config
from tasks.errors import ConfigError, InputError
from tasks.model import read_config, weight_bytes
from tasks.settings import Settings
from tests.conftest import DATA, listening

NEMOTRON = "nvidia--NVIDIA-Nemotron-3-Super-120B-A12B-FP8"
FILES = {
    "/acme/plain/resolve/main/config.json": DATA / "configs" / "Qwen--Qwen3-32B.json",
    "/acme/quantised/resolve/main/config.json": DATA / "configs" / f"{NEMOTRON}.json",
    "/acme/quantised/resolve/main/hf_quant_config.json": DATA
    / "hf_quant"
    / f"{NEMOTRON}.hf_quant_config.json",
}


class Handler(BaseHTTPRequestHandler):
    def answer(self) -> bytes:
        path = FILES.get(self.path)
        status, code = (200, None) if path else (404, "EntryNotFound")
        if self.path.startswith("/acme/nowhere"):
            status, code = 401, "RepoNotFound"
        if self.path.startswith("/acme/gated"):
            status, code = 403, "GatedRepo"
        body = path.read_bytes() if path and status == 200 else b""
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("X-Repo-Commit", "a" * 40)
        self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        return body

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.wfile.write(self.answer())

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def hub() -> Iterator[str]:
    with listening(Handler) as url:
        yield url


def fetch(hub: str, repo_id: str, tmp_path: Path) -> Path:
    return fetch_config(repo_id, Settings(workspace=tmp_path, hf_endpoint=hub), tmp_path / "hub")


def test_config_alone(hub: str, tmp_path: Path) -> None:
    model = read_config(fetch(hub, "acme/plain", tmp_path), "acme/plain/config.json")
    assert (model.num_heads, model.quantization) == (64, None)


def test_config_with_its_quantisation_beside_it(hub: str, tmp_path: Path) -> None:
    model = read_config(fetch(hub, "acme/quantised", tmp_path), "acme/quantised/config.json")
    assert model.quantization is not None
    assert (model.quantization.method, model.quantization.width) == ("modelopt", "fp8")
    # Nemotron 3 Super has 120 billion parameters, one byte each.
    assert weight_bytes(model) / 1e9 == pytest.approx(120, rel=0.05)


@pytest.mark.parametrize(
    ("repo_id", "kind", "message"),
    [
        ("acme/nowhere", ConfigError, "acme/nowhere: no such model on the Hub"),
        ("acme/gated", ConfigError, "acme/gated: gated on the Hub"),
        ("acme/other", ConfigError, "acme/other: has no config.json"),
        ("a/b/c", InputError, "'a/b/c' is not a Hugging Face repository id"),
        ("../../x", InputError, "'../../x' is not a Hugging Face repository id"),
    ],
)
def test_what_cannot_be_fetched(
    hub: str, tmp_path: Path, repo_id: str, kind: type[InputError], message: str
) -> None:
    with pytest.raises(kind) as caught:
        fetch(hub, repo_id, tmp_path)
    assert message in str(caught.value)


def test_without_the_hub_what_it_answered_before_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with listening(Handler) as url:
        for repo_id in ("acme/plain", "acme/quantised"):
            fetch(url, repo_id, tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # no waiting for it
    assert read_config(fetch(url, "acme/plain", tmp_path)).quantization is None
    assert read_config(fetch(url, "acme/quantised", tmp_path)).quantization is not None
    (quantisation,) = tmp_path.glob("hub/*quantised/snapshots/*/hf_quant_config.json")
    quantisation.unlink()
    with pytest.raises(ConfigError, match="its files are not all in the cache"):
        fetch(url, "acme/quantised", tmp_path)
