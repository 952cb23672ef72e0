"""Read FlashInfer's level-10 dumps.

One folder per call, with `metadata.jsonl` (its last line counts) and `inputs.safetensors` or
`inputs.pt`. A call that was captured into a CUDA graph has a folder per replay below its own; each
replay is a call. Nothing is loaded until a row asks for it, no pickle is opened in this process,
and whatever cannot be read is a counted reason.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tasks import ops
from tasks.collect.dumps.folders import (
    SESSION,
    DumpFolder,
    Unreadable,
    dump_folder,
    find_flushes,
    find_folders,
)
from tasks.collect.dumps.pickled import Reads, TorchFiles
from tasks.collect.dumps.records import (
    CapturedError,
    DumpedCall,
    DumpedTensor,
    UnfinishedError,
    last_record,
    make_call,
    same_record,
)
from tasks.errors import CollectError
from tasks.ops.base import DumpError

_COPY = "a copy of a call that is read already (its folder lies there twice)"


@dataclass
class CallLog:
    """All readable calls of a dump folder, and why the others are not."""

    calls: list[DumpedCall] = field(default_factory=list)
    unreadable: Counter[str] = field(default_factory=Counter)


def known_reads() -> Reads:
    """Return, by dumped name, the parameters whose data the rows of any op module need."""
    reads: defaultdict[str, set[str]] = defaultdict(set)
    for module in ops.registry().values():
        for api in module.apis:
            for name in api.dumps:
                reads[name].update(api.reads)
    return dict(reads)


@dataclass(eq=False)
class Reader:
    """Reads the dump folders below one root."""

    root: Path
    prefix: str = ""
    """What goes before the ids and processes of its calls."""
    reads: Reads | None = None
    """Dumped name -> parameters to get from `.pt` files; without it, what op modules need."""

    def __post_init__(self) -> None:
        reads = known_reads() if self.reads is None else self.reads
        self._torch_files = TorchFiles(reads)

    def read(self, folder: DumpFolder, *, incomplete: bool = False) -> DumpedCall:
        """Read one folder, of an eager call or of a replay.

        Raises:
            UnfinishedError: it may still be being written.
            CapturedError: the call counts by its replays.
            DumpError: it cannot be read.
        """
        record = last_record(self.root / folder.relative)
        return make_call(
            *(self.root, folder, record, self._torch_files),
            prefix=self.prefix,
            incomplete=incomplete,
        )

    def read_all(
        self, folder: DumpFolder, *, incomplete: bool = False
    ) -> Iterator[DumpedCall | Unreadable]:
        """Read a folder: the call, its replays, or why it is neither."""
        try:
            yield self.read(folder, incomplete=incomplete)
        except DumpError as error:
            replays, other = find_flushes(self.root, folder)
            if not replays or not isinstance(error, CapturedError):
                yield Unreadable(self.prefix + folder.relative, str(error))
            for unreadable in other:
                yield Unreadable(self.prefix + unreadable.id, unreadable.reason)
            for replay in replays:
                yield self.try_read(replay)

    def try_read(self, folder: DumpFolder, *, incomplete: bool = False) -> DumpedCall | Unreadable:
        """Read one folder, or return why it cannot be read."""
        try:
            return self.read(folder, incomplete=incomplete)
        except DumpError as error:
            return Unreadable(self.prefix + folder.relative, str(error))


def read_calls(root: Path, *, incomplete: bool = False, reads: Reads | None = None) -> CallLog:
    """Read every call dumped below `root`, in the order in which they were made.

    A folder that was copied to another place below `root` is one call.

    Args:
        root: folder of dumps; they may lie in folders within it.
        incomplete: whether calls count of which only the inputs were saved: on a host without a
            GPU, FlashInfer dumps a call and then the kernel fails.
        reads: dumped name -> parameters whose data can be loaded of `.pt` dumps; without it, what
            the op modules need.

    Raises:
        CollectError: `root` is no folder.
    """
    if not root.is_dir():
        raise CollectError(f"{root}: no such folder of dumps")
    folders, other = find_folders(root)
    reader = Reader(root, reads=reads)
    log = CallLog(unreadable=Counter(item.reason for item in other))
    places: defaultdict[str, list[str]] = defaultdict(list)
    for folder in folders:
        for result in reader.read_all(folder, incomplete=incomplete):
            if isinstance(result, Unreadable):
                log.unreadable[result.reason] += 1
                continue
            # Ranks in containers may have folders of the same name: the records decide.
            known = places[result.id.removeprefix(f"{folder.parent}/")]
            if any(same_record(root / place, root / result.id) for place in known):
                log.unreadable[_COPY] += 1
            else:
                known.append(result.id)
                log.calls.append(result)
    return log


__all__ = [
    "SESSION",
    "CallLog",
    "CapturedError",
    "DumpFolder",
    "DumpedCall",
    "DumpedTensor",
    "Reader",
    "Reads",
    "UnfinishedError",
    "Unreadable",
    "dump_folder",
    "find_flushes",
    "find_folders",
    "known_reads",
    "read_calls",
]
