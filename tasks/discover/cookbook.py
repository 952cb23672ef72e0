"""Serving configurations: how sgl-cookbook serves a model.

Every version folder is searched (a model lives in the one that added it). A model is matched by its
exact repository id, then by vendor and base name, so that a quantised sibling's entry serves.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from tasks.errors import InputError
from tasks.model import ModelConfig, Serving

_QUANTISED = re.compile(r"-(FP8|NVFP4|MXFP4|FP4|INT4|INT8|AWQ|GPTQ|BF16)$", re.IGNORECASE)
_LARGEST_TP = 64


def _documents(cookbook: Path) -> Iterator[tuple[str, Any]]:
    folder = cookbook / "data" / "models" / "generated"
    if not folder.is_dir():
        raise InputError(f"{folder}: not found; is {cookbook} a clone of sgl-cookbook?")
    for path in sorted(folder.glob("*/*.yaml")):
        try:
            yield str(path.relative_to(cookbook)), yaml.safe_load(path.read_bytes())
        except (yaml.YAMLError, OSError, UnicodeError, RecursionError) as error:
            first = str(error).splitlines()[0]
            raise InputError(f"{path}: not a readable YAML file ({first})") from error


def _models(cookbook: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for source, document in _documents(cookbook):
        for family in _items(document, "families"):
            for model in _items(family, "models"):
                yield source, model


def _items(node: Any, key: str) -> list[dict[str, Any]]:
    found = node.get(key) if isinstance(node, dict) else None
    return [item for item in found if isinstance(item, dict)] if isinstance(found, list) else []


def _degree(value: Any, where: str) -> int:
    """Return a degree of parallelism.

    Raises:
        InputError: it is not a positive integer.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InputError(f"{where} is {value!r}, not a positive integer")
    return value


def _servings(source: str, model: dict[str, Any]) -> Iterator[Serving]:
    hardware = model.get("hardware")
    for name, machine in (hardware if isinstance(hardware, dict) else {}).items():
        for configuration in _items(machine, "configurations"):
            engine = configuration.get("engine")
            if not isinstance(engine, dict):
                continue
            where = f"{source}: {model.get('model_path')} on {name}"
            tp = _degree(engine.get("tp"), f"{where}: engine.tp")
            ep = _degree(engine.get("ep") or 1, f"{where}: engine.ep")
            dp = _degree(engine.get("dp") or 1, f"{where}: engine.dp")
            if engine.get("enable_dp_attention"):
                tp = max(1, tp // dp)
            yield Serving(tp=tp, ep=ep, origin=f"sgl-cookbook {source}")


def _same_model(repo_id: str, path: str) -> bool:
    vendor, _, base = repo_id.partition("/")
    other_vendor, _, other = path.partition("/")
    return vendor == other_vendor and _QUANTISED.sub("", base) == _QUANTISED.sub("", other)


def serving_configs(
    cookbook: Path, repo_id: str | None, model: ModelConfig, gpu_memory_gb: float
) -> list[Serving]:
    """Return the distinct (attention tp, ep) pairs the model is served with.

    Without an entry in the cookbook: the smallest power of two of GPUs whose memory holds the
    weights, said so in `origin`.

    Raises:
        InputError: the cookbook is damaged, or the model fits no sensible number of GPUs.
    """
    entries = list(_models(cookbook)) if repo_id else []
    for matches in (lambda path: path == repo_id, lambda path: _same_model(repo_id or "", path)):
        found = [
            serving
            for source, entry in entries
            if isinstance(entry.get("model_path"), str) and matches(entry["model_path"])
            for serving in _servings(source, entry)
        ]
        if found:
            return list({(s.tp, s.ep): s for s in reversed(found)}.values())[::-1]
    weights = model.weight_bytes() / 1e9
    tp = 1
    while tp * gpu_memory_gb < weights:
        tp *= 2
        if tp > _LARGEST_TP:
            raise InputError(
                f"{model.source}: about {weights:.0f} GB of weights do not fit {_LARGEST_TP} GPUs "
                f"of {gpu_memory_gb:g} GB"
            )
    return [
        Serving(
            tp=tp,
            ep=1,
            origin=(
                f"assumed: no sgl-cookbook entry; about {weights:.0f} GB of weights fit "
                f"{tp} x {gpu_memory_gb:g} GB"
            ),
        )
    ]
