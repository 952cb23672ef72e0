"""Prove a reference: run it on the cases of its own reference test, and check what it returns.

The test's text is ours and runs here; the reference runs in the jail and can only return tensors.
A test that came with a supplied reference is as hostile as that, and runs in the jail too.
"""

from __future__ import annotations

import importlib.util
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

from tasks import files
from tasks.dataset import DefinitionFiles
from tasks.define import jail
from tasks.errors import DefinitionError

Json = dict[str, Any]
_LINES = 6
_MAX_CASES = 50

_JAILED = """

def run(case):
    globals().pop("run", None)  # the published test has none
    if not isinstance(CASES, dict):
        raise TypeError("CASES is no dict of case name -> function")
    if case is None:
        return len(CASES)
    name = list(CASES)[case]
    prove(name)
    result = load(DEFINITION["reference"])(*CASES[name]().values())
    results = result if isinstance(result, tuple | list) else (result,)
    try:
        verify(CASES[name](), [(output.double() + 1).to(output.dtype) for output in results])
    except AssertionError:
        return True
    raise AssertionError("check accepts outputs that are wrong by one")
"""


def prove(definition: Json, test: str, limits: jail.Limits) -> list[str]:
    """Run a definition's reference on the cases of its reference test, whose text is ours.

    Args:
        definition: the definition.
        test: the source of its reference test.
        limits: what one call of the reference may use.

    Returns:
        The names of the cases in which the reference was right.

    Raises:
        DefinitionError: it was wrong in one, or misbehaved; the text names the case.
    """
    proved = []
    with tempfile.TemporaryDirectory(prefix="onboard-proof-") as folder:
        module = _load(definition, test, Path(folder))
        for case in module.CASES:
            _prove_case(definition, module, case, limits)
            proved.append(str(case))
    return proved


def prove_supplied(test: str, limits: jail.Limits) -> list[str]:
    """Run a reference test that came with its reference.

    Args:
        test: its source, with the definition embedded (`reference_test.render`).
        limits: what running it may use, per case.

    Returns:
        A line for each case in which the reference was right.

    Raises:
        DefinitionError: it was wrong in one, or something in the file misbehaved.
    """
    (count,) = jail.run(test + _JAILED, [None], limits=limits)
    if not isinstance(count, int) or not 0 < count <= _MAX_CASES:
        raise DefinitionError(f"proof: the file has {count} CASES, expected 1 to {_MAX_CASES}")
    for case in range(count):
        try:
            jail.run(test + _JAILED, [case], limits=limits)
        except DefinitionError as error:
            raise DefinitionError(f"proof: case {case + 1}: {error}") from error
    return [f"case {case + 1}, by the file's own computation" for case in range(count)]


def _load(definition: Json, test: str, root: Path) -> ModuleType:
    """Import the test from a dataset that has nothing but it and the definition."""
    place = DefinitionFiles(definition["op_type"], definition["name"])
    files.write_json(root / place.definition, definition)
    files.write_text(root / place.reference_test, test)
    spec = importlib.util.spec_from_file_location("reference_test", root / place.reference_test)
    if spec is None or spec.loader is None:
        raise DefinitionError(f"{place.reference_test}: cannot be imported")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _prove_case(definition: Json, module: ModuleType, case: str, limits: jail.Limits) -> None:
    inputs = module.CASES[case]()
    axes = dict(module.CONST)
    try:
        module.check_form("inputs", inputs, axes)
        result = jail.run(
            definition["reference"],
            list(inputs.values()),
            constraints=definition.get("constraints", []),
            names={**axes, **inputs},
            limits=limits,
        )
        module.verify(inputs, result)
    except AssertionError as error:
        raise DefinitionError(f"proof: {case}: {_shortened(error)}") from error
    except DefinitionError as error:
        raise DefinitionError(f"proof: {case}: {error}") from error


def _shortened(error: AssertionError) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " | ".join(lines[:_LINES]) or "does not hold"
