"""What SGLang serves and which FlashInfer objects it uses, read from its sources.

A use counts by *import origin*: SGLang has functions of its own with FlashInfer's names. Uses that
go through sglang-kernel's Python layer (`sgl_kernel.rmsnorm` -> `flashinfer.norm.rmsnorm`) are
followed.
"""

from __future__ import annotations

import ast
import contextlib
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from tasks.discover.constants import Calculator
from tasks.discover.index_cache import Index
from tasks.discover.references import Kind, Use, uses
from tasks.discover.server_flags import DECLARES, ServerFlag, read_flags
from tasks.discover.syntax import (
    absolute,
    entry_classes,
    import_bindings,
    module_name,
    parse,
    python_files,
    statements,
)
from tasks.errors import InputError

_PACKAGES = ("python/sglang", "sglang")
"""Where the package is: in the repository, in an unpacked wheel."""
_KERNEL_PACKAGES = ("sgl-kernel/python/sgl_kernel", "sgl_kernel")
_ORIGINS = ("flashinfer", "sgl_kernel")
_IMPORTS = re.compile(
    rb"\b(?:from|import)\s+(?:flashinfer|sgl_kernel)\b"
    rb"|(?:LazyImport|import_module|__import__)\([^()]*[\"'](?:flashinfer|sgl_kernel)\b"
)
_KIND_ORDER: tuple[Kind, ...] = ("call", "mention", "import")


class Site(NamedTuple):
    """One place in SGLang that uses a FlashInfer object."""

    file: str
    line: int
    kind: Kind
    via: str = ""
    """The place in sglang-kernel that makes the call, `file:line`; empty for a direct use."""

    def __str__(self) -> str:
        via = f" via {self.via}" if self.via else ""
        return f"{self.file}:{self.line}{via}"


class SglangIndex(Index):
    """SGLang's uses of FlashInfer objects, its model classes and its server flags."""

    sites: dict[str, list[Site]]
    """Import origin (`flashinfer.norm.rmsnorm`) -> where it is used, calls first."""
    architectures: dict[str, str]
    """Model class -> file."""
    model_layers: dict[str, list[str]]
    """Model file -> the layer modules it imports."""
    attention_backends: dict[str, list[str]]
    """Value of `--attention-backend` -> the files that implement it."""
    flags: dict[str, ServerFlag]
    """Server flags by spelling, aliases and deprecated ones included."""


class _Layout(NamedTuple):
    """Where a tree keeps the two packages."""

    package: str
    kernel: str

    def module_path(self, path: str) -> str:
        """Return a file's path as its imports see it: `sglang/...` or `sgl_kernel/...`."""
        for root in self:
            if path.startswith(f"{root}/"):
                return f"{root.rpartition('/')[2]}/{path.removeprefix(f'{root}/')}"
        return path


def index_sglang(checkout: Path) -> SglangIndex:
    """Read an SGLang checkout, or an unpacked wheel with sglang-kernel's beside it.

    Raises:
        InputError: the folder is neither.
    """
    package = next((p for p in _PACKAGES if (checkout / p / "srt" / "models").is_dir()), None)
    if package is None:
        raise InputError(f"{checkout}: has no {_PACKAGES[0]}/srt/models; is it an SGLang checkout?")
    kernel = next((p for p in _KERNEL_PACKAGES if (checkout / p).is_dir()), _KERNEL_PACKAGES[0])
    scan = _Scan(_Layout(package, kernel))
    for path, source in python_files(checkout, f"{package}/srt", f"{package}/kernels"):
        with contextlib.suppress(RecursionError):  # No person nested anything that deep.
            scan.add(path, source)
    return SglangIndex(
        sites=_sites(scan, _KernelLayer(checkout, scan.layout)),
        architectures=scan.architectures,
        model_layers=scan.files_of(scan.model_layers),
        attention_backends=scan.files_of(scan.backends),
        flags=dict(sorted(_server_flags(checkout, scan).items())),
    )


@dataclass
class _Scan:
    """What one pass over the package's files leaves."""

    layout: _Layout
    paths: dict[str, str] = field(default_factory=dict)
    """Module -> file."""
    direct: dict[str, list[Site]] = field(default_factory=lambda: defaultdict(list))
    through: list[tuple[str, Site]] = field(default_factory=list)
    """Uses of sglang-kernel."""
    architectures: dict[str, str] = field(default_factory=dict)
    model_layers: dict[str, list[str]] = field(default_factory=dict)
    backends: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    declaring: list[tuple[str, bytes]] = field(default_factory=list)
    """Files that declare server flags."""

    def add(self, path: str, source: bytes) -> None:
        """Read one file, parsing it only if it can have something to say."""
        srt = f"{self.layout.package}/srt"
        self.paths[module_name(self.layout.module_path(path))] = path
        if path.startswith((f"{srt}/arg_groups/", f"{srt}/server_args.py")):
            self.declaring += [(path, source)] if DECLARES.search(source) else []
        is_model = path.rpartition("/")[0] == f"{srt}/models" and b"EntryClass" in source
        is_registry = b"@register_attention_backend(" in source
        mentions = any(name.encode() in source for name in _ORIGINS)
        imports = mentions and _IMPORTS.search(source) is not None
        tree = parse(source) if is_model or is_registry or imports else None
        if tree is None:
            return
        if is_model:
            self._read_model(path, tree)
        if is_registry:
            self._read_backends(path, tree)
        for use in _uses(self.layout, path, source, tree) if imports else ():
            site = Site(path, use.line, use.kind)
            if use.origin.startswith("sgl_kernel."):
                self.through.append((use.origin, site))
            else:
                self.direct[use.origin].append(site)

    def _read_model(self, path: str, tree: ast.Module) -> None:
        classes = list(entry_classes(tree))
        for name in classes:
            self.architectures.setdefault(name, path)
        if classes:
            imported = _imported_modules(self.layout, path, statements(tree.body))
            layers = [m for m in imported if m.startswith("sglang.srt.layers.")]
            self.model_layers[path] = layers

    def _read_backends(self, path: str, tree: ast.Module) -> None:
        """Read what makes each attention backend: `@register_attention_backend("name")`."""
        for node in tree.body:
            for decorator in getattr(node, "decorator_list", ()):
                match decorator:
                    case ast.Call(
                        func=ast.Name(id="register_attention_backend"),
                        args=[ast.Constant(value=str(name))],
                    ):
                        imported = _imported_modules(self.layout, path, ast.walk(node))
                        prefix = "sglang.srt.layers.attention."
                        self.backends[name] += [m for m in imported if m.startswith(prefix)]

    def files_of(self, modules: dict[str, list[str]]) -> dict[str, list[str]]:
        """Replace modules by their files, dropping what is not a module."""
        return {
            key: sorted({self.paths[name] for name in names if name in self.paths})
            for key, names in sorted(modules.items())
        }


def _sites(scan: _Scan, layer: _KernelLayer) -> dict[str, list[Site]]:
    sites = scan.direct
    for origin, site in scan.through:
        for target, where in layer.reached(origin):
            sites[target].append(site._replace(via=where))
    return {
        origin: sorted(set(found), key=lambda s: (_KIND_ORDER.index(s.kind), bool(s.via), s))
        for origin, found in sorted(sites.items())
    }


def _uses(
    layout: _Layout, path: str, source: bytes, tree: ast.Module, own: dict[str, str] | None = None
) -> list[Use]:
    module, is_package = module_name(layout.module_path(path)), path.endswith("__init__.py")
    return uses(tree, source, module, is_package, packages=_ORIGINS, own=own)


# Models, backends, flags


def _imported_modules(layout: _Layout, path: str, body: Iterable[ast.AST]) -> Iterator[str]:
    """Yield the modules that `from ... import ...` statements may name."""
    module, is_package = module_name(layout.module_path(path)), path.endswith("__init__.py")
    for node in body:
        if isinstance(node, ast.ImportFrom):
            origin = absolute(module, is_package, node.module or "", node.level)
            yield origin
            yield from (f"{origin}.{alias.name}" for alias in node.names)


def _server_flags(checkout: Path, scan: _Scan) -> dict[str, ServerFlag]:
    def load(module: str) -> tuple[ast.Module, bool] | None:
        path = scan.paths.get(module)
        tree = parse((checkout / path).read_bytes()) if path else None
        return None if tree is None or path is None else (tree, path.endswith("__init__.py"))

    calculator = Calculator(load)
    flags: dict[str, ServerFlag] = {}
    for path, source in scan.declaring:
        read_flags(source, calculator, module_name(scan.layout.module_path(path)), flags)
    return flags


# sglang-kernel


class _KernelLayer:
    """sglang-kernel's Python functions, and the FlashInfer objects that each of them uses."""

    def __init__(self, checkout: Path, layout: _Layout) -> None:
        self._uses: dict[str, list[tuple[str, str]]] = defaultdict(list)
        """Function -> objects used and where, objects of its own package included."""
        self._by_name: dict[str, list[str]] = defaultdict(list)
        self._exports: dict[str, str] = {}
        for path, source in python_files(checkout, layout.kernel):
            tree = parse(source) if any(name.encode() in source for name in _ORIGINS) else None
            if tree is not None:
                with contextlib.suppress(RecursionError):
                    self._add(layout, path, source, tree)

    def _add(self, layout: _Layout, path: str, source: bytes, tree: ast.Module) -> None:
        module, is_package = module_name(layout.module_path(path)), path.endswith("__init__.py")
        top = list(statements(tree.body))
        functions = [node.name for node in top if isinstance(node, ast.FunctionDef)]
        own = {name: f"{module}.{name}" for name in functions}
        for name, function in own.items():
            self._by_name[name].append(function)
        for node in top:
            match node:
                case ast.ImportFrom() if is_package:
                    for name, origin in import_bindings(node, module, is_package).items():
                        self._exports[f"{module}.{name}"] = f"{origin.module}.{origin.name}"
                case ast.Assign(targets=[ast.Name(id=name)], value=ast.Name(id=alias)):
                    if alias in own:
                        self._by_name[name].append(own[alias])
        for use in _uses(layout, path, source, tree, own):
            if use.function in own:
                self._uses[own[use.function]].append((use.origin, f"{path}:{use.line}"))

    def _functions(self, path: str) -> list[str]:
        """Return the functions a path may mean: the one it is exported from, or all of its name."""
        exported = self._exports.get(path, path)
        if exported in self._uses:
            return [exported]
        return self._by_name.get(exported.rpartition(".")[2], [])

    def reached(self, path: str) -> list[tuple[str, str]]:
        """Return the FlashInfer objects that a function uses, itself or by its helpers."""
        found, seen, pending = [], set(), self._functions(path)
        while pending:
            function, *pending = pending
            if function in seen:
                continue
            seen.add(function)
            for origin, where in self._uses[function]:
                if origin.startswith("flashinfer."):
                    found.append((origin, where))
                else:
                    pending += self._functions(origin)
        return found
