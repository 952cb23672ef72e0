"""The layout of the flashinfer-trace dataset: where each kind of file of a definition lives."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from tasks import git
from tasks.errors import DefinitionError, InputError
from tasks.files import safe_name


@dataclass(frozen=True)
class DefinitionFiles:
    """Paths of one definition, relative to the dataset's root.

    Raises:
        InputError: the op type or the name could escape its folder.
    """

    op_type: str
    name: str

    def __post_init__(self) -> None:
        safe_name(self.op_type, "op_type")
        safe_name(self.name, "definition name")

    @property
    def definition(self) -> PurePosixPath:
        """`definitions/{op_type}/{name}.json`."""
        return PurePosixPath("definitions", self.op_type, f"{self.name}.json")

    @property
    def workloads(self) -> PurePosixPath:
        """`workloads/{op_type}/{name}.jsonl`."""
        return PurePosixPath("workloads", self.op_type, f"{self.name}.jsonl")

    @property
    def blobs(self) -> PurePosixPath:
        """`blob/workloads/{op_type}/{name}`, one safetensors file per workload."""
        return PurePosixPath("blob", "workloads", self.op_type, self.name)

    def blob(self, uuid: str) -> PurePosixPath:
        """The file of one workload's tensors."""
        return self.blobs / f"{self.name}_{safe_name(uuid, 'workload uuid')}.safetensors"

    @property
    def solutions(self) -> PurePosixPath:
        """`solutions/baseline/{op_type}/{name}`."""
        return PurePosixPath("solutions", "baseline", self.op_type, self.name)

    @property
    def traces(self) -> PurePosixPath:
        """`traces/baseline/{op_type}/{name}.jsonl`."""
        return PurePosixPath("traces", "baseline", self.op_type, f"{self.name}.jsonl")

    @property
    def reference_test(self) -> PurePosixPath:
        """`tests/references/test_{name}.py`."""
        return PurePosixPath("tests", "references", f"test_{self.name}.py")

    @property
    def owned(self) -> tuple[PurePosixPath, ...]:
        """Its files and folders; nothing in them is of another definition."""
        given = (self.definition, self.reference_test, self.workloads, self.traces)
        return (*given, self.solutions, self.blobs)

    def staged(self, root: Path) -> Iterator[PurePosixPath]:
        """Yield the files of this definition that exist below `root`, in a fixed order.

        Raises:
            DefinitionError: one of them is a symbolic link.
        """
        candidates = [self.definition, self.reference_test, self.workloads, self.traces]
        for folder in (self.solutions, self.blobs):
            if (root / folder).is_dir():
                candidates += sorted(folder / item.name for item in (root / folder).iterdir())
        for path in candidates:
            if (root / path).is_symlink():
                raise DefinitionError(f"{root / path}: is a symbolic link, refused")
            if (root / path).is_file() and not path.name.startswith("."):
                yield path


def published_definitions(clone: Path) -> dict[str, str]:
    """Return name -> op_type of every definition of the dataset.

    Of a git clone, those in the commit it has checked out: definitions that a run staged in the
    work tree are not in that commit, so they stay `new` until they are merged upstream. Of a plain
    folder, those that lie there.

    Raises:
        InputError: it is no folder.
    """
    return _listed(clone, "definitions", ".json")


def collected_definitions(clone: Path) -> set[str]:
    """Return the names of the definitions that have workloads in the dataset.

    Raises:
        InputError: it is no folder.
    """
    return set(_listed(clone, "workloads", ".jsonl"))


def _listed(clone: Path, folder: str, suffix: str) -> dict[str, str]:
    """Return stem -> middle folder of the files `{folder}/{op_type}/{name}{suffix}`."""
    if not clone.is_dir():
        raise InputError(f"{clone}: is no folder; it should be the dataset")
    if (clone / ".git").exists():
        paths = [PurePosixPath(path) for path in git.tracked_files(clone, folder)]
    else:
        if not (clone / "definitions").is_dir():
            raise InputError(f"{clone}: has no definitions/ folder; it should be the dataset")
        files = sorted((clone / folder).glob(f"*/*{suffix}"))
        paths = [PurePosixPath(path.relative_to(clone)) for path in files if path.is_file()]
    return {
        path.stem: path.parts[1] for path in paths if path.suffix == suffix and len(path.parts) == 3
    }
