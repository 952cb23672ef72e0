"""Serving configurations: how sgl-cookbook serves a model.

Every version folder is searched (a model lives in the one that added it). A model is matched by its
exact repository id, then by vendor and base name, so that a quantised sibling's entry serves.

The files come from a git remote: links are not followed, and what is too large, too deep or grows
too much by its aliases is refused. A file that cannot be read is passed over with a warning, unless
it is the one that would say how the wanted model is served.
"""

from __future__ import annotations

import functools
import logging
import math
import os
import re
import reprlib
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from tasks.coverage_doc import model_slug
from tasks.errors import InputError
from tasks.model import ModelConfig, Serving, weight_bytes

FOLDER = "data/models/generated"
_QUANTISED = re.compile(r"-(FP8|NVFP4|MXFP4|FP4|INT4|INT8|AWQ|GPTQ|BF16)$", re.IGNORECASE)
_LARGEST_TP = 64
_LARGEST_DEGREE = 1024
MAX_BYTES = 2_000_000
_MAX_DEPTH = 64
"""libyaml's composer recurses in C: deep nesting would not raise, it would crash."""
_MAX_NODES = 500_000
"""Nodes of a file with its aliases written out; the largest real file has under 10,000."""

_log = logging.getLogger(__name__)
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def shown(text: str) -> str:
    """Return text from a repository fit for one line of output, escaped where it is not."""
    return text if text.isprintable() else ascii(text)


def _check_shape(raw: bytes) -> None:
    """Refuse nesting and aliases that no honest file has; one pass, nothing is built.

    Raises:
        ValueError: too deep, too large when written out, or an alias without its anchor.
    """
    sizes: dict[str, int] = {}
    open_nodes: list[tuple[str | None, int]] = [(None, 0)]
    for event in yaml.parse(raw, Loader=_LOADER):
        anchor: str | None = getattr(event, "anchor", None)
        size = 1
        if isinstance(event, yaml.CollectionStartEvent):
            if len(open_nodes) > _MAX_DEPTH:
                raise ValueError(f"nested more than {_MAX_DEPTH} deep")
            open_nodes.append((anchor, 1))
            continue
        if isinstance(event, yaml.AliasEvent):
            if anchor is None or anchor not in sizes:
                raise ValueError("an alias to itself or to nothing")
            size, anchor = sizes[anchor], None
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, size = open_nodes.pop()
        elif not isinstance(event, yaml.ScalarEvent):
            continue
        if anchor:
            sizes[anchor] = size
        outer, so_far = open_nodes[-1]
        if so_far + size > _MAX_NODES:
            raise ValueError(f"more than {_MAX_NODES} nodes when its aliases are written out")
        open_nodes[-1] = (outer, so_far + size)


@functools.lru_cache(maxsize=256)  # a night asks the same files about many models
def read_models(raw: bytes, where: str) -> tuple[dict[str, Any], ...]:
    """Return the model entries of a cookbook file's content; read only.

    Args:
        raw: the content.
        where: the file, for messages.

    Raises:
        InputError: it is not a YAML file of a sane size and shape.
    """
    if len(raw) > MAX_BYTES:
        raise InputError(f"{where}: not a readable YAML file (more than {MAX_BYTES} bytes)")
    try:
        _check_shape(raw)
        document = yaml.load(raw, Loader=_LOADER)  # noqa: S506 - a safe loader, see above
    # The safe constructors trip over odd scalars in their own ways: `!!bool x` is a KeyError.
    except (
        *(yaml.YAMLError, ValueError, TypeError, LookupError, AttributeError),
        *(ArithmeticError, RecursionError),
    ) as error:
        first = shown((str(error) or type(error).__name__).splitlines()[0])
        raise InputError(f"{where}: not a readable YAML file ({first})") from error
    if not isinstance(document, dict) or not isinstance(document.get("families"), list):
        raise InputError(f"{where}: has no list of families; is it a cookbook file?")
    families = _items(document, "families")
    return tuple(model for family in families for model in _items(family, "models"))


def _items(node: Any, key: str) -> list[dict[str, Any]]:
    found = node.get(key) if isinstance(node, dict) else None
    return [item for item in found if isinstance(item, dict)] if isinstance(found, list) else []


def _files(cookbook: Path) -> Iterator[tuple[str, bytes]]:
    """Yield name and content of the cookbook's files in order; of a huge one, only its beginning.

    Raises:
        InputError: the folder is no cookbook.
    """
    folder = cookbook
    for part in FOLDER.split("/"):
        folder /= part
        if folder.is_symlink() or not folder.is_dir():
            raise InputError(f"{folder}: not found; is {cookbook} a clone of sgl-cookbook?")
    for parent, subfolders, names in os.walk(folder):
        subfolders.sort()
        for name in sorted(names):
            path = Path(parent, name)
            if not name.endswith(".yaml") or not stat.S_ISREG(path.lstat().st_mode):
                continue
            where = shown(str(path.relative_to(cookbook)))
            try:
                with path.open("rb") as stream:
                    yield where, stream.read(MAX_BYTES + 1)
            except OSError as error:
                _log.warning("%s: cannot be read (%s)", where, error.strerror)


def _degree(value: Any, where: str) -> int:
    """Return a degree of parallelism.

    Raises:
        InputError: it is not a positive integer of a sane size.
    """
    if type(value) is not int or not 1 <= value <= _LARGEST_DEGREE:
        raise InputError(
            f"{where} is {reprlib.repr(value)}, not a positive integer up to {_LARGEST_DEGREE}"
        )
    return value


def _part(node: dict[str, Any], key: str, kind: type, where: str) -> Any:
    """Return a part of an entry, empty where it is absent or null.

    Raises:
        InputError: it is of another kind.
    """
    value = node.get(key)
    if value is None:
        return kind()
    if not isinstance(value, kind):
        raise InputError(f"{where}: {key} is {reprlib.repr(value)}, not a {kind.__name__}")
    return value


def _serving(engine: dict[str, Any], where: str, origin: str) -> Serving:
    tp = _degree(engine.get("tp"), f"{where}: engine.tp")
    ep, dp = (
        1 if engine.get(key) is None else _degree(engine[key], f"{where}: engine.{key}")
        for key in ("ep", "dp")
    )
    data_parallel_attention = engine.get("enable_dp_attention")
    if data_parallel_attention not in (None, True, False):
        raise InputError(
            f"{where}: engine.enable_dp_attention is {reprlib.repr(data_parallel_attention)}, "
            "neither true nor false"
        )
    if data_parallel_attention:
        if dp < tp and tp % dp:
            raise InputError(f"{where}: engine.tp {tp} is not a multiple of engine.dp {dp}")
        tp = max(1, tp // dp)  # A real entry has more data-parallel ranks than GPUs.
    return Serving(tp=tp, ep=ep, origin=origin)


def _servings(source: str, model: dict[str, Any]) -> Iterator[Serving]:
    entry = f"{source}: {shown(str(model.get('model_path')))}"
    for name, machine in _part(model, "hardware", dict, entry).items():
        where = f"{entry} on {shown(str(name))}"
        if machine is not None and not isinstance(machine, dict):
            raise InputError(f"{where}: {reprlib.repr(machine)} is not a dict")
        for configuration in _part(machine or {}, "configurations", list, where):
            if not isinstance(configuration, dict):
                raise InputError(f"{where}: {reprlib.repr(configuration)} is not a configuration")
            engine = _part(configuration, "engine", dict, where)
            if engine:
                yield _serving(engine, where, f"sgl-cookbook {source}")


def _same_model(repo_id: str, path: str) -> bool:
    vendor, _, base = repo_id.partition("/")
    other_vendor, _, other = path.partition("/")
    return vendor == other_vendor and _QUANTISED.sub("", base) == _QUANTISED.sub("", other)


def _from_cookbook(cookbook: Path, repo_id: str) -> list[Serving]:
    """Return how the cookbook serves a model, nothing where it does not say.

    Raises:
        InputError: the folder is no cookbook, or the model's own entry is wrong.
    """
    exact: list[tuple[str, dict[str, Any]]] = []
    siblings: list[tuple[str, dict[str, Any]]] = []
    own_damaged: list[InputError] = []
    mention = re.compile(re.escape(repo_id.encode()) + rb"(?![\w.-])")
    for source, raw in _files(cookbook):
        try:
            models = read_models(raw, source)
        except InputError as error:
            _log.warning("%s; passed over", error)
            if mention.search(raw):
                own_damaged.append(error)
            continue
        for model in models:
            path = model.get("model_path")
            if path == repo_id:
                exact.append((source, model))
            elif isinstance(path, str) and _same_model(repo_id, path):
                siblings.append((source, model))
    found = [serving for source, model in exact for serving in _servings(source, model)]
    if not found and own_damaged:
        raise own_damaged[0]
    return found or [serving for source, model in siblings for serving in _servings(source, model)]


def _smallest_fit(model: ModelConfig, gpu_memory_gb: float) -> Serving:
    if not (math.isfinite(gpu_memory_gb) and gpu_memory_gb > 0):
        raise InputError(f"--gpu-memory: {gpu_memory_gb:g} is not a positive number of GB")
    weights = weight_bytes(model) / 1e9
    tp = 1
    while tp * gpu_memory_gb < weights:
        tp *= 2
        if tp > _LARGEST_TP:
            raise InputError(
                f"{model.source}: about {weights:.0f} GB of weights do not fit {_LARGEST_TP} GPUs "
                f"of {gpu_memory_gb:g} GB"
            )
    return Serving(
        tp=tp,
        ep=1,
        origin=(
            f"assumed: no sgl-cookbook entry; about {weights:.0f} GB of weights fit "
            f"{tp} x {gpu_memory_gb:g} GB"
        ),
    )


def repository_of(cookbook: Path, name: str) -> str | None:
    """Return the repository id of a model by its slug or base name, None if it has no entry.

    A repository of exactly that name goes before its tuned and quantised siblings, a short name
    before a long one.

    Raises:
        InputError: the folder is no cookbook.
    """
    found: set[str] = set()
    for source, raw in _files(cookbook):
        try:
            paths = [model.get("model_path") for model in read_models(raw, source)]
        except InputError as error:
            _log.warning("%s; passed over", error)
            continue
        found |= {path for path in paths if isinstance(path, str) and "/" in path}
    base = name.rpartition("/")[2].lower()
    same = [path for path in found if model_slug(path) == model_slug(name)]
    exact = [path for path in same if path.rpartition("/")[2].lower() == base]
    return min(exact or same, key=lambda path: (len(path), path), default=None)


def serving_configs(
    cookbook: Path | None, repo_id: str | None, model: ModelConfig, gpu_memory_gb: float
) -> list[Serving]:
    """Return the distinct (attention tp, ep) pairs the model is served with.

    Without a cookbook, or an entry in it: the smallest power of two of GPUs whose memory holds the
    weights, said so in `origin`.

    Raises:
        InputError: the folder is no cookbook, the model's own entry is wrong, or the model fits no
            sensible number of GPUs.
    """
    found = _from_cookbook(cookbook, repo_id) if cookbook and repo_id else []
    if not found:
        return [_smallest_fit(model, gpu_memory_gb)]
    distinct: dict[tuple[int, int], Serving] = {}
    for serving in found:
        distinct.setdefault((serving.tp, serving.ep), serving)
    return list(distinct.values())
