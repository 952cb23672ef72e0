"""The rule that makes the reference `run`: renamed, or called by a `run` written below it."""

from __future__ import annotations

import ast

from tasks.define.repair.answer import Draft
from tasks.define.repair.syntax import fail, lines_of, parameters_of, parse_source, undefined_names

_IMPORTS = {
    "math": "import math",
    "torch": "import torch",
    "F": "import torch.nn.functional as F",
    "Optional": "from typing import Optional",
    "Tuple": "from typing import Tuple",
}
"""What the names that templates' preambles import mean; older dumps lack the preamble."""


def rule_imports(draft: Draft) -> None:
    """Modules that every template's preamble imports are imported."""
    lacking = [_IMPORTS[name] for name in undefined_names(draft.source) if name in _IMPORTS]
    if lacking:
        future = [n for n in parse_source(draft.source).body if isinstance(n, ast.ImportFrom)]
        after = max((n.end_lineno or 0 for n in future if n.module == "__future__"), default=0)
        lines = lines_of(draft.source)
        lines[after:after] = [*(f"{line}\n".encode() for line in lacking), b"\n"]
        draft.source = b"".join(lines).decode()


def rule_run(draft: Draft) -> None:
    """The reference is `run` and takes the inputs: it is renamed, or called by a `run` below it."""
    names, target = list(draft.inputs), draft.target
    if "run" in draft.functions and target.name != "run":
        raise fail("run", "a helper of the reference is named run")
    plain = [a.arg for a in (*target.args.posonlyargs, *target.args.args)]
    as_is = list(parameters_of(target)) == plain == names and not target.args.kwarg
    as_is = as_is and draft.passed == {name: name for name in names} and draft.picked is None
    if as_is and not (draft.raw_inputs or draft.raw_outputs or draft.copied or draft.paged):
        draft.source = _renamed(draft.source, target.name)
    elif target.name == "run":
        raise fail("run", "the reference is named run and does not take the inputs")
    elif hidden := draft.inputs.keys() & {*draft.functions, "torch"}:
        raise fail("run", f"inputs hide what run calls: {', '.join(sorted(hidden))}")
    else:
        draft.source = f"{draft.source.rstrip()}\n\n\n{_wrapper(draft)}"
        rule_imports(draft)


def _argument(draft: Draft, parameter: str) -> str:
    """Return what `run` passes to a parameter."""
    value = passed = draft.passed[parameter]
    if value in draft.raw_inputs:
        passed += f".view(torch.{draft.raw_inputs[value]})"
    if value in draft.paged:
        passed += f".reshape(-1, 1, *{value}.shape[2:])"
    if parameter in draft.copied:
        passed += ".clone()"
    if passed != value and draft.inputs[value].get("optional"):
        return f"None if {value} is None else {passed}"
    return passed


def _wrapper(draft: Draft) -> str:
    """Return a `run` that calls the reference."""
    given, target = parameters_of(draft.target), draft.target
    positional_only = {a.arg for a in target.args.posonlyargs}
    by_place = {*positional_only, *(a.arg for a in target.args.args)} & draft.passed.keys()
    positional, arguments = True, []
    for parameter in (*given, *(name for name in draft.passed if name not in given)):
        positional = positional and parameter in by_place
        if parameter in draft.passed:
            if not positional and parameter in positional_only:
                raise fail("run", f"{parameter} is positional only, after one with its default")
            passed = _argument(draft, parameter)
            arguments.append(passed if positional else f"{parameter}={passed}")
    call = _wrapped(f"{target.name}(", arguments, ")", "    ")
    if not draft.raw_outputs and draft.picked is None:
        lines = [*draft.first, f"return {call}"]
    else:
        # A single output may be returned as such; several always come as a tuple.
        single = len(draft.outputs) == 1 and (draft.picked is None or draft.returned == 1)
        places = draft.picked if draft.picked is not None else range(len(draft.outputs))
        values = []
        for place, name in zip(places, draft.outputs, strict=True):
            raw = draft.raw_outputs.get(name)
            value = "returned" if single else f"returned[{place}]"
            values.append(f"{value}.view(torch.{raw})" if raw else value)
        lines = [*draft.first, f"returned = {call}", f"return {', '.join(values)}"]
    head = _wrapped("def run(", list(draft.inputs), "):", "")
    return "".join([f"{head}\n", *(f"    {line}\n" for line in lines)])


def _wrapped(start: str, items: list[str], end: str, indent: str) -> str:
    """Return a call or signature, on one line if it is short."""
    line = f"{start}{', '.join(items)}{end}"
    if len(line) <= 80:
        return line
    return "\n".join([start, *(f"{indent}    {item}," for item in items), f"{indent}{end}"])


def _renamed(source: str, name: str) -> str:
    """Rename a function to `run` where it is defined and wherever it is read."""
    nodes, lines, places = list(ast.walk(parse_source(source))), lines_of(source), []
    names = {n.id for n in nodes if isinstance(n, ast.Name)}
    arguments = {n.arg for n in nodes if isinstance(n, ast.arg)}
    if name != "run" and ("run" in names | arguments or name in arguments):
        raise fail("run", f"the reference uses run, or {name}, for something else")
    for node in nodes:
        if isinstance(node, ast.Name) and node.id == name:
            places.append((node.lineno, node.col_offset))
        elif isinstance(node, ast.FunctionDef) and node.name == name:
            column = lines[node.lineno - 1].find(name.encode(), node.col_offset + len("def "))
            if column < 0:
                raise fail("run", "the reference's name is not on the line of its def")
            places.append((node.lineno, column))
    for number, column in sorted(places, reverse=True):
        line = lines[number - 1]
        lines[number - 1] = line[:column] + b"run" + line[column + len(name.encode()) :]
    return b"".join(lines).decode()
