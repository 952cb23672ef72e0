"""Check solutions and evaluation traces; nothing of them is run."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Set
from typing import Any

from tasks.validate import source
from tasks.validate.findings import Findings
from tasks.validate.listing import BadFileError, Place, parse_object
from tasks.validate.rows import lines_of

Json = dict[str, Any]
_IN_PYTHON = frozenset({"python", "triton", "tilelang"})


def check_solution(solution: Json, place: Place, definition: Json, findings: Findings) -> None:
    """Check one solution against its path and its definition."""

    def error(where: str, message: str) -> None:
        findings.error(place.name, place.path, where, message)

    said = {"name": place.path.stem, "definition": place.name, "author": place.author}
    for key, value in said.items():
        if solution.get(key) != value:
            error(key, f"{solution.get(key)!r}, but the path says {value!r}")
    spec, sources = solution.get("spec"), solution.get("sources")
    if not isinstance(spec, dict) or not isinstance(spec.get("entry_point"), str):
        error("spec.entry_point", "missing, or not a string")
        return
    if not isinstance(sources, list) or not all(
        isinstance(item, dict)
        and isinstance(item.get("path"), str)
        and isinstance(item.get("content"), str)
        for item in sources
    ):
        error("sources", "missing, or not a list of files with path and content")
        return
    trees: dict[str, ast.Module | str] = {}
    for index, item in enumerate(sources):
        path = item["path"]
        tree = source.parsed(item["content"]) if path.endswith(".py") else ""
        if tree and isinstance(tree, str):
            error(f"sources.{index}.content", f"{path}: {tree}")
        trees[path] = tree
    file, _, function = spec["entry_point"].partition("::")
    if file not in trees:
        error("spec.entry_point", f"{file!r} is not among the sources")
        return
    tree = trees[file]
    if isinstance(tree, ast.Module) and spec.get("language") in _IN_PYTHON:
        wrong = _misfit(tree, function, spec, definition)
        if wrong:
            error("spec.entry_point", wrong)


def _misfit(tree: ast.Module, function: str, spec: Json, definition: Json) -> str:
    """Say why the entry point cannot be called as the definition's kernel."""
    found: ast.stmt | None = None
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == function:
            found = node
        elif not isinstance(node, ast.FunctionDef | ast.ClassDef) and _binds(node, function):
            return ""
    if found is None:
        return f"its file has no function named {function}"
    count, what = len(definition["inputs"]), "inputs"
    if spec.get("destination_passing_style", True):
        count, what = count + len(definition["outputs"]), "inputs and outputs"
    if isinstance(found, ast.FunctionDef) and not source.takes(found, count):
        return f"{function} cannot be called with the definition's {count} {what}"
    return ""


def _binds(node: ast.stmt, name: str) -> bool:
    """Say whether a statement may give a name a value in a way that is not looked into."""
    for part in ast.walk(node):
        if isinstance(part, ast.Name) and part.id == name and isinstance(part.ctx, ast.Store):
            return True
        if isinstance(part, ast.alias) and (part.asname or part.name) in (name, "*"):
            return True
        if isinstance(part, ast.FunctionDef) and part.name == name:
            return True
    return False


def check_traces(
    text: str, place: Place, uuids: Set[str], solutions: Set[str], findings: Findings
) -> int:
    """Check the evaluations of one file; return how many there are."""
    states: Counter[str] = Counter()
    seen: set[str] = set()
    for number, line in lines_of(text):

        def error(where: str, message: str, number: int = number) -> None:
            shown = f"line {number}: {where}" if where else f"line {number}"
            findings.error(place.name, place.path, shown, message)

        states["all"] += 1
        try:
            trace = parse_object(line)
        except BadFileError as cause:
            error("", str(cause))
            continue
        if trace.get("definition") != place.name:
            error("definition", f"{trace.get('definition')!r}, but the path says {place.name!r}")
        workload, evaluation = trace.get("workload"), trace.get("evaluation")
        uuid = workload.get("uuid") if isinstance(workload, dict) else None
        if not isinstance(uuid, str) or uuid not in uuids:
            error("workload.uuid", f"{uuid!r} is no row of the workloads")
        else:
            seen.add(uuid)
        solution = trace.get("solution")
        if not isinstance(solution, str) or solution not in solutions:
            error("solution", f"{solution!r} is no solution of this definition")
        status = evaluation.get("status") if isinstance(evaluation, dict) else None
        if not isinstance(status, str):
            error("evaluation.status", "missing, or not a string")
        elif status != "PASSED":
            states[f"status {status}"] += 1
    for status, count in sorted(states.items()):
        if status != "all":
            findings.warn(
                place.name,
                place.path,
                "evaluation.status",
                f"{count} of {states['all']} evaluations are not PASSED: {status[7:]}",
            )
    if len(seen) < len(uuids):
        findings.warn(
            place.name, place.path, "", f"trace covers {len(seen)}/{len(uuids)} workloads"
        )
    return states["all"]
