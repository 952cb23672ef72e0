"""Where the two source trees are below a folder, and what names their content."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from tasks.discover.index_cache import revision
from tasks.errors import InputError

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SourceTrees:
    """A FlashInfer and an SGLang tree that belong together."""

    flashinfer: Path
    sglang: Path
    shas: dict[str, str]
    """Short SHA, or package version, of each, under `flashinfer` and `sglang`."""


_LAYOUTS = {
    "flashinfer": ("flashinfer/__init__.py",),
    "sglang": ("python/sglang/srt/models", "sglang/srt/models"),
}
_KERNEL = ("sgl-kernel/python/sgl_kernel", "sgl_kernel")
_PACKAGES = {"flashinfer": ("flashinfer_python",), "sglang": ("sglang", "sglang_kernel")}


def find_trees(folder: Path) -> SourceTrees:
    """Find FlashInfer and SGLang below a folder, as git checkouts or as unpacked wheels.

    Each may be a sub-folder (`flashinfer/`, `sglang-0.5.17/`) or, as `pip install --target` leaves
    them, the folder itself.

    Raises:
        InputError: one of them is not there.
    """
    if not folder.is_dir():
        raise InputError(f"--sources: {folder} is no folder")
    trees = {name: _find(folder, name) for name in _LAYOUTS}
    if not any((trees["sglang"] / kernel).is_dir() for kernel in _KERNEL):
        _log.warning("%s: has no sglang-kernel; calls through it are not seen", trees["sglang"])
    shas = {name: revision(tree, *_PACKAGES[name]) for name, tree in trees.items()}
    return SourceTrees(flashinfer=trees["flashinfer"], sglang=trees["sglang"], shas=shas)


def _find(folder: Path, name: str) -> Path:
    found = [
        tree
        for tree in (*sorted(folder.glob(f"{name}*")), folder)
        if any((tree / layout).exists() for layout in _LAYOUTS[name])
    ]
    if len(found) > 1:
        names = ", ".join(tree.name for tree in found)
        raise InputError(f"--sources: {folder} has several {name} trees ({names}); give one")
    if found:
        return found[0]
    raise InputError(
        f"--sources: {folder} has no {name} tree ({name}/{' or '.join(_LAYOUTS[name])} below it)"
    )
