"""The child process that drafts definitions: `python -m tasks.define.child REQUEST RESULT`.

It is the only place that imports torch, FlashInfer and FlashInfer-Bench. Templates are called on
meta tensors, so it needs no GPU and allocates nothing. Without the bench extra every kernel takes
its op module's definition.
"""

from __future__ import annotations

import importlib
import json
import sys
from functools import reduce
from pathlib import Path
from typing import Any

from tasks import files, ops
from tasks.define.check import check_definition
from tasks.define.repair import finish, repair
from tasks.errors import DefinitionError
from tasks.ops.base import FlashInferApi, KernelSpec, MetaTensor, TemplateCall

Json = dict[str, Any]


def _import_bench() -> tuple[Any, Any] | str:
    """Return torch and FlashInfer-Bench's Definition, or why they cannot be had."""
    try:
        import flashinfer  # noqa: F401
        import torch
        from flashinfer_bench.data import Definition
    except Exception as error:  # FlashInfer runs device code at import on some hosts
        return f"{type(error).__name__}: {error}"
    return torch, Definition


def _meta(value: Any, torch: Any) -> Any:
    if isinstance(value, MetaTensor):
        return torch.empty(value.shape, dtype=getattr(torch, value.dtype), device="meta")
    if isinstance(value, tuple):
        return tuple(_meta(item, torch) for item in value)
    return value


def _call_template(call: TemplateCall, torch: Any) -> Json:
    """Call `api.fi_trace(...)` on meta tensors."""
    module, _, name = call.api.partition(":")
    try:
        api = reduce(getattr, name.split("."), importlib.import_module(module))
        answer = api.fi_trace(**{k: _meta(v, torch) for k, v in call.arguments.items()})
    except Exception as error:  # a template is FlashInfer's code
        raise DefinitionError(f"template {call.api}: {type(error).__name__}: {error}") from error
    return dict(answer)


def _draft(spec: KernelSpec, has_template: bool, model_slug: str, bench: Any) -> Json:
    """Return one kernel's definition and how it was made."""
    module = ops.op_module(spec.op_type)
    provider = module.provider(spec)
    own = module.definition(spec)
    body, method, notes = own, "op_module", []
    call = module.template_call(spec) if has_template else None
    if call is not None:
        if isinstance(bench, str):
            notes.append(f"trace template not used: {bench}")
        else:
            try:
                body = repair(_call_template(call, bench[0]), spec, own)
                method = "trace_template"
            except DefinitionError as error:
                notes.append(f"trace template not used: {error}")
    definition = finish(body, spec, provider, model_slug)
    check_definition(definition)
    if not isinstance(bench, str):
        try:
            bench[1].model_validate(definition)
        except ValueError as error:
            raise DefinitionError(f"flashinfer_bench.data.Definition: {error}") from error
    if isinstance(provider, FlashInferApi) and method == "op_module" and not notes:
        notes.append("no trace template is trusted for this kernel")
    return {"definition": definition, "method": method, "notes": notes}


def main(request_path: str, result_path: str) -> None:
    """Draft every kernel of the request; one kernel's failure is its own result."""
    request = json.loads(Path(request_path).read_text())
    bench = _import_bench()
    results: dict[str, Json] = {}
    for item in request["kernels"]:
        try:
            spec = KernelSpec.model_validate(item["spec"])
            draft = _draft(spec, item["has_template"], request["model_slug"], bench)
        except DefinitionError as error:
            draft = {"error": str(error)}
        except Exception as error:  # one kernel's is not the others'
            draft = {"error": f"unexpected {type(error).__name__}: {error}"}
        results[item["name"]] = draft
    versions = {}
    if not isinstance(bench, str):
        from importlib.metadata import version

        versions = {name: version(name) for name in ("flashinfer-python", "flashinfer-bench")}
    files.write_json(Path(result_path), {"versions": versions, "kernels": results})


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
