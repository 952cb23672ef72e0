"""The rules that hold for any template. Each raises under its own name."""

from __future__ import annotations

import ast
import builtins
import copy
import re
from collections.abc import Callable

from tasks import syntax
from tasks.define.check import DTYPES
from tasks.define.repair.answer import Draft, Json, texts
from tasks.define.repair.run import rule_imports, rule_run
from tasks.define.repair.syntax import (
    asked_by,
    fail,
    parameters_of,
    read_by,
    returned_by,
    undefined_names,
    written_by,
)

_PLANNED = ("qo_indptr", "kv_indptr", "kv_indices")
"""Index tensors that FlashInfer's wrappers take at plan time, where they must be int32."""

_RAW = {"uint8": "int8", "uint16": "int16", "uint32": "int32"}
"""Dtypes the dataset lacks -> the one of the same bytes it stores them as."""

_API = "fi_api:"

_NO_TENSORS = frozenset({"string", "dtype"})
"""What templates give as the dtype of options that are no tensors or numbers."""


def rule_options(draft: Draft) -> None:
    """An option that is no tensor or number is left to the reference's default."""
    for name, spec in list(draft.inputs.items()):
        if spec["dtype"] in _NO_TENSORS:
            if parameters_of(draft.target).get(name, ast.Constant(None)) is None:
                raise fail("options", f"{name} is a {spec['dtype']} without default")
            del draft.inputs[name]


def rule_dtype_option(draft: Draft) -> None:
    """An option that names the output's dtype is bound to it, where there is one output."""
    for name in ("dtype", "out_dtype"):
        required = parameters_of(draft.target).get(name, ast.Constant(None)) is None
        if required and len(draft.outputs) == 1:
            (output,) = draft.outputs.values()
            draft.inputs.pop(name, None)
            draft.passed[name] = f"torch.{output['dtype']}"


def rule_plan_tensors(draft: Draft) -> None:
    """Index tensors given at plan time, not at the call, are int32, as wrappers require."""
    if not any(re.search(r"Wrapper(\.run)?$", tag) for tag in draft.tags):
        return
    for name in _PLANNED:
        spec = draft.inputs.get(name, {})
        if spec.get("dtype") == "unknown":
            spec["dtype"] = "int32"
            spec.pop("optional", None)


def rule_absent(draft: Draft) -> None:
    """An optional tensor that the call did not have is none of the inputs."""
    for name, spec in list(draft.inputs.items()):
        if spec["dtype"] == "unknown" and spec.get("optional"):
            del draft.inputs[name]
            if parameters_of(draft.target).get(name, ast.Constant(None)) is None:
                draft.passed[name] = "None"


def rule_destinations(draft: Draft) -> None:
    """A buffer for an output, which the reference can do without, is no input."""
    given = parameters_of(draft.target)
    for name, spec in draft.outputs.items():
        for buffer in {name, spec.get("param", name)} & draft.inputs.keys():
            default = given.get(buffer)
            if isinstance(default, ast.Constant) and default.value is None:
                del draft.inputs[buffer]


def rule_parameters(draft: Draft) -> None:
    """The reference gets the inputs, const axes it asks for, and nothing for what it ignores."""
    target, given = draft.target, parameters_of(draft.target)
    if target.args.vararg:
        raise fail("parameters", f"the reference takes *{target.args.vararg.arg}")
    waiting, read = [], read_by(target)
    for name, default in given.items():
        axis = draft.axes.get(name, {})
        if name in draft.passed:
            continue
        if name in draft.inputs:
            draft.passed[name] = name
        elif default is not None:
            continue
        elif axis.get("type") == "const" and "value" in axis:
            draft.passed[name] = repr(axis["value"])
        elif name not in read:
            draft.passed[name] = "None"
        else:
            waiting.append(name)
    if waiting:
        left = [n for n, s in draft.inputs.items() if n not in given and not s.get("optional")]
        _by_position(draft, waiting, left)
    extra = target.args.kwarg
    if extra and extra.arg in read:
        taken = {*draft.passed, *draft.passed.values()}
        draft.passed.update({name: name for name in draft.inputs if name not in taken})


def _by_position(draft: Draft, waiting: list[str], left: list[str]) -> None:
    """Bind parameters to inputs of other names where both are alone at the same position."""
    parameters, inputs = list(parameters_of(draft.target)), list(draft.inputs)
    places = [parameters.index(name) for name in waiting]
    if places != [inputs.index(name) for name in left]:
        taken = f"the reference takes {', '.join(waiting)}"
        raise fail("parameters", f"{taken}, not an input (left are: {', '.join(left) or 'none'})")
    draft.passed.update(zip(waiting, left, strict=True))


def rule_inputs(draft: Draft) -> None:
    """Inputs are those the reference gets, in its order; run-time options go.

    One is optional only where the reference can do without: it has None as default, or asks.
    """
    given, asked = parameters_of(draft.target), asked_by(draft.target)
    order = [name for name in (*given, *draft.passed) if name in draft.passed]
    names = dict.fromkeys(draft.passed[name] for name in order)
    draft.inputs = {name: draft.inputs[name] for name in names if name in draft.inputs}
    for parameter in given.keys() & draft.passed.keys():
        default = given[parameter]
        none = isinstance(default, ast.Constant) and default.value is None
        if not none and parameter not in asked:
            draft.inputs.get(draft.passed[parameter], {}).pop("optional", None)


def rule_absent_outputs(draft: Draft) -> None:
    """An optional output that the reference does not return is none."""
    sure = {name: spec for name, spec in draft.outputs.items() if not spec.get("optional")}
    if sure and draft.returned == len(sure):
        draft.outputs = sure


def rule_in_place(draft: Draft) -> None:
    """A tensor written in place is either an input or an output.

    Where the reference returns other outputs too, it is an input; where all outputs are such, they
    are new tensors `<name>_out`. The reference gets copies of what it writes.
    """
    declared, count = list(draft.outputs), draft.returned
    kept = [name for name in declared if name not in draft.inputs]
    if not kept:
        draft.outputs = {f"{name}_out": spec for name, spec in draft.outputs.items()}
        kept = declared
    elif count == len(declared) > len(kept):
        draft.picked = [declared.index(name) for name in kept]
    if count not in (len(declared), len(kept)) and not (count is None and kept == declared):
        values = "an unclear number of" if count is None else count
        raise fail("in_place", f"the reference returns {values} values for {declared}")
    if kept != declared:
        draft.outputs = {name: draft.outputs[name] for name in kept}
    for parameter in sorted(written_by(draft.target)):
        if draft.inputs.get(draft.passed.get(parameter, ""), {}).get("shape") is not None:
            draft.copied.append(parameter)


def rule_returned_dtypes(draft: Draft) -> None:
    """An output has the dtype that the reference converts it to, where it says so at the end."""
    returned = returned_by(draft.target)
    if len(returned) != 1:
        return
    value = returned[0]
    values = list(value.elts) if isinstance(value, ast.Tuple) else [value]
    places = draft.picked if draft.picked is not None else range(len(draft.outputs))
    for place, spec in zip(places, draft.outputs.values(), strict=True):
        stated = _stated_dtype(draft, values[place]) if place < len(values) else None
        if stated in DTYPES:
            spec["dtype"] = stated


def _stated_dtype(draft: Draft, value: ast.expr) -> str | None:
    """Return the dtype of `....to(torch.X)`, or of a name whose only last value is that."""
    if isinstance(value, ast.Name):
        name = value.id
        last = [
            node.value
            for node in draft.target.body
            if isinstance(node, ast.Assign)
            and any(isinstance(t, ast.Name) and t.id == name for t in node.targets)
        ]
        if not last or isinstance(last[-1], ast.Name):
            return None
        value = last[-1]
    if not isinstance(value, ast.Call) or not isinstance(value.func, ast.Attribute):
        return None
    if value.func.attr != "to" or len(value.args) != 1 or value.keywords:
        return None
    dtype = value.args[0]
    if not isinstance(dtype, ast.Attribute) or not isinstance(dtype.value, ast.Name):
        return None
    return dtype.attr if dtype.value.id == "torch" else None


def rule_raw_bytes(draft: Draft) -> None:
    """Unsigned tensors are stored as the signed dtype of the same bytes.

    The reference still gets and returns what it did: `run` views the bytes, both ways.
    """
    for name, spec in draft.inputs.items():
        if spec["dtype"] in _RAW and spec["shape"] is not None:
            draft.raw_inputs[name] = spec["dtype"]
            spec["dtype"] = _RAW[spec["dtype"]]
    for name, spec in draft.outputs.items():
        if spec["dtype"] in _RAW:
            spec["dtype"] = draft.raw_outputs[name] = _RAW[spec["dtype"]]


def rule_dtypes(draft: Draft) -> None:
    """Every dtype is known, and one the dataset has."""
    for part in (draft.inputs, draft.outputs):
        for name, spec in part.items():
            if spec["dtype"] == "unknown":
                raise fail("dtypes", f"the call had no {name}, which the reference needs")
            if spec["dtype"] not in DTYPES:
                raise fail("dtypes", f"{name} is {spec['dtype']}, which the dataset lacks")


def rule_axes(draft: Draft) -> None:
    """Axes are those shapes use and the const ones; a size no axis is declared for is variable.

    A number among the axes of a shape is a const axis of that size.
    """
    tensors = [*draft.inputs.values(), *draft.outputs.values()]
    for spec in tensors:
        for place, size in enumerate(spec["shape"] or ()):
            if size.isdigit():
                name = "one" if size == "1" else f"size_{size}"
                literal = {"type": "const", "value": int(size)}
                if draft.axes.setdefault(name, literal).get("value") != int(size):
                    raise fail("axes", f"{name} is declared, and is not {size}")
                spec["shape"][place] = name
    used = dict.fromkeys(axis for spec in tensors for axis in spec["shape"] or ())
    unread = [a for a in used if a in draft.axes and "value" not in draft.axes[a]]
    unread = [a for a in unread if draft.axes[a].get("type") == "const"]
    if unread:
        raise fail("axes", f"the template could not read {', '.join(unread)}")
    kept = {n: a for n, a in draft.axes.items() if n in used or "value" in a}
    draft.axes = kept | {name: {"type": "var"} for name in used if name not in kept}


def rule_constraints(draft: Draft) -> None:
    """Constraints are about axes and inputs that are there."""
    kept = []
    for constraint in draft.constraints:
        try:
            names = {n.id for n in ast.walk(syntax.parse(constraint)) if isinstance(n, ast.Name)}
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            continue
        if names - set(dir(builtins)) <= draft.axes.keys() | draft.inputs.keys():
            kept.append(constraint)
    draft.constraints = kept


def rule_tags(draft: Draft) -> None:
    """The `fi_api` tag names what users import: no method, no private or innermost module."""
    for place, tag in enumerate(draft.tags):
        if tag.startswith(_API):
            draft.tags[place] = _API + _public(tag.removeprefix(_API))


def _public(path: str) -> str:
    parts = path.split(".")
    if len(parts) > 1 and parts[-2][:1].isupper():
        parts.pop()
    parts = [part for part in parts if not part.startswith("_")]
    if len(parts) > 3:
        del parts[-2]
    return ".".join(parts)


def fi_api(definition: Json) -> str:
    """Return the public path of the API that a definition's or template's tags name.

    Raises:
        DefinitionError: they name none, or several.
    """
    tags = texts(definition.get("tags") or [], "tags")
    paths = {_public(tag.removeprefix(_API)) for tag in tags if tag.startswith(_API)}
    if len(paths) != 1:
        raise fail("tags", f"{len(paths)} {_API} tags, expected 1")
    return paths.pop()


def rule_keys(draft: Draft) -> None:
    """Tensors do not say which parameter they are, and outputs are never absent."""
    for spec in (*draft.inputs.values(), *draft.outputs.values()):
        spec.pop("param", None)
    for spec in draft.outputs.values():
        spec.pop("optional", None)


def rule_helpers(draft: Draft) -> None:
    """Doubt: the reference calls helpers that the template left out (FlashInfer before 0.7)."""
    lacking = undefined_names(draft.source)
    if lacking:
        draft.doubts.append(f"helpers: the reference lacks {', '.join(lacking)}")


def rule_heads(draft: Draft) -> None:
    """Doubt: the template misread a cache's dimensions (SGLang's pool has three, not four)."""
    for query in ("num_qo_heads", "num_heads_qo", "num_heads"):
        heads, kv = (draft.axes.get(a, {}).get("value") for a in (query, "num_kv_heads"))
        if heads and kv and heads % kv:
            draft.doubts.append(f"heads: {heads} query heads, {kv} KV heads")


Rule = Callable[[Draft], None]

SHARED: tuple[Rule, ...] = (
    rule_imports,
    rule_helpers,
    rule_heads,
    rule_options,
    rule_plan_tensors,
    rule_absent,
    rule_destinations,
    rule_dtype_option,
    rule_parameters,
    rule_inputs,
    rule_absent_outputs,
    rule_in_place,
    rule_returned_dtypes,
    rule_raw_bytes,
    rule_dtypes,
    rule_axes,
)
HARVEST: tuple[Rule, ...] = (
    *SHARED,
    rule_constraints,
    rule_tags,
    rule_keys,
    rule_run,
)


def _state(draft: Draft) -> Json:
    state = {name: value for name, value in vars(draft).items() if name != "functions"}
    state["passed"] = {k: v for k, v in draft.passed.items() if k != v}
    return copy.deepcopy(state)


def apply(draft: Draft, rules: tuple[Rule, ...]) -> list[str]:
    """Apply rules in order; return the names of those that changed something."""
    applied = []
    for rule in rules:
        before = _state(draft)
        rule(draft)
        if before != _state(draft):
            applied.append(rule.__name__.removeprefix("rule_"))
    return applied
