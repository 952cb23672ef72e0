"""Turn a trace template's answer into a definition of the dataset's conventions.

Templates describe run-time options, buffers written in place, raw bytes and defining modules;
definitions do not. Each difference is one named rule, a function over a `Draft` (`rules.py`,
`run.py`; `adopt.py` for what depends on the kernel). A rule that cannot be applied raises with its
name, and the kernel falls back to its op module's definition. The reference's text is kept: it is
either renamed to `run`, or a `run` that takes the definition's inputs is written below it and calls
it. Nothing is executed.
"""

from __future__ import annotations

from typing import Any

from tasks.define.repair.adopt import adopted
from tasks.define.repair.answer import Json, Repaired, read_answer
from tasks.define.repair.rules import HARVEST, apply, fi_api
from tasks.errors import DefinitionError
from tasks.ops.base import KernelSpec, Provider, definition_tags

__all__ = ["Repaired", "adopted", "fi_api", "finish", "harvested", "repair"]


def harvested(template: Any) -> Repaired:
    """Repair any template's answer, with its own name and op type.

    Args:
        template: what `api.fi_trace(...)` returned, or a file FlashInfer dumped.

    Returns:
        The definition, and why it may not be used although it holds together, if so.

    Raises:
        DefinitionError: a rule cannot be applied; the text begins with the rule's name.
    """
    draft = read_answer(template)
    applied = apply(draft, HARVEST)
    definition: Json = {
        "name": draft.name,
        "description": draft.description,
        "op_type": draft.op_type,
        "tags": draft.tags,
        "axes": draft.axes,
        "inputs": draft.inputs,
        "outputs": draft.outputs,
        "reference": draft.source,
    }
    if draft.constraints:
        definition["constraints"] = draft.constraints
    return Repaired(definition, tuple(applied), tuple(draft.doubts))


def repair(template: Any, spec: KernelSpec, own: Json) -> Json:
    """Return the definition of `adopted(...)` if nothing speaks against using it.

    Raises:
        DefinitionError: a rule cannot be applied, or leaves a doubt; the text begins with its name.
    """
    repaired = adopted(template, spec, own)
    if repaired.doubts:
        raise DefinitionError(repaired.doubts[0])
    return repaired.definition


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
