"""Draft the definitions of a run's new kernels, and stage one of them in the dataset clone."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tasks import files, sandbox
from tasks.dataset import DefinitionFiles
from tasks.errors import DefinitionError
from tasks.manifest import KernelEntry

_SECONDS = 300
_MEMORY_GB = 64
"""Address space, not resident memory: torch maps far more than it touches."""


def _draft_path(drafts: Path, name: str) -> Path:
    return drafts / f"{files.safe_name(name, 'definition name')}.json"


def draft_definitions(entries: Sequence[KernelEntry], model_slug: str, drafts: Path) -> None:
    """Draft all entries in one child process, one file each in `drafts`.

    A kernel that cannot be drafted gets a file with its `error`; all of them, with the child's last
    lines, where the child itself failed.
    """
    request = {
        "model_slug": model_slug,
        "kernels": [
            {
                "name": entry.definition_name,
                "spec": entry.spec,
                "has_template": bool(entry.fi_trace_template),
            }
            for entry in entries
        ],
    }
    with tempfile.TemporaryDirectory(prefix="onboard-draft-") as folder:
        asked, answered = Path(folder, "request.json"), Path(folder, "result.json")
        files.write_json(asked, request)
        outcome = sandbox.run_python(
            ["-m", "tasks.define.child", str(asked), str(answered)],
            timeout=_SECONDS,
            memory_gb=_MEMORY_GB,
            cwd=Path(folder),
        )
        if outcome.ok:
            result = files.read_json_object(answered, "the drafts")
        else:
            failed = {"error": f"drafting: the child process {outcome.reason}"}
            kernels = {entry.definition_name: failed for entry in entries}
            result = {"versions": {}, "kernels": kernels}
    for name, draft in result["kernels"].items():
        files.write_json(_draft_path(drafts, name), {**draft, "versions": result["versions"]})


def stage_definition(entry: KernelEntry, drafts: Path, dataset: Path) -> dict[str, Any]:
    """Write one drafted definition into the dataset clone, atomically.

    Returns:
        The draft: `definition`, `method`, `notes`, `versions`.

    Raises:
        DefinitionError: it was not drafted, or could not be.
    """
    path = _draft_path(drafts, entry.definition_name)
    if not path.exists():
        raise DefinitionError(f"{entry.definition_name}: has no draft at {path}")
    draft = files.read_json_object(path, "the draft")
    if "error" in draft:
        raise DefinitionError(f"{entry.definition_name}: {draft['error']}")
    staged = dataset / DefinitionFiles(entry.op_type, entry.definition_name).definition
    if staged.exists():
        # Another model needs the kernel too: the definition is the same, the models add up.
        earlier = files.read_json_object(staged, "the staged definition")["tags"]
        tags = draft["definition"]["tags"]
        draft["definition"]["tags"] = list(dict.fromkeys((*earlier, *tags)))
    files.write_json(staged, draft["definition"])
    return draft
