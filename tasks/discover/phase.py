"""Phase 1 of one model, from its config and the clones to classified kernels."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tasks import dataset
from tasks.discover.cookbook import serving_configs
from tasks.discover.hub import fetch_config
from tasks.discover.inventory import Sources, check_architecture, classify, required_kernels
from tasks.discover.sources import (
    FlashInferIndex,
    SglangIndex,
    cached,
    index_flashinfer,
    index_sglang,
)
from tasks.errors import InputError
from tasks.manifest import KernelEntry
from tasks.model import ModelConfig, Serving, read_config
from tasks.ops.base import NotProduced
from tasks.request import OnboardRequest
from tasks.settings import Settings


@dataclass(frozen=True)
class Inventory:
    """What phase 1 found for one model."""

    model: ModelConfig
    model_class: str
    servings: list[Serving]
    kernels: list[KernelEntry]
    not_produced: list[NotProduced]

    @property
    def fingerprint(self) -> str:
        """A digest of the result, to tell whether anything changed since the last run."""
        facts = [entry.model_dump(mode="json", exclude_unset=True) for entry in self.kernels]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


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
        ConfigError: the config is wrong or its architecture unknown.
        InputError: a clone is not what it should be.
    """
    model = read_model(request, options, cache)
    sources = Sources(
        flashinfer=cached(
            cache / "sources",
            FlashInferIndex,
            shas["flashinfer"],
            lambda: index_flashinfer(clones["flashinfer"]),
        ),
        sglang=cached(
            cache / "sources", SglangIndex, shas["sglang"], lambda: index_sglang(clones["sglang"])
        ),
        shas=shas,
        published=dataset.published_definitions(clones["flashinfer_trace"]),
    )
    model_class = check_architecture(model, sources.sglang, shas["sglang"])
    servings = serving_configs(
        clones["sgl_cookbook"], request.hf_repo_id, model, options.gpu_memory_gb
    )
    specs, not_produced = required_kernels(model, servings)
    return Inventory(
        model=model,
        model_class=model_class,
        servings=servings,
        kernels=[classify(spec, sources) for spec in specs],
        not_produced=not_produced,
    )
