"""Settings: where things live and where they go.

Read, first match wins, from arguments, environment variables (`ONBOARD_...`, nested with `__`),
files of a container's secrets (`/run/secrets/onboard_github_token`, ...), and `onboard.toml` in the
workspace. Tokens are `SecretStr`: they do not print, dump, or reach a
manifest.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, ClassVar, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, field_validator
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SecretsSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from tasks.errors import InputError

REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
"""Owner and name of a repository, on the Hub or on GitHub."""
_SECRETS = Path("/run/secrets")
"""Where a container finds the secrets that it is given."""
HF_TOKEN_BLOCK = "hf-token"  # noqa: S105  its name, not its value
"""The Prefect server's Secret block with the Hub's token."""


class Remotes(BaseModel):
    """Git remotes, each any git URL or a local path."""

    model_config = ConfigDict(extra="forbid")

    sglang: str = "https://github.com/sgl-project/sglang.git"
    flashinfer: str = "https://github.com/flashinfer-ai/flashinfer.git"
    sgl_cookbook: str = "https://github.com/sgl-project/sgl-cookbook.git"
    flashinfer_trace: str = "https://huggingface.co/datasets/flashinfer-ai/flashinfer-trace"
    flashinfer_bench: str = "https://github.com/flashinfer-ai/flashinfer-bench.git"


class CollectSettings(BaseModel):
    """How workloads are collected."""

    model_config = ConfigDict(extra="forbid")

    recorded_dumps: Path | None = Field(
        default=None,
        description="Folder with one sub-folder of FlashInfer level-10 dumps per model slug.",
    )
    max_workloads: int = Field(default=20, ge=1, le=10_000)
    serve: Literal["no", "here", "pool"] = Field(
        default="no",
        description="Where a run serves the model if there are no recorded dumps: on this host's "
        "GPUs, or in runs of `collect-workloads` and `evaluate-baseline` on the GPU work pool.",
    )
    options: dict[str, Any] = Field(
        default={},
        description="How a run serves the model: fields of `onboard collect`'s request, such as "
        "batch_sizes, isl, osl, rounds, model_path, server_flags.",
    )
    crashes: int = Field(
        default=3,
        ge=0,
        description="How often a run that crashed, with its container or host, starts again.",
    )
    python: Path | None = Field(
        default=None, description="Interpreter that SGLang is installed for; this one if not given."
    )
    gpus: list[str] | None = Field(
        default=None, description="GPUs to lease, by number or UUID; all visible ones if not given."
    )
    lease_dir: Path = Field(
        default=Path("/tmp/onboard-gpu-leases"),  # noqa: S108  shared by all who use these GPUs
        description="Folder of the GPUs' locks, shared by everyone who leases them.",
    )
    lease_seconds: float | None = Field(
        default=None, gt=0, description="Longest wait for GPUs; no limit if not given."
    )
    start_seconds: float = Field(
        default=1800, gt=0, description="Longest start of a server: weights, compiling kernels."
    )
    stall_seconds: float = Field(
        default=900, gt=0, description="Longest time without an answer before a server has failed."
    )
    disk_gb: float = Field(
        default=2.0, ge=0.05, description="Most that a session keeps on disk at a time."
    )
    row_seconds: int | None = Field(
        default=None,
        ge=1,
        description="Longest evaluation of one workload; what its op type needs if not given.",
    )
    iterations: int | None = Field(
        default=None, ge=1, description="Timed runs of a trial; as its op type needs if not given."
    )
    trials: int | None = Field(
        default=None, ge=1, description="Trials of a workload; as its op type needs if not given."
    )
    incomplete_calls: bool = Field(
        default=False,
        description="Count calls that did not complete: a host without a GPU completes none.",
    )

    @property
    def disk_bytes(self) -> int:
        """`disk_gb` in bytes."""
        return int(self.disk_gb * 1e9)


def github_site(api_url: str) -> str:
    """Return where people look at what a GitHub API is about, without a slash at the end.

    Raises:
        InputError: the URL is none.
    """
    try:
        parts = urlsplit(api_url)
        wrong = parts.scheme not in {"http", "https"} or not parts.hostname or "@" in parts.netloc
        wrong = wrong or (parts.port or 1) < 1
    except ValueError:
        wrong = True
    if wrong:
        raise InputError(
            "publish.github_url: is not the URL of a GitHub API (https://api.github.com, "
            "https://HOST/api/v3)"
        )
    enterprise = parts.path.strip("/")
    return f"{parts.scheme}://{parts.netloc if enterprise else parts.netloc.removeprefix('api.')}"


class PublishSettings(BaseModel):
    """Where pull requests and issues go."""

    model_config = ConfigDict(extra="forbid")

    to: Literal["auto", "outbox"] = Field(
        default="auto",
        description="Upstream where there is a token for it, else the outbox; or only the outbox.",
    )
    dataset: str = Field(
        default="flashinfer-ai/flashinfer-trace", description="Dataset repository on the Hub."
    )
    bench: str = "flashinfer-ai/flashinfer-bench"
    flashinfer: str = "flashinfer-ai/flashinfer"
    sglang: str = "sgl-project/sglang"
    github_url: str = Field(
        default="https://api.github.com",
        description="GitHub's API; https://HOST/api/v3 of a GitHub Enterprise server.",
    )

    @field_validator("dataset", "bench", "flashinfer", "sglang")
    @classmethod
    def _repository(cls, value: str) -> str:
        if not REPOSITORY.fullmatch(value):
            raise ValueError(f"{value!r} is not a repository (owner/name)")
        return value


class Settings(BaseSettings):
    """Everything that is not the run itself."""

    model_config = SettingsConfigDict(
        env_prefix="ONBOARD_", env_nested_delimiter="__", extra="ignore"
    )
    toml_file: ClassVar[Path | None] = None

    workspace: Path = Path("workspace")
    remotes: Remotes = Remotes()
    collect: CollectSettings = CollectSettings()
    publish: PublishSettings = PublishSettings()
    github_token: SecretStr | None = None
    hf_endpoint: str | None = None
    hf_token: SecretStr | None = None
    gpu_memory_gb: float = Field(default=141.0, gt=0, description="Memory of one GPU, in GB.")

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Add files of secrets, and the workspace's `onboard.toml` as the last source."""
        del dotenv_settings, file_secret_settings
        sources = [init_settings, env_settings]
        if _SECRETS.is_dir():
            sources.append(SecretsSettingsSource(settings_cls, _SECRETS))
        if cls.toml_file:
            sources.append(TomlConfigSettingsSource(settings_cls, cls.toml_file))
        return tuple(sources)

    @field_validator("hf_token", "github_token")
    @classmethod
    def _none_if_empty(cls, value: SecretStr | None) -> SecretStr | None:
        return value if value and value.get_secret_value().strip() else None

    @property
    def outbox(self) -> Path:
        """Where pull requests and issues are put when they cannot be sent."""
        return self.workspace / "outbox"

    def drafts(self, run: str) -> Path:
        """Return where a run's drafted definitions are kept until they are staged."""
        return self.workspace / ".cache" / "drafts" / run

    def sessions(self, model_slug: str) -> Path:
        """Return the folder of a model's serving sessions."""
        return self.workspace / "collected" / model_slug / "sessions"

    def provenance(self, model_slug: str, definition_name: str) -> Path:
        """Return the file that says what a definition's workloads were made of."""
        return self.workspace / "collected" / model_slug / f"{definition_name}.json"

    def clone(self, name: str) -> Path:
        """Return the folder of a repository's clone; the names are those the procedures use."""
        return self.workspace / name.replace("_", "-")


def load_settings(workspace: Path | None = None) -> Settings:
    """Read the settings that hold in `workspace` (default: `ONBOARD_WORKSPACE`, `./workspace`).

    Relative paths in `onboard.toml` are relative to the workspace.

    Raises:
        InputError: a value is wrong; the message names the field and where it may come from.
    """
    try:
        folder = (workspace or Settings().workspace).expanduser().absolute()
        source = folder / "onboard.toml"
        with_file = type("Settings", (Settings,), {"toml_file": source})
        settings: Settings = with_file(workspace=folder)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise InputError(
            f"settings: {field}: {first['msg']} (from ONBOARD_{field.upper().replace('.', '__')} "
            "or the workspace's onboard.toml)"
        ) from error
    except (ValueError, OSError) as error:
        raise InputError(f"{folder / 'onboard.toml'}: cannot be read ({error})") from error
    dumps = settings.collect.recorded_dumps
    if dumps is not None:
        settings.collect.recorded_dumps = folder / dumps.expanduser()
    settings.collect.lease_dir = folder / settings.collect.lease_dir.expanduser()
    for name, url in settings.remotes.model_dump().items():
        if "://" not in url and ":" not in url:
            setattr(settings.remotes, name, str(folder / Path(url).expanduser()))
    return settings
