"""Which definitions of a dataset calls may be workloads of."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tasks import files, ops
from tasks.collect.rows import Form, form_of
from tasks.errors import CollectError, DefinitionError, InputError
from tasks.model import ModelConfig, Serving
from tasks.ops.base import Call, FlashInferApi, KernelSpec, OpModule, Requirement, Row, Scalar

_SIZES = (1, 2, 4, 8, 16, 32, 64)
"""Tensor- and expert-parallel sizes that a definition may be of."""


@dataclass(frozen=True)
class Target:
    """A definition to collect for."""

    form: Form
    definition: dict[str, Any]
    spec: KernelSpec


@dataclass(frozen=True)
class NoTarget:
    """A definition that nothing can be collected for, and why."""

    name: str
    op_type: str
    error: str


@dataclass
class ModelKernels:
    """The kernels that a model needs, whichever way it is served."""

    model: ModelConfig
    _found: dict[tuple[str, tuple[int, ...]], dict[str, KernelSpec]] = field(default_factory=dict)

    def like(self, spec: KernelSpec) -> KernelSpec | None:
        """Return the model's kernel of a spec's name and axes, at every tp and ep that needs it.

        Scalars in which kernels of this name differ are left out: no call says whose it is.

        Raises:
            ConfigError: the model's config lacks a field of the kernel's family.
        """
        pages = tuple(size for axis, size in spec.axes.items() if axis == "page_size")
        key = spec.op_type, pages
        if key not in self._found:
            self._found[key] = self._kernels(ops.op_module(spec.op_type), pages)
        known = self._found[key].get(spec.name)
        return known if known and known.axes == spec.axes else None

    def _kernels(self, module: OpModule, pages: tuple[int, ...]) -> dict[str, KernelSpec]:
        found: dict[str, KernelSpec] = {}
        for item in self._required(module, pages):
            if isinstance(item, KernelSpec):
                known = found.get(item.name)
                found[item.name] = _merged(known, item) if known else item
        return found

    def _required(self, module: OpModule, pages: tuple[int, ...]) -> Iterator[Requirement]:
        for tp in _SIZES:
            for ep in (size for size in _SIZES if tp % size == 0):
                origin = f"{self.model.source} at tp={tp}, ep={ep}"
                yield from module.required(self.model, Serving(tp, ep, origin, pages or (1,)))


def _merged(known: KernelSpec, other: KernelSpec) -> KernelSpec:
    scalars: dict[str, Scalar] = {
        name: scalar
        for name, scalar in known.scalars.items()
        if name in other.scalars and other.scalars[name].value == scalar.value
    }
    return known.merged(other).model_copy(update={"scalars": scalars})


def with_model(spec: KernelSpec, model: ModelKernels | None) -> KernelSpec:
    """Return a spec with what only the model's config says: scalars and parallel sizes."""
    known = model.like(spec) if model else None
    if known is None:
        return spec
    return spec.model_copy(
        update={"scalars": known.scalars, "tp": known.tp, "ep": known.ep, "origin": known.origin}
    )


@dataclass(frozen=True)
class Implied:
    """A kernel that calls are of and that a dataset has no definition of."""

    spec: KernelSpec
    rejected: Counter[str]
    """Why no call is a workload of it; empty if one is."""


def implied(calls: Sequence[Call], dataset: Path, model: ModelKernels | None) -> list[Implied]:
    """Return the kernels that calls are of and that a dataset has no definition of, by name."""
    known, found = definitions_in(dataset), dict[str, KernelSpec]()
    modules = ops.registry().values()
    for call in calls:
        for module in modules:
            spec = module.implied(call)
            if spec is not None and spec.name not in known and spec.name not in found:
                found[spec.name] = with_model(spec, model)
    return [Implied(found[name], _refusals(found[name], calls)) for name in sorted(found)]


def _refusals(spec: KernelSpec, calls: Sequence[Call]) -> Counter[str]:
    """Return why calls are no workloads of a kernel; nothing if one is."""
    reasons: Counter[str] = Counter()
    for result in ops.op_module(spec.op_type).rows(spec, calls):
        if isinstance(result, Row):
            return Counter()
        reasons[result.reason] += 1
    return reasons


def definitions_in(dataset: Path) -> dict[str, Path]:
    """Return name -> file of every definition that lies in a dataset's folder."""
    files_there = sorted((dataset / "definitions").glob("*/*.json"))
    return {path.stem: path for path in files_there if path.is_file() and not path.is_symlink()}


def targets(
    dataset: Path, names: Sequence[str], seen: Collection[str], model: ModelKernels | None
) -> Iterator[Target | NoTarget]:
    """Yield definitions to collect for.

    Args:
        dataset: the dataset's folder.
        names: which; if there is none, all for whose API a call was dumped.
        seen: the names of the dumped calls.
        model: where scalars come from that no dump carries.

    Raises:
        InputError: a name is that of no definition.
    """
    known = definitions_in(dataset)
    unknown = [name for name in names if name not in known]
    if unknown:
        raise InputError(f"--definitions: {dataset} has no definition named {', '.join(unknown)}")
    called = {
        op_type
        for op_type, module in ops.registry().items()
        if any(name in seen for api in module.apis for name in api.dumps)
    }
    for name, path in known.items():
        if name in names if names else path.parent.name in called:
            made = _target(path, model)
            if names or isinstance(made, NoTarget) or _is_called(made.spec, seen):
                yield made


def _is_called(spec: KernelSpec, seen: Collection[str]) -> bool:
    provider = ops.op_module(spec.op_type).provider(spec)
    return isinstance(provider, FlashInferApi) and any(name in seen for name in provider.dumps)


def _target(path: Path, model: ModelKernels | None) -> Target | NoTarget:
    name, op_type = path.stem, path.parent.name
    try:
        definition = files.read_json_object(path, "the definition")
        form = form_of(definition, str(path))
        _check_place(form, path)
        spec = with_model(ops.family(op_type).spec_of(definition), model)
        _check_known(form, ops.op_module(op_type).definition(spec), path)
    except (CollectError, DefinitionError, InputError) as error:
        return NoTarget(name, op_type, str(error))
    provider = ops.op_module(op_type).provider(spec)
    if not isinstance(provider, FlashInferApi):
        return NoTarget(name, op_type, f"has no FlashInfer call to collect ({provider.reason})")
    return Target(form, definition, spec)


def _check_known(form: Form, own: dict[str, Any], path: Path) -> None:
    """Check that what rows leave random is what the family looks for in a call.

    Of another input nobody would notice that the calls had none, or one of another type.

    Raises:
        CollectError: an input is not the family's own.
    """
    for name, given in form.inputs.items():
        known = own["inputs"].get(name)
        same = known and (given.dtype, list(given.shape or ())) == (known["dtype"], known["shape"])
        if given.may_be_random and not same:
            meant = f"{known['dtype']} {known['shape']}" if known else "none of that name"
            raise CollectError(
                f"{path}: input {name} is {given.dtype} {list(given.shape or ())}, calls are "
                f"checked for {meant}: a row would claim a tensor that no call is known to have had"
            )


def _check_place(form: Form, path: Path) -> None:
    said, meant = (form.op_type, form.name), (path.parent.name, path.stem)
    if said != meant:
        raise CollectError(
            f"{path}: op_type and name are {'/'.join(said)}, its path says {'/'.join(meant)}"
        )
