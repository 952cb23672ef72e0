"""One module per op type; importing this package registers them all."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping

from tasks.errors import InputError
from tasks.ops.base import KernelSpec, OpModule, UnknownFamily, register, registry

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")


def op_module(op_type: str) -> OpModule:
    """Return the module that knows `op_type`.

    Raises:
        InputError: there is none.
    """
    known: Mapping[str, OpModule] = registry()
    if op_type not in known:
        raise InputError(f"op type {op_type!r} has no module; known: {', '.join(sorted(known))}")
    return known[op_type]


def family(op_type: str) -> OpModule:
    """Return the module that knows `op_type`, or one that knows nothing."""
    return registry().get(op_type) or UnknownFamily()


__all__ = ["KernelSpec", "OpModule", "family", "op_module", "register", "registry"]
