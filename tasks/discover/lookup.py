"""Where does this live: an API, an op type or a model, in the FlashInfer and SGLang checkouts.

Answers come from the source indexes and the op modules; nothing is computed about a model.
"""

from __future__ import annotations

import difflib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from pydantic import BaseModel

from tasks import ops
from tasks.discover.sources import Api, FlashInferIndex, SglangIndex, Site, Template
from tasks.errors import InputError
from tasks.ops.base import FlashInferApi, OpModule

_SHOWN = 6
"""How many tests, names or sites the text lists before it counts the rest."""


class CallSite(BaseModel):
    """One place in SGLang that uses an API."""

    file: str
    line: int
    kind: str
    """`call`, `mention` (passed on or stored), or `import` (for other modules to use)."""
    via: str
    """Where sglang-kernel makes the call, `file:line`; empty for a direct use."""


class SelectingFlag(BaseModel):
    """A server flag that makes SGLang take an API's path."""

    flag: str
    """As on the command line: `--moe-runner-backend flashinfer_trtllm`."""
    source: str
    """What says so."""
    known: bool
    """Whether this SGLang has the flag, and the value among its choices."""
    deprecated: bool = False
    instead: str = ""
    """What a deprecated flag says to use."""


class TemplateName(BaseModel):
    """What a trace template makes."""

    op_type: str
    prefix: str
    name: str


class ApiPlace(BaseModel):
    """Where a FlashInfer API is defined, tested and called."""

    public: str
    defined: str
    file: str
    line: int
    decorator: str
    has_template: bool
    op_types: list[str]
    templates: list[TemplateName]
    dump: str
    tests: list[str]
    call_sites: dict[str, list[CallSite]]
    """By import origin; for a method, the uses of its class."""
    layer_folders: list[str]
    dataset_op_types: list[str]
    """Op modules here whose kernels it runs."""
    server_flags: list[SelectingFlag]


class ModelPlace(BaseModel):
    """Where a model is implemented."""

    architecture: str
    file: str
    """Empty where SGLang has no such class."""
    same_file: list[str]
    """Other model classes in it."""
    layers: list[str]
    """Layer modules that it imports."""
    layer_folders: list[str]
    call_sites: dict[str, list[CallSite]]
    """FlashInfer objects that the file itself uses, by import origin."""


class Places(BaseModel):
    """The answer to one question."""

    query: str
    matched_by: str
    flashinfer: str
    """The checkout's short SHA."""
    sglang: str
    apis: list[ApiPlace] = []
    models: list[ModelPlace] = []
    notes: list[str] = []

    def as_dict(self) -> dict[str, Any]:
        """Return plain JSON values; the keys are the same for every question."""
        return self.model_dump(mode="json")


@dataclass
class Lookup:
    """Answers questions about one pair of checkouts."""

    flashinfer: FlashInferIndex
    sglang: SglangIndex
    shas: Mapping[str, str]
    """Short SHAs, under `flashinfer` and `sglang`."""
    modules: Mapping[str, OpModule] = field(default_factory=ops.registry)
    """Op modules by op type."""

    def __post_init__(self) -> None:
        apis = self.flashinfer.apis
        self._owners = {path: _owner(path, api) for path, api in apis.items()}
        """API -> itself, or a method's class."""
        self._uses: dict[str, list[str]] = defaultdict(list)
        """Function or class -> import origins that mean it or its attributes."""
        owners = set(self._owners.values())
        for origin in self.sglang.sites:
            target = self.flashinfer.resolve(origin)
            self._uses[target if target in owners else target.rpartition(".")[0]].append(origin)
        self._using: dict[str, list[tuple[str, FlashInferApi]]] = defaultdict(list)
        """API -> the op modules that run it."""
        for op_type, module in sorted(self.modules.items()):
            for provided in module.apis:
                for path in self._provided(provided):
                    self._using[path].append((op_type, provided))

    # Questions

    def api(self, name: str) -> Places:
        """Find APIs by full path, by name, or else by part of the path, ignoring case.

        A class stands for its methods.

        Raises:
            InputError: none matches; the message has the closest names.
        """
        defined = self.flashinfer.resolve(name)
        apis = self.flashinfer.apis
        ways: list[tuple[str, Callable[[str, Api], bool]]] = [
            ("path", lambda path, api: name == api.public or defined in (path, self._owners[path])),
            ("name", lambda path, _: f"{path}\n{self._owners[path]}\n".count(f".{name}\n") > 0),
            ("part of the path", lambda path, api: name.lower() in f"{path}\n{api.public}".lower()),
        ]
        for matched_by, matches in ways:
            found = [path for path, api in apis.items() if name and matches(path, api)]
            if found:
                return self._places(name, matched_by, apis=found)
        names = {path.rpartition(".")[2] for path in apis}
        names |= {owner.rpartition(".")[2] for owner in self._owners.values()}
        near = _closest(name.rpartition(".")[2], names)
        raise InputError(f"no FlashInfer API is called {name!r}{near}")

    def op_type(self, name: str) -> Places:
        """Find the APIs of one of the dataset's op types, or of FlashInfer's trace op types.

        Raises:
            InputError: neither has it; the message has the closest ones.
        """
        traced = [path for path, api in self.flashinfer.apis.items() if name in api.op_types]
        module = self.modules.get(name)
        if module is None and not traced:
            known = set(self.modules).union(*(a.op_types for a in self.flashinfer.apis.values()))
            raise InputError(f"no op type {name!r}{_closest(name, known)}")
        kinds = ["the dataset's op type"] * (module is not None)
        kinds += ["FlashInfer's trace op type"] * bool(traced)
        found, notes = [], []
        for provided in module.apis if module else ():
            paths = self._provided(provided)
            found += paths
            if not paths:
                notes.append(f"this FlashInfer has no {provided.path}")
        if module is not None and not module.apis:
            notes.append(f"op type {name} is not run by a FlashInfer API")
        places = self._places(name, " and ".join(kinds), apis=[*found, *traced])
        places.notes = notes
        return places

    def model(self, name: str) -> Places:
        """Find models by class name, by file, or else by part of either, ignoring case.

        Raises:
            InputError: none matches; the message has the closest names.
        """
        models = self.sglang.architectures
        stem = name.removesuffix(".py")
        ways: list[tuple[str, Callable[[str, str], bool]]] = [
            ("architecture", lambda architecture, _: architecture == name),
            ("model file", lambda _, file: stem in (PurePosixPath(file).stem, file[:-3])),
            (
                "part of the name",
                lambda a, file: stem.lower() in f"{a}\n{_stem(file)}".lower(),
            ),
        ]
        for matched_by, matches in ways:
            found = [a for a, file in models.items() if name and matches(a, file)]
            if found:
                return self._places(name, matched_by, models=found)
        names = {*models, *(_stem(file) for file in models.values())}
        raise InputError(f"SGLang has no model {name!r}{_closest(name, names)}")

    # Answers

    def _places(
        self, query: str, matched_by: str, apis: Iterable[str] = (), models: Iterable[str] = ()
    ) -> Places:
        return Places(
            query=query,
            matched_by=matched_by,
            flashinfer=self.shas["flashinfer"],
            sglang=self.shas["sglang"],
            apis=[self._api(path) for path in dict.fromkeys(apis)],
            models=[self._model(name) for name in sorted(models)],
        )

    def _provided(self, provided: FlashInferApi) -> list[str]:
        """Return the defining paths of what an op module says runs its kernels."""
        defined = self.flashinfer.resolve(provided.path)
        if provided.method:
            defined = f"{defined}.{provided.method}"
        return [path for path, owner in self._owners.items() if defined in (path, owner)]

    def _api(self, path: str) -> ApiPlace:
        api = self.flashinfer.apis[path]
        sites = {
            origin: [_call_site(site) for site in self.sglang.sites[origin]]
            for origin in self._uses.get(self._owners[path], ())
        }
        files = {site.file for found in sites.values() for site in found}
        using = self._using.get(path, [])
        # Where nothing calls it, the op modules know which file would.
        layers = files or {provided.sglang_layer for _, provided in using} - {""}
        return ApiPlace(
            public=api.public,
            defined=path,
            file=api.file,
            line=api.line,
            decorator=api.decorator,
            has_template=api.has_template,
            op_types=api.op_types,
            templates=[_template(template) for template in api.templates],
            dump=api.dump,
            tests=api.tests,
            call_sites=sites,
            layer_folders=_folders(layers),
            dataset_op_types=sorted({op_type for op_type, _ in using}),
            server_flags=list(self._flags(using, files)),
        )

    def _flags(
        self, using: list[tuple[str, FlashInferApi]], files: set[str]
    ) -> Iterator[SelectingFlag]:
        """Yield the flags that the op modules and SGLang's attention registry name."""
        named: dict[str, str] = {}
        for op_type, provided in using:
            for flag in provided.server_flags:
                named.setdefault(flag, f"op module {op_type}")
        for backend, implemented in self.sglang.attention_backends.items():
            for file in sorted(files.intersection(implemented)):
                flag = f"--attention-backend {backend}"
                named.setdefault(flag, f"SGLang's attention registry: {file}")
        for flag, source in named.items():
            yield self._selecting(flag, source)

    def _selecting(self, text: str, source: str) -> SelectingFlag:
        spelling, _, value = text.replace("=", " ", 1).partition(" ")
        flag = self.sglang.flags.get(spelling)
        if flag is None:
            return SelectingFlag(flag=text, source=source, known=False)
        return SelectingFlag(
            flag=text,
            source=source,
            known=not value or not flag.choices or value in flag.choices,
            deprecated=flag.deprecated,
            instead=flag.instead,
        )

    def _model(self, architecture: str) -> ModelPlace:
        architectures = self.sglang.architectures
        file = architectures.get(architecture, "")
        layers = self.sglang.model_layers.get(file, [])
        sites = {
            origin: [_call_site(site) for site in found if site.file == file]
            for origin, found in self.sglang.sites.items()
        }
        return ModelPlace(
            architecture=architecture,
            file=file,
            same_file=sorted(
                a for a, f in architectures.items() if f == file and a != architecture
            ),
            layers=layers,
            layer_folders=_folders(layers),
            call_sites={origin: found for origin, found in sites.items() if found},
        )


def _owner(path: str, api: Api) -> str:
    """Return the path of the function, or of a method's outermost class."""
    module = PurePosixPath(api.file.removesuffix(".py").removesuffix("/__init__"))
    name = path.removeprefix(f"{'.'.join(module.parts)}.").partition(".")[0]
    return f"{'.'.join(module.parts)}.{name}"


def _call_site(site: Site) -> CallSite:
    return CallSite(file=site.file, line=site.line, kind=site.kind, via=site.via)


def _template(template: Template) -> TemplateName:
    return TemplateName(op_type=template.op_type, prefix=template.prefix, name=template.name)


def _folders(files: Iterable[str]) -> list[str]:
    return sorted({file.rpartition("/")[0] for file in files})


def _stem(file: str) -> str:
    return PurePosixPath(file).stem


def _closest(name: str, known: Iterable[str]) -> str:
    """Return `; did you mean ...?` with the known names that hold or resemble one."""
    by_lower = {other.lower(): other for other in sorted(known)}
    near = [lower for lower in by_lower if name and name.lower() in lower]
    near += difflib.get_close_matches(name.lower(), by_lower, n=5, cutoff=0.5)
    names = list(dict.fromkeys(by_lower[lower] for lower in near))[:5]
    return f"; did you mean {', '.join(names)}?" if names else ""


# Text


def render(places: Places) -> str:
    """Write an answer for a terminal: a few aligned lines per API or model."""
    count = len(places.apis) + len(places.models)
    lines = [
        f"FlashInfer {places.flashinfer}, SGLang {places.sglang}",
        f"{places.query}: {count} found by {places.matched_by}",
        *(f"note: {note}" for note in places.notes),
    ]
    for api in places.apis:
        lines += ["", api.public, *_aligned(_api_rows(api))]
    for model in places.models:
        lines += ["", model.architecture, *_aligned(_model_rows(model))]
    return "\n".join(lines) + "\n"


def _aligned(rows: Iterable[tuple[str, str]]) -> Iterator[str]:
    label = ""
    for name, text in rows:
        yield f"  {'' if name == label else name:<10}{text}".rstrip()
        label = name


def _api_rows(api: ApiPlace) -> Iterator[tuple[str, str]]:
    yield "defined", f"{api.file}:{api.line}  {api.defined}  @{api.decorator}"
    if api.templates:
        for op_type in api.op_types:
            names = [template.name for template in api.templates if template.op_type == op_type]
            yield from _list_rows("template", [f"{op_type}: {name}" for name in names])
    else:
        yield "template", "made at run time" if api.has_template else "none"
    yield "dumped as", api.dump
    yield "tests", _some(api.tests) or "none in this tree"
    yield from _site_rows("called", api.call_sites)
    if not api.call_sites:
        yield "called", "nowhere in SGLang"
    for folder in api.layer_folders:
        yield "layers", folder
    if api.dataset_op_types:
        yield "op type", ", ".join(api.dataset_op_types)
    for flag in api.server_flags:
        state = "" if flag.known else "; not in this SGLang"
        state += "; deprecated" if flag.deprecated else ""
        state += f", use {flag.instead}" if flag.instead else ""
        yield "flag", f"{flag.flag}  ({flag.source}{state})"


def _model_rows(model: ModelPlace) -> Iterator[tuple[str, str]]:
    yield "file", model.file or "none"
    if model.same_file:
        yield "also", ", ".join(model.same_file)
    for folder in model.layer_folders:
        names = [_stem(layer) for layer in model.layers if layer.rpartition("/")[0] == folder]
        files = ", ".join(name for name in names if name != "__init__")
        yield "layers", f"{folder}: {files}" if files else folder
    yield from _site_rows("uses", model.call_sites)


def _site_rows(label: str, sites: Mapping[str, list[CallSite]]) -> Iterator[tuple[str, str]]:
    for origin, found in sites.items():
        yield label, origin
        yield from _list_rows(label, [f"  {_site_text(site)}" for site in found])


def _site_text(site: CallSite) -> str:
    kind = "" if site.kind == "call" else f"  ({site.kind})"
    return f"{site.file}:{site.line}{f'  via {site.via}' if site.via else ''}{kind}"


def _list_rows(label: str, items: list[str]) -> Iterator[tuple[str, str]]:
    for item in items[:_SHOWN]:
        yield label, item
    if len(items) > _SHOWN:
        yield label, f"  and {len(items) - _SHOWN} more"


def _some(items: list[str]) -> str:
    more = f" and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    return ", ".join(items[:_SHOWN]) + more
