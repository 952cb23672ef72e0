"""The baseline solution: the FlashInfer API behind the definition's signature.

A wrapper is made once per device; it is planned in every call, so a trace times plan and run. The
format knows one entry point, called with all inputs, and no hook before it. flashinfer-bench 0.1.2
clones all inputs before each timed call, so a plan kept for the same tensors would never be found
again, and one kept for the same address, shape and version would be found by mistake: the allocator
hands the address of freed index tensors to new ones. Identity does not help either: servers write
index buffers in place by kernels that leave torch's version counter alone, and comparing contents
costs the copy to the host that makes planning slow. A stale plan gives wrong results silently.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from tasks import files, ops
from tasks.dataset import DefinitionFiles
from tasks.ops.base import KernelSpec


def write_baseline(dataset: Path, spec: KernelSpec) -> str | None:
    """Write the baseline solution of a definition; return its name, or None if there is none.

    The name is of definition and source: flashinfer-bench refuses a dataset in which two solutions
    have the same name, and definitions that differ in their axes only share the source.
    """
    source = ops.op_module(spec.op_type).baseline(spec)
    if source is None:
        return None
    digest = hashlib.sha256(f"{spec.name}\n{source}".encode()).hexdigest()
    name = f"flashinfer_wrapper_{digest[:6]}"
    solution: dict[str, Any] = {
        "name": name,
        "definition": spec.name,
        "author": "baseline",
        "description": "Wraps the FlashInfer API that the definition is tagged with.",
        "spec": {
            "language": "python",
            "target_hardware": ["cuda"],
            "entry_point": "main.py::run",
            "dependencies": ["flashinfer", "torch"],
            "destination_passing_style": False,
        },
        "sources": [{"path": "main.py", "content": source}],
    }
    folder = dataset / DefinitionFiles(spec.op_type, spec.name).solutions
    written = folder / f"{name}.json"
    files.write_json(written, solution)
    for other in folder.glob("flashinfer_wrapper_*.json"):
        if other != written:
            other.unlink()
    return name
