"""Making a template's answer the op module's definition, with the template's reference."""

from __future__ import annotations

import ast
import copy
from typing import Any

from tasks.define.repair.answer import Draft, Json, Repaired, read_answer
from tasks.define.repair.rules import SHARED, Rule, apply
from tasks.define.repair.run import rule_run
from tasks.define.repair.syntax import Function, fail, parameters_of, read_by
from tasks.ops.base import KernelSpec

_PAGES = """
def _tokens_of_pages(kv_indptr, kv_indices, kv_last_page_len, page_size):
    \"\"\"Offsets and ids of the tokens in use: a page of `page_size` is as many pages of one.\"\"\"
    pages = kv_indptr.long().diff()
    last = kv_last_page_len.to(pages)
    lengths = torch.where(pages > 0, (pages - 1) * page_size + last, 0)
    used = torch.full_like(kv_indices[: int(kv_indptr[-1])], page_size).long()
    used[(kv_indptr.long()[1:] - 1)[pages > 0]] = last[pages > 0]
    slots = torch.arange(page_size, device=kv_indices.device)
    tokens = kv_indices[: used.shape[0], None].long() * page_size + slots
    token_indptr = torch.cat([torch.zeros_like(lengths[:1]), lengths.cumsum(0)])
    return token_indptr.to(kv_indptr.dtype), tokens[slots < used[:, None]].to(kv_indices.dtype)
"""


def _alike(draft: Draft, theirs: Json, own: Json, own_spec: Json) -> bool:
    """Whether two tensors may be the same: dtype, and the sizes of const axes."""
    mine, others = own_spec["shape"], theirs["shape"]
    if theirs["dtype"] != own_spec["dtype"] or (mine is None) != (others is None):
        return False
    sizes = [
        [axes.get(a, {}).get("value") for a in shape or ()]
        for axes, shape in ((own["axes"], mine), (draft.axes, others))
    ]
    return sizes[0] == sizes[1]


def _paired(draft: Draft, part: str, own: Json) -> dict[str, str]:
    """Return the op module's names -> the template's: the same name, or the only one alike."""
    theirs, wanted = getattr(draft, part), own[part]
    pairs = {name: name for name in wanted if name in theirs}
    left = [name for name in theirs if name not in pairs]
    lacking = [name for name in wanted if name not in pairs]
    for name in lacking:
        alike = [t for t in left if _alike(draft, theirs[t], own, wanted[name])]
        rivals = [n for n in lacking if alike and _alike(draft, theirs[alike[0]], own, wanted[n])]
        if len(alike) != 1 or len(rivals) != 1:
            found = f"any of {alike} in the template" if alike else "nothing in the template"
            raise fail(part, f"{name} may be {found}")
        pairs[name] = alike[0]
    return pairs


def adopt_pages(draft: Draft, own: Json) -> None:
    """Give `run` the input `kv_last_page_len`, which templates do not know.

    They take all tokens of a page. So the reference gets the tokens in use as pages of one, in
    caches viewed so.

    Raises:
        DefinitionError: the reference cannot be given pages of another size.
    """
    size = own["axes"].get("page_size", {}).get("value", 1)
    if "kv_last_page_len" not in own["inputs"] or "kv_last_page_len" in draft.inputs:
        return
    numbers = {n.value for n in ast.walk(draft.target) if isinstance(n, ast.Constant)}
    indices = ("kv_indptr", "kv_indices")
    if any(draft.passed.get(name) != name for name in indices) or size in numbers:
        raise fail("pages", f"the reference cannot be given pages of one instead of {size}")
    for name, spec in draft.inputs.items():
        shape = spec["shape"] or []
        if shape[:2] == ["num_pages", "page_size"]:
            draft.paged.append(name)
        elif "page_size" in shape:
            raise fail("pages", f"{name} has shape {shape}")
    draft.passed |= {name: name.replace("kv_", "token_") for name in indices}
    draft.first += [
        "# The reference reads whole pages: it gets the tokens in use, as pages of one.",
        "token_indptr, token_indices = "
        f"_tokens_of_pages(kv_indptr, kv_indices, kv_last_page_len, {size})",
    ]
    draft.source = f"{draft.source.rstrip()}\n\n{_PAGES}"
    draft.inputs["kv_last_page_len"] = dict(own["inputs"]["kv_last_page_len"])
    draft.axes.setdefault("batch_size", {"type": "var"})


def adopt_inputs(draft: Draft, spec: KernelSpec, own: Json) -> None:
    """Give the inputs the op module's names and order; what it bakes in is bound to its value.

    Raises:
        DefinitionError: one is lacking, ambiguous, or needed and not the op module's.
    """
    pairs = _paired(draft, "inputs", own)
    ours = {theirs: name for name, theirs in pairs.items()}
    given = parameters_of(draft.target)
    for parameter, value in list(draft.passed.items()):
        if value in ours:
            draft.passed[parameter] = ours[value]
        elif value in draft.inputs:
            fixed = spec.axes.get(value, spec.constants.get(value))
            if fixed is not None:
                draft.passed[parameter] = repr(fixed)
            elif parameter in given and given[parameter] is not None:
                _left_out(draft.target, parameter, given[parameter])
                del draft.passed[parameter]
            elif draft.inputs[value].get("optional"):
                draft.passed[parameter] = "None"
            else:
                raise fail("inputs", f"the reference takes {value}, which the op module has not")
    draft.inputs = {name: draft.inputs[pairs[name]] for name in own["inputs"]}
    draft.raw_inputs = {ours[n]: raw for n, raw in draft.raw_inputs.items() if n in ours}
    draft.paged = [ours[name] for name in draft.paged if name in ours]
    draft.copied = [name for name in draft.copied if draft.passed.get(name) in draft.inputs]


def _left_out(target: Function, parameter: str, default: ast.expr | None) -> None:
    """Refuse to leave out an option whose default switches something on or off.

    GDN's template normalises queries and keys by default, where SGLang has done it before.
    """
    absent = isinstance(default, ast.Constant) and default.value is None
    if not absent and parameter in read_by(target):
        raise fail("inputs", f"the reference has an option {parameter}, the op module has not")


def adopt_outputs(draft: Draft, own: Json) -> None:
    """Give the outputs the op module's names and order; others are not returned.

    Raises:
        DefinitionError: one is lacking or ambiguous, or what is returned is not clear.
    """
    pairs, names = _paired(draft, "outputs", own), list(draft.outputs)
    places = draft.picked if draft.picked is not None else list(range(len(names)))
    picked = [places[names.index(pairs[name])] for name in own["outputs"]]
    if picked != places:
        if draft.returned is None:
            raise fail("outputs", f"which of {names} the reference returns is not clear")
        draft.picked = picked
    raw = draft.raw_outputs
    draft.raw_outputs = {name: raw[theirs] for name, theirs in pairs.items() if theirs in raw}
    draft.outputs = {name: draft.outputs[pairs[name]] for name in own["outputs"]}


def check_constants(axes: Json, spec: KernelSpec, own: Json) -> None:
    """Check that the template read the const axes we computed, and no other.

    Args:
        axes: the template's, under the op module's names where shapes use them.
        spec: the kernel.
        own: the op module's definition.

    Raises:
        DefinitionError: a value differs or is absent; the text has both.
    """
    read = {name: axis.get("value") for name, axis in axes.items() if axis["type"] == "const"}
    needed = {name: a["value"] for name, a in own["axes"].items() if a["type"] == "const"}
    known = {**spec.constants, **spec.axes, **needed}
    # What the reference works out of its inputs, the template need not have read.
    used = {
        axis
        for part in ("inputs", "outputs")
        for t in own[part].values()
        for axis in t["shape"] or ()
    }
    absent = (needed.keys() & used) - read.keys()
    if absent or any(known.get(name) != value for name, value in read.items()):
        raise fail("axes", f"the template read {read}, computed are {needed}")


def adopt_axes(draft: Draft, spec: KernelSpec, own: Json) -> None:
    """Check that all tensors have the op module's dtypes and shapes, whose axes it takes.

    Raises:
        DefinitionError: one differs; the text has both.
    """
    ours: dict[str, str] = {}
    for part in ("inputs", "outputs"):
        for name, wanted in own[part].items():
            seen = getattr(draft, part)[name]
            if seen["dtype"] != wanted["dtype"]:
                both = f"{seen['dtype']} in the template, {wanted['dtype']} in the op module"
                raise fail("dtypes", f"{name} is {both}")
            old, new = seen["shape"], wanted["shape"]
            same = (old is None) == (new is None) and len(old or ()) == len(new or ())
            pairs = zip(old or (), new or (), strict=True) if same else ()
            if not same or any(ours.setdefault(a, b) != b for a, b in pairs):
                raise fail("axes", f"{name} is {old} in the template, {new} in the op module")
    if len(set(ours.values())) != len(ours):
        raise fail("axes", f"two axes of the template are one in the op module: {ours}")
    check_constants({ours.get(n, n): axis for n, axis in draft.axes.items()}, spec, own)


def adopted(template: Any, spec: KernelSpec, own: Json) -> Repaired:
    """Repair a template's answer into an op module's definition, with the template's reference.

    Args:
        template: what `api.fi_trace(...)` returned.
        spec: the kernel.
        own: the op module's definition.

    Returns:
        The definition without name, op type and tags about the run, and why its reference may not
        be used, if so.

    Raises:
        DefinitionError: a rule cannot be applied, or the template describes another kernel; the
            text begins with the rule's name.
    """
    draft = read_answer(template)
    applied = apply(draft, SHARED)
    own_rules: tuple[tuple[str, Rule], ...] = (
        ("pages", lambda d: adopt_pages(d, own)),
        ("inputs", lambda d: adopt_inputs(d, spec, own)),
        ("outputs", lambda d: adopt_outputs(d, own)),
        ("axes", lambda d: adopt_axes(d, spec, own)),
        ("run", rule_run),
    )
    applied += [name for name, rule in own_rules if apply(draft, (rule,))]
    body = {part: own[part] for part in ("description", "tags", "axes", "inputs", "outputs")}
    body |= {"constraints": own.get("constraints", []), "reference": draft.source}
    return Repaired(copy.deepcopy(body), tuple(dict.fromkeys(applied)), tuple(draft.doubts))
