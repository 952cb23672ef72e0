"""Uses of other packages' objects in a Python module, by where each name was imported from.

A name means what the scope it stands in says: a function's own import, parameter or variable hides
the module's. Lazy imports (`LazyImport("package.module", "name")`, `importlib.import_module`) count
as imports. Statements that mention none of the imported names are not visited.
"""

from __future__ import annotations

import ast
import re
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping
from typing import Literal, NamedTuple

from tasks.discover.syntax import absolute, dotted, statements

Kind = Literal["call", "mention", "import"]


class Use(NamedTuple):
    """One place where an imported object is used."""

    origin: str
    """Dotted path of the object in the package it was imported from."""
    line: int
    kind: Kind
    """`import`: the module imports it and leaves its use to others."""
    function: str
    """The module's outermost function or class around it; empty outside of any."""


_Scope = Mapping[str, frozenset[str]]
_Function = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda


def uses(
    tree: ast.Module,
    source: bytes,
    module: str,
    is_package: bool,
    *,
    packages: tuple[str, ...],
    own: Mapping[str, str] | None = None,
) -> list[Use]:
    """Return the uses of objects of `packages`, in the order of their lines.

    Args:
        tree: the module.
        source: what it was parsed from.
        module: its dotted name.
        is_package: whether it is an `__init__`.
        packages: top-level names of the packages looked for.
        own: names that the module defines, and the paths they are to be known by.
    """
    finder = _Finder(module, is_package, packages)
    finder.keep_lines(source, packages)
    imported = {name for node in finder.relevant(tree) for name, _ in finder.imports(node)}
    if not imported and not own:
        return []
    finder.keep_lines(source, (*packages, *imported, *(own or ())))
    outer = {name: frozenset({path}) for name, path in (own or {}).items()}
    finder.names = frozenset({*imported, *outer})
    finder.block(tree.body, outer)
    return sorted(finder.found(), key=lambda use: use.line)


class _Finder:
    def __init__(self, module: str, is_package: bool, packages: tuple[str, ...]) -> None:
        self.module, self.is_package, self.packages = module, is_package, packages
        self.names: frozenset[str] = frozenset()
        self._lines: list[int] = []
        self._uses: list[Use] = []
        self._imports: dict[str, Use] = {}
        self._called: set[int] = set()
        self._within = ""

    def found(self) -> Iterator[Use]:
        """Yield the uses, and the imports of what is not used in the module itself."""
        yield from self._uses
        for origin, use in self._imports.items():
            inner = f"{origin}."
            if not any(u.origin == origin or u.origin.startswith(inner) for u in self._uses):
                yield use

    def keep_lines(self, source: bytes, words: Iterable[str]) -> None:
        """Remember the lines with one of some words; only their statements are visited."""
        one_of = b"|".join(re.escape(word.encode()) for word in sorted(words))
        pattern = re.compile(rb"\b(?:" + one_of + rb")\b")
        self._lines = [n for n, line in enumerate(source.splitlines(), 1) if pattern.search(line)]

    def _is_relevant(self, node: ast.stmt) -> bool:
        first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", ()))])
        at = bisect_left(self._lines, first)
        return at < len(self._lines) and self._lines[at] <= (node.end_lineno or first)

    def relevant(self, node: ast.AST) -> Iterator[ast.stmt]:
        """Yield all statements below a node that have a remembered line."""
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.stmt):
                if self._is_relevant(child):
                    yield child
                    yield from self.relevant(child)
            elif isinstance(child, ast.excepthandler | ast.match_case):
                yield from self.relevant(child)

    # What names mean

    def imports(self, node: ast.stmt) -> Iterator[tuple[str, str]]:
        """Yield the names a statement binds to objects of the packages, and their origins."""
        match node:
            case ast.Import():
                for alias in node.names:
                    if self._is_wanted(alias.name):
                        top = alias.name.partition(".")[0]
                        yield (alias.asname, alias.name) if alias.asname else (top, top)
            case ast.ImportFrom():
                origin = absolute(self.module, self.is_package, node.module or "", node.level)
                if self._is_wanted(origin):
                    for alias in node.names:
                        yield alias.asname or alias.name, f"{origin}.{alias.name}"
            case ast.Assign(value=ast.Call() as call):
                lazy = self._lazy(call)
                for target in node.targets if lazy else ():
                    if isinstance(target, ast.Name):
                        yield target.id, lazy

    def _is_wanted(self, origin: str) -> bool:
        return origin.partition(".")[0] in self.packages

    def _lazy(self, call: ast.Call) -> str:
        """Return what a lazy import names, empty for any other call."""
        function = (dotted(call.func) or "").rpartition(".")[2]
        if function not in ("LazyImport", "import_module", "__import__"):
            return ""
        values = [*call.args, *(keyword.value for keyword in call.keywords)]
        texts = [
            v.value for v in values if isinstance(v, ast.Constant) and isinstance(v.value, str)
        ]
        path = ".".join(texts[: 2 if function == "LazyImport" else 1])
        return path if self._is_wanted(path) else ""

    def _inner(self, body: Iterable[ast.stmt], outer: _Scope, hidden: Iterable[str]) -> _Scope:
        """Return the names of a block: what it imports, without what it binds otherwise."""
        imported: dict[str, set[str]] = {}
        bound = set(hidden)
        for node in statements(list(body)):
            if not self._is_relevant(node):
                continue
            for name, origin in self.imports(node):
                imported.setdefault(name, set()).add(origin)
                use = Use(origin, node.lineno, "import", self._within)
                if not isinstance(node, ast.Import):
                    self._imports.setdefault(origin, use)
            bound |= _bound(node)
        hides = {name: frozenset[str]() for name in bound if name in outer}
        return {**outer, **hides, **{n: frozenset(origins) for n, origins in imported.items()}}

    # Uses

    def block(self, body: list[ast.stmt], own: _Scope) -> None:
        """Visit a module's statements; `own` are names that it defines."""
        scope = {**own, **self._inner(body, {}, ())}
        for node in body:
            self._visit(node, scope)

    def _visit(self, node: ast.AST, scope: _Scope) -> None:
        if isinstance(node, ast.stmt) and not self._is_relevant(node):
            return
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.Lambda():
                self._function(node, scope)
            case ast.ClassDef():
                self._class(node, scope)
            case ast.Name() | ast.Attribute():
                if not self._use(node, scope) and isinstance(node, ast.Attribute):
                    self._visit(node.value, scope)
            case ast.Assign(value=ast.Call() as call) if self._lazy(call):
                if not all(isinstance(target, ast.Name) for target in node.targets):
                    self._use(call, scope)
            case ast.Call():
                self._called.add(id(node.func))
                if self._use(node, scope):
                    return
                for child in ast.iter_child_nodes(node):
                    self._visit(child, scope)
            case _:
                for child in ast.iter_child_nodes(node):
                    self._visit(child, scope)

    def _function(self, node: _Function, scope: _Scope) -> None:
        arguments = node.args
        named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
        named += [rest for rest in (arguments.vararg, arguments.kwarg) if rest]
        # Defaults, annotations and decorators belong to the scope around the function.
        self._visit(arguments, scope)
        if isinstance(node, ast.Lambda):
            hidden = {a.arg: frozenset[str]() for a in named if a.arg in scope}
            self._visit(node.body, {**scope, **hidden})
            return
        for part in (*node.decorator_list, *filter(None, [node.returns])):
            self._visit(part, scope)
        before, self._within = self._within, self._within or node.name
        inner = self._inner(node.body, scope, (a.arg for a in named))
        for statement in node.body:
            self._visit(statement, inner)
        self._within = before

    def _class(self, node: ast.ClassDef, scope: _Scope) -> None:
        for part in (*node.decorator_list, *node.bases, *node.keywords):
            self._visit(part, scope)
        before, self._within = self._within, self._within or node.name
        # A class's own names are not visible in its methods; its imports are taken to be.
        inner = self._inner(node.body, scope, ())
        imported = {**scope, **{name: origins for name, origins in inner.items() if origins}}
        for statement in node.body:
            self._visit(statement, imported)
        self._within = before

    def _use(self, node: ast.expr, scope: _Scope) -> bool:
        """Record what an expression refers to; return whether it is an imported object."""
        origins = self._origins(node, scope)
        kind: Kind = "call" if id(node) in self._called else "mention"
        for origin in sorted(origins):
            if "." in origin:
                self._uses.append(Use(origin, node.lineno, kind, self._within))
        return bool(origins)

    def _origins(self, node: ast.expr, scope: _Scope) -> frozenset[str]:
        match node:
            case ast.Name(ctx=ast.Load()):
                return scope.get(node.id, frozenset())
            case ast.Attribute(ctx=ast.Load()):
                return frozenset(f"{o}.{node.attr}" for o in self._origins(node.value, scope))
            case ast.Call(
                func=ast.Name(id="getattr"), args=[owner, ast.Constant(value=str(name)), *_]
            ):
                return frozenset(f"{o}.{name}" for o in self._origins(owner, scope))
            case ast.Call():
                lazy = self._lazy(node)
                return frozenset({lazy}) if lazy else frozenset()
        return frozenset()


def _bound(node: ast.stmt) -> set[str]:
    """Return the names a statement binds other than by importing."""
    match node:
        case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
            return {node.name}
        case ast.Assign(targets=targets):
            pass
        case ast.AnnAssign(target=target) | ast.For(target=target) | ast.AsyncFor(target=target):
            targets = [target]
        case ast.With(items=items) | ast.AsyncWith(items=items):
            targets = [item.optional_vars for item in items if item.optional_vars]
        case ast.Import() | ast.ImportFrom():
            return {alias.asname or alias.name.partition(".")[0] for alias in node.names}
        case _:
            return set()
    return {
        part.id
        for target in targets
        for part in ast.walk(target)
        if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store)
    }
