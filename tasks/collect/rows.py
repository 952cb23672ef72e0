"""From a definition's calls to its distinct workloads, each checked against the definition."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from tasks import constraints, ops
from tasks.collect.dumps import CallLog
from tasks.collect.realism import extent_of
from tasks.collect.select import Candidate, content_uuid, dtype_name, stored
from tasks.errors import CollectError, first_problem
from tasks.ops.base import DumpError, KernelSpec, Rejected, Row, Scalar
from tasks.ops.plans import shown

Json = dict[str, Any]
Number = int | float | bool
_FLOATS = ("float", "bfloat")
_LARGEST_AXIS = 1 << 63
_INTEGERS = {f"int{bits}": bits for bits in (8, 16, 32, 64)}
_ROUNDED: Mapping[str, type[np.floating[Any]]] = {"float32": np.float32, "float16": np.float16}
_LARGEST_FLOAT = {name: float(np.finfo(kind).max) for name, kind in _ROUNDED.items()}


class _Axis(BaseModel):
    model_config = ConfigDict(frozen=True)

    type: Literal["var", "const"]
    value: int | None = None


class _Input(BaseModel):
    model_config = ConfigDict(frozen=True)

    shape: tuple[str, ...] | None
    dtype: str

    @property
    def may_be_random(self) -> bool:
        """Whether its values decide nothing: an activation or a weight."""
        return self.shape is not None and self.dtype.startswith(_FLOATS)


class Form(BaseModel):
    """What a definition asks of a row."""

    model_config = ConfigDict(frozen=True)

    name: str
    op_type: str
    axes: dict[str, _Axis]
    inputs: dict[str, _Input]
    reference: str
    constraints: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _complete(self) -> Form:
        for name, axis in self.axes.items():
            if axis.type == "const" and axis.value is None:
                raise ValueError(f"const axis {name} has no value")
        for name, given in self.inputs.items():
            unknown = set(given.shape or ()) - self.axes.keys()
            if unknown:
                raise ValueError(f"input {name} has the unknown axes {sorted(unknown)}")
        return self

    @cached_property
    def variable(self) -> tuple[str, ...]:
        """The var axes, in the definition's order."""
        return tuple(name for name, axis in self.axes.items() if axis.type == "var")

    @cached_property
    def constant(self) -> dict[str, int]:
        """The const axes."""
        return {name: axis.value for name, axis in self.axes.items() if axis.value is not None}

    def rounded(self, scalars: Mapping[str, Number]) -> dict[str, Number]:
        """Return scalars as the kernel gets them: a float32 has fewer digits than a number."""
        return {
            name: float(_ROUNDED[dtype](value))
            if (dtype := self.inputs[name].dtype) in _ROUNDED
            else value
            for name, value in scalars.items()
        }

    def check(self, row: Row) -> Row:
        """Return a row whose scalars have the definition's types.

        Raises:
            DumpError: it is no row of the definition; the text has the numbers.
        """
        self._check_axes(row.axes)
        axes = {**self.constant, **row.axes}
        unknown = (row.tensors.keys() | row.scalars.keys()) - self.inputs.keys()
        if unknown:
            raise DumpError(f"the definition has no inputs {sorted(unknown)}")
        scalars: dict[str, Scalar] = {}
        for name, given in self.inputs.items():
            if given.shape is None and name in row.scalars:
                scalars[name] = _typed(name, given.dtype, row.scalars[name])
            elif given.shape is not None and name in row.tensors:
                _check_tensor(name, given.dtype, [axes[a] for a in given.shape], row.tensors[name])
            elif not given.may_be_random:
                raise DumpError(
                    f"input {name} ({given.dtype}) has no recorded value, neither in the dump nor "
                    "from a model config"
                )
        self._check_constraints(axes, row.tensors)
        return replace(row, scalars=scalars)

    def _check_axes(self, axes: Mapping[str, int]) -> None:
        if axes.keys() != set(self.variable):
            raise DumpError(
                f"rows have the axes {sorted(axes)}, the definition {sorted(self.variable)}"
            )
        for name, size in axes.items():
            whole = isinstance(size, int) and not isinstance(size, bool)
            if not whole or not 0 < size < _LARGEST_AXIS:
                raise DumpError(f"axis {name} is {shown(size)}, no positive integer")

    def _check_constraints(
        self, axes: Mapping[str, int], tensors: Mapping[str, np.ndarray]
    ) -> None:
        def shape(name: str) -> tuple[int, ...] | None:
            given = self.inputs.get(name)
            return tuple(axes[a] for a in given.shape) if given and given.shape else None

        def element(name: str, index: int) -> int | None:
            values = tensors.get(name)
            if values is None or values.ndim != 1 or values.dtype.kind not in "iu":
                return None
            return int(values[index]) if -values.size <= index < values.size else None

        for constraint in self.constraints:
            compared = constraints.compare(constraint, axes, shape, element)
            if compared is not None and not compared.holds:
                raise DumpError(f"the constraint {constraint!r} does not hold: {compared}")


def form_of(definition: Json, where: str) -> Form:
    """Return what a definition asks of a row.

    Args:
        definition: the definition's JSON.
        where: what names it in errors.

    Raises:
        CollectError: it is no definition; the message names the field.
    """
    try:
        return Form.model_validate(definition)
    except ValidationError as error:
        named, reason = first_problem(error)
        raise CollectError(f"{where}: field {named or 'definition'}: {reason}") from error


def _typed(name: str, dtype: str, scalar: Scalar) -> Scalar:
    """Return a scalar of its dtype's Python type; an int keeps its value as a float.

    Raises:
        DumpError: its value is none of the dtype.
    """
    value, kind = scalar.value, type(scalar.value)
    if dtype.startswith(_FLOATS):
        if kind is not bool and abs(value) <= _LARGEST_FLOAT.get(dtype, sys.float_info.max):
            return scalar if kind is float else scalar.model_copy(update={"value": float(value)})
    elif dtype == "bool":
        if kind is bool:
            return scalar
    elif kind is int and dtype in _INTEGERS and abs(value) < 1 << (_INTEGERS[dtype] - 1):
        return scalar
    raise DumpError(f"scalar {name} is {shown(value)}, no {dtype}")


def _check_tensor(name: str, dtype: str, shape: Sequence[int], values: np.ndarray) -> None:
    if list(values.shape) != shape:
        raise DumpError(
            f"{name} has shape {shown(list(values.shape))}, the definition says {shape}"
        )
    if dtype_name(values.dtype) != dtype:
        raise DumpError(f"{name} is {values.dtype}, the definition says {dtype}")


@dataclass
class Found:
    """The distinct workloads of a definition, in order of first appearance, and what is none."""

    candidates: list[Candidate] = field(default_factory=list)
    calls: int = 0
    """Calls that are workloads or duplicates of one."""
    rejected: Counter[str] = field(default_factory=Counter)


def find(spec: KernelSpec, form: Form, log: CallLog) -> Found:
    """Return the distinct workloads among a session's calls.

    No more than one row's tensors are held at a time.
    """
    found, known = Found(), dict[str, Candidate]()
    page_size = form.constant.get("page_size", 1)
    for result in ops.op_module(spec.op_type).rows(spec, log.calls):
        if isinstance(result, Rejected):
            found.rejected[result.reason] += 1
            continue
        try:
            row = form.check(result)
        except DumpError as error:
            found.rejected[str(error)] += 1
            continue
        found.calls += 1
        uuid = uuid_of(form, row)
        if uuid in known:
            known[uuid].seen_again(row.calls)
            continue
        known[uuid] = Candidate(
            uuid=uuid,
            axes=row.axes,
            scalars=row.scalars,
            stored=tuple(sorted(row.tensors)),
            extent=extent_of(form.variable, page_size, row.axes, row.tensors),
            remake=row.remake or partial(_itself, row),
            calls=list(row.calls),
        )
    found.candidates = list(known.values())
    return found


def _itself(row: Row) -> Row:
    return row


def uuid_of(form: Form, row: Row) -> str:
    """Return the uuid of a checked row's content."""
    scalars = form.rounded({name: scalar.value for name, scalar in row.scalars.items()})
    tensors = {name: stored(values) for name, values in row.tensors.items()}
    return content_uuid(form.name, row.axes, scalars, tensors)
