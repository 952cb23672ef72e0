"""An inventory without a run: what `onboard inventory` answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

from tasks import manifest
from tasks.coverage_doc import model_slug
from tasks.dataset import published_definitions
from tasks.discover.cookbook import repository_of, serving_configs
from tasks.discover.phase import Inventory, read_model, read_sources, take
from tasks.discover.trees import find_trees
from tasks.errors import InputError
from tasks.model import ModelConfig, Serving
from tasks.request import parse_request
from tasks.settings import Settings


@dataclass(frozen=True)
class Question:
    """What to take the inventory of, and against what."""

    model_name: str | None = None
    hf_repo_id: str | None = None
    config: Path | None = None
    tps: Sequence[int] | None = None
    """Attention TP sizes; None for what the cookbook says."""
    eps: Sequence[int] | None = None
    page_sizes: tuple[int, ...] = (1, 64)
    sources: Path | None = None
    """Folder with the FlashInfer and SGLang trees; None to leave availability open."""
    dataset: Path | None = None
    """The dataset; None to leave open what is new."""


@dataclass(frozen=True)
class Answer:
    """An inventory, and what the model is called."""

    model_slug: str
    hf_repo_id: str | None
    inventory: Inventory


def look(question: Question, options: Settings) -> Answer:
    """Take a model's inventory.

    The model is read from the given config, or from the Hub by the given repository id, the
    workspace's manifest of that name, or the cookbook.

    Raises:
        InputError: the model is not known, or something given is wrong.
    """
    if question.model_name is None and question.config is None and question.hf_repo_id is None:
        raise InputError("give --model-name, --hf-repo-id or --config")
    # A wrong repository id is named as such, not as the name that is made of it.
    parse_request(model_name="unnamed", hf_repo_id=question.hf_repo_id, workspace=Path())
    name = question.model_name
    if name is None:
        name = model_slug(question.hf_repo_id or _called(question.config))
    repo_id = question.hf_repo_id
    if repo_id is None and question.config is None:
        repo_id = _known_repository(name, options)
    request = parse_request(
        model_name=name, hf_repo_id=repo_id, config=question.config, workspace=options.workspace
    )
    cache = options.workspace / ".cache"
    model = read_model(request, options, cache)
    servings = _servings(question, repo_id, model, options)
    indexes = None
    if question.sources:
        trees = find_trees(question.sources)
        indexes = read_sources(trees.flashinfer, trees.sglang, trees.shas, cache)
    published = published_definitions(question.dataset) if question.dataset else None
    return Answer(name, repo_id, take(model, servings, indexes, published))


def _called(config: Path | None) -> str:
    """Return the model a config file is called after, in `{org}--{model}.json` too."""
    if config is None:
        return ""
    stem = config.absolute().parent.name if config.name == "config.json" else config.stem
    return stem.rsplit("--", 1)[-1]


def _known_repository(name: str, options: Settings) -> str:
    path = manifest.latest(options.workspace, name)
    known = manifest.load(path).hf_repo_id if path else None
    cookbook = options.clone("sgl_cookbook")
    if known is None and cookbook.is_dir():
        known = repository_of(cookbook, name)
    if known is None:
        raise InputError(
            f"--model-name: {name!r} is neither in a manifest of {options.workspace} nor in its "
            "cookbook; give --hf-repo-id or --config FILE"
        )
    return known


def _servings(
    question: Question, repo_id: str | None, model: ModelConfig, options: Settings
) -> list[Serving]:
    if question.tps is not None or question.eps is not None:
        degrees = product(question.tps or (1,), question.eps or (1,))
        return [Serving(tp, ep, "--tp-list, --ep-list", question.page_sizes) for tp, ep in degrees]
    cookbook = options.clone("sgl_cookbook")
    found = serving_configs(
        cookbook if cookbook.is_dir() else None, repo_id, model, options.gpu_memory_gb
    )
    return [replace(serving, page_sizes=question.page_sizes) for serving in found]
