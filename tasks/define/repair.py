"""Turn a trace template's answer into a definition of the dataset's conventions.

Templates describe run-time options, in-place outputs and defining modules; definitions do not. Each
difference is one rule below. A rule that cannot be applied raises, and the kernel falls back to its
op module's definition.
"""

from __future__ import annotations

import ast
from typing import Any

from tasks.errors import DefinitionError
from tasks.ops.base import KernelSpec, Provider, definition_tags

Json = dict[str, Any]
_TENSOR_KEYS = ("shape", "dtype", "description")


def _functions(source: str) -> list[ast.FunctionDef]:
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError) as error:
        raise DefinitionError(f"reference: not Python ({error})") from error
    return [node for node in tree.body if isinstance(node, ast.FunctionDef)]


def rename_reference(source: str) -> tuple[str, list[str]]:
    """Rename the template's reference function to `run`; helpers keep their names.

    The reference is the last top-level function (templates put helpers before it).

    Returns:
        The source and the parameter names of `run`.

    Raises:
        DefinitionError: the source has no function, or is not Python.
    """
    functions = _functions(source)
    if not functions:
        raise DefinitionError("reference: the template has none")
    target = functions[-1]
    lines = source.splitlines(keepends=True)
    line = lines[target.lineno - 1]
    lines[target.lineno - 1] = line.replace(f"def {target.name}", "def run", 1)
    parameters = [a.arg for a in (*target.args.posonlyargs, *target.args.args)]
    return "".join(lines), parameters


def keep_inputs(inputs: Json, parameters: list[str]) -> Json:
    """Keep the inputs the reference takes, in its order; run-time options go.

    Raises:
        DefinitionError: the reference takes something that is no input.
    """
    unknown = [name for name in parameters if name not in inputs]
    if unknown:
        raise DefinitionError(f"inputs: the reference takes {', '.join(unknown)}, not an input")
    return {name: _tensor(inputs[name]) for name in parameters}


def keep_outputs(outputs: Json, inputs: Json) -> Json:
    """Drop outputs that are an input written in place.

    Raises:
        DefinitionError: nothing is left.
    """
    kept = {name: _tensor(spec) for name, spec in outputs.items() if name not in inputs}
    if not kept:
        raise DefinitionError("outputs: all are inputs written in place")
    return kept


def _tensor(spec: Json) -> Json:
    return {key: spec[key] for key in _TENSOR_KEYS if key in spec}


def keep_axes(axes: Json, inputs: Json, outputs: Json) -> Json:
    """Keep the axes that shapes use.

    Raises:
        DefinitionError: a shape uses an axis that is not declared.
    """
    used = {
        axis for spec in (*inputs.values(), *outputs.values()) for axis in spec.get("shape") or ()
    }
    missing = sorted(used - axes.keys())
    if missing:
        raise DefinitionError(f"axes: shapes use {', '.join(missing)}, not declared")
    return {name: axis for name, axis in axes.items() if name in used}


def check_constants(axes: Json, spec: KernelSpec) -> None:
    """Check that the template read the const axes we computed.

    Raises:
        DefinitionError: a value differs or is absent; the text has both.
    """
    read = {name: axis.get("value") for name, axis in axes.items() if axis.get("type") == "const"}
    if read != spec.axes:
        raise DefinitionError(f"axes: the template read {read}, computed are {spec.axes}")


def describe(harvested: Json, own: Json) -> None:
    """Fill descriptions the template lacks from the op module's definition, in place."""
    for part in ("axes", "inputs", "outputs"):
        for name, spec in harvested[part].items():
            if not spec.get("description"):
                described = own[part].get(name, {}).get("description")
                if described:
                    spec["description"] = described


def repair(template: Json, spec: KernelSpec, own: Json) -> Json:
    """Apply all rules.

    Args:
        template: what `api.fi_trace(...)` returned.
        spec: the kernel.
        own: the op module's definition, for descriptions and tags.

    Returns:
        The definition without name, op type and tags about the run.

    Raises:
        DefinitionError: a rule cannot be applied; the text begins with the part at fault.
    """
    try:
        reference, parameters = rename_reference(template["reference"])
        inputs = keep_inputs(template["inputs"], parameters)
        outputs = keep_outputs(template["outputs"], inputs)
        axes = keep_axes(template["axes"], inputs, outputs)
    except (KeyError, TypeError, AttributeError) as error:
        raise DefinitionError(f"template: not of the expected form ({error!r})") from error
    check_constants(axes, spec)
    repaired: Json = {
        "description": own["description"],
        "tags": own["tags"],
        "axes": axes,
        "constraints": list(template.get("constraints") or ()),
        "inputs": inputs,
        "outputs": outputs,
        "reference": reference,
    }
    describe(repaired, own)
    return repaired


def finish(body: Json, spec: KernelSpec, provider: Provider, model_slug: str) -> Json:
    """Add name, op type and tags, in the dataset's order of keys."""
    definition = {
        "name": spec.name,
        "description": body["description"],
        "op_type": spec.op_type,
        "tags": definition_tags(spec, provider, body.get("tags", []), model_slug),
        "axes": body["axes"],
        "inputs": body["inputs"],
        "outputs": body["outputs"],
        "reference": body["reference"],
    }
    if body.get("constraints"):
        definition["constraints"] = body["constraints"]
    return definition
