"""Render a definition's reference test: what the dataset keeps beside it, and what proves it here.

The frame is the same for every definition; its middle is the op module's `reference_test`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from tasks import ops
from tasks.ops.base import KernelSpec

_TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "templates"),
    undefined=StrictUndefined,
    autoescape=False,  # noqa: S701  the output is Python
    keep_trailing_newline=True,
    trim_blocks=True,
    lstrip_blocks=True,
)


def render(
    spec: KernelSpec, family: str | None = None, *, embedded: dict[str, Any] | None = None
) -> str:
    """Return the source of `tests/references/test_{name}.py`.

    Args:
        spec: the kernel.
        family: the middle, where it is not the op module's own.
        embedded: a definition to contain instead of reading it from the dataset; then there are no
            test functions, only `CASES` and `prove(case)`.
    """
    middle = ops.op_module(spec.op_type).reference_test if family is None else family
    return _TEMPLATES.get_template("reference_test.py.j2").render(
        name=spec.name,
        op_type=spec.op_type,
        variant=spec.variant,
        constants=spec.constants,
        family=middle.strip(),
        embedded=repr(embedded) if embedded else None,
    )
