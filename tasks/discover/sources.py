"""What FlashInfer offers and what SGLang calls, read from their sources.

The trees are parsed (`ast`), never imported. A call counts by *import origin*: SGLang has functions
of its own with FlashInfer's names. Calls that go through sglang-kernel's Python layer
(`sgl_kernel.rmsnorm` -> `flashinfer.norm.rmsnorm`) are followed.

An index is keyed by its checkout's commit and cached in the workspace; a damaged cache is rebuilt.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from tasks import files
from tasks.errors import InputError

_DECORATORS = {"flashinfer_api", "flashinfer_experimental_api"}
_SGLANG_ROOTS = ("python/sglang/srt", "python/sglang/kernels", "sgl-kernel/python")
_MODELS = "python/sglang/srt/models"
_CACHE_VERSION = 1

Index = TypeVar("Index", bound=BaseModel)


class Api(BaseModel):
    """One FlashInfer API: where it is defined and whether it has a trace template."""

    file: str
    line: int
    has_template: bool


class FlashInferIndex(BaseModel):
    """FlashInfer's decorated APIs by defining path, and what its packages re-export."""

    version: int = _CACHE_VERSION
    apis: dict[str, Api]
    exports: dict[str, str]
    """`flashinfer.fused_moe.f` -> `flashinfer.fused_moe.core.f`, one step at a time."""

    def resolve(self, path: str) -> str:
        """Follow re-exports from a public path to the defining one."""
        seen = set()
        while path in self.exports and path not in seen:
            seen.add(path)
            path = self.exports[path]
        return path

    def find(self, path: str, method: str | None = None) -> Api | None:
        """Return the API at a public path; for a wrapper class, its method."""
        defined = self.resolve(path)
        return self.apis.get(f"{defined}.{method}" if method else defined)


class SglangIndex(BaseModel):
    """SGLang's references to FlashInfer objects, and its model classes."""

    version: int = _CACHE_VERSION
    references: dict[str, list[str]]
    """Import origin (`flashinfer.norm.rmsnorm`) -> `file:line`, with `via ...` where indirect."""
    architectures: dict[str, str]
    """Model class -> file."""


def _python_files(root: Path, *folders: str) -> Iterator[tuple[str, bytes]]:
    for folder in folders:
        for path in sorted((root / folder).rglob("*.py")):
            if path.is_file() and not path.is_symlink():
                yield path.relative_to(root).as_posix(), path.read_bytes()


def _parse(name: str, source: bytes) -> ast.Module | None:
    """Parse bytes (a file may start with a byte-order mark); None for what is not Python 3."""
    try:
        return ast.parse(source, filename=name)
    except (SyntaxError, ValueError, RecursionError):
        return None


def _dotted(node: ast.expr) -> str | None:
    """Return `a.b.c` for a chain of attributes, None for anything else."""
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    if not isinstance(node, ast.Name):
        return None
    return ".".join([node.id, *reversed(parts)])


def _module_name(path: str) -> str:
    parts = path.removesuffix(".py").split("/")
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _absolute(module: str, is_package: bool, node: ast.ImportFrom) -> str:
    """Return the absolute module an `import from` names."""
    if not node.level:
        return node.module or ""
    parts = module.split(".")
    base = parts if is_package else parts[:-1]
    base = base[: len(base) - (node.level - 1)]
    return ".".join([*base, *([node.module] if node.module else [])])


def _decorated(node: ast.stmt) -> tuple[bool, bool]:
    """Whether a function carries FlashInfer's API decorator, and a trace template with it."""
    for decorator in getattr(node, "decorator_list", []):
        call = decorator if isinstance(decorator, ast.Call) else None
        name = _dotted(call.func if call else decorator)
        if name and name.rsplit(".", 1)[-1] in _DECORATORS:
            keywords = {k.arg: k.value for k in call.keywords} if call else {}
            trace = keywords.get("trace")
            empty = isinstance(trace, ast.Constant) and trace.value is None
            return True, trace is not None and not empty
    return False, False


def _definitions(body: list[ast.stmt], prefix: str = "") -> Iterator[tuple[str, ast.stmt]]:
    """Yield functions and methods by qualified name, looking inside `if`, `try` and `with`."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield f"{prefix}{node.name}", node
        elif isinstance(node, ast.ClassDef):
            yield from _definitions(node.body, f"{prefix}{node.name}.")
        else:
            for field in ("body", "orelse", "finalbody"):
                yield from _definitions(getattr(node, field, []) or [], prefix)
            for handler in getattr(node, "handlers", []):
                yield from _definitions(handler.body, prefix)


def index_flashinfer(checkout: Path) -> FlashInferIndex:
    """Parse a FlashInfer checkout.

    Raises:
        InputError: the folder is no FlashInfer checkout.
    """
    if not (checkout / "flashinfer").is_dir():
        raise InputError(f"{checkout}: has no flashinfer/ package; is it a FlashInfer checkout?")
    apis, exports = {}, {}
    for path, source in _python_files(checkout, "flashinfer"):
        is_package = path.endswith("__init__.py")
        if b"flashinfer_api" not in source and not is_package:
            continue
        tree = _parse(path, source)
        if tree is None:
            continue
        module = _module_name(path)
        for name, node in _definitions(tree.body):
            decorated, has_template = _decorated(node)
            if decorated:
                apis[f"{module}.{name}"] = Api(
                    file=path, line=node.lineno, has_template=has_template
                )
        if is_package:
            for statement in ast.walk(tree):
                if isinstance(statement, ast.ImportFrom):
                    origin = _absolute(module, is_package, statement)
                    for alias in statement.names:
                        exports[f"{module}.{alias.asname or alias.name}"] = f"{origin}.{alias.name}"
    if not apis:
        raise InputError(f"{checkout}: no @flashinfer_api in flashinfer/; is it FlashInfer 0.6+?")
    return FlashInferIndex(apis=apis, exports=exports)


class _References(ast.NodeVisitor):
    """Collect uses of names bound by imports of the given top-level packages."""

    def __init__(self, module: str, is_package: bool, packages: tuple[str, ...]) -> None:
        self.module, self.is_package, self.packages = module, is_package, packages
        self.bound: dict[str, set[str]] = {}  # a name may be imported in several branches
        self.uses: list[tuple[str, int, str]] = []
        self._function: list[str] = []
        self._called: set[int] = set()
        self._mentions: list[tuple[str, int, str]] = []

    def found(self) -> list[tuple[str, int, str]]:
        """Return origin, line and enclosing function: calls first, they say more than a mention."""
        return self.uses + self._mentions

    def _bind(self, name: str, origin: str) -> None:
        self.bound.setdefault(name, set()).add(origin)

    def _wanted(self, origin: str) -> bool:
        return origin.partition(".")[0] in self.packages

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            if self._wanted(alias.name):
                top = alias.name.split(".")[0]
                self._bind(alias.asname or top, alias.name if alias.asname else top)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        origin = _absolute(self.module, self.is_package, node)
        if self._wanted(origin):
            for alias in node.names:
                self._bind(alias.asname or alias.name, f"{origin}.{alias.name}")

    def visit_Assign(self, node: ast.Assign) -> None:
        value = node.value
        lazy = isinstance(value, ast.Call) and (_dotted(value.func) or "").endswith("LazyImport")
        if lazy and isinstance(value, ast.Call):
            texts = [str(a.value) for a in value.args if isinstance(a, ast.Constant)]
            names = [t.id for t in node.targets if isinstance(t, ast.Name)]
            if len(texts) == 2 and names and self._wanted(texts[0]):
                self._bind(names[0], f"{texts[0]}.{texts[1]}")
                return
        self.generic_visit(node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        self._function.append(node.name)
        self.generic_visit(node)
        self._function.pop()

    def visit_Call(self, node: ast.Call) -> None:
        self._called.add(id(node.func))
        self.generic_visit(node)

    def _use(self, node: ast.Name | ast.Attribute, dotted: str) -> None:
        head, _, rest = dotted.partition(".")
        for name in sorted(self.bound.get(head, ())):
            origin = f"{name}.{rest}" if rest else name
            use = (origin, node.lineno, self._function[0] if self._function else "")
            (self.uses if id(node) in self._called else self._mentions).append(use)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        dotted = _dotted(node)
        if dotted is None:
            self.generic_visit(node)
        else:
            self._use(node, dotted)

    def visit_Name(self, node: ast.Name) -> None:
        if isinstance(node.ctx, ast.Load):
            self._use(node, node.id)


def _references(
    path: str, tree: ast.Module, packages: tuple[str, ...]
) -> list[tuple[str, int, str]]:
    visitor = _References(_module_name(path), path.endswith("__init__.py"), packages)
    # Imports first: a function may use a name that the module binds further down.
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            visitor.visit_Import(node)
        elif isinstance(node, ast.ImportFrom):
            visitor.visit_ImportFrom(node)
    visitor.visit(tree)
    return visitor.found()


def _entry_classes(tree: ast.Module) -> Iterator[str]:
    for node in tree.body:
        if not isinstance(node, ast.Assign):
            continue
        if any(isinstance(t, ast.Name) and t.id == "EntryClass" for t in node.targets):
            values = node.value.elts if isinstance(node.value, ast.List) else [node.value]
            yield from (value.id for value in values if isinstance(value, ast.Name))


def index_sglang(checkout: Path) -> SglangIndex:
    """Parse an SGLang checkout: references to FlashInfer, direct and through sglang-kernel.

    Raises:
        InputError: the folder is no SGLang checkout.
    """
    if not (checkout / _MODELS).is_dir():
        raise InputError(f"{checkout}: has no {_MODELS}; is it an SGLang checkout?")
    references: dict[str, list[str]] = {}
    kernel_layer: dict[str, list[tuple[str, str]]] = {}
    through: list[tuple[str, str, int]] = []
    architectures: dict[str, str] = {}
    for path, source in _python_files(checkout, *_SGLANG_ROOTS):
        is_model = path.startswith(f"{_MODELS}/")
        wanted = b"flashinfer" in source or b"sgl_kernel" in source
        if not wanted and not (is_model and b"EntryClass" in source):
            continue
        tree = _parse(path, source)
        if tree is None:
            continue
        if is_model:
            architectures |= dict.fromkeys(_entry_classes(tree), path)
        in_kernel_layer = path.startswith("sgl-kernel/")
        for origin, line, function in _references(path, tree, ("flashinfer", "sgl_kernel")):
            if origin.startswith("sgl_kernel."):
                if not in_kernel_layer:
                    through.append((origin.rsplit(".", 1)[-1], path, line))
            elif in_kernel_layer:
                kernel_layer.setdefault(function, []).append((origin, f"{path}:{line}"))
            else:
                references.setdefault(origin, []).append(f"{path}:{line}")
    for function, path, line in through:
        for origin, where in kernel_layer.get(function, []):
            references.setdefault(origin, []).append(f"{path}:{line} via {where}")
    return SglangIndex(references=references, architectures=architectures)


def cached(cache: Path, kind: type[Index], sha: str, build: Callable[[], Index]) -> Index:
    """Return the index of a commit from `cache`, building and storing it where it is not there."""
    path = cache / f"{kind.__name__.lower()}-{files.safe_name(sha, 'commit')}.json"
    try:
        value: Any = json.loads(path.read_bytes())
        if value.get("version") == _CACHE_VERSION:
            return kind.model_validate(value)
    except (OSError, ValueError, AttributeError, ValidationError):
        pass  # Absent or damaged: it is only a cache.
    index = build()
    files.write_text(path, index.model_dump_json())
    return index
