"""Where the two source trees are below a folder, and what names their content."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tasks.discover.index_cache import revision
from tasks.errors import InputError


@dataclass(frozen=True)
class SourceTrees:
    """A FlashInfer and an SGLang tree that belong together."""

    flashinfer: Path
    sglang: Path
    shas: dict[str, str]
    """Short SHA, or package version, of each, under `flashinfer` and `sglang`."""


_LAYOUTS = {
    "flashinfer": ("flashinfer",),
    "sglang": ("python/sglang/srt", "sglang/srt"),
}
_PACKAGES = {"flashinfer": "flashinfer_python", "sglang": "sglang"}


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
    shas = {name: revision(tree, _PACKAGES[name]) for name, tree in trees.items()}
    return SourceTrees(flashinfer=trees["flashinfer"], sglang=trees["sglang"], shas=shas)


def _find(folder: Path, name: str) -> Path:
    # A folder called like the package may be the package itself: its parent is the tree then.
    for tree in (*sorted(folder.glob(f"{name}*")), folder):
        for layout in _LAYOUTS[name]:
            if (tree / layout).is_dir() and not (tree / "__init__.py").exists():
                return tree
    raise InputError(
        f"--sources: {folder} has no {name} tree ({name}/{' or '.join(_LAYOUTS[name])} below it)"
    )
