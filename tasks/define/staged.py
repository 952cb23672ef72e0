"""Whether what is staged of a definition is what phase 2 proved; if it is not, prove it again.

`python -m tasks.define.staged REQUEST ANSWER` is the child that does. The reference runs in the
jail (`jail.py`); so does its test, unless that is the text of an op module.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

from tasks import files, ops, sandbox
from tasks.define import jail, proof
from tasks.define.reference_test import render
from tasks.errors import DefinitionError
from tasks.ops.base import KernelSpec

Json = dict[str, Any]
_NOT_PROVED = frozenset({"description", "tags"})
_FAMILY = re.compile(
    r"^# --- [\w ]+ -+\n\n\n(.*?)\n\n\n# --- the tests -+$", re.DOTALL | re.MULTILINE
)
_SECONDS, _MEMORY_GB = 900, 64
"""Address space, not resident memory: torch maps far more than it touches."""


def fingerprint(definition: Json, test: str) -> str:
    """Return a digest of what a proof is about: a definition's mathematics, and its test."""
    proved = {key: value for key, value in definition.items() if key not in _NOT_PROVED}
    text = json.dumps([proved, test], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def prove_again(definition: Json, test: str, spec: KernelSpec) -> list[str]:
    """Run a staged reference on the cases of its staged test, in a process of its own.

    Args:
        definition: what is staged.
        test: the text of its reference test.
        spec: the kernel.

    Returns:
        The cases in which the reference was right.

    Raises:
        DefinitionError: it was wrong in one, or the test is not of the form that phase 2 writes.
    """
    request = {"definition": definition, "test": test, "spec": spec.model_dump(mode="json")}
    with tempfile.TemporaryDirectory(prefix="onboard-proof-") as folder:
        asked, answer = Path(folder, "request.json"), Path(folder, "answer.json")
        files.write_json(asked, request)
        outcome = sandbox.run_python(
            ["-m", "tasks.define.staged", str(asked), str(answer)],
            timeout=_SECONDS,
            memory_gb=_MEMORY_GB,
            cwd=Path(folder),
        )
        if not answer.exists():
            raise DefinitionError(f"proof: the child process {outcome.reason or 'said nothing'}")
        found = files.read_json_object(answer, "the answer")
    if "error" in found:
        raise DefinitionError(str(found["error"]))
    return [str(case) for case in found["proved"]]


def _proved(definition: Json, test: str, spec: KernelSpec) -> list[str]:
    """Prove a reference, the test's text being as trusted as it came.

    Raises:
        DefinitionError: it does not hold, or the frame of the test is not ours.
    """
    limits, ours = jail.Limits(), ops.family(spec.op_type).reference_test
    if ours and render(spec, ours) == test:
        return proof.prove(definition, test, limits)
    middle = _FAMILY.search(test)
    if middle is None or render(spec, middle[1]) != test:
        raise DefinitionError("proof: the reference test is not of the form that phase 2 writes")
    return proof.prove_supplied(render(spec, middle[1], embedded=definition), limits)


def main(request: Path, answer: Path) -> None:
    """Answer one request."""
    asked = files.read_json_object(request, "the request")
    try:
        jail.deny_network()
        import torch

        torch.set_num_threads(1)
        jail.warm_up()
        spec = KernelSpec.model_validate(asked["spec"])
        found: Json = {"proved": _proved(asked["definition"], asked["test"], spec)}
    except DefinitionError as error:
        found = {"error": str(error)}
    except ImportError as error:
        found = {
            "error": f"proof: cannot be run here ({error}); the extra `bench` has what it needs"
        }
    except Exception as error:  # the text of a test may raise anything
        found = {"error": f"proof: {type(error).__name__}: {error}"}
    files.write_json(answer, found)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
