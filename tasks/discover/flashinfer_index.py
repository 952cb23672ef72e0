"""What FlashInfer offers: its decorated APIs, their trace templates, public paths and tests.

Read from a checkout or an unpacked wheel; nothing is imported.
"""

from __future__ import annotations

import ast
import contextlib
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel

from tasks.discover.constants import Calculator
from tasks.discover.index_cache import Index
from tasks.discover.syntax import (
    Imported,
    absolute,
    dotted,
    import_bindings,
    module_name,
    parse,
    python_files,
    statements,
)
from tasks.discover.values import (
    UNKNOWN,
    Function,
    Record,
    Scope,
    bounded,
)
from tasks.errors import InputError

_DECORATORS = frozenset({"flashinfer_api", "flashinfer_experimental_api"})
_MARKS = tuple(name.encode() for name in sorted(_DECORATORS))
_FROM = re.compile(
    rb"^from[ \t]+(\.+[\w.]*|flashinfer[\w.]*)[ \t]+import[ \t]+(\([^()]*\)|[^(\n]*)", re.MULTILINE
)
_WORD = re.compile(rb"\b[A-Za-z_]\w*")


class Template(NamedTuple):
    """What a trace template calls the definitions it makes."""

    op_type: str
    prefix: str
    name: str
    """The definition's name, its const axes in braces: `rmsnorm_h{hidden_size}`."""


class Api(BaseModel):
    """One decorated FlashInfer function or method."""

    file: str
    line: int
    has_template: bool
    decorator: str = "flashinfer_api"
    public: str = ""
    """The shortest path under which it can be imported; a method's follows its class's."""
    dump: str = ""
    """The name under which its calls are dumped."""
    templates: list[Template] = []
    """Empty where the template is only made at run time."""
    tests: list[str] = []
    """Test files that name it (a method: its class)."""

    @property
    def op_types(self) -> list[str]:
        """Its templates' op types."""
        return sorted({template.op_type for template in self.templates})


class FlashInferIndex(Index):
    """FlashInfer's decorated APIs by defining path, and what its packages re-export."""

    apis: dict[str, Api]
    exports: dict[str, str]
    """Other paths of APIs and of their classes -> defining path."""

    def resolve(self, path: str) -> str:
        """Return the defining path of a public one: an API, a class, or a class's attribute."""
        if path in self.apis:
            return path
        if path in self.exports:
            return self.exports[path]
        owner, _, name = path.rpartition(".")
        return f"{self.exports[owner]}.{name}" if owner in self.exports else path

    def find(self, path: str, method: str | None = None) -> Api | None:
        """Return the API at a public path; for a wrapper class, its method."""
        defined = self.resolve(path)
        return self.apis.get(f"{defined}.{method}" if method else defined)


@dataclass
class _Found:
    """A decorated function or method as the scan finds it."""

    module: str
    qualname: str
    api: Api
    trace: ast.expr | None
    scope: Scope

    @property
    def owner(self) -> str:
        """The path that is imported: the function's, or the method's outermost class's."""
        return f"{self.module}.{self.qualname.partition('.')[0]}"


@dataclass
class _Tree:
    """What one pass over the package's files leaves."""

    paths: dict[str, str] = field(default_factory=dict)
    """Module -> file."""
    found: list[_Found] = field(default_factory=list)
    bindings: dict[str, dict[str, Imported]] = field(default_factory=dict)
    """Module -> names it imports."""
    lazy: dict[str, set[str]] = field(default_factory=dict)
    """Package with a module-level `__getattr__` -> its string constants."""
    dump_classes: tuple[frozenset[str], frozenset[str]] = (frozenset({"Wrapper"}), frozenset())
    """Parts of, and whole, class names whose methods are dumped as `Class.method`."""

    def dump_name(self, names: list[str]) -> str:
        """Return the name under which FlashInfer dumps calls of a function or method."""
        parts, whole = self.dump_classes
        owner = names[-2] if len(names) > 1 else ""
        is_shown = owner in whole or any(part in owner for part in parts)
        return f"{owner}.{names[-1]}" if is_shown else names[-1]


def index_flashinfer(checkout: Path) -> FlashInferIndex:
    """Read a FlashInfer checkout or unpacked wheel.

    Raises:
        InputError: the folder is neither.
    """
    if not (checkout / "flashinfer").is_dir():
        raise InputError(f"{checkout}: has no flashinfer/ package; is it a FlashInfer checkout?")
    tree = _scan(checkout)
    if not tree.found:
        raise InputError(f"{checkout}: no @flashinfer_api in flashinfer/; is it FlashInfer 0.6+?")
    exports = _exports(tree)
    public = _public_paths(tree, exports)
    calculator = Calculator(lambda module: _load(checkout, tree.paths.get(module)))
    tests = _tests(checkout, tree.found)
    apis = {}
    for found in sorted(tree.found, key=lambda found: (found.module, found.api.line)):
        api = found.api
        _, *inner = names = found.qualname.split(".")
        api.public = ".".join([public[found.owner], *inner])
        api.dump = tree.dump_name(names)
        api.tests = tests.get(found.owner.rpartition(".")[2], [])
        if found.trace is not None:
            api.templates = _templates(calculator, found)
        apis[f"{found.module}.{found.qualname}"] = api
    return FlashInferIndex(apis=apis, exports=exports)


def _load(checkout: Path, path: str | None) -> tuple[ast.Module, bool] | None:
    if path is None:
        return None
    tree = parse((checkout / path).read_bytes())
    return None if tree is None else (tree, path.endswith("__init__.py"))


# The scan


def _scan(checkout: Path) -> _Tree:
    """Read every file once; parse those that can have APIs or re-export them."""
    scan = _Tree()
    plain: list[tuple[str, bool, list[tuple[bytes, bytes]]]] = []
    for path, source in python_files(checkout, "flashinfer"):
        module, is_package = module_name(path), path.endswith("__init__.py")
        scan.paths[module] = path
        if any(mark in source for mark in _MARKS) or is_package:
            syntax = parse(source)
            if syntax is not None:
                with contextlib.suppress(RecursionError):  # No person nested anything that deep.
                    _read_module(scan, path, syntax)
        elif imports := _FROM.findall(source):
            plain.append((module, is_package, imports))
    origins = {found.module for found in scan.found} | set(scan.bindings)
    for module, is_package, imports in plain:
        for target, names in imports:
            text = target.decode(errors="replace")
            level = len(text) - len(text.lstrip("."))
            if absolute(module, is_package, text[level:], level) in origins:
                syntax = parse(b"from " + target + b" import " + names)
                if syntax is not None:
                    _bind(scan, module, is_package, syntax.body)
    return scan


def _bind(scan: _Tree, module: str, is_package: bool, body: Iterable[ast.AST]) -> None:
    for node in body:
        if isinstance(node, ast.ImportFrom):
            found = import_bindings(node, module, is_package)
            scan.bindings.setdefault(module, {}).update(found)


def _read_module(scan: _Tree, path: str, syntax: ast.Module) -> None:
    module, is_package = module_name(path), path.endswith("__init__.py")
    scope = Scope(module, is_package)
    top = list(statements(syntax.body))
    _bind(scan, module, is_package, top)
    for node in top:
        if isinstance(node, ast.Import | ast.ImportFrom):
            for name, origin in import_bindings(node, module, is_package).items():
                one = scope.names.get(name, origin) == origin
                scope.names[name] = origin if one else UNKNOWN  # A fallback gives it another.
        elif is_package and isinstance(node, ast.FunctionDef) and node.name == "__getattr__":
            _bind(scan, module, is_package, ast.walk(node))
            scan.lazy[module] = {
                item.value
                for item in ast.walk(syntax)
                if isinstance(item, ast.Constant) and isinstance(item.value, str)
            }
    if module == "flashinfer.api_logging":
        scan.dump_classes = _dump_classes(syntax) or scan.dump_classes
    named = {
        name: origin.name
        for name, origin in scope.names.items()
        if isinstance(origin, Imported) and origin.name in _DECORATORS
    }
    for qualname, node in _functions(top):
        decoration = _decoration(node, named)
        if decoration is not None:
            decorator, trace = decoration
            api = Api(
                file=path, line=node.lineno, has_template=trace is not None, decorator=decorator
            )
            scan.found.append(_Found(module, qualname, api, trace, scope))


def _decoration(
    node: ast.FunctionDef | ast.AsyncFunctionDef, named: Mapping[str, str | None]
) -> tuple[str, ast.expr | None] | None:
    """Return a function's API decorator and its `trace=`, None for a function without one.

    Args:
        node: the function.
        named: other names under which the module imports the decorators.
    """
    for decorator in node.decorator_list:
        call = decorator if isinstance(decorator, ast.Call) else None
        name = (dotted(call.func if call else decorator) or "").rpartition(".")[2]
        name = named.get(name) or name
        if name in _DECORATORS:
            traces = [k.value for k in call.keywords if k.arg == "trace"] if call else []
            given = [t for t in traces if not (isinstance(t, ast.Constant) and t.value is None)]
            return name, given[0] if given else None
    return None


def _functions(
    body: Iterable[ast.stmt], prefix: str = ""
) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Yield functions and methods by qualified name."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield f"{prefix}{node.name}", node
        elif isinstance(node, ast.ClassDef):
            yield from _functions(statements(node.body), f"{prefix}{node.name}.")


def _dump_classes(syntax: ast.Module) -> tuple[frozenset[str], frozenset[str]] | None:
    """Read `"Wrapper" in class_name or class_name in [...]` from the dumping code."""
    parts: set[str] = set()
    whole: set[str] = set()
    for node in ast.walk(syntax):
        match node:
            case ast.Compare(
                left=ast.Constant(value=str(part)),
                ops=[ast.In()],
                comparators=[ast.Name(id="class_name")],
            ):
                parts.add(part)
            case ast.Compare(
                left=ast.Name(id="class_name"),
                ops=[ast.In()],
                comparators=[ast.List(elts=names) | ast.Tuple(elts=names) | ast.Set(elts=names)],
            ):
                whole |= {str(name.value) for name in names if isinstance(name, ast.Constant)}
    return (frozenset(parts), frozenset(whole)) if parts else None


# Public paths


def _exports(tree: _Tree) -> dict[str, str]:
    """Return the other paths of the APIs and their classes, following re-exports."""
    owners = {found.owner for found in tree.found}
    by_name: dict[str, list[str]] = defaultdict(list)
    for owner in sorted(owners):
        by_name[owner.rpartition(".")[2]].append(owner)
    exports: dict[str, str] = {}

    def origin(module: str, name: str, seen: set[str]) -> str | None:
        """Return the owner that `name` means in `module`."""
        path = f"{module}.{name}"
        if path in owners or path in seen:
            return path if path in owners else None
        seen.add(path)
        bound = tree.bindings.get(module, {})
        if name in bound and bound[name].name:
            return origin(bound[name].module, bound[name].name or "", seen)
        stars = [target.module for key, target in bound.items() if key.startswith("*")]
        found = [origin(star, name, seen) for star in stars if not name.startswith("_")]
        return next(filter(None, found), None)

    for module, bound in tree.bindings.items():
        names = set(bound) & set(by_name) | {
            name for name, target in bound.items() if target.name in by_name
        }
        if any(key.startswith("*") for key in bound):
            names |= set(by_name)
        for name in names:
            path = origin(module, name, set())
            if path and path != f"{module}.{name}":
                exports[f"{module}.{name}"] = path
    for package, texts in tree.lazy.items():
        for name in texts & set(by_name):
            path = _lazily_exported(package, by_name[name])
            if path:
                exports.setdefault(f"{package}.{name}", path)
    return dict(sorted(exports.items()))


def _lazily_exported(package: str, owners: list[str]) -> str | None:
    """Return what a package exports on demand: the one below it, or the only one there is."""
    below = [owner for owner in owners if owner.startswith(f"{package}.")]
    candidates = below or owners
    return candidates[0] if len(candidates) == 1 else None


def _public_paths(tree: _Tree, exports: dict[str, str]) -> dict[str, str]:
    """Return the most public path of every function and class: no private part, then shortest."""
    packages = {module for module, path in tree.paths.items() if path.endswith("__init__.py")}
    paths = {found.owner: [found.owner] for found in tree.found}
    for path, owner in exports.items():
        if path.rpartition(".")[0] in packages:
            paths[owner].append(path)

    def rank(path: str) -> tuple[bool, int, str]:
        parts = path.split(".")
        return any(part.startswith("_") for part in parts), len(parts), path

    return {owner: min(candidates, key=rank) for owner, candidates in paths.items()}


# Templates


def _templates(calculator: Calculator, found: _Found) -> list[Template]:
    """Compute the templates a `trace=` expression stands for."""
    assert found.trace is not None  # noqa: S101 - the caller looked
    head = found.trace
    while isinstance(head, ast.Attribute | ast.Call | ast.Subscript):
        head = head.func if isinstance(head, ast.Call) else head.value
    scope: Scope | None = found.scope
    if isinstance(head, ast.Name) and head.id not in found.scope.names:
        scope = calculator.module(found.module)  # made in the API's own module
    value = calculator.value(found.trace, scope) if scope else None
    templates = (_template(record) for record in _records(value))
    return sorted({template for template in templates if template})


def _records(value: Any) -> list[Record]:
    """Return the template objects behind a template, or a dispatching function that lists them."""
    if isinstance(value, Function):
        value = bounded(value.attributes.get("templates"))
    items = value if isinstance(value, list | tuple) else [value]
    return [item for item in items if isinstance(item, Record)]


def _template(record: Record) -> Template | None:
    """Name what a template makes, as FlashInfer's `TraceTemplate.definition_name` does.

    None where a part of the name is not known.
    """
    op_type = record.attributes.get("op_type")
    prefix = record.attributes.get("name_prefix")
    axes = bounded(record.attributes.get("axes"))
    if not isinstance(op_type, str) or not isinstance(axes, dict):
        return None
    if not isinstance(prefix, str | None):
        return None
    name = prefix = prefix or op_type
    for axis, marker in axes.items():
        if not isinstance(marker, Record):
            return None
        if marker.kind.name == "Const":
            label = marker.attributes.get("abbrev", UNKNOWN)
            if not isinstance(label, str | None):
                return None
            label = axis if label is None else label
            name += f"_{label}{{{axis}}}" if label else ""
    return Template(op_type, prefix, name)


# Tests


def _tests(checkout: Path, found: list[_Found]) -> dict[str, list[str]]:
    """Return the test files that name each function or class, as a whole word."""
    names = {api.owner.rpartition(".")[2].encode(): api.owner.rpartition(".")[2] for api in found}
    tests: dict[str, list[str]] = defaultdict(list)
    for path, source in python_files(checkout, "tests"):
        if path.rpartition("/")[2].startswith("test_"):
            for word in sorted(names.keys() & set(_WORD.findall(source))):
                tests[names[word]].append(path)
    return tests
