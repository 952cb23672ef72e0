"""Phase 1 of one model, from its config and the clones to classified kernels."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tasks import dataset, manifest
from tasks.discover.cookbook import serving_configs
from tasks.discover.hub import fetch_config
from tasks.discover.inventory import Kernel, Sources, classify, model_class, requirements
from tasks.discover.sources import (
    FlashInferIndex,
    SglangIndex,
    cached,
    index_flashinfer,
    index_sglang,
)
from tasks.errors import InputError
from tasks.manifest import RepoShas, RunManifest
from tasks.model import ModelConfig, Serving, read_config
from tasks.ops.base import NotProduced, Unmapped
from tasks.request import OnboardRequest
from tasks.settings import Settings


@dataclass(frozen=True)
class Inventory:
    """What phase 1 found for one model."""

    model: ModelConfig
    model_class: str
    servings: list[Serving]
    kernels: list[Kernel]
    rejected: list[NotProduced]
    unmapped: list[Unmapped]

    @property
    def fingerprint(self) -> str:
        """A digest of the result, to tell whether anything changed since the last run."""
        facts = [kernel.entry().model_dump(mode="json") for kernel in self.kernels]
        others = [vars(item) for item in (*self.rejected, *self.unmapped)]
        return hashlib.sha256(json.dumps([facts, others], sort_keys=True).encode()).hexdigest()[:16]

    def record(
        self, run: RunManifest, shas: Mapping[str, str], repo_id: str | None, *, refresh: bool
    ) -> None:
        """Write what was found into a manifest, keeping what later phases wrote."""
        run.repo_shas = RepoShas(**shas)
        run.hf_repo_id = run.hf_repo_id or repo_id
        manifest.merge_discovery(run, [k.entry() for k in self.kernels], refresh=refresh)
        run.architecture, run.model_class = self.model.architecture, self.model_class
        run.serving = [{**vars(s), "page_sizes": list(s.page_sizes)} for s in self.servings]
        run.unmapped = [dict(vars(item)) for item in self.unmapped]
        run.rejected = [dict(vars(item)) for item in self.rejected]
        run.phase1_fingerprint = self.fingerprint

    def as_json(self, model_slug: str, hf_repo_id: str | None) -> dict[str, Any]:
        """Return the inventory as `onboard inventory --json` prints it."""
        return {
            "model_slug": model_slug,
            "hf_repo_id": hf_repo_id,
            "architecture": self.model.architecture,
            "model_class": self.model_class,
            "serving": [vars(serving) for serving in self.servings],
            "kernels": [kernel.as_json(model_slug) for kernel in self.kernels],
            "unmapped": [{**vars(item), "status": "—"} for item in self.unmapped],
            "rejected": [vars(item) for item in self.rejected],
        }


def read_model(request: OnboardRequest, options: Settings, cache: Path) -> ModelConfig:
    """Read the model's config from the given file or the Hub.

    Raises:
        InputError: neither a file nor a repository is known, or the config is wrong.
    """
    if request.config:
        return read_config(request.config)
    if not request.hf_repo_id:
        raise InputError(
            f"{request.model_name}: give --hf-repo-id to read config.json from the Hub, or "
            "--config FILE"
        )
    path = fetch_config(request.hf_repo_id, options, cache / "hub")
    return read_config(path, f"{request.hf_repo_id}/config.json")


def inventory(
    request: OnboardRequest,
    clones: Mapping[str, Path],
    shas: Mapping[str, str],
    cache: Path,
    options: Settings,
) -> Inventory:
    """Compute and classify the requested model's kernels.

    Args:
        request: names the model and its config.
        clones: the four phase 0 clones by name.
        shas: their short SHAs.
        cache: folder for the source indexes and the config.
        options: settings (the Hub, memory of one GPU).

    Raises:
        ConfigError: the config is wrong.
        InputError: a clone is not what it should be.
    """
    model = read_model(request, options, cache)
    servings = serving_configs(
        clones["sgl_cookbook"], request.hf_repo_id, model, options.gpu_memory_gb
    )
    sources = read_sources(clones["flashinfer"], clones["sglang"], shas, cache)
    published = dataset.published_definitions(clones["flashinfer_trace"])
    return take(model, servings, sources, published)


def read_sources(flashinfer: Path, sglang: Path, shas: Mapping[str, str], cache: Path) -> Sources:
    """Index the two source trees, or take the indexes of these commits from the cache.

    Raises:
        InputError: a tree is not what it should be.
    """
    folder = cache / "sources"
    return Sources(
        flashinfer=cached(
            folder, FlashInferIndex, shas["flashinfer"], lambda: index_flashinfer(flashinfer)
        ),
        sglang=cached(folder, SglangIndex, shas["sglang"], lambda: index_sglang(sglang)),
        shas=shas,
    )


def take(
    model: ModelConfig,
    servings: list[Serving],
    sources: Sources | None = None,
    published: Mapping[str, str] | None = None,
) -> Inventory:
    """Compute a model's kernels and classify them by what is at hand.

    Raises:
        ConfigError: a field that an op module needs is missing or wrong.
    """
    where, path = "", ""
    if sources:
        where = model_class(model, sources.sglang, sources.shas["sglang"])
        path = sources.sglang.architectures.get(model.architecture, "")
    needed = requirements(model, servings, path)
    return Inventory(
        model=model,
        model_class=where,
        servings=servings,
        kernels=[classify(spec, sources, published) for spec in needed.kernels],
        rejected=needed.rejected,
        unmapped=needed.unmapped,
    )
