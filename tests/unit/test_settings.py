"""Settings: where they come from, and what never leaves them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tasks.errors import InputError
from tasks.settings import load_settings


def test_workspace_file_environment_and_defaults(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "onboard.toml").write_text(
        '[remotes]\nsglang = "remotes/sglang.git"\n[collect]\nrecorded_dumps = "dumps"\n'
    )
    monkeypatch.setenv("ONBOARD_REMOTES__FLASHINFER", "git@example.org:fork/flashinfer.git")
    settings = load_settings(tmp_path)
    assert settings.remotes.sglang == str(tmp_path / "remotes/sglang.git")
    assert settings.remotes.flashinfer == "git@example.org:fork/flashinfer.git"
    assert settings.remotes.sgl_cookbook == "https://github.com/sgl-project/sgl-cookbook.git"
    assert settings.collect.recorded_dumps == tmp_path / "dumps"
    assert settings.clone("flashinfer_trace") == tmp_path / "flashinfer-trace"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[collect]\nmax_workloads = 0\n", "settings: collect.max_workloads: "),
        ("[remotes]\nnope = 'x'\n", "settings: remotes.nope: "),
        ("not toml", "onboard.toml: cannot be read"),
    ],
)
def test_wrong_settings_are_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "onboard.toml").write_text(text)
    with pytest.raises(InputError) as caught:
        load_settings(tmp_path)
    assert message in str(caught.value)


def test_tokens_do_not_print(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONBOARD_HF_TOKEN", "hf_s3cret")
    settings = load_settings(tmp_path)
    assert settings.hf_token is not None
    assert settings.hf_token.get_secret_value() == "hf_s3cret"
    assert "s3cret" not in f"{settings!r}{settings.model_dump_json()}"


def test_secrets_of_a_container_are_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tasks.settings._SECRETS", tmp_path)
    (tmp_path / "onboard_github_token").write_text("ghp_s3cret\n")
    (tmp_path / "onboard_hf_token").write_text("\n")  # none was given
    settings = load_settings(tmp_path)
    assert settings.github_token is not None
    assert settings.github_token.get_secret_value() == "ghp_s3cret"
    assert settings.hf_token is None
    monkeypatch.setenv("ONBOARD_GITHUB_TOKEN", "another")
    found = load_settings(tmp_path).github_token
    assert found is not None
    assert found.get_secret_value() == "another"
