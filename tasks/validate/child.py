"""The child process that looks into JSON texts: `python -m tasks.validate.child`.

It reads `REQUEST`, a line `[model, text]` for each JSON text, and writes `ANSWER`. FlashInfer-
Bench's models parse the text and run nothing of it; still it is other people's text and other
people's code. The reference of a definition is built: its module's text is run, in the jail, and
the function `run` it defines is not called.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from tasks import files
from tasks.define import jail
from tasks.errors import DefinitionError
from tasks.validate import source

Json = dict[str, Any]
_BUILD_SECONDS, _BUILD_MEMORY_GB = 10.0, 4.0
_ALL_BUILD_SECONDS = 300.0
_RUN_NOTHING = "\nrun = (lambda: 0) if callable(globals().get('run')) else None\n"
"""Added to a reference: the jail calls `run`, and refuses a `run` that cannot be called."""
_PARTS = ("flashinfer_bench.__main__", "flashinfer_bench.data.validate")


def _apply(model: Any, text: str) -> list[tuple[str, str]]:
    """Return the fields a model refuses, and why."""
    try:
        model.model_validate_json(text)
    except ValidationError as error:
        return [
            (".".join(map(str, item["loc"])), item["msg"])
            for item in error.errors(include_url=False, include_input=False)
        ]
    except Exception as error:  # the models' own validators see anything
        return [("", f"{type(error).__name__}: {error}")]
    return []


def _models(texts: list[tuple[str, str]]) -> Json:
    """Apply FlashInfer-Bench's models."""
    try:
        from flashinfer_bench import data
    except Exception as error:  # a broken torch raises anything
        return {"missing": f"{type(error).__name__}: {error}"}
    try:
        release = version("flashinfer-bench")
    except PackageNotFoundError:
        release = "unknown"
    refused = [
        (index, where, message)
        for index, (name, text) in enumerate(texts)
        for where, message in _apply(getattr(data, name), text)
    ]
    has_validate = all(importlib.util.find_spec(part) for part in _PARTS)
    return {"version": release, "has_validate": has_validate, "refused": refused}


def _build(reference: str, seconds: float) -> str:
    """Run a reference's module in the jail; return what is wrong with it."""
    limits = jail.Limits(seconds=seconds, memory_gb=_BUILD_MEMORY_GB, output_mb=1)
    try:
        jail.run(reference + _RUN_NOTHING, [], limits=limits)
    except DefinitionError as error:
        return str(error).removeprefix("reference: ")
    return ""


def _builds(texts: list[tuple[str, str]]) -> Json:
    """Build the definitions' references that compile; those that are equal, once."""
    try:
        import torch  # noqa: F401  the jail needs it
    except Exception as error:  # as above
        return {"no_builds": f"torch cannot be imported ({type(error).__name__}: {error})"}
    messages: dict[str, str] = {}
    built, unbuilt, late = [], [], 0
    deadline = time.monotonic() + _ALL_BUILD_SECONDS
    for index, (name, text) in enumerate(texts):
        reference = json.loads(text).get("reference") if name == "Definition" else None
        if not isinstance(reference, str) or isinstance(source.parsed(reference), str):
            continue
        if reference not in messages:
            if time.monotonic() > deadline:
                late += 1
                continue
            messages[reference] = _build(reference, _BUILD_SECONDS)
        if messages[reference]:
            unbuilt.append((index, messages[reference]))
        else:
            built.append(index)
    return {"built": built, "unbuilt": unbuilt, "late": late}


def main(request: Path, answer: Path) -> None:
    """Answer one request."""
    try:
        jail.deny_network()
        no_jail = {}
    except DefinitionError as error:
        no_jail = {"no_builds": str(error)}
    with request.open(encoding="utf-8") as stream:
        texts = [(name, text) for name, text in map(json.loads, stream)]
    files.write_json(answer, _models(texts) | (no_jail or _builds(texts)))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
