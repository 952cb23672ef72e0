"""What an op module is: the single place that knows one kernel family.

A module in this folder defines one or more `OpModule` subclasses and decorates them with
`register`. Everything else (inventory, definitions, collection, publishing) goes through this
interface, so a new kernel family is one new file.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from string import Formatter
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
from pydantic import BaseModel, ConfigDict

from tasks.errors import DefinitionError
from tasks.model import ModelConfig, Serving

Json = dict[str, Any]


class Scalar(BaseModel):
    """A scalar input's true value and where it was read."""

    model_config = ConfigDict(frozen=True)

    value: int | float | bool
    source: str


class KernelSpec(BaseModel):
    """One kernel a model needs: the definition's name and everything that decides it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    op_type: str
    variant: str
    """Which of the op type's APIs (`decode`, `prefill`, ...)."""
    axes: dict[str, int]
    """The definition's const axes, sharded as this serving configuration shards them."""
    tp: tuple[int, ...] = ()
    """Tensor-parallel sizes that need it; empty where sharding does not change the kernel."""
    ep: tuple[int, ...] = ()
    scalars: dict[str, Scalar] = {}
    """Scalar inputs that no dump carries, from the model config."""
    constants: dict[str, int | float | str] = {}
    """What is baked into the reference (a norm's epsilon, a router's method and groups)."""
    origin: tuple[str, ...] = ()
    """The formula and the serving configuration it came from."""
    not_served: str = ""
    """Why SGLang runs another kernel for this model, whatever its flags; empty if it does not."""

    def merged(self, other: KernelSpec) -> KernelSpec:
        """Return this spec with the parallelism and origins of an equal kernel added."""
        return self.model_copy(
            update={
                "tp": tuple(sorted({*self.tp, *other.tp})),
                "ep": tuple(sorted({*self.ep, *other.ep})),
                "origin": tuple(dict.fromkeys((*self.origin, *other.origin))),
            }
        )


@dataclass(frozen=True)
class NotProduced:
    """A kernel that cannot exist under a serving configuration, and why; listed, not dropped."""

    what: str
    reason: str


@dataclass(frozen=True)
class Unmapped:
    """A part of the model that no op module maps to a kernel, and why; listed, not dropped."""

    what: str
    reason: str
    sglang_file: str = ""
    """Where SGLang implements it, where that is known."""


Requirement = KernelSpec | NotProduced | Unmapped


class Hint(BaseModel):
    """Why SGLang may not have made a call that a session was served for."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    text: str = ""
    """What to look at first."""
    not_with: dict[str, str] = {}
    """Setting or variable of the server -> what SGLang does instead where it is on."""


@dataclass(frozen=True)
class FlashInferApi:
    """The kernel is a FlashInfer API."""

    path: str
    """Public path, as the dataset's `fi_api` tag has it (a wrapper class without its method)."""
    dumps: tuple[str, ...]
    """Names under which FlashInfer dumps its calls."""
    method: str | None = None
    """The traced method, where `path` is a class."""
    server_flags: tuple[str, ...] = ()
    """What makes SGLang take this path, where it does not by default."""
    sglang_layer: str = ""
    """The SGLang file that would call it, relative to the repository."""
    former: tuple[str, ...] = ()
    """Paths that published tags have for it and that are wrong by now."""
    reads: tuple[str, ...] = ()
    """Parameters, of whichever of `dumps`, whose values rows store or check; of all other tensors
    a row needs at most the shape and the dtype."""
    prefill: Literal["", "paged", "ragged"] = ""
    """Which way of prefilling SGLang must be in for this call; empty if it is in either."""

    quantization: str = ""
    """Width of the weights it takes (`fp8`, `fp4`); empty where that is not what decides."""

    hint: Hint = field(default_factory=Hint)
    """What to look at where a session shows no such call."""
    gpu: str = ""
    """Architecture of the only GPUs that it runs on (`SM100`); empty where most will do."""

    @property
    def recorded(self) -> tuple[str, ...]:
        """What of `dumps` a serving session records: plans, where there are any.

        A plan is a few hundred bytes, a wrapper's run writes the layer's whole KV pool.
        """
        plans = tuple(name for name in self.dumps if name.endswith(".plan"))
        return plans or self.dumps


@dataclass(frozen=True)
class TorchOnly:
    """The kernel is a plain PyTorch operation; there is no FlashInfer call to collect."""

    reason: str


@dataclass(frozen=True)
class NoKernel:
    """FlashInfer has no such kernel."""

    reason: str
    keyword: str
    """A word its name would contain; an API that has it is mentioned to the reader."""
    sglang_file: str
    """Where SGLang implements it, relative to the repository; empty if nowhere."""


Provider = FlashInferApi | TorchOnly | NoKernel


@dataclass(frozen=True)
class MetaTensor:
    """A tensor without data, for calling a trace template."""

    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class TemplateCall:
    """How to call FlashInfer's own trace template on meta tensors (`api.fi_trace(**arguments)`).

    Values are `MetaTensor`, a tuple of them, or plain JSON values.
    """

    api: str
    """Import path of the API, `module:qualified.name`."""
    arguments: Mapping[str, MetaTensor | tuple[MetaTensor, ...] | int | float | str | None]


class Tensor(Protocol):
    """A dumped tensor; its data is read only when asked for."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its dimensions."""
        ...

    @property
    def dtype(self) -> str:
        """Its data type as definitions have it (`int32`, `bfloat16`)."""
        ...

    def load(self) -> np.ndarray:
        """Read the data; `bfloat16` and 8-bit floats come as `ml_dtypes` types.

        Raises:
            DumpError: the file is truncated or lacks the tensor.
        """
        ...


class Call(Protocol):
    """One dumped FlashInfer call, its arguments under their parameter names."""

    @property
    def id(self) -> str:
        """What names the call in reports."""
        ...

    @property
    def name(self) -> str:
        """The dumped function's name, `Class.method` for wrappers."""
        ...

    @property
    def process(self) -> str:
        """The serving process, unique across the sessions read together."""
        ...

    @property
    def self_id(self) -> int | None:
        """The wrapper object it was called on, unique within its process; None for functions."""
        ...

    @property
    def prefill(self) -> str:
        """Which way its server was made to prefill (`paged`, `ragged`); empty if unknown."""
        ...

    @property
    def captured(self) -> bool:
        """Whether a CUDA graph recorded the call, so that it did not run when it was made."""
        ...

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """Tensor arguments by parameter name."""
        ...

    @property
    def values(self) -> Mapping[str, Any]:
        """Other arguments by parameter name, as JSON has them."""
        ...


class DumpError(Exception):
    """A dumped call lacks something a row needs; the text is the counted reason."""


@dataclass(frozen=True)
class Row:
    """One candidate workload, made of a real call."""

    axes: Mapping[str, int]
    """Every var axis of the definition."""
    tensors: Mapping[str, np.ndarray] = field(default_factory=dict)
    """Inputs stored with their values (index tensors, routing tensors)."""
    scalars: Mapping[str, Scalar] = field(default_factory=dict)
    calls: tuple[str, ...] = ()
    remake: Callable[[], Row] | None = field(default=None, compare=False, repr=False)
    """Makes the row again from its dump, so that whoever holds many need not hold their tensors."""


@dataclass(frozen=True)
class Rejected:
    """A call that is no row, and why; reasons are counted."""

    call: str
    reason: str


def rows_of(
    calls: Iterable[Call], name: str, make: Callable[[Call], Row]
) -> Iterator[Row | Rejected]:
    """Make a row of every call dumped under `name`; reject what `make` refuses, with its reason."""
    for call in calls:
        if call.name == name:
            try:
                yield replace(make(call), remake=partial(make, call))
            except DumpError as error:
                yield Rejected(call.id, str(error))


@dataclass(frozen=True)
class Effort:
    """How much evaluating one workload may cost; None stands for flashinfer-bench's own number."""

    row_seconds: int | None = None
    """Longest run of the baseline on a workload, its correctness check and timing included."""
    warmups: int | None = None
    """Untimed runs before the timed ones, of the reference too."""
    iterations: int | None = None
    """Timed runs of a trial, of the reference too."""
    trials: int | None = None

    def under(self, asked: Effort) -> Effort:
        """Return it with what was asked for in place of its own."""
        given = {key: value for key, value in asdict(asked).items() if value is not None}
        return replace(self, **given)


SLOW_REFERENCE = Effort(warmups=1, iterations=3, trials=1)
"""For a reference that computes token by token: a call takes seconds, and flashinfer-bench would
time it 180 times per workload."""


class OpModule(ABC):
    """All that is known about one op type.

    Method arguments named `spec` are always specs that this module's `required` yielded.
    """

    op_type: ClassVar[str]
    apis: ClassVar[tuple[FlashInferApi, ...]] = ()
    """Every FlashInfer API this family may run, whatever the model."""

    any_architecture: ClassVar[bool] = False
    """Whether `required` may be asked about a model class that nobody has read."""

    reference_test: ClassVar[str] = ""
    """The middle of this family's reference tests (`define/templates/reference_test.py.j2`).

    Python that defines `CASES`, a dict of case name -> function that makes small inputs in order
    (tensors on the CPU, plain numbers for scalars, `None` for an absent optional input), and
    `check(inputs, outputs, kernel)`, which compares with an independent computation: another
    algorithm, mostly in float64. `kernel` says that a GPU kernel computed the outputs. The frame
    gives it `NAME`, `VARIANT`, `CONST` (const axes), `CONSTANTS` (of the spec) and helpers.
    """
    names: ClassVar[Mapping[str, str]] = {}
    """Variant -> its definitions' names, a format string over const axes and constants."""
    crosschecked: ClassVar[bool] = True
    """Whether a definition that FlashInfer dumped of SGLang's call can be compared with ours: its
    template misreads nothing, or `as_called` knows what."""
    placement: ClassVar[frozenset[str]] = frozenset({"num_pages"})
    """Var axes that say where data lay, not how much there was: no measure of diversity."""

    def name_of(
        self, variant: str, axes: Mapping[str, int], constants: Mapping[str, Any] | None = None
    ) -> str:
        """Return a definition's name."""
        return self.names[variant].format_map({**axes, **(constants or {})})

    def spec_of(self, definition: Json) -> KernelSpec:
        """Return the spec that a definition's name and const axes stand for.

        Raises:
            DefinitionError: the name is none of this family's, or contradicts the axes.
        """
        name, axes = definition["name"], const_axes(definition)
        for variant, pattern in self.names.items():
            said = said_by_name(pattern, name)
            if said is None:
                continue
            wrong = {axis: n for axis, n in said.items() if axes.get(axis, n) != n}
            if wrong:
                raise DefinitionError(f"{name}: the name says {wrong}, the axes {axes}")
            return self.restored(definition, variant, axes, said)
        raise DefinitionError(f"{name}: not a name of op type {self.op_type!r}")

    def check_name(self, spec: KernelSpec) -> None:
        """Check that a spec's name says its axes, as those of `required` do.

        Raises:
            DefinitionError: it does not.
        """
        known = {**spec.constants, **spec.axes}
        for pattern in self.names.values():
            said = said_by_name(pattern, spec.name)
            if said is not None and all(known.get(key) == value for key, value in said.items()):
                return
        if self.names:
            raise DefinitionError(
                f"{spec.name}: not the name of a kernel of op type {self.op_type!r} with {known}"
            )

    def restored(
        self,
        definition: Json,
        variant: str,
        axes: Mapping[str, int],
        said: Mapping[str, int | str],
    ) -> KernelSpec:
        """Return the spec of one of this family's definitions.

        Args:
            definition: the definition.
            variant: which of the family's it is, by its name.
            axes: its const axes.
            said: what its name says.

        Raises:
            DefinitionError: it lacks something that decides the kernel.
        """
        named = {axis: n for axis, n in said.items() if isinstance(n, int)}
        return KernelSpec(
            name=definition["name"],
            op_type=self.op_type,
            variant=variant,
            axes={**named, **axes},
        )

    def mixes(self, kind: str, model: ModelConfig) -> bool:
        """Whether layers of this kind (`model.mixers`) run kernels of this family."""
        return False

    @abstractmethod
    def required(self, model: ModelConfig, serving: Serving) -> Iterator[Requirement]:
        """Yield the kernels of this family that the model needs when served so.

        Raises:
            ConfigError: a field that this family reads is missing or wrong.
        """

    @abstractmethod
    def provider(self, spec: KernelSpec) -> Provider:
        """Say what would run the kernel."""

    @abstractmethod
    def definition(self, spec: KernelSpec) -> Json:
        """Return the definition written here: schema and PyTorch `reference`.

        Without name, op type and tags about the run, which are the same for every family. Without
        `reference` while nobody has written one: the kernel then waits in `needs_reference`.
        """

    def template_call(self, spec: KernelSpec) -> TemplateCall | None:
        """Return the call of a trace template whose answer may be trusted, if there is one."""
        return None

    def implied(self, call: Call) -> KernelSpec | None:
        """Return the kernel that a dumped call was of, by the call's own arguments."""
        return None

    def as_called(self, template: Json, spec: KernelSpec) -> tuple[Json, tuple[str, ...]]:
        """Correct a definition that FlashInfer dumped from one of SGLang's calls.

        Args:
            template: the dumped definition, whose shapes may be misread; it stays as it is.
            spec: the kernel that was called (`implied`).

        Returns:
            The corrected definition, and what was wrong with it.

        Raises:
            DefinitionError: it is wrong in a way that the call does not explain.
        """
        read = const_axes(template)
        if read != spec.axes:
            raise DefinitionError(f"axes: dumped {read}, called with {spec.axes}")
        return template, ()

    def rows(self, spec: KernelSpec, calls: Sequence[Call]) -> Iterator[Row | Rejected]:
        """Turn a session's calls into candidate rows; calls of other APIs are passed over."""
        return iter(())

    def baseline(self, spec: KernelSpec) -> str | None:
        """Return the source of `run(...)` wrapping the FlashInfer API, if it can be wrapped."""
        return None

    def effort(self, spec: KernelSpec) -> Effort:
        """Say how much evaluating a workload of the kernel may cost."""
        return Effort()


class UnknownFamily(OpModule):
    """An op type that no module knows."""

    op_type = ""

    def required(self, model: ModelConfig, serving: Serving) -> Iterator[Requirement]:
        """None."""
        return iter(())

    def provider(self, spec: KernelSpec) -> NoKernel:
        """Nothing known."""
        return NoKernel(f"op type {spec.op_type!r} has no module", spec.op_type, "")

    def definition(self, spec: KernelSpec) -> Json:
        """Nothing known."""
        return {}


_REGISTRY: dict[str, OpModule] = {}


def register(module: type[OpModule]) -> type[OpModule]:
    """Class decorator: make an op type known under its `op_type`."""
    if module.op_type in _REGISTRY:
        raise ValueError(f"op type {module.op_type!r} is registered twice")
    _REGISTRY[module.op_type] = module()
    return module


def registry() -> Mapping[str, OpModule]:
    """Return the registered op modules by op type, in order whichever file was imported first."""
    return dict(sorted(_REGISTRY.items()))


def const_axes(definition: Json) -> dict[str, int]:
    """Return a definition's const axes."""
    return {
        name: axis["value"] for name, axis in definition["axes"].items() if axis["type"] == "const"
    }


def said_by_name(pattern: str, name: str) -> dict[str, int | str] | None:
    """Return what a name says by its pattern (`OpModule.names`), or nothing if it is not of it."""
    expression = "".join(
        re.escape(text) + (f"(?P<{field_name}>[a-z_]+|[0-9]+)" if field_name else "")
        for text, field_name, _, _ in Formatter().parse(pattern)
    )
    match = re.fullmatch(expression, name)
    if match is None:
        return None
    return {
        key: int(value) if value.isdigit() else value for key, value in match.groupdict().items()
    }


def definition_tags(
    spec: KernelSpec, provider: Provider, own: Sequence[str], model_slug: str
) -> list[str]:
    """Return a definition's tags: its family's own, then status, model, API and parallelism."""
    tags = [
        *own,
        "status:unverified" if isinstance(provider, NoKernel) else "status:verified",
        f"model:{model_slug}",
    ]
    if isinstance(provider, FlashInferApi):
        tags.append(f"fi_api:{provider.path}")
    return tags + [f"tp:{tp}" for tp in spec.tp] + [f"ep:{ep}" for ep in spec.ep]


def var(description: str) -> Json:
    """Return a var axis."""
    return {"type": "var", "description": description}


def const(value: int, description: str) -> Json:
    """Return a const axis."""
    return {"type": "const", "value": value, "description": description}


def tensor(shape: Sequence[str], dtype: str, description: str) -> Json:
    """Return a tensor input or output; `shape` names axes."""
    return {"shape": list(shape), "dtype": dtype, "description": description}


def scalar(dtype: str, description: str) -> Json:
    """Return a scalar input."""
    return {"shape": None, "dtype": dtype, "description": description}


def check_axes(call: Call, seen: Mapping[str, int], wanted: Mapping[str, int]) -> None:
    """Check the const axes that a call shows against a definition's.

    Raises:
        DumpError: one differs; the text has the numbers.
    """
    for axis, value in seen.items():
        if value != wanted[axis]:
            raise DumpError(f"{call.name}: {axis} is {value}, the definition has {wanted[axis]}")
