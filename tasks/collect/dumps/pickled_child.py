"""The child process that reads `.pt` dumps: `python -m tasks.collect.dumps.pickled_child FOLDER`.

`FOLDER/requests.json` says which tensors of which files; each file's are written to a safetensors
file of their own, and a line of `results.jsonl` says why not, or nothing.
"""

from __future__ import annotations

import json
import os
import stat
import sys
import zipfile
from pathlib import Path
from typing import Any

from tasks.collect.dumps.pickled import RESULTS

_MOST_ELEMENTS = 1 << 28
"""Elements a tensor may have; those that rows store are index and routing tensors."""


class _RefusedError(Exception):
    """The file's tensors cannot be had; the text is the reason."""


def _load(path: str) -> dict[str, Any]:
    import torch

    if not stat.S_ISREG(os.lstat(path).st_mode):
        raise _RefusedError("inputs.pt cannot be read (not a regular file)")
    # Torch's former format, one pickle, cannot be mapped.
    mmap = zipfile.is_zipfile(path)
    loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    if not isinstance(loaded, dict):
        raise _RefusedError("inputs.pt holds no tensors by name")
    return loaded


def _check(key: str, value: object, expected: dict[str, Any]) -> Any:
    import torch

    if not isinstance(value, torch.Tensor) or value.layout != torch.strided:
        raise _RefusedError(f"inputs.pt holds no tensor {key}")
    if list(value.shape) != expected["shape"] or str(value.dtype) != f"torch.{expected['dtype']}":
        raise _RefusedError(f"tensor {key} of inputs.pt has another shape or dtype than metadata")
    if value.numel() > _MOST_ELEMENTS:
        raise _RefusedError(f"tensor {key} of inputs.pt is too large")
    return value.detach().contiguous().clone()


def _convert(request: dict[str, Any], out: Path) -> str:
    """Write one file's tensors; return why that cannot be, or nothing."""
    from safetensors.torch import save_file

    try:
        loaded = _load(request["path"])
        wanted = request["tensors"].items()
        save_file({key: _check(key, loaded.get(key), told) for key, told in wanted}, out)
    except _RefusedError as error:
        return str(error)
    except Exception as error:  # a hostile file chooses what it raises
        return f"inputs.pt cannot be read ({type(error).__name__})"
    return ""


def main(folder: Path) -> None:
    """Convert what is asked for, one file after the other."""
    with (folder / RESULTS).open("a") as results:
        for request in json.loads((folder / "requests.json").read_text()):
            results.write(json.dumps(_convert(request, folder / request["out"])) + "\n")
            results.flush()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
