"""The baseline solution: the FlashInfer API behind the definition's signature."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from tasks import files, ops
from tasks.dataset import DefinitionFiles
from tasks.ops.base import KernelSpec


def write_baseline(dataset: Path, spec: KernelSpec) -> str | None:
    """Write the baseline solution of a definition; return its name, or None if there is none."""
    source = ops.op_module(spec.op_type).baseline(spec)
    if source is None:
        return None
    name = f"flashinfer_wrapper_{hashlib.sha256(source.encode()).hexdigest()[:6]}"
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
    place = DefinitionFiles(spec.op_type, spec.name)
    for earlier in (dataset / place.solutions).glob("flashinfer_wrapper_*.json"):
        earlier.unlink()
    files.write_json(dataset / place.solutions / f"{name}.json", solution)
    return name
