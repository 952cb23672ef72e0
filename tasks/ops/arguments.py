"""The arguments of a dumped call, read and checked.

Every check that fails is a counted reason (`DumpError`) that names the call, the argument, and what
it is against what it should be. No argument is assumed but those that a caller left out, which have
the API's own defaults.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

import ml_dtypes  # noqa: F401  # numpy learns the names of bfloat16 and 8-bit floats
import numpy as np

from tasks.ops.base import Call, DumpError, Json, KernelSpec, Scalar, Tensor, const_axes
from tasks.ops.plans import is_int64, shown

_FLOAT32_MAX = float(np.finfo(np.float32).max)
_MISSING = object()


def tensor_of(call: Call, name: str, dimensions: int) -> Tensor:
    """Return a tensor argument.

    Raises:
        DumpError: the call has no such tensor, or it has not so many dimensions.
    """
    found = call.tensors.get(name)
    if found is None and call.values.get(name, _MISSING) is None:
        raise DumpError(
            f"{call.name}: {name} is None, and a row cannot leave an input out (FlashInfer-Bench "
            "makes up random values for it)"
        )
    if found is None:
        raise DumpError(f"{call.name}: the dump has no tensor {name!r}")
    if len(found.shape) != dimensions:
        raise DumpError(
            f"{call.name}: {name} has {len(found.shape)} dimensions, expected {dimensions}"
        )
    return found


def value_of(call: Call, name: str, default: object = _MISSING) -> Any:
    """Return another argument, the number of an enumeration's member included.

    Args:
        call: the call.
        name: the parameter.
        default: the API's default, for a parameter that has one.

    Raises:
        DumpError: it is a tensor, or a parameter without default that is not in the dump.
    """
    if name in call.tensors:
        raise DumpError(f"{call.name}: {name} is a tensor")
    value = call.values.get(name, default)
    if value is _MISSING:
        raise DumpError(f"{call.name}: the dump has no {name}")
    if isinstance(value, Mapping) and value.get("type") == "enum":
        return value.get("value")
    return value


def integer_of(call: Call, name: str, default: object = _MISSING, *, least: int = 1) -> int:
    """Return an integer argument.

    Raises:
        DumpError: it is missing, no integer of 64 bits, or less than `least`.
    """
    value = value_of(call, name, default)
    if type(value) is not int or value < least or not is_int64(value):
        raise DumpError(f"{call.name}: {name} is {shown(value)}, not an integer from {least} on")
    return value


def number_of(call: Call, name: str, default: object = _MISSING) -> int | float:
    """Return a number, with its own type.

    Raises:
        DumpError: it is missing, no number, or none that a float32 can hold.
    """
    value = value_of(call, name, default)
    if type(value) not in (int, float):
        raise DumpError(f"{call.name}: {name} is {shown(value)}, not a number")
    if not abs(value) <= _FLOAT32_MAX:
        raise DumpError(f"{call.name}: {name} is {shown(value)}, no float32")
    number: int | float = value
    return number


def scalar_of(call: Call, spec: KernelSpec, name: str, parameter: str) -> Scalar:
    """Return a scalar input: what the call passed, else what the model's config says.

    Raises:
        DumpError: neither says it, or the call passed something else than a number.
    """
    if parameter not in call.values and parameter not in call.tensors and name in spec.scalars:
        return spec.scalars[name]
    return Scalar(value=number_of(call, parameter), source=f"the call's {parameter}")


def default_scale(call: Call, size: int, parameter: str = "scale") -> Scalar:
    """Return a scale for which FlashInfer takes 1/sqrt(size) where the caller passes none.

    Raises:
        DumpError: the call passed something else than a number.
    """
    if value_of(call, parameter, None) is None:
        source = f"FlashInfer's default, 1/sqrt({size}): the call's {parameter} is None"
        return Scalar(value=1 / math.sqrt(size), source=source)
    return Scalar(value=number_of(call, parameter), source=f"the call's {parameter}")


def check_setting(call: Call, name: str, *values: object, default: object = _MISSING) -> None:
    """Check an argument that decides what the kernel computes.

    Args:
        call: the call.
        name: the parameter.
        values: what stands for what the definition says.
        default: the API's default, for a parameter that has one.

    Raises:
        DumpError: it is something else, or missing.
    """
    got = value_of(call, name, default)
    if not any(type(got) is type(value) and got == value for value in values):
        raise DumpError(f"{call.name}: {name} is {shown(got)}, the definition has {values[0]!r}")


def check_without(call: Call, names: Collection[str]) -> None:
    """Check that optional arguments which the definition does not have were not passed.

    Raises:
        DumpError: one was.
    """
    for name in names:
        nested = any(key == name or key.startswith(f"{name}__") for key in call.tensors)
        if nested or call.values.get(name) is not None:
            raise DumpError(f"{call.name}: it was called with {name}, which the definition has not")


def bound_axes(
    call: Call,
    definition: Json,
    parameters: Mapping[str, str],
    other_dtype: Collection[str] = (),
) -> dict[str, int]:
    """Match a call's tensors with a definition's inputs: dimensions, axes and dtypes.

    Args:
        call: the call.
        definition: the definition.
        parameters: input -> the parameter that carries it.
        other_dtype: inputs whose dtype may be another one.

    Returns:
        The var axes of these inputs.

    Raises:
        DumpError: a tensor is missing or empty, or does not fit the definition or the others.
    """
    known = const_axes(definition)
    found: dict[str, int] = {}
    for name, parameter in parameters.items():
        wanted = definition["inputs"][name]
        tensor = tensor_of(call, parameter, len(wanted["shape"]))
        if name not in other_dtype and tensor.dtype != wanted["dtype"]:
            raise DumpError(
                f"{call.name}: {parameter} is {tensor.dtype}, the definition has {wanted['dtype']}"
            )
        for axis, size in zip(wanted["shape"], tensor.shape, strict=True):
            if size < 1:
                raise DumpError(f"{call.name}: {parameter} is empty ({axis} is {size})")
            if axis in known and size != known[axis]:
                raise DumpError(
                    f"{call.name}: {axis} is {size}, the definition has {known[axis]} ({parameter})"
                )
            if found.setdefault(axis, size) != size:
                raise DumpError(
                    f"{call.name}: {axis} is {size} by {parameter}, {found[axis]} by other inputs"
                )
    return {axis: size for axis, size in found.items() if axis not in known}


def exact(call: Call, name: str, values: np.ndarray, dtype: str) -> np.ndarray:
    """Return values in a dtype that has all of them: the kernel then computes the same.

    Raises:
        DumpError: some are not finite, or the dtype does not have them.
    """
    real = "float" in values.dtype.name
    if real and not np.isfinite(values.astype(np.float32)).all():
        raise DumpError(f"{call.name}: {name} has numbers that are not finite")
    if values.dtype.name == dtype:
        return values
    refused = f"{call.name}: {name} is {values.dtype.name}, the definition has {dtype}"
    if real != ("float" in dtype) or values.dtype.kind in "bOSUc":
        raise DumpError(refused)
    with np.errstate(over="ignore"):
        converted = values.astype(np.dtype(dtype))
        changed = int((converted.astype(values.dtype) != values).sum())
    if changed:
        raise DumpError(f"{refused}, which does not have {changed} of the {values.size} values")
    return converted


def stored(call: Call, definition: Json, name: str) -> np.ndarray:
    """Return the values of an input that rows store, in the definition's dtype.

    Raises:
        DumpError: the tensor cannot be read, or not be stored exactly (`exact`).
    """
    return exact(call, name, call.tensors[name].load(), definition["inputs"][name]["dtype"])


def check_range(call: Call, name: str, values: np.ndarray, first: int, last: int) -> None:
    """Check that integers are between two numbers, both included.

    Raises:
        DumpError: one is not.
    """
    lowest, highest = int(values.min()), int(values.max())
    if lowest < first or highest > last:
        raise DumpError(
            f"{call.name}: {name} has values from {lowest} to {highest}, "
            f"expected from {first} to {last}"
        )


def check_offsets(call: Call, name: str, values: np.ndarray, total: int) -> None:
    """Check that integers are the offsets of consecutive parts of `total` elements.

    Raises:
        DumpError: they are not.
    """
    if values[0] != 0 or (values[1:] < values[:-1]).any() or values[-1] != total:
        raise DumpError(
            f"{call.name}: {name} is not a sequence of offsets from 0 to {total} "
            f"(it begins with {int(values[0])} and ends with {int(values[-1])})"
        )
